// The GPU ops and their arguments. Pointers are device memory. Work is queued on a stream and not
// waited for. Every op returns what went wrong, in words, or nullptr.
#pragma once

#include "types.h"

namespace fluxfast {

// where to run: the number of a device and the handle of a stream on it, as torch gives them
struct GpuQueue {
  int device;
  uintptr_t stream;
};

// nf4's parts, its levels [16], and the values [256] that absmax's codes stand for
struct GpuNf4Parts {
  const uint8_t* packed;
  const uint8_t* absmax;
  const float* nested_absmax;
  const float* offset;
  const float* levels;
  const float* values;
};

// why nothing can run here (no driver, one that is too old, no device), or nullptr
const char* gpu_error();

// writes the codes and scales of the rows of x, or of x * col_scale [cols] unless col_scale is null
const char* gpu_row_quant(Weight x, const float* col_scale, Codes codes, GpuQueue queue);

// write [rows, cols] in bf16
const char* gpu_dequantize_int4(uint16_t* out, int64_t rows, int64_t cols, Int4Parts parts, GpuQueue queue);
const char* gpu_dequantize_int2(uint16_t* out, int64_t rows, int64_t cols, Int2Parts parts, GpuQueue queue);
const char* gpu_dequantize_nf4(uint16_t* out, int64_t rows, int64_t cols, GpuNf4Parts parts, GpuQueue queue);

}  // namespace fluxfast
