// exp, and bounds that keep a NaN, written so that compilers vectorise loops over them.
#pragma once

#include <stdint.h>
#include <string.h>

namespace fluxfast {
namespace FLUXFAST_ISA {

// exp(x) for |x| <= 88 within 1.5 ulp; a NaN stays a NaN. The polynomial on [-ln2/2, ln2/2] is that
// of Cephes
static inline float exp_in_range(float x) {
  // adding 1.5 * 2^23 rounds to an integer, which is then in the low bits
  const float shifted = x * 1.44269504088896341f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  int32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  const uint32_t scale_bits = (static_cast<uint32_t>(bits) + 127u) << 23;
  float scale;
  memcpy(&scale, &scale_bits, sizeof scale);
  return p * scale;
}

// the comparisons are false for a NaN, which so passes through
static inline float at_least(float x, float low) { return x < low ? low : x; }

static inline float at_most(float x, float high) { return x > high ? high : x; }

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
