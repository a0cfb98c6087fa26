// The formats int8 and fp8_e4m3, one scale a row:
//   scale = max|w| / top, code = round(w * (1 / scale)), top = 127 or 448.
#include "quant_decoders.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

template <class C>
static void quantize_8bit(const Weight& weight, typename C::Stored* packed, float* scale, int threads) {
  with_type(weight.type, [&](auto type) {
    using T = decltype(type);
    for_each_row(weight.rows, weight.cols, threads, [&](int64_t row) {
      scale[row] = encode_row<C, T>(row_of<T>(weight, row), weight.cols, packed + row * weight.cols);
    });
  });
}

void quantize_int8(Weight weight, int8_t* packed, float* scale, int threads) {
  quantize_8bit<Int8Code>(weight, packed, scale, threads);
}

void quantize_fp8(Weight weight, uint8_t* packed, float* scale, int threads) {
  quantize_8bit<E4M3Code>(weight, packed, scale, threads);
}

void dequantize_int8(DenseWeight weight, const int8_t* packed, const float* scale, int threads) {
  decode_rows(EightBitDecoder<Int8Code>{packed, scale, weight.cols}, weight, threads);
}

void dequantize_fp8(DenseWeight weight, const uint8_t* packed, const float* scale, int threads) {
  decode_rows(EightBitDecoder<E4M3Code>{packed, scale, weight.cols}, weight, threads);
}

void codes_from_int8(Codes codes, const int8_t* packed, const float* scale, int threads) {
  recode_rows(EightBitDecoder<Int8Code>{packed, scale, codes.cols}, codes, threads);
}

void codes_from_fp8(Codes codes, const uint8_t* packed, const float* scale, int threads) {
  recode_rows(EightBitDecoder<E4M3Code>{packed, scale, codes.cols}, codes, threads);
}

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
