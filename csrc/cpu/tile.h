// Matrix products on small tiles that stay in registers, for attention and the adapters.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace fluxfast {
namespace FLUXFAST_ISA {

#if defined(__AVX512F__)
static constexpr int kVector = 16, kRegisters = 32;
#elif defined(__AVX__)
static constexpr int kVector = 8, kRegisters = 16;
#else
static constexpr int kVector = 4, kRegisters = 16;
#endif

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"
typedef float Floats __attribute__((vector_size(4 * kVector)));
#if defined(__clang__)
#define FLUXFAST_UNROLL _Pragma("unroll")
#else
#define FLUXFAST_UNROLL _Pragma("GCC unroll 32")
#endif
#else
struct Floats {
  float lane[kVector];
  friend Floats operator*(const Floats& a, float b) {
    Floats product;
    for (int l = 0; l < kVector; ++l) product.lane[l] = a.lane[l] * b;
    return product;
  }
  friend Floats operator*(const Floats& a, const Floats& b) {
    Floats product;
    for (int l = 0; l < kVector; ++l) product.lane[l] = a.lane[l] * b.lane[l];
    return product;
  }
  Floats& operator+=(const Floats& other) {
    for (int l = 0; l < kVector; ++l) lane[l] += other.lane[l];
    return *this;
  }
};
#define FLUXFAST_UNROLL
#endif

static inline Floats load_floats(const float* from) {
  Floats x;
  memcpy(&x, from, sizeof x);
  return x;
}

static inline void store_floats(float* to, const Floats& x) { memcpy(to, &x, sizeof x); }

// the largest width of a tile in vectors; its sums fill at most three quarters of the registers,
// the factors the others
static constexpr int kTileVectors = kRegisters / 8;
template <int V>
static constexpr int kTileRows = kRegisters == 32 ? (V == 1 ? 12 : 24 / V) : (V == 1 ? 8 : 6);

// C [R, V vectors] = A B, or += with ADD. A's element (r, k) is a[r * a_row + k * a_step]; the rows
// of B [depth, V vectors] and of C are b_row and c_row elements apart
template <int R, int V, bool ADD>
static inline void tile_product(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, int64_t depth,
                                float* c, int64_t c_row) {
  Floats sums[R][V];
  FLUXFAST_UNROLL
  for (int r = 0; r < R; ++r) {
    FLUXFAST_UNROLL
    for (int v = 0; v < V; ++v) {
      sums[r][v] = ADD ? load_floats(c + r * c_row + v * kVector) : Floats{};
    }
  }
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_row) {
    Floats right[V];
    FLUXFAST_UNROLL
    for (int v = 0; v < V; ++v) right[v] = load_floats(b + v * kVector);
    FLUXFAST_UNROLL
    for (int r = 0; r < R; ++r) {
      const float left = a[r * a_row];
      FLUXFAST_UNROLL
      for (int v = 0; v < V; ++v) sums[r][v] += right[v] * left;
    }
  }
  FLUXFAST_UNROLL
  for (int r = 0; r < R; ++r) {
    FLUXFAST_UNROLL
    for (int v = 0; v < V; ++v) store_floats(c + r * c_row + v * kVector, sums[r][v]);
  }
}

template <int R, int V, bool ADD>
static inline int64_t whole_tiles(int64_t r, int64_t rows, const float* a, int64_t a_row, int64_t a_step, const float* b,
                                  int64_t b_row, int64_t depth, float* c, int64_t c_row) {
  for (; r + R <= rows; r += R) {
    tile_product<R, V, ADD>(a + r * a_row, a_row, a_step, b, b_row, depth, c + r * c_row, c_row);
  }
  return r;
}

template <int V, bool ADD>
static inline void tiles_product(int64_t rows, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row,
                                 int64_t depth, float* c, int64_t c_row) {
  int64_t r = whole_tiles<kTileRows<V>, V, ADD>(0, rows, a, a_row, a_step, b, b_row, depth, c, c_row);
  r = whole_tiles<4, V, ADD>(r, rows, a, a_row, a_step, b, b_row, depth, c, c_row);
  whole_tiles<1, V, ADD>(r, rows, a, a_row, a_step, b, b_row, depth, c, c_row);
}

// the same for any number of rows; `cols` is 1, 2 or kTileVectors vectors
template <bool ADD>
static inline void panel_product(int64_t rows, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row,
                                 int64_t cols, int64_t depth, float* c, int64_t c_row) {
  if (cols == kVector) return tiles_product<1, ADD>(rows, a, a_row, a_step, b, b_row, depth, c, c_row);
  if (cols == 2 * kVector) return tiles_product<2, ADD>(rows, a, a_row, a_step, b, b_row, depth, c, c_row);
  tiles_product<kTileVectors, ADD>(rows, a, a_row, a_step, b, b_row, depth, c, c_row);
}

// how many columns the panel that starts at `col` has; there are `cols` in all, a multiple of
// kVector
static inline int64_t panel_cols(int64_t col, int64_t cols) {
  int64_t vectors = kTileVectors;
  while (vectors * kVector > cols - col) vectors /= 2;
  return vectors * kVector;
}

// C [rows, cols] = A B, or += with ADD; cols is a multiple of the vector width
template <bool ADD>
static inline void product(int64_t rows, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row,
                           int64_t cols, int64_t depth, float* c, int64_t c_row) {
  for (int64_t col = 0; col < cols; col += panel_cols(col, cols)) {
    panel_product<ADD>(rows, a, a_row, a_step, b + col, b_row, panel_cols(col, cols), depth, c + col, c_row);
  }
}

// a number of columns, grown to whole vectors
static inline int64_t padded(int64_t cols) { return (cols + kVector - 1) / kVector * kVector; }

// memory for floats, aligned to a cache line, which lives as long as the object
class Scratch {
 public:
  explicit Scratch(int64_t count) : memory_(malloc(sizeof(float) * static_cast<size_t>(count) + 64)) {}
  ~Scratch() { free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() const { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_) + 63) & ~uintptr_t{63}); }

 private:
  void* const memory_;
};

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
