// int4 and int2 decoded: w = scale * (unit * code - zero).
#include "quant_decode.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

// one group, of whose columns y has the first n
template <class T, class Format>
static inline void evaluate(const uint8_t (&codes)[Format::kGroup], int zero, float scale, typename T::Stored* y, int64_t n) {
  typename T::Stored values[Format::kGroup];
  for (int k = 0; k < Format::kGroup; ++k) values[k] = T::store(scale * static_cast<float>(Format::kUnit * codes[k] - zero));
  memcpy(y, values, sizeof values[0] * min64(n, Format::kGroup));
}

struct Int4Decoder {
  static constexpr int kGroup = Int4Format::kGroup;
  Int4Parts parts;
  int64_t cols, groups;

  Int4Decoder(const Int4Parts& parts, int64_t cols) : parts(parts), cols(cols), groups(ceil_div(cols, kGroup)) {}

  template <class T>
  void decode(int64_t row, typename T::Stored* y) const {
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t* bytes = parts.packed + (row * groups + g) * (kGroup / 2);
      uint8_t codes[kGroup];
      for (int i = 0; i < kGroup / 2; ++i) {
        codes[2 * i] = bytes[i] >> 4;
        codes[2 * i + 1] = bytes[i] & 15;
      }
      const float scale = BF16::load(parts.scale[row * groups + g]);
      evaluate<T, Int4Format>(codes, parts.zero[row * groups + g], scale, y + g * kGroup, cols - g * kGroup);
    }
  }
};

struct Int2Decoder {
  static constexpr int kGroup = Int2Format::kGroup;
  Int2Parts parts;
  int64_t cols, groups;

  Int2Decoder(const Int2Parts& parts, int64_t cols) : parts(parts), cols(cols), groups(ceil_div(cols, kGroup)) {}

  template <class T>
  void decode(int64_t row, typename T::Stored* y) const {
    const uint8_t* const zeros = parts.zero + row * ceil_div(groups, 2);
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t* bytes = parts.packed + (row * groups + g) * (kGroup / 4);
      uint8_t codes[kGroup];
      for (int i = 0; i < kGroup; ++i) codes[i] = bytes[i / 4] >> (6 - i % 4 * 2) & 3;
      const int zero = zeros[g / 2] >> (g % 2 ? 0 : 4) & 15;
      const float scale = Int2Format::value(parts.scale[row * groups + g], *parts.global_scale);
      evaluate<T, Int2Format>(codes, zero, scale, y + g * kGroup, cols - g * kGroup);
    }
  }
};

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
