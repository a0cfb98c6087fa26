// GELU, tanh form: y = x * sigmoid(v), v = 2 * sqrt(2/pi) * (x + 0.044715 x^3), which is the same as
// 0.5 x (1 + tanh(v/2)).
#include <math.h>

#include "exp.h"
#include "rows.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

static constexpr float kLinear = 1.5957691216057308f;
static constexpr float kCubic = kLinear * 0.044715f;
// beyond these bounds gelu is 0 (to 1e-37) or x, and within them exp(-v) neither overflows nor
// vanishes
static constexpr float kSaturated = 10.0f;

static inline float gelu(float x) {
  const float left = at_least(x, -kSaturated);
  const float z = at_most(left, kSaturated);
  return left / (1.0f + exp_in_range(-z * (kLinear + kCubic * z * z)));
}

static inline float gelu_derivative(float x) {
  const float z = at_most(at_least(x, -kSaturated), kSaturated);
  const float e = exp_in_range(-z * (kLinear + kCubic * z * z));
  const float sigmoid = 1.0f / (1.0f + e);
  // 1 - sigmoid, computed as e * sigmoid, which does not cancel
  return sigmoid + z * (kLinear + 3.0f * kCubic * z * z) * sigmoid * (e * sigmoid);
}

// calls body(row, first element in it, length) for each piece of a row in one task's share of the
// elements
template <class Body>
static void for_each_piece(const Shape& shape, int threads, const Body& body) {
  const int64_t elements = shape.rows * shape.cols;
  parallel_for(ceil_div(elements, kTaskElements), threads, [&](int64_t task) {
    int64_t i = task * kTaskElements;
    const int64_t end = min64(i + kTaskElements, elements);
    while (i < end) {
      const int64_t col = i % shape.cols;
      const int64_t length = min64(shape.cols - col, end - i);
      body(i / shape.cols, col, length);
      i += length;
    }
  });
}

void gelu_fwd(Rows x, OutRows y, Shape shape, int threads) {
  for_each_piece(shape, threads, [=](int64_t row, int64_t col, int64_t length) {
    const float* __restrict xs = row_at(x, 0, row) + col;
    float* __restrict ys = row_at(y, 0, row) + col;
    for (int64_t j = 0; j < length; ++j) ys[j] = gelu(xs[j]);
  });
}

void gelu_bwd(Rows dy, Rows x, OutRows dx, Shape shape, int threads) {
  for_each_piece(shape, threads, [=](int64_t row, int64_t col, int64_t length) {
    const float* __restrict dys = row_at(dy, 0, row) + col;
    // dx and x may be the same memory
    const float* xs = row_at(x, 0, row) + col;
    float* dxs = row_at(dx, 0, row) + col;
#pragma omp simd
    for (int64_t j = 0; j < length; ++j) dxs[j] = dys[j] * gelu_derivative(xs[j]);
  });
}

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
