// nf4: sixteen levels, blocks of 64 along the flattened weight. A block's max|w| goes in and out as
// fp32; the caller quantises it in turn, which is 1/64 of the work.
#include "quant_decoders.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

static constexpr int kBlock = Nf4Format::kBlock;
// how many blocks a task has
static constexpr int64_t kTaskBlocks = kTaskElements / kBlock;
// bitsandbytes bounds max|w| by this before inverting it; it is not a normal number
static constexpr float kLeastAbsmax = 1e-38f;

// the code of x in [-1, 1]; a tie goes to the lower code
static inline int32_t nearest_level(float x) {
  int32_t code = 0;
  for (int i = 0; i < 15; ++i) code += (kNf4Levels[i] + kNf4Levels[i + 1]) / 2.0f < x ? 1 : 0;
  return code;
}

static inline float in_unit_range(float x) {
  x = x < -1.0f ? -1.0f : x;
  return x > 1.0f ? 1.0f : x;
}

void quantize_nf4(Weight weight, uint8_t* packed, float* absmax, int threads) {
  const int64_t count = weight.rows * weight.cols;
  const int64_t full_blocks = count / kBlock;
  with_type(weight.type, [&](auto type) {
    using T = decltype(type);
    const typename T::Stored* const data = row_of<T>(weight, 0);
    parallel_for(ceil_div(full_blocks, kTaskBlocks), threads, [&](int64_t task) {
      for (int64_t block = task * kTaskBlocks; block < min64((task + 1) * kTaskBlocks, full_blocks); ++block) {
        const typename T::Stored* __restrict x = data + block * kBlock;
        uint8_t* __restrict bytes = packed + block * kBlock / 2;
        const float top = float_of(top_of<T>(x, kBlock));
        absmax[block] = top;
        const float inverse = 1.0f / (top < kLeastAbsmax ? kLeastAbsmax : top);
        int32_t codes[kBlock];
        for (int j = 0; j < kBlock; ++j) codes[j] = nearest_level(in_unit_range(T::load(x[j]) * inverse));
        for (int j = 0; j < kBlock / 2; ++j) bytes[j] = static_cast<uint8_t>(codes[2 * j] << 4 | codes[2 * j + 1]);
      }
    });
    const int64_t rest = count - full_blocks * kBlock;
    if (rest == 0) return;
    // as in the reference, the last and shorter block is divided by max|w|, and not multiplied by
    // the inverse; a byte's missing half holds code 7, which means zero
    const typename T::Stored* x = data + full_blocks * kBlock;
    float top = float_of(top_of<T>(x, rest));
    top = top < kLeastAbsmax ? kLeastAbsmax : top;
    absmax[full_blocks] = top;
    uint8_t* bytes = packed + full_blocks * kBlock / 2;
    for (int64_t j = 0; j < rest; j += 2) {
      const int32_t high = nearest_level(in_unit_range(T::load(x[j]) / top));
      const int32_t low = j + 1 < rest ? nearest_level(in_unit_range(T::load(x[j + 1]) / top)) : 7;
      bytes[j / 2] = static_cast<uint8_t>(high << 4 | low);
    }
  });
}

void dequantize_nf4(DenseWeight weight, const uint8_t* packed, const float* absmax, int threads) {
  decode_rows(Nf4Decoder<PlainAbsmax>{packed, {absmax}, weight.cols}, weight, threads);
}

void codes_from_nf4(Codes codes, const uint8_t* packed, const float* absmax, int threads) {
  recode_rows(Nf4Decoder<PlainAbsmax>{packed, {absmax}, codes.cols}, codes, threads);
}

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
