// y = x W^T with W as it is stored: a row's codes are multiplied as they lie in memory, and sums
// are scaled afterwards. Where the compiler has no vector types, or where blocks cross the ends of
// rows, a row is decoded first.
#include "quant_decoders.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fluxfast {
namespace FLUXFAST_ISA {

// fills y with dot(row, b) for every row and vector
template <class Dot>
static void gemv_rows(const Gemv& gemv, int threads, const Dot& dot) {
  for_each_row(gemv.rows, gemv.cols * gemv.batch, threads, [&](int64_t row) {
    for (int64_t b = 0; b < gemv.batch; ++b) gemv.y[b * gemv.rows + row] = dot(row, b);
  });
}

template <class Decoder>
static inline void gemv_decoded(const Decoder& decoder, const Gemv& gemv, int threads) {
  gemv_rows(gemv, threads, [&](int64_t row, int64_t b) {
    float* const values = static_cast<float*>(malloc(sizeof(float) * static_cast<size_t>(gemv.cols)));
    decoder.template decode<F32>(row, values);
    const float* __restrict x = gemv.x + b * gemv.cols;
    const float sum = sum_of(gemv.cols, [&](int64_t j) { return values[j] * x[j]; });
    free(values);
    return sum;
  });
}

template <class T>
static void gemv_dense(const Gemv& gemv, const Weight& weight, int threads) {
  gemv_rows(gemv, threads, [&](int64_t row, int64_t b) {
    const typename T::Stored* __restrict w = row_of<T>(weight, row);
    const float* __restrict x = gemv.x + b * gemv.cols;
    return sum_of(gemv.cols, [&](int64_t j) { return T::load(w[j]) * x[j]; });
  });
}

void gemv_float(Gemv gemv, Weight weight, int threads) {
  with_type(weight.type, [&](auto type) { gemv_dense<decltype(type)>(gemv, weight, threads); });
}

template <class C>
static void gemv_codes(const Gemv& gemv, const typename C::Stored* packed, const float* scale, int threads) {
  gemv_rows(gemv, threads, [&](int64_t row, int64_t b) {
    const typename C::Stored* __restrict w = packed + row * gemv.cols;
    const float* __restrict x = gemv.x + b * gemv.cols;
    return scale[row] * sum_of(gemv.cols, [&](int64_t j) { return C::decode(w[j]) * x[j]; });
  });
}

void gemv_int8(Gemv gemv, const int8_t* packed, const float* scale, int threads) {
  gemv_codes<Int8Code>(gemv, packed, scale, threads);
}

void gemv_fp8_e4m3(Gemv gemv, const uint8_t* packed, const float* scale, int threads) {
  gemv_codes<E4M3Code>(gemv, packed, scale, threads);
}

#if defined(__GNUC__)

// vectors of eight lanes, however wide the processor's are
#pragma GCC diagnostic ignored "-Wpsabi"
static constexpr int kVector = 8;
typedef float Floats __attribute__((vector_size(4 * kVector)));
typedef int32_t Ints __attribute__((vector_size(4 * kVector)));

template <class V>
static inline V load(const void* address) {
  V vector;
  memcpy(&vector, address, sizeof vector);
  return vector;
}

static inline Floats floats_of(const Ints& x) { return __builtin_convertvector(x, Floats); }

static inline float sum_of_vector(const Floats& lanes) {
  float sum = 0.0f;
  for (int l = 0; l < kVector; ++l) sum += lanes[l];
  return sum;
}

// The vectors x in the order in which codes come out of their bytes, padded with zeros, and their
// sums over each group. place(j) is where column j goes.
class Arranged {
 public:
  template <class Place>
  Arranged(const Gemv& gemv, int64_t span, int group, const Place& place)
      : cols_(ceil_div(gemv.cols, span) * span), groups_(cols_ / group) {
    x_ = static_cast<float*>(calloc(static_cast<size_t>(gemv.batch * cols_), sizeof(float)));
    sums_ = static_cast<float*>(calloc(static_cast<size_t>(gemv.batch * groups_), sizeof(float)));
    for (int64_t b = 0; b < gemv.batch; ++b) {
      for (int64_t j = 0; j < gemv.cols; ++j) {
        const float value = gemv.x[b * gemv.cols + j];
        x_[b * cols_ + place(j)] = value;
        sums_[b * groups_ + j / group] += value;
      }
    }
  }
  ~Arranged() {
    free(x_);
    free(sums_);
  }
  Arranged(const Arranged&) = delete;
  Arranged& operator=(const Arranged&) = delete;

  const float* x(int64_t b) const { return x_ + b * cols_; }
  const float* sums(int64_t b) const { return sums_ + b * groups_; }

 private:
  const int64_t cols_, groups_;
  float *x_, *sums_;
};

// 64 columns are eight integers of eight codes each; a vector holds one code of each integer, the
// lowest code first
static constexpr int kSpan = 64, kSpanBytes = kSpan / 2;
static inline int64_t place_of_nibble(int64_t j) {
  const int64_t byte = j % kSpan / 2, code = byte % 4 * 2 + 1 - j % 2;
  return j / kSpan * kSpan + code * kVector + byte / 4;
}

void gemv_int4(Gemv gemv, Int4Parts parts, int threads) {
  static_assert(Int4Format::kGroup == kSpan, "a scale is of one span");
  const Arranged arranged(gemv, kSpan, kSpan, place_of_nibble);
  const int64_t groups = ceil_div(gemv.cols, kSpan);
  gemv_rows(gemv, threads, [&](int64_t row, int64_t b) {
    const uint8_t* bytes = parts.packed + row * groups * kSpanBytes;
    const float* x = arranged.x(b);
    Floats lanes = {};
    float offset = 0.0f;
    for (int64_t g = 0; g < groups; ++g, bytes += kSpanBytes, x += kSpan) {
      // flipping a code's highest bit and reading it as a signed number subtracts 8, the middle of
      // the range, so that subtracting the zero point afterwards cancels little
      const Ints words = load<Ints>(bytes) ^ static_cast<int32_t>(0x88888888);
      Floats part = {};
      for (int code = 0; code < 8; ++code) part += floats_of(words << (28 - 4 * code) >> 28) * load<Floats>(x + code * kVector);
      const float scale = BF16::load(parts.scale[row * groups + g]);
      const int zero = parts.zero[row * groups + g] - 8 * Int4Format::kUnit;
      offset += scale * static_cast<float>(zero) * arranged.sums(b)[g];
      lanes += part * scale;
    }
    return Int4Format::kUnit * sum_of_vector(lanes) - offset;
  });
}

// eight bytes as eight integers
static inline Ints widened(const uint8_t* bytes) {
#if defined(__AVX2__)
  return reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
#else
  Ints wide;
  for (int l = 0; l < kVector; ++l) wide[l] = bytes[l];
  return wide;
#endif
}

// the same for half bytes, the high half first
static inline Ints widened_halves(const uint8_t* bytes) {
  uint8_t halves[kVector];
  for (int l = 0; l < kVector; ++l) halves[l] = static_cast<uint8_t>(bytes[l / 2] >> (l % 2 ? 0 : 4) & 15);
  return widened(halves);
}

// Each lane is a group; the group's four bytes are one integer.
struct Int2Lanes {
  static constexpr int kGroup = Int2Format::kGroup;
  static constexpr int kSpan = kVector * kGroup;

  static int64_t place(int64_t j) { return j / kSpan * kSpan + j % kGroup * kVector + j % kSpan / kGroup; }

  // the sums of kVector groups, in units of the global scale
  static inline Floats dot(const uint8_t* bytes, const uint8_t* scales, const uint8_t* zeros, const float* x, const float* sums) {
    const Ints words = load<Ints>(bytes);
    Floats part = {};
    for (int c = 0; c < kGroup; ++c) {
      const Ints codes = words >> (c / 4 * 8 + 6 - c % 4 * 2) & 3;
      part += (floats_of(codes) - 1.5f) * load<Floats>(x + c * kVector);
    }
    const Floats scale = reinterpret_cast<Floats>((widened(scales) + Int2Format::kBias) << Int2Format::kShift);
    const Floats zero = floats_of(widened_halves(zeros)) - 1.5f * Int2Format::kUnit;
    return scale * (part * static_cast<float>(Int2Format::kUnit) - zero * load<Floats>(sums));
  }
};

void gemv_int2(Gemv gemv, Int2Parts parts, int threads) {
  constexpr int kBytes = Int2Format::kGroup / 4;
  const Arranged arranged(gemv, Int2Lanes::kSpan, Int2Format::kGroup, Int2Lanes::place);
  const int64_t groups = ceil_div(gemv.cols, Int2Format::kGroup);
  gemv_rows(gemv, threads, [&](int64_t row, int64_t b) {
    const uint8_t* const bytes = parts.packed + row * groups * kBytes;
    const uint8_t* const scales = parts.scale + row * groups;
    const uint8_t* const zeros = parts.zero + row * ceil_div(groups, 2);
    const float *x = arranged.x(b), *sums = arranged.sums(b);
    Floats lanes = {};
    int64_t g = 0;
    for (; g + kVector <= groups; g += kVector) {
      lanes += Int2Lanes::dot(bytes + g * kBytes, scales + g, zeros + g / 2, x + g * Int2Format::kGroup, sums + g);
    }
    if (g < groups) {
      // groups beyond the row's end meet zeros in x
      const size_t n = static_cast<size_t>(groups - g);
      uint8_t last[kVector * kBytes] = {}, last_scales[kVector] = {}, last_zeros[kVector / 2] = {};
      memcpy(last, bytes + g * kBytes, n * kBytes);
      memcpy(last_scales, scales + g, n);
      memcpy(last_zeros, zeros + g / 2, (n + 1) / 2);
      lanes += Int2Lanes::dot(last, last_scales, last_zeros, x + g * Int2Format::kGroup, sums + g);
    }
    return *parts.global_scale * sum_of_vector(lanes);
  });
}

// the levels that the low four bits of each code stand for
static inline Floats levels_of(const Ints& codes) {
#if defined(__AVX2__)
  const __m256i index = reinterpret_cast<__m256i>(codes);
  const __m256 low = _mm256_loadu_ps(kNf4Levels), high = _mm256_loadu_ps(kNf4Levels + 8);
#if defined(__AVX512VL__)
  return _mm256_permutex2var_ps(low, index, high);
#else
  // the fourth bit, moved to the sign, chooses between the two halves
  const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), is_high);
#endif
#else
  Floats levels;
  for (int l = 0; l < kVector; ++l) levels[l] = kNf4Levels[codes[l] & 15];
  return levels;
#endif
}

static void gemv_whole_blocks(const Gemv& gemv, const uint8_t* packed, const NestedAbsmax& absmax, int threads) {
  static_assert(Nf4Format::kBlock == kSpan, "max|w| is of one span");
  const Arranged arranged(gemv, kSpan, kSpan, place_of_nibble);
  const int64_t blocks = gemv.cols / kSpan;
  gemv_rows(gemv, threads, [&](int64_t row, int64_t b) {
    const uint8_t* bytes = packed + row * blocks * kSpanBytes;
    const float* x = arranged.x(b);
    Floats lanes = {};
    for (int64_t block = row * blocks; block < (row + 1) * blocks; ++block, bytes += kSpanBytes, x += kSpan) {
      const Ints words = load<Ints>(bytes);
      Floats part = {};
      for (int code = 0; code < 8; ++code) part += levels_of(words >> 4 * code) * load<Floats>(x + code * kVector);
      lanes += part * absmax.of(block);
    }
    return sum_of_vector(lanes);
  });
}

#else

void gemv_int4(Gemv gemv, Int4Parts parts, int threads) { gemv_decoded(Int4Decoder(parts, gemv.cols), gemv, threads); }

void gemv_int2(Gemv gemv, Int2Parts parts, int threads) { gemv_decoded(Int2Decoder(parts, gemv.cols), gemv, threads); }

#endif

void gemv_nf4(Gemv gemv, StoredNf4 parts, int threads) {
  const NestedAbsmax absmax{parts.absmax, parts.nested_absmax, parts.offset, parts.values};
#if defined(__GNUC__)
  if (gemv.cols % Nf4Format::kBlock == 0) return gemv_whole_blocks(gemv, parts.packed, absmax, threads);
#endif
  gemv_decoded(Nf4Decoder<NestedAbsmax>{parts.packed, absmax, gemv.cols}, gemv, threads);
}

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
