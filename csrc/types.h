// Weights, codes and the storage formats' parts as CPU and GPU sources get them: addresses, sizes, and the numbers by which
// Python names a type.
#pragma once

#include <stdint.h>

namespace fluxfast {

// of floats in memory; the numbers are fluxfast/quant/rows.py's
enum class Float : int64_t { f32 = 0, bf16 = 1, f16 = 2 };

// of codes with one scale a row, likewise
enum class Code : int64_t { int8 = 0, e4m3 = 1 };

// [rows, cols] to read, rows apart by row_stride elements
struct Weight {
  const void* data;
  Float type;
  int64_t rows, cols, row_stride;
};

// [rows, cols] to write, contiguous
struct DenseWeight {
  void* data;
  Float type;
  int64_t rows, cols;
};

// codes [rows, cols] of `type` to write, contiguous, and a scale for each row
struct Codes {
  void* data;
  Code type;
  float* scale;
  int64_t rows, cols;
};

struct Int4Parts {
  uint8_t* packed;
  uint16_t* scale;
  uint8_t* zero;
};

struct Int2Parts {
  uint8_t* packed;
  uint8_t* scale;
  uint8_t* zero;
  float* global_scale;
};

}  // namespace fluxfast
