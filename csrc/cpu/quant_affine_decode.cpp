// Decoding int4 and int2: w = scale * (unit * code - zero).
#include "quant_decoders.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

void dequantize_int4(DenseWeight weight, Int4Parts parts, int threads) {
  decode_rows(Int4Decoder(parts, weight.cols), weight, threads);
}

void dequantize_int2(DenseWeight weight, Int2Parts parts, int threads) {
  decode_rows(Int2Decoder(parts, weight.cols), weight, threads);
}

void codes_from_int4(Codes codes, Int4Parts parts, int threads) {
  recode_rows(Int4Decoder(parts, codes.cols), codes, threads);
}

void codes_from_int2(Codes codes, Int2Parts parts, int threads) {
  recode_rows(Int2Decoder(parts, codes.cols), codes, threads);
}

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
