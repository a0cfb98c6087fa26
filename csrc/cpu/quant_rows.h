// How the quantisers read and write rows of floats of any type, and how they share out rows.
#pragma once

#include <stdint.h>
#include <string.h>

#include "rows.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

static constexpr uint32_t kAbs = 0x7FFFFFFFu;
static constexpr uint32_t kInfinity = 0x7F800000u;
static constexpr float kLeastNormal = 1.17549435e-38f;
// 1.5 * 2^23: adding it to |v| < 2^22 rounds v to an integer, halves to even, and leaves that integer in the low bits
static constexpr float kRound = 12582912.0f;

static inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static inline float round_even(float x) { return (x + kRound) - kRound; }

struct F32 {
  using Stored = float;
  static inline float load(float x) { return x; }
  static inline float store(float x) { return x; }
};

struct BF16 {
  using Stored = uint16_t;
  static inline float load(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }
  // to nearest, halves to even; x is finite
  static inline uint16_t store(float x) {
    const uint32_t bits = bits_of(x);
    return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
  }
};

struct F16 {
  using Stored = uint16_t;
  static inline float load(uint16_t x) {
    // the exponent's bias differs by 112; a product with 2^112 mends that for subnormal numbers as well
    const uint32_t magnitude = bits_of(float_of(static_cast<uint32_t>(x & 0x7FFFu) << 13) * 5.192296858534828e33f);
    const uint32_t special = (x & 0x7C00u) == 0x7C00u ? kInfinity : 0u;
    return float_of(magnitude | special | static_cast<uint32_t>(x & 0x8000u) << 16);
  }
  // to nearest, halves to even; x is finite
  static inline uint16_t store(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t magnitude = bits & kAbs;
    const uint32_t normal = (magnitude + 0x0FFFu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    // below 2^-14 the unit is 2^-24, which is the last bit of numbers in [0.5, 1)
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
    uint32_t out = magnitude < 0x38800000u ? subnormal : normal;
    out = magnitude >= 0x47800000u ? 0x7C00u : out;
    return static_cast<uint16_t>(out | (bits >> 16 & 0x8000u));
  }
};

// calls body(F32{}) or its like for a type known at run time
template <class Body>
static inline void with_type(Float type, const Body& body) {
  if (type == Float::f32) return body(F32{});
  if (type == Float::bf16) return body(BF16{});
  body(F16{});
}

template <class T>
static inline const typename T::Stored* row_of(const Weight& weight, int64_t row) {
  return static_cast<const typename T::Stored*>(weight.data) + row * weight.row_stride;
}

// the bits of the largest magnitude of n numbers: as integers, magnitudes keep their order, and infinity and NaN come on top
template <class T>
static inline uint32_t top_of(const typename T::Stored* __restrict x, int64_t n) {
  int32_t top = 0;
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < n; ++j) {
    const int32_t magnitude = static_cast<int32_t>(bits_of(T::load(x[j])) & kAbs);
    top = magnitude > top ? magnitude : top;
  }
  return static_cast<uint32_t>(top);
}

// calls body(row) for every row
template <class Body>
static inline void for_each_row(int64_t rows, int64_t cols, int threads, const Body& body) {
  const RowTasks tasks({1, rows, cols}, 1);
  parallel_for(tasks.count(1), threads, [&](int64_t task) {
    for (int64_t row = tasks.begin(task); row < tasks.end(task); ++row) body(row);
  });
}

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
