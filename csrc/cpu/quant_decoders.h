// The decoders of the storage formats: each writes a stored row as floats.
#pragma once

#include "quant_decode.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

template <class C>
struct EightBitDecoder {
  const typename C::Stored* packed;
  const float* scales;
  int64_t cols;

  template <class T>
  void decode(int64_t row, typename T::Stored* __restrict y) const {
    const typename C::Stored* __restrict codes = packed + row * cols;
    const float scale = scales[row];
    for (int64_t j = 0; j < cols; ++j) y[j] = T::store(C::decode(codes[j]) * scale);
  }
};

// decodes one group, of which y has the first n columns
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

static constexpr float kNf4Levels[16] = {
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

// the two levels that every byte stands for, so that decoding takes one load a byte
struct Nf4Pairs {
  float levels[256][2];
  constexpr Nf4Pairs() : levels() {
    for (int byte = 0; byte < 256; ++byte) {
      levels[byte][0] = kNf4Levels[byte >> 4];
      levels[byte][1] = kNf4Levels[byte & 15];
    }
  }
};
static constexpr Nf4Pairs kNf4Pairs;

// max|w| of a block: given as fp32, or stored as a code times the scale of 256 such codes plus
// their mean
struct PlainAbsmax {
  const float* absmax;
  float of(int64_t block) const { return absmax[block]; }
};

struct NestedAbsmax {
  const uint8_t* codes;
  const float *nested, *offset, *values;
  float of(int64_t block) const { return values[codes[block]] * nested[block / Nf4Format::kNestedBlock] + *offset; }
};

template <class Absmax>
struct Nf4Decoder {
  static constexpr int kBlock = Nf4Format::kBlock;
  const uint8_t* packed;
  Absmax absmax;
  int64_t cols;

  template <class T>
  void decode(int64_t row, typename T::Stored* y) const {
    int64_t index = row * cols;
    const int64_t end = index + cols;
    // a row may begin or end within a block
    while (index < end) {
      const int64_t block = index / kBlock;
      const int64_t stop = min64((block + 1) * kBlock, end);
      const int n = static_cast<int>(stop - index);
      float levels[kBlock];
      if (n == kBlock) {
        const uint8_t* __restrict bytes = packed + index / 2;
        for (int j = 0; j < kBlock / 2; ++j) memcpy(levels + 2 * j, kNf4Pairs.levels[bytes[j]], sizeof kNf4Pairs.levels[0]);
      } else {
        for (int j = 0; j < n; ++j) levels[j] = kNf4Pairs.levels[packed[(index + j) / 2]][(index + j) % 2];
      }
      const float top = absmax.of(block);
      for (int j = 0; j < n; ++j) y[j] = T::store(levels[j] * top);
      y += n;
      index = stop;
    }
  }
};

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
