// Weights, codes and the storage formats' parts, as CPU and GPU sources take them. Types have
// numbers, which Python passes.
#pragma once

#include <stdint.h>

namespace fluxfast {

// the type of floats in memory; fluxfast/quant/rows.py has the same numbers
enum class Float : int64_t { f32 = 0, bf16 = 1, f16 = 2 };

// the type of codes with one scale a row; the numbers are in the same place
enum class Code : int64_t { int8 = 0, e4m3 = 1 };

// [rows, cols] to read; rows are row_stride elements apart
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
