// How the quantisers read and write rows of floats of any type, and how they divide the rows into
// tasks.
#pragma once

#include "codec.h"
#include "rows.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

template <class T>
static inline const typename T::Stored* row_of(const Weight& weight, int64_t row) {
  return static_cast<const typename T::Stored*>(weight.data) + row * weight.row_stride;
}

// the bits of the largest magnitude of n numbers; compared as integers, magnitudes keep their
// order, with infinity and NaN above all others
template <class T>
static inline uint32_t top_of(const typename T::Stored* __restrict x, int64_t n) {
  int32_t top = 0;
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < n; ++j) {
    const int32_t magnitude = static_cast<int32_t>(bits_of(T::load(x[j])) & kAbs);
    top = magnitude > top ? magnitude : top;
  }
  return static_cast<uint32_t>(top);
}

// calls body(row) for every row
template <class Body>
static inline void for_each_row(int64_t rows, int64_t cols, int threads, const Body& body) {
  const RowTasks tasks({1, rows, cols}, 1);
  parallel_for(tasks.count(1), threads, [&](int64_t task) {
    for (int64_t row = tasks.begin(task); row < tasks.end(task); ++row) body(row);
  });
}

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
