// Products of a few vectors with a weight in its storage format. The weight is read once, and never
// decoded as a whole.
#pragma once

#include "types.h"

namespace fluxfast {

// y [batch, rows] = x [batch, cols] times the transpose of a weight [rows, cols]
struct Gemv {
  const float* x;
  float* y;
  int64_t batch, rows, cols;
};

// nf4 as it is stored; values [256] are what the codes of max|w| stand for
struct StoredNf4 {
  const uint8_t* packed;
  const uint8_t* absmax;
  const float* nested_absmax;
  const float* offset;
  const float* values;
};

// the name and arguments of every op
#define FLUXFAST_GEMV_OPS(OP)                                                            \
  OP(gemv_float, (Gemv gemv, Weight weight, int threads))                                \
  OP(gemv_int8, (Gemv gemv, const int8_t* packed, const float* scale, int threads))      \
  OP(gemv_fp8_e4m3, (Gemv gemv, const uint8_t* packed, const float* scale, int threads)) \
  OP(gemv_int4, (Gemv gemv, Int4Parts parts, int threads))                               \
  OP(gemv_int2, (Gemv gemv, Int2Parts parts, int threads))                               \
  OP(gemv_nf4, (Gemv gemv, StoredNf4 parts, int threads))

}  // namespace fluxfast
