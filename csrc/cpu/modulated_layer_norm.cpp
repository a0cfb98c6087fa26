// y = xhat * (1 + scale) + shift, xhat = (x - mean) * rstd; stats are all means, then all rstds.
// Backward, with g = dy * (1 + scale):  dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),
// dscale = sum over rows of dy * xhat, dshift = sum over rows of dy.
#include <math.h>

#include "rows.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

void modulated_layer_norm_fwd(Rows x, PerSample scale, PerSample shift, float* y, float* stats, Shape shape, float eps,
                              int threads) {
  const int64_t d = shape.cols;
  float* const mean = stats;
  float* const rstd = stats + shape.batch * shape.rows;
  const RowTasks tasks(shape, 1);
  parallel_for(tasks.count(shape.batch), threads, [=](int64_t task) {
    const int64_t b = tasks.sample(task);
    const float* __restrict sc = row_at(scale, b);
    const float* __restrict sh = row_at(shift, b);
    for (int64_t s = tasks.begin(task); s < tasks.end(task); ++s) {
      const int64_t row = b * shape.rows + s;
      const float* __restrict xs = row_at(x, b, s);
      float* __restrict ys = y + row * d;
      const float m = sum_of(d, [=](int64_t j) { return xs[j]; }) / d;
      const float variance = sum_of(d, [=](int64_t j) { return (xs[j] - m) * (xs[j] - m); }) / d;
      const float r = 1.0f / sqrtf(variance + eps);
      for (int64_t j = 0; j < d; ++j) ys[j] = (xs[j] - m) * r * (1.0f + sc[j]) + sh[j];
      mean[row] = m;
      rstd[row] = r;
    }
  });
}

void modulated_layer_norm_bwd(Rows dy, Rows x, PerSample scale, const float* stats, float* dx, float* dmodulation, Shape shape,
                              int threads) {
  const int64_t d = shape.cols;
  const float* const mean = stats;
  const float* const rstd = stats + shape.batch * shape.rows;
  const RowTasks tasks(shape, dmodulation ? kMinSummedRows : 1);
  const int64_t partial_elements = tasks.count(shape.batch) * d;
  float* partials = dmodulation ? static_cast<float*>(calloc(2 * partial_elements, sizeof(float))) : nullptr;
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
      const float mean_g = sum_of(d, [=](int64_t j) { return dys[j] * (1.0f + sc[j]); }) / d;
      const float mean_gx = sum_of(d, [=](int64_t j) { return dys[j] * (1.0f + sc[j]) * ((xs[j] - m) * r); }) / d;
      for (int64_t j = 0; j < d; ++j) {
        dxs[j] = r * (dys[j] * (1.0f + sc[j]) - mean_g - (xs[j] - m) * r * mean_gx);
      }
      if (!dmodulation) continue;
      float* __restrict sum_scale = partials + task * d;
      float* __restrict sum_shift = partials + partial_elements + task * d;
      for (int64_t j = 0; j < d; ++j) {
        sum_scale[j] += dys[j] * ((xs[j] - m) * r);
        sum_shift[j] += dys[j];
      }
    }
  });
  if (dmodulation) {
    // dscale and dshift follow each other in memory, and so do their partial sums: sum them as one
    // batch of twice the size
    sum_partials(partials, tasks.per_sample, dmodulation, {2 * shape.batch, shape.rows, d}, threads);
  }
  free(partials);
}

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
