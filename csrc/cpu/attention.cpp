// Attention without a mask, in blocks that stay in the cache:
//   out = softmax(q k^T / sqrt(head_dim)) v.
// Backward computes the probabilities P again from the log-sum-exp:
//   dS = P * (dout v^T - sum(dout * out)),  dq = dS k,  dk = dS^T q,  dv = P^T dout.
// After Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work
// Partitioning" (2023).
#include <math.h>

#include "exp.h"
#include "rows.h"
#include "tile.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

// how many rows of q and of k a block of scores has
static constexpr int64_t kQueries = 48;
static constexpr int64_t kKeys = 384;
// how many keys a panel of scores has
static constexpr int64_t kPanel = kTileVectors * kVector;
static_assert(kKeys % kPanel == 0, "a block of keys is whole panels");
// the same on every machine, so that the number of threads changes no bits
static constexpr int64_t kTasks = 16;
static constexpr float kLowest = -87.0f;

static int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

static const float* row_of(const Heads& x, int64_t b, int64_t h, int64_t s) {
  return x.data + b * x.batch_stride + h * x.head_stride + s * x.row_stride;
}

static void clear(float* x, int64_t count) { memset(x, 0, sizeof(float) * static_cast<size_t>(count)); }

// Copies rows of one head, times a factor, and adds rows of zeros up to `padded`. The copy lies in
// panels, each of which has all rows of some columns: the panel that begins at column c begins at
// element c * padded.
static void copy_panels(const Heads& x, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t dim, float factor,
                        int64_t padded, float* panels) {
  for (int64_t col = 0; col < dim; col += panel_cols(col, dim)) {
    const int64_t cols = panel_cols(col, dim);
    float* panel = panels + col * padded;
    for (int64_t s = begin; s < end; ++s, panel += cols) {
      const float* row = row_of(x, b, h, s) + col;
      for (int64_t d = 0; d < cols; ++d) panel[d] = row[d] * factor;
    }
    clear(panel, (padded - (end - begin)) * cols);
  }
}

// copies rows of one head to the columns of panels [dim, kPanel], and adds columns of zeros
static void copy_transposed(const Heads& x, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t dim, float* panels) {
  for (int64_t first = begin; first < end; first += kPanel, panels += dim * kPanel) {
    const int64_t count = min64(kPanel, end - first);
    if (count < kPanel) clear(panels, dim * kPanel);
    for (int64_t j = 0; j < count; ++j) {
      const float* row = row_of(x, b, h, first + j);
      for (int64_t d = 0; d < dim; ++d) panels[d * kPanel + j] = row[d];
    }
  }
}

// scores [kQueries, kPanel]: rows in panels, times the columns of one panel
static void panel_scores(const float* rows, const float* columns, int64_t dim, float* scores) {
  for (int64_t col = 0; col < dim; col += panel_cols(col, dim)) {
    const int64_t cols = panel_cols(col, dim);
    const float *a = rows + col * kQueries, *b = columns + col * kPanel;
    if (col == 0) {
      panel_product<false>(kQueries, a, cols, 1, b, kPanel, kPanel, cols, scores, kKeys);
    } else {
      panel_product<true>(kQueries, a, cols, 1, b, kPanel, kPanel, cols, scores, kKeys);
    }
  }
}

// turns a block's scores into exp(score - maximum), and rescales what was summed under a lower
// maximum
static void softmax_rows(float* scores, int64_t keys, int64_t dim, float* maximum, float* sum, float* acc) {
  for (int64_t r = 0; r < kQueries; ++r, scores += kKeys, acc += dim) {
    float high = maximum[r];
#pragma omp simd reduction(max : high)
    for (int64_t j = 0; j < keys; ++j) high = scores[j] > high ? scores[j] : high;
    const float shrink = exp_in_range(at_least(maximum[r] - high, kLowest));
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < keys; ++j) {
      const float p = exp_in_range(at_least(scores[j] - high, kLowest));
      scores[j] = p;
      total += p;
    }
    sum[r] = sum[r] * shrink + total;
    if (maximum[r] != high) {
      for (int64_t d = 0; d < dim; ++d) acc[d] *= shrink;
    }
    maximum[r] = high;
  }
}

// computes out and the log-sum-exp of rows [begin, end) of one head
static void attend(Heads q, const float* k_columns, const float* v_panels, float* out, float* lse, const AttentionShape& shape,
                   int64_t b, int64_t h, int64_t begin, int64_t end) {
  const int64_t dim = shape.head_dim, tokens = shape.tokens;
  const float scale = 1.0f / sqrtf(static_cast<float>(dim));
  const Scratch queries(kQueries * dim), scores(kQueries * kKeys), acc(kQueries * dim);
  for (int64_t first = begin; first < end; first += kQueries) {
    const int64_t last = min64(first + kQueries, end);
    float maximum[kQueries], sum[kQueries] = {};
    for (int64_t r = 0; r < kQueries; ++r) maximum[r] = -INFINITY;
    copy_panels(q, b, h, first, last, dim, scale, kQueries, queries.data());
    clear(acc.data(), kQueries * dim);
    for (int64_t key = 0; key < tokens; key += kKeys) {
      const int64_t keys = min64(kKeys, tokens - key);
      for (int64_t col = 0; col < keys; col += kPanel) {
        panel_scores(queries.data(), k_columns + (key + col) * dim, dim, scores.data() + col);
      }
      softmax_rows(scores.data(), keys, dim, maximum, sum, acc.data());
      for (int64_t col = 0; col < dim; col += panel_cols(col, dim)) {
        const int64_t cols = panel_cols(col, dim);
        panel_product<true>(kQueries, scores.data(), kKeys, 1, v_panels + col * tokens + key * cols, cols, cols, keys,
                            acc.data() + col, dim);
      }
    }
    for (int64_t r = 0; r < last - first; ++r) {
      float* row = out + ((b * tokens + first + r) * shape.heads + h) * dim;
      for (int64_t d = 0; d < dim; ++d) row[d] = acc.data()[r * dim + d] / sum[r];
      lse[(b * shape.heads + h) * tokens + first + r] = maximum[r] + logf(sum[r]);
    }
  }
}

void attention_fwd(Heads q, Heads k, Heads v, float* out, float* lse, AttentionShape shape, int threads) {
  const int64_t all_heads = shape.batch * shape.heads;
  const int64_t rows = round_up(ceil_div(shape.tokens, ceil_div(kTasks, all_heads)), kQueries);
  const int64_t parts = ceil_div(shape.tokens, rows);
  parallel_for(all_heads * parts, threads, [=](int64_t task) {
    const int64_t b = task / parts / shape.heads, h = task / parts % shape.heads;
    const int64_t begin = task % parts * rows;
    const Scratch k_columns(round_up(shape.tokens, kPanel) * shape.head_dim), v_panels(shape.tokens * shape.head_dim);
    copy_transposed(k, b, h, 0, shape.tokens, shape.head_dim, k_columns.data());
    copy_panels(v, b, h, 0, shape.tokens, shape.head_dim, 1.0f, shape.tokens, v_panels.data());
    attend(q, k_columns.data(), v_panels.data(), out, lse, shape, b, h, begin, min64(begin + rows, shape.tokens));
  });
}

// turns the scores and dout v^T of one panel of keys into P and dS, in place
static void panel_gradients(float* p, float* ds, const float* lse, const float* delta) {
  for (int64_t r = 0; r < kQueries; ++r, p += kKeys, ds += kKeys) {
    const float row_lse = lse[r], row_delta = delta[r];
#pragma omp simd
    for (int64_t j = 0; j < kPanel; ++j) {
      p[j] = exp_in_range(at_most(at_least(p[j] - row_lse, kLowest), 1.0f));
      ds[j] = p[j] * (ds[j] - row_delta);
    }
  }
}

// What backward reads of one head again and again: scaled q and dout in blocks of kQueries rows, as
// panels, and the log-sum-exp and sum(dout * out). Rows after the last are zeros, which give no
// gradient.
struct HeadRows {
  int64_t padded;
  Scratch q, dout, lse, delta;

  HeadRows(int64_t tokens, int64_t dim)
      : padded(round_up(tokens, kQueries)), q(padded * dim), dout(padded * dim), lse(padded), delta(padded) {}
};

static void fill(const HeadRows& head, const AttentionForward& fwd, Heads dout, const AttentionShape& shape, int64_t b,
                 int64_t h) {
  const int64_t dim = shape.head_dim, tokens = shape.tokens;
  const float scale = 1.0f / sqrtf(static_cast<float>(dim));
  for (int64_t first = 0; first < tokens; first += kQueries) {
    const int64_t last = min64(first + kQueries, tokens);
    copy_panels(fwd.q, b, h, first, last, dim, scale, kQueries, head.q.data() + first * dim);
    copy_panels(dout, b, h, first, last, dim, 1.0f, kQueries, head.dout.data() + first * dim);
  }
  for (int64_t s = 0; s < head.padded; ++s) {
    float sum = 0.0f;
    if (s < tokens) {
      const float *row = row_of(fwd.out, b, h, s), *drow = row_of(dout, b, h, s);
#pragma omp simd reduction(+ : sum)
      for (int64_t d = 0; d < dim; ++d) sum += row[d] * drow[d];
    }
    head.delta.data()[s] = sum;
    head.lse.data()[s] = s < tokens ? fwd.lse[(b * shape.heads + h) * tokens + s] : 0.0f;
  }
}

static void write_rows(const float* rows, int64_t count, int64_t dim, float factor, float* to, int64_t stride) {
  for (int64_t s = 0; s < count; ++s, rows += dim, to += stride) {
    for (int64_t d = 0; d < dim; ++d) to[d] = rows[d] * factor;
  }
}

// The gradients of up to kKeys keys of one head, from `first` on.
class KeyBlock {
 public:
  KeyBlock(const AttentionForward& fwd, const AttentionShape& shape, int64_t b, int64_t h, int64_t first, int64_t keys)
      : keys_(keys), dim_(shape.head_dim), k_panels_(kKeys * dim_), k_columns_(kKeys * dim_), v_columns_(kKeys * dim_),
        p_(kQueries * kKeys), ds_(kQueries * kKeys), dk_(kKeys * dim_), dv_(kKeys * dim_) {
    copy_panels(fwd.k, b, h, first, first + keys, dim_, 1.0f, keys, k_panels_.data());
    copy_transposed(fwd.k, b, h, first, first + keys, dim_, k_columns_.data());
    copy_transposed(fwd.v, b, h, first, first + keys, dim_, v_columns_.data());
    clear(dk_.data(), kKeys * dim_);
    clear(dv_.data(), kKeys * dim_);
  }

  // adds the part of this block of keys and kQueries queries; dq [kQueries, dim] is not scaled yet
  void add(const float* q, const float* dout, const float* lse, const float* delta, float* dq) const {
    float *p = p_.data(), *ds = ds_.data();
    for (int64_t col = 0; col < keys_; col += kPanel) {
      panel_scores(q, k_columns_.data() + col * dim_, dim_, p + col);
      panel_scores(dout, v_columns_.data() + col * dim_, dim_, ds + col);
      panel_gradients(p + col, ds + col, lse, delta);
    }
    for (int64_t col = 0; col < dim_; col += panel_cols(col, dim_)) {
      const int64_t cols = panel_cols(col, dim_);
      panel_product<true>(keys_, p, 1, kKeys, dout + col * kQueries, cols, cols, kQueries, dv_.data() + col, dim_);
      panel_product<true>(keys_, ds, 1, kKeys, q + col * kQueries, cols, cols, kQueries, dk_.data() + col, dim_);
      panel_product<true>(kQueries, ds, kKeys, 1, k_panels_.data() + col * keys_, cols, cols, keys_, dq + col, dim_);
    }
  }

  void write(float* dk, float* dv, int64_t stride) const {
    write_rows(dk_.data(), keys_, dim_, 1.0f, dk, stride);
    write_rows(dv_.data(), keys_, dim_, 1.0f, dv, stride);
  }

 private:
  const int64_t keys_, dim_;
  const Scratch k_panels_, k_columns_, v_columns_, p_, ds_, dk_, dv_;
};

void attention_bwd(Heads dout, AttentionForward fwd, float* dq, float* dk, float* dv, AttentionShape shape, int threads) {
  const int64_t all_heads = shape.batch * shape.heads, dim = shape.head_dim, tokens = shape.tokens;
  const int64_t keys_per_part = round_up(ceil_div(tokens, ceil_div(kTasks, all_heads)), kKeys);
  const int64_t parts = ceil_div(tokens, keys_per_part);
  const int64_t padded = round_up(tokens, kQueries), row = shape.heads * dim;
  // for each part of the keys, its share of dq
  const Scratch partials(all_heads * parts * padded * dim);
  float* const sums = partials.data();
  parallel_for(all_heads * parts, threads, [=](int64_t task) {
    const int64_t b = task / parts / shape.heads, h = task / parts % shape.heads;
    const int64_t begin = task % parts * keys_per_part, end = min64(begin + keys_per_part, tokens);
    const HeadRows head(tokens, dim);
    fill(head, fwd, dout, shape, b, h);
    float* const part = sums + task * padded * dim;
    clear(part, padded * dim);
    for (int64_t first = begin; first < end; first += kKeys) {
      const KeyBlock block(fwd, shape, b, h, first, min64(kKeys, end - first));
      for (int64_t s = 0; s < padded; s += kQueries) {
        block.add(head.q.data() + s * dim, head.dout.data() + s * dim, head.lse.data() + s, head.delta.data() + s,
                  part + s * dim);
      }
      const int64_t at = (b * tokens + first) * row + h * dim;
      block.write(dk + at, dv + at, row);
    }
  });
  const float scale = 1.0f / sqrtf(static_cast<float>(dim));
  parallel_for(all_heads, threads, [=](int64_t task) {
    float* const first = sums + task * parts * padded * dim;
    for (int64_t part = 1; part < parts; ++part) {
      const float* more = first + part * padded * dim;
      for (int64_t i = 0; i < tokens * dim; ++i) first[i] += more[i];
    }
    write_rows(first, tokens, dim, scale, dq + (task / shape.heads * tokens * shape.heads + task % shape.heads) * dim, row);
  });
}

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
