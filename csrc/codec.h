// Conversions between floats of 8, 16 and 32 bits and codes, by integer arithmetic on their bits.
// So one source serves every CPU instruction set and GPUs, whatever types a compiler has.
// Everything rounds to nearest, halves to even.
//
// Like the sources that include it, it is in a namespace named after the target (FLUXFAST_ISA), and
// compiled without contracting a * b + c, so that it equals the plain-torch references of
// fluxfast/quant bit for bit.
#pragma once

#include <stdint.h>
#include <string.h>

#include "types.h"

// how functions are declared for this target; gpu/compat.cuh defines it for GPUs
#ifndef FLUXFAST_FN
#define FLUXFAST_FN inline
#endif

namespace fluxfast {
namespace FLUXFAST_ISA {

static constexpr uint32_t kAbs = 0x7FFFFFFFu;
static constexpr uint32_t kInfinity = 0x7F800000u;
static constexpr float kLeastNormal = 1.17549435e-38f;
// 1.5 * 2^23: adding it to |v| < 2^22 rounds v to an integer, halves to even, and leaves that
// integer in the low bits
static constexpr float kRound = 12582912.0f;

static FLUXFAST_FN uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static FLUXFAST_FN float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static FLUXFAST_FN float round_even(float x) { return (x + kRound) - kRound; }

struct F32 {
  using Stored = float;
  static FLUXFAST_FN float load(float x) { return x; }
  static FLUXFAST_FN float store(float x) { return x; }
};

struct BF16 {
  using Stored = uint16_t;
  static FLUXFAST_FN float load(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }
  // x must be finite
  static FLUXFAST_FN uint16_t store(float x) {
    const uint32_t bits = bits_of(x);
    return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
  }
};

struct F16 {
  using Stored = uint16_t;
  static FLUXFAST_FN float load(uint16_t x) {
    // the exponents' biases differ by 112, which multiplying by 2^112 corrects, also for subnormal
    // numbers
    const uint32_t magnitude = bits_of(float_of(static_cast<uint32_t>(x & 0x7FFFu) << 13) * 5.192296858534828e33f);
    const uint32_t special = (x & 0x7C00u) == 0x7C00u ? kInfinity : 0u;
    return float_of(magnitude | special | static_cast<uint32_t>(x & 0x8000u) << 16);
  }
  // x must be finite
  static FLUXFAST_FN uint16_t store(float x) {
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

struct Int8Code {
  using Stored = int8_t;
  static constexpr float kTop = 127.0f;
  // |x| must round to 127 or less
  static FLUXFAST_FN int8_t encode(float x) { return static_cast<int8_t>(bits_of(x + kRound)); }
  static FLUXFAST_FN float decode(int8_t code) { return static_cast<float>(code); }
};

// a sign, four bits of exponent with a bias of 7, three of mantissa; 448 is the largest value, 0x7F
// is NaN, and there is no infinity
struct E4M3Code {
  using Stored = uint8_t;
  static constexpr float kTop = 448.0f;
  // x must be finite, and |x| round to 448 or less
  static FLUXFAST_FN uint8_t encode(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t magnitude = bits & kAbs;
    const uint32_t normal = (magnitude + 0x7FFFFu + ((magnitude >> 20) & 1u) - (120u << 23)) >> 20;
    // below 2^-6 the unit is 2^-9
    const uint32_t subnormal = bits_of(float_of(magnitude) * 512.0f + kRound) & 0xFFu;
    return static_cast<uint8_t>((magnitude < (121u << 23) ? subnormal : normal) | (bits >> 24 & 0x80u));
  }
  static FLUXFAST_FN float decode(uint8_t code) {
    // the exponents' biases differ by 120, which multiplying by 2^120 corrects, also for subnormal
    // numbers
    const float magnitude = float_of(static_cast<uint32_t>(code & 0x7Fu) << 20) * 1.329227995784916e36f;
    return float_of(bits_of(magnitude) | static_cast<uint32_t>(code & 0x80u) << 24);
  }
};

// calls body with F32{}, BF16{} or F16{} for a type that is known at run time only
template <class Body>
static inline void with_type(Float type, const Body& body) {
  if (type == Float::f32) return body(F32{});
  if (type == Float::bf16) return body(BF16{});
  body(F16{});
}

// the scale of a row's codes, from the bits of the row's largest magnitude
template <class C>
static FLUXFAST_FN float scale_of(uint32_t top) {
  const float scale = float_of(top) / C::kTop;
  return scale < kLeastNormal ? 1.0f : scale;
}

// w = scale * (unit * code - zero), in groups along a row; the scale is a bf16
struct Int4Format {
  static constexpr int kGroup = 64, kUnit = 16;
};

// the same, but the scale is a byte (five bits of exponent, three of mantissa) times one global
// scale
struct Int2Format {
  static constexpr int kGroup = 16, kUnit = 5;
  static constexpr int kShift = 20;
  static constexpr int32_t kBias = (127 - 31) << 3;
  static FLUXFAST_FN float value(int32_t stored, float global_scale) {
    return float_of(static_cast<uint32_t>(stored + kBias) << kShift) * global_scale;
  }
};

struct Nf4Format {
  static constexpr int kBlock = 64, kNestedBlock = 256;
};

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
