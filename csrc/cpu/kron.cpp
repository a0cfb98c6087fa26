// LoKr's products in fp32, which never form w1 ⊗ w2. A row of a [P · R] is read as a matrix a [P, R], and a row of y [S · Q]
// as y [S, Q]. With factors u [S, P] and v [R, Q],
//   y += u (a v).
// That is LoKr's forward by u = scale * w1 and v = w2^T, and its gradient of x by their transposes, where y is dx and a is dy.
// The other gradients come with the second one, which has t = dy w2 at hand:
//   dw1 = sum of t x^T,  dw2 = sum of dy^T (u^T x),  over the rows.
// Both products are made and used for a few rows at a time, while those rows are in the cache.
#include "rows.h"
#include "tile.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

// the most rows of a block; of the first product's rows, a small factor's length for each row of a; and of its elements
static constexpr int64_t kBlockRows = 64, kBlockProductRows = 256, kBlockElements = 1 << 16;
// the least rows that a task sums over, and the most tasks that sum; each task has sums of its own
static constexpr int64_t kTaskRows = 128, kMaxTasks = 16;
// a tile of dw1 has a vector of sums for each of its elements
static constexpr int kDotSide = kRegisters == 32 ? 4 : 2;

static int64_t block_rows(int64_t length, int64_t width) {
  const int64_t most = min64(kBlockProductRows / length, kBlockElements / (length * width));
  return max64(min64(most, kBlockRows), 1);
}

// to [rows, padded(cols)], with zeros behind each row
static void pad(const float* from, int64_t rows, int64_t cols, float* to) {
  const int64_t width = padded(cols);
  for (int64_t r = 0; r < rows; ++r, from += cols, to += width) {
    memcpy(to, from, sizeof(float) * static_cast<size_t>(cols));
    memset(to + cols, 0, sizeof(float) * static_cast<size_t>(width - cols));
  }
}

// rows [length, cols] of x as one matrix; they are copied where they lie apart
static const float* adjoining(const Rows& x, int64_t first, int64_t rows, int64_t cols, float* copy) {
  if (x.row_stride == cols) return row_at(x, 0, first);
  for (int64_t m = 0; m < rows; ++m) memcpy(copy + m * cols, row_at(x, 0, first + m), sizeof(float) * static_cast<size_t>(cols));
  return copy;
}

// y [S, Q] += y_cols * u t for t [P, padded Q]; `mixed` is memory for the product
static void add_mixed(const Kron& k, const float* t, const float* y_cols, float* mixed, float* y) {
  const int64_t width = padded(k.q);
  product<false>(k.s, k.u, k.p, 1, t, width, width, k.p, mixed, width);
  for (int64_t s = 0; s < k.s; ++s, mixed += width, y += k.q) {
    if (y_cols == nullptr) {
      for (int64_t q = 0; q < k.q; ++q) y[q] += mixed[q];
    } else {
      for (int64_t q = 0; q < k.q; ++q) y[q] += mixed[q] * y_cols[s * k.q + q];
    }
  }
}

// out [A, B] += the products of t's rows with x's, each [.., width], summed over rows of [P, width] and of [S, width]
template <int A, int B>
static inline void add_dots(int64_t rows, const float* t, int64_t t_step, const float* x, int64_t x_step, int64_t width,
                            float* out, int64_t out_row) {
  Floats sums[A][B];
  for (int a = 0; a < A; ++a) {
    for (int b = 0; b < B; ++b) sums[a][b] = Floats{};
  }
  for (int64_t m = 0; m < rows; ++m, t += t_step, x += x_step) {
    for (int64_t q = 0; q < width; q += kVector) {
      Floats right[B];
      FLUXFAST_UNROLL
      for (int b = 0; b < B; ++b) right[b] = load_floats(x + b * width + q);
      FLUXFAST_UNROLL
      for (int a = 0; a < A; ++a) {
        const Floats left = load_floats(t + a * width + q);
        FLUXFAST_UNROLL
        for (int b = 0; b < B; ++b) sums[a][b] += right[b] * left;
      }
    }
  }
  for (int a = 0; a < A; ++a) {
    for (int b = 0; b < B; ++b) {
      float lanes[kVector], sum = 0.0f;
      store_floats(lanes, sums[a][b]);
      for (int lane = 0; lane < kVector; ++lane) sum += lanes[lane];
      out[a * out_row + b] += sum;
    }
  }
}

template <int A>
static int64_t rows_of_dots(int64_t p, const Kron& k, int64_t rows, const float* t, const float* x, float* out) {
  const int64_t width = padded(k.q), t_step = k.p * width, x_step = k.s * width;
  for (; p + A <= k.p; p += A) {
    int64_t s = 0;
    for (; s + kDotSide <= k.s; s += kDotSide) {
      add_dots<A, kDotSide>(rows, t + p * width, t_step, x + s * width, x_step, width, out + p * k.s + s, k.s);
    }
    for (; s < k.s; ++s) add_dots<A, 1>(rows, t + p * width, t_step, x + s * width, x_step, width, out + p * k.s + s, k.s);
  }
  return p;
}

void kron_add(Rows a, Kron factors, const float* y_cols, OutRows y, int64_t rows, int threads) {
  const Kron& k = factors;
  const int64_t width = padded(k.q), block = block_rows(k.p, width);
  const Scratch v(k.r * width);
  pad(k.v, k.r, k.q, v.data());
  parallel_for(ceil_div(rows, block), threads, [&](int64_t task) {
    const int64_t first = task * block, count = min64(block, rows - first);
    const Scratch copy(count * k.p * k.r), t(count * k.p * width), mixed(k.s * width);
    const float* const left = adjoining(a, first, count, k.p * k.r, copy.data());
    product<false>(count * k.p, left, k.r, 1, v.data(), width, width, k.r, t.data(), width);
    for (int64_t m = 0; m < count; ++m) {
      add_mixed(k, t.data() + m * k.p * width, y_cols, mixed.data(), row_at(y, 0, first + m));
    }
  });
}

void kron_grads(Rows dy, Rows x, Kron factors, KronGrads grads, int64_t rows, int threads) {
  const Kron& k = factors;
  const int64_t width = padded(k.q), block = block_rows(max64(k.p, k.s), width);
  const int64_t per_task = ceil_div(max64(kTaskRows, ceil_div(rows, kMaxTasks)), block) * block;
  const int64_t tasks = ceil_div(rows, per_task), dw2_size = k.r * width, sums_size = dw2_size + k.p * k.s;
  const Scratch v(k.r * width), all_sums(tasks * sums_size);
  pad(k.v, k.r, k.q, v.data());
  parallel_for(tasks, threads, [&](int64_t task) {
    const Scratch dy_copy(block * k.p * k.r), x_copy(block * k.s * k.q), x_padded(block * k.s * width);
    const Scratch t(block * k.p * width), ux(block * k.p * width), mixed(k.s * width);
    float *const dw2 = all_sums.data() + task * sums_size, *const dw1 = dw2 + dw2_size;
    memset(dw2, 0, sizeof(float) * static_cast<size_t>(sums_size));
    const int64_t end = min64((task + 1) * per_task, rows);
    for (int64_t first = task * per_task; first < end; first += block) {
      const int64_t count = min64(block, end - first);
      const float* const left = adjoining(dy, first, count, k.p * k.r, dy_copy.data());
      const float* right = adjoining(x, first, count, k.s * k.q, x_copy.data());
      if (width != k.q) {
        pad(right, count * k.s, k.q, x_padded.data());
        right = x_padded.data();
      }
      product<false>(count * k.p, left, k.r, 1, v.data(), width, width, k.r, t.data(), width);
      rows_of_dots<1>(rows_of_dots<kDotSide>(0, k, count, t.data(), right, dw1), k, count, t.data(), right, dw1);
      for (int64_t m = 0; m < count; ++m) {
        const int64_t at = m * k.p * width;
        product<false>(k.p, k.u, 1, k.p, right + m * k.s * width, width, width, k.s, ux.data() + at, width);
        if (grads.dx.data != nullptr) add_mixed(k, t.data() + at, nullptr, mixed.data(), row_at(grads.dx, 0, first + m));
      }
      product<true>(k.r, left, 1, k.r, ux.data(), width, width, count * k.p, dw2, width);
    }
  });
  float* const sums = all_sums.data();
  sum_partials(sums, tasks, sums, {1, tasks, sums_size}, threads);
  memcpy(grads.dw1, sums + dw2_size, sizeof(float) * static_cast<size_t>(k.p * k.s));
  for (int64_t r = 0; r < k.r; ++r) memcpy(grads.dw2 + r * k.q, sums + r * width, sizeof(float) * static_cast<size_t>(k.q));
}

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
