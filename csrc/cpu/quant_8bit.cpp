// int8 and fp8_e4m3: one scale a row, top = 127 or 448.  scale = max|w| / top, code = round(w * (1 / scale)).
#include "quant_rows.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

struct Int8Code {
  using Stored = int8_t;
  static constexpr float kTop = 127.0f;
  static inline int8_t encode(float x) { return static_cast<int8_t>(bits_of(x + kRound)); }
  static inline float decode(int8_t code) { return static_cast<float>(code); }
};

// sign, four bits of exponent with a bias of 7, three of mantissa; 448 is the largest, 0x7F is NaN, there is no infinity
struct E4M3Code {
  using Stored = uint8_t;
  static constexpr float kTop = 448.0f;
  // to nearest, halves to even; |x| is finite and rounds to 448 or less
  static inline uint8_t encode(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t magnitude = bits & kAbs;
    const uint32_t normal = (magnitude + 0x7FFFFu + ((magnitude >> 20) & 1u) - (120u << 23)) >> 20;
    // below 2^-6 the unit is 2^-9
    const uint32_t subnormal = bits_of(float_of(magnitude) * 512.0f + kRound) & 0xFFu;
    return static_cast<uint8_t>((magnitude < (121u << 23) ? subnormal : normal) | (bits >> 24 & 0x80u));
  }
  static inline float decode(uint8_t code) {
    // the exponent's bias differs by 120; a product with 2^120 mends that for subnormal numbers as well
    const float magnitude = float_of(static_cast<uint32_t>(code & 0x7Fu) << 20) * 1.329227995784916e36f;
    return float_of(bits_of(magnitude) | static_cast<uint32_t>(code & 0x80u) << 24);
  }
};

template <class Code>
static void quantize_8bit(const Weight& weight, typename Code::Stored* packed, float* scales, int threads) {
  with_type(weight.type, [&](auto type) {
    using T = decltype(type);
    for_each_row(weight.rows, weight.cols, threads, [&](int64_t row) {
      const typename T::Stored* __restrict x = row_of<T>(weight, row);
      typename Code::Stored* __restrict codes = packed + row * weight.cols;
      float scale = float_of(top_of<T>(x, weight.cols)) / Code::kTop;
      if (scale < kLeastNormal) scale = 1.0f;
      scales[row] = scale;
      const float inverse = 1.0f / scale;
      for (int64_t j = 0; j < weight.cols; ++j) codes[j] = Code::encode(T::load(x[j]) * inverse);
    });
  });
}

template <class Code>
static void dequantize_8bit(const DenseWeight& weight, const typename Code::Stored* packed, const float* scales, int threads) {
  with_type(weight.type, [&](auto type) {
    using T = decltype(type);
    for_each_row(weight.rows, weight.cols, threads, [&](int64_t row) {
      const typename Code::Stored* __restrict codes = packed + row * weight.cols;
      typename T::Stored* __restrict y = static_cast<typename T::Stored*>(weight.data) + row * weight.cols;
      const float scale = scales[row];
      for (int64_t j = 0; j < weight.cols; ++j) y[j] = T::store(Code::decode(codes[j]) * scale);
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
  dequantize_8bit<Int8Code>(weight, packed, scale, threads);
}

void dequantize_fp8(DenseWeight weight, const uint8_t* packed, const float* scale, int threads) {
  dequantize_8bit<E4M3Code>(weight, packed, scale, threads);
}

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
