// Quantising the rows of a matrix to int8 or e4m3 with one scale a row, bit for bit as
// fluxfast/ops/row_quant.py defines it.
#include "compat.cuh"

#include "eight.cuh"
#include "ops.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

// threads of a block; a block reads one row twice, the second time from the cache
static constexpr int kRowThreads = 256;

// columns [col, col + 8) of a row of n elements, times the column scales if there are any, with
// zeros past the end
template <class T>
static FLUXFAST_FN Eight<float> scaled_eight(const typename T::Stored* x, const float* col_scale, int64_t col, int64_t n,
                                             bool whole) {
  const Eight<typename T::Stored> stored = load_eight(x + col, n - col, whole);
  Eight<float> y;
  for (int i = 0; i < kEight; ++i) y.of[i] = T::load(stored.of[i]);
  if (col_scale == nullptr) return y;
  for (int i = 0; i < kEight && i < n - col; ++i) y.of[i] *= col_scale[col + i];
  return y;
}

template <class T, class C>
static __global__ void row_quant_kernel(const typename T::Stored* x, int64_t row_stride, const float* col_scale,
                                        typename C::Stored* codes, float* scales, int64_t cols, bool whole) {
  const int64_t row = blockIdx.x;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kEight, step = static_cast<int64_t>(blockDim.x) * kEight;
  x += row * row_stride;
  codes += row * cols;
  // compared as integers, magnitudes keep their order, with infinity and NaN above all others
  uint32_t top = 0;
  for (int64_t col = first; col < cols; col += step) {
    const Eight<float> y = scaled_eight<T>(x, col_scale, col, cols, whole);
    for (int i = 0; i < kEight; ++i) {
      const uint32_t magnitude = bits_of(y.of[i]) & kAbs;
      top = magnitude > top ? magnitude : top;
    }
  }
  const float scale = scale_of<C>(block_max(top));
  const float inverse = 1.0f / scale;
  for (int64_t col = first; col < cols; col += step) {
    const Eight<float> y = scaled_eight<T>(x, col_scale, col, cols, whole);
    Eight<typename C::Stored> q;
    for (int i = 0; i < kEight; ++i) q.of[i] = C::encode(y.of[i] * inverse);
    store_eight(codes + col, q, cols - col, whole);
  }
  if (threadIdx.x == 0) scales[row] = scale;
}

template <class C>
static const char* row_quant(Weight x, const float* col_scale, Codes out, GpuQueue queue) {
  const char* error = nullptr;
  with_type(x.type, [&](auto type) {
    using T = decltype(type);
    const auto* data = static_cast<const typename T::Stored*>(x.data);
    auto* codes = static_cast<typename C::Stored*>(out.data);
    const bool whole = in_eights<typename T::Stored>(data, x.row_stride) && in_eights<typename C::Stored>(codes, x.cols);
    error = launch(row_quant_kernel<T, C>, x.rows, kRowThreads, queue.stream, data, x.row_stride, col_scale, codes, out.scale,
                   x.cols, whole);
  });
  return error;
}

}  // namespace FLUXFAST_ISA

const char* gpu_row_quant(Weight x, const float* col_scale, Codes codes, GpuQueue queue) {
  using namespace FLUXFAST_ISA;
  const DeviceScope scope(queue.device);
  if (scope.error != nullptr) return scope.error;
  if (codes.type == Code::int8) return row_quant<Int8Code>(x, col_scale, codes, queue);
  return row_quant<E4M3Code>(x, col_scale, codes, queue);
}

}  // namespace fluxfast
