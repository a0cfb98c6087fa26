// out = x + gate * y, one gate per sample and channel.
#include "rows.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

void gated_residual_fwd(Rows x, PerSample gate, Rows y, float* out, Shape shape, int threads) {
  const int64_t d = shape.cols;
  const RowTasks tasks(shape, 1);
  parallel_for(tasks.count(shape.batch), threads, [=](int64_t task) {
    const int64_t b = tasks.sample(task);
    const float* __restrict g = row_at(gate, b);
    for (int64_t s = tasks.begin(task); s < tasks.end(task); ++s) {
      const float* __restrict xs = row_at(x, b, s);
      const float* __restrict ys = row_at(y, b, s);
      float* __restrict o = out + (b * shape.rows + s) * d;
      for (int64_t j = 0; j < d; ++j) o[j] = xs[j] + g[j] * ys[j];
    }
  });
}

void gated_residual_bwd(Rows dout, PerSample gate, Rows y, float* dy, float* dgate, Shape shape, int threads) {
  const int64_t d = shape.cols;
  const RowTasks tasks(shape, dgate ? kMinSummedRows : 1);
  float* partials = dgate ? static_cast<float*>(calloc(tasks.count(shape.batch) * d, sizeof(float))) : nullptr;
  parallel_for(tasks.count(shape.batch), threads, [=](int64_t task) {
    const int64_t b = tasks.sample(task);
    const float* __restrict g = row_at(gate, b);
    for (int64_t s = tasks.begin(task); s < tasks.end(task); ++s) {
      const float* __restrict dos = row_at(dout, b, s);
      float* __restrict dys = dy + (b * shape.rows + s) * d;
      for (int64_t j = 0; j < d; ++j) dys[j] = g[j] * dos[j];
      if (!dgate) continue;
      const float* __restrict ys = row_at(y, b, s);
      float* __restrict sum = partials + task * d;
      for (int64_t j = 0; j < d; ++j) sum[j] += dos[j] * ys[j];
    }
  });
  if (dgate) sum_partials(partials, tasks.per_sample, dgate, shape, threads);
  free(partials);
}

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
