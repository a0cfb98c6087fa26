// The GPU ops: what each takes. Pointers are device memory; work is queued on a stream and not waited for. Every op returns
// nullptr, or what went wrong in words.
#pragma once

#include "types.h"

namespace fluxfast {

// where to run: the number of a device, and a stream's handle on it, as torch gives them
struct GpuQueue {
  int device;
  uintptr_t stream;
};

// nf4's parts, its levels [16], and the values [256] of absmax
struct GpuNf4Parts {
  const uint8_t* packed;
  const uint8_t* absmax;
  const float* nested_absmax;
  const float* offset;
  const float* levels;
  const float* values;
};

// why nothing can run here: no driver, one that is too old, no device
const char* gpu_error();

// codes and scales of the rows of x, or of x * col_scale [cols]; col_scale may be null
const char* gpu_row_quant(Weight x, const float* col_scale, Codes codes, GpuQueue queue);

// [rows, cols] of bf16
const char* gpu_dequantize_int4(uint16_t* out, int64_t rows, int64_t cols, Int4Parts parts, GpuQueue queue);
const char* gpu_dequantize_int2(uint16_t* out, int64_t rows, int64_t cols, Int2Parts parts, GpuQueue queue);
const char* gpu_dequantize_nf4(uint16_t* out, int64_t rows, int64_t cols, GpuNf4Parts parts, GpuQueue queue);

}  // namespace fluxfast
