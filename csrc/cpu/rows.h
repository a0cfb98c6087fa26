// How the ops divide rows into tasks, and how they sum over them.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "ops.h"
#include "parallel.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

// elements of a task: about 5 to 10 µs of work for one core, little beside waking a thread, much
// beside taking a task
static constexpr int64_t kTaskElements = 16384;
// a task that sums over its rows writes one row of partial sums: with 16 rows, a few per cent of
// what it reads
static constexpr int64_t kMinSummedRows = 16;

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

static inline const float* row_at(const Rows& x, int64_t b, int64_t s) {
  return x.data + b * x.batch_stride + s * x.row_stride;
}

static inline float* row_at(const OutRows& y, int64_t b, int64_t s) {
  return y.data + b * y.batch_stride + s * y.row_stride;
}

static inline const float* row_at(const PerSample& x, int64_t b) { return x.data + b * x.batch_stride; }

// running sums enough for four vectors of 512 bits: with a single one, each addition would wait for
// the one before
static constexpr int kLanes = 64;

static inline float sum_of_lanes(const float* lanes) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// the sum of term(0) ... term(n - 1)
template <class Term>
static inline float sum_of(int64_t n, const Term& term) {
  float lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(j + lane);
  }
  for (int lane = 0; j < n; ++j, ++lane) lanes[lane] += term(j);
  return sum_of_lanes(lanes);
}

// divides [B, S] into tasks of whole rows of one sample; depends on the shape only
struct RowTasks {
  int64_t rows, rows_per_task, per_sample;

  RowTasks(const Shape& shape, int64_t min_rows) : rows(shape.rows) {
    rows_per_task = max64(min_rows, kTaskElements / max64(shape.cols, 1));
    per_sample = ceil_div(rows, rows_per_task);
  }
  int64_t count(int64_t batch) const { return batch * per_sample; }
  int64_t sample(int64_t task) const { return task / per_sample; }
  int64_t begin(int64_t task) const { return task % per_sample * rows_per_task; }
  int64_t end(int64_t task) const { return min64(begin(task) + rows_per_task, rows); }
};

// sums [B, per_sample, D] over its middle dimension into out [B, D], always in the same order; with one sample, out may be
// where the first row of the partial sums is
static inline void sum_partials(const float* partials, int64_t per_sample, float* out, const Shape& shape, int threads) {
  constexpr int64_t kCols = 256;
  const int64_t d = shape.cols;
  const int64_t col_tasks = ceil_div(d, kCols);
  const bool is_small = shape.batch * per_sample * d <= kTaskElements;
  parallel_for(shape.batch * col_tasks, is_small ? 1 : threads, [=](int64_t task) {
    const int64_t b = task / col_tasks;
    const int64_t col = task % col_tasks * kCols;
    const int64_t cols = min64(kCols, d - col);
    float sum[kCols] = {};
    for (int64_t i = 0; i < per_sample; ++i) {
      const float* part = partials + (b * per_sample + i) * d + col;
      for (int64_t j = 0; j < cols; ++j) sum[j] += part[j];
    }
    memcpy(out + b * d + col, sum, sizeof(float) * cols);
  });
}

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
