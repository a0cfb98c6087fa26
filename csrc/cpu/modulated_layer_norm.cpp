// y = xhat * (1 + scale) + shift, xhat = (x - mean) * rstd.
// Backward, with g = dy * (1 + scale):  dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),
// dscale = sum over rows of dy * xhat, dshift = sum over rows of dy.
#include <math.h>

#include "rows.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

void modulated_layer_norm_fwd(Rows x, PerSample scale, PerSample shift, float* y, float* mean, float* rstd, Shape shape,
                              float eps, int threads) {
  const int64_t d = shape.cols;
  const RowTasks tasks(shape, 1);
  parallel_for(tasks.count(shape.batch), threads, [=](int64_t task) {
    const int64_t b = tasks.sample(task);
    const float* __restrict sc = row_at(scale, b);
    const float* __restrict sh = row_at(shift, b);
    for (int64_t s = tasks.begin(task); s < tasks.end(task); ++s) {
      const int64_t row = b * shape.rows + s;
      const float* __restrict xs = row_at(x, b, s);
      float* __restrict ys = y + row * d;
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < d; ++j) sum += xs[j];
      const float m = sum / d;
      float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
      for (int64_t j = 0; j < d; ++j) squares += (xs[j] - m) * (xs[j] - m);
      const float r = 1.0f / sqrtf(squares / d + eps);
      for (int64_t j = 0; j < d; ++j) ys[j] = (xs[j] - m) * r * (1.0f + sc[j]) + sh[j];
      mean[row] = m;
      rstd[row] = r;
    }
  });
}

void modulated_layer_norm_bwd(Rows dy, Rows x, PerSample scale, const float* mean, const float* rstd, float* dx,
                              float* dscale, float* dshift, Shape shape, int threads) {
  const int64_t d = shape.cols;
  const RowTasks tasks(shape, dscale ? kMinSummedRows : 1);
  const int64_t partial_elements = tasks.count(shape.batch) * d;
  float* partials = dscale ? static_cast<float*>(calloc(2 * partial_elements, sizeof(float))) : nullptr;
  parallel_for(tasks.count(shape.batch), threads, [=](int64_t task) {
    const int64_t b = tasks.sample(task);
    const float* __restrict sc = row_at(scale, b);
    for (int64_t s = tasks.begin(task); s < tasks.end(task); ++s) {
      const int64_t row = b * shape.rows + s;
      const float* __restrict dys = row_at(dy, b, s);
      const float* __restrict xs = row_at(x, b, s);
      float* __restrict dxs = dx + row * d;
      const float m = mean[row];
      const float r = rstd[row];
      float sum_g = 0.0f;
      float sum_gx = 0.0f;
#pragma omp simd reduction(+ : sum_g, sum_gx)
      for (int64_t j = 0; j < d; ++j) {
        const float g = dys[j] * (1.0f + sc[j]);
        sum_g += g;
        sum_gx += g * ((xs[j] - m) * r);
      }
      const float mean_g = sum_g / d;
      const float mean_gx = sum_gx / d;
      for (int64_t j = 0; j < d; ++j) {
        dxs[j] = r * (dys[j] * (1.0f + sc[j]) - mean_g - (xs[j] - m) * r * mean_gx);
      }
      if (!dscale) continue;
      float* __restrict sum_scale = partials + task * d;
      float* __restrict sum_shift = partials + partial_elements + task * d;
      for (int64_t j = 0; j < d; ++j) {
        sum_scale[j] += dys[j] * ((xs[j] - m) * r);
        sum_shift[j] += dys[j];
      }
    }
  });
  if (dscale) {
    sum_partials(partials, tasks.per_sample, dscale, shape, threads);
    sum_partials(partials + partial_elements, tasks.per_sample, dshift, shape, threads);
  }
  free(partials);
}

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
