// nf4: blocks of 64 along the flattened weight, sixteen levels. max|w| of a block goes in and out as fp32; that it is quantised
// in turn is the caller's business, and 1/64 of the work.
#include "quant_decode.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

static constexpr int kBlock = Nf4Format::kBlock;
// blocks of one task
static constexpr int64_t kTaskBlocks = kTaskElements / kBlock;
// bitsandbytes bounds the inverse of max|w| with this, which is not a normal number
static constexpr float kLeastAbsmax = 1e-38f;

static constexpr float kLevels[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// the two levels of every byte, so that decoding is one load a byte
struct PairTable {
  float levels[256][2];
  constexpr PairTable() : levels() {
    for (int byte = 0; byte < 256; ++byte) {
      levels[byte][0] = kLevels[byte >> 4];
      levels[byte][1] = kLevels[byte & 15];
    }
  }
};
static constexpr PairTable kPairs;

// x in [-1, 1]; a tie goes to the lower code
static inline int32_t nearest_level(float x) {
  int32_t code = 0;
  for (int i = 0; i < 15; ++i) code += (kLevels[i] + kLevels[i + 1]) / 2.0f < x ? 1 : 0;
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
    // the last, shorter block is divided by max|w|, not multiplied by its inverse; a byte's missing half holds code 7, zero
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

struct Nf4Decoder {
  const uint8_t* packed;
  const float* absmax;
  int64_t cols;

  template <class T>
  void decode(int64_t row, typename T::Stored* y) const {
    int64_t index = row * cols;
    const int64_t end = index + cols;
    // a row may begin and end within a block
    while (index < end) {
      const int64_t block = index / kBlock;
      const int64_t stop = min64((block + 1) * kBlock, end);
      const int n = static_cast<int>(stop - index);
      float levels[kBlock];
      if (n == kBlock) {
        const uint8_t* __restrict bytes = packed + index / 2;
        for (int j = 0; j < kBlock / 2; ++j) memcpy(levels + 2 * j, kPairs.levels[bytes[j]], sizeof kPairs.levels[0]);
      } else {
        for (int j = 0; j < n; ++j) levels[j] = kPairs.levels[packed[(index + j) / 2]][(index + j) % 2];
      }
      const float top = absmax[block];
      for (int j = 0; j < n; ++j) y[j] = T::store(levels[j] * top);
      y += n;
      index = stop;
    }
  }
};

void dequantize_nf4(DenseWeight weight, const uint8_t* packed, const float* absmax, int threads) {
  decode_rows(Nf4Decoder{packed, absmax, weight.cols}, weight, threads);
}

void codes_from_nf4(Codes codes, const uint8_t* packed, const float* absmax, int threads) {
  recode_rows(Nf4Decoder{packed, absmax, codes.cols}, codes, threads);
}

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
