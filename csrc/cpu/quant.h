// The storage formats' CPU ops: quantise a weight, and decode it to floats or to codes with one
// scale a row. fluxfast/quant/<format>.py says what the parts mean. These ops equal its plain-torch
// references byte for byte, so these sources are compiled without contracting a * b + c.
#pragma once

#include "types.h"

namespace fluxfast {

// the name and arguments of every op; a weight that isn't finite gives a scale that isn't (int2:
// global_scale, nf4: absmax)
#define FLUXFAST_QUANT_OPS(OP)                                                                     \
  OP(quantize_int8, (Weight weight, int8_t* packed, float* scale, int threads))                    \
  OP(quantize_fp8, (Weight weight, uint8_t* packed, float* scale, int threads))                    \
  OP(quantize_int4, (Weight weight, Int4Parts parts, int threads))                                 \
  OP(quantize_int2, (Weight weight, Int2Parts parts, int threads))                                 \
  OP(quantize_nf4, (Weight weight, uint8_t* packed, float* absmax, int threads))                   \
  OP(dequantize_int8, (DenseWeight weight, const int8_t* packed, const float* scale, int threads)) \
  OP(dequantize_fp8, (DenseWeight weight, const uint8_t* packed, const float* scale, int threads)) \
  OP(dequantize_int4, (DenseWeight weight, Int4Parts parts, int threads))                          \
  OP(dequantize_int2, (DenseWeight weight, Int2Parts parts, int threads))                          \
  OP(dequantize_nf4, (DenseWeight weight, const uint8_t* packed, const float* absmax, int threads))\
  OP(codes_from_int8, (Codes codes, const int8_t* packed, const float* scale, int threads))        \
  OP(codes_from_fp8, (Codes codes, const uint8_t* packed, const float* scale, int threads))        \
  OP(codes_from_int4, (Codes codes, Int4Parts parts, int threads))                                 \
  OP(codes_from_int2, (Codes codes, Int2Parts parts, int threads))                                 \
  OP(codes_from_nf4, (Codes codes, const uint8_t* packed, const float* absmax, int threads))

}  // namespace fluxfast
