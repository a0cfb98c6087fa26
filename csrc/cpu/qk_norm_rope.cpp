// q and k of each head: y = rot(x * rstd * w), rot on adjacent pairs; v is copied; text rows come
// before image rows. Backward, with xhat = x * rstd and g = rot^T(dy) * w:
//   dx = rstd * (g - xhat * mean(g * xhat)).
// Where the outputs were kept instead of the inputs: xhat = rot^-1(y) / w, and the sum of g * xhat is
// the sum of dy * y.
#include <math.h>

#include "rows.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

// the largest ratio of a pair's weights with which dividing by the smaller one costs less than
// 1e-6: rounding y leaves an error of 2^-24 of the pair's larger element in both
static constexpr float kMaxWeightRatio = 8.0f;
static constexpr float kMinWeight = 1e-12f;
// how far cos^2 + sin^2 may be from 1 for rot^T to serve as rot^-1
static constexpr float kMaxTableError = 1e-6f;

static int64_t table_row(const RowIndex& index, int64_t b, int64_t token) {
  if (!index.data) return token;
  const int64_t i = b * index.batch_stride + token;
  return index.bytes == 4 ? static_cast<const int32_t*>(index.data)[i] : static_cast<const int64_t*>(index.data)[i];
}

// the rows of q, k and v of one token of the joined sequence
struct Token {
  int64_t b, img_row, txt_row, joint_row;
  const float* cos;
  const float* sin;
  bool is_txt;

  Token(const HeadsShape& shape, const Rope& rope, int64_t b, int64_t s) : b(b), is_txt(s < shape.txt_rows) {
    img_row = s - shape.txt_rows;
    txt_row = s;
    joint_row = b * (shape.txt_rows + shape.img_rows) + s;
    const int64_t row = table_row(rope.index, b, s) * (shape.head_dim / 2);
    cos = rope.cos + row;
    sin = rope.sin + row;
  }
  const float* packed(const Rows& qkv, const Rows& txt_qkv) const {
    return is_txt ? row_at(txt_qkv, b, txt_row) : row_at(qkv, b, img_row);
  }
};

static inline const float* head_at(const Heads& x, const Token& token, int64_t s, int64_t head) {
  return x.data + token.b * x.batch_stride + s * x.row_stride + head * x.head_stride;
}

static Shape joint_shape(const HeadsShape& shape) {
  return {shape.batch, shape.txt_rows + shape.img_rows, 3 * shape.heads * shape.head_dim};
}

static inline float norm_rope(const float* __restrict x, const float* __restrict w, const Token& token,
                              float* __restrict y, int64_t head_dim, float eps) {
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t j = 0; j < head_dim; ++j) squares += x[j] * x[j];
  const float rstd = 1.0f / sqrtf(squares / head_dim + eps);
  for (int64_t p = 0; p < head_dim / 2; ++p) {
    const float x0 = x[2 * p] * rstd * w[2 * p];
    const float x1 = x[2 * p + 1] * rstd * w[2 * p + 1];
    y[2 * p] = x0 * token.cos[p] - x1 * token.sin[p];
    y[2 * p + 1] = x1 * token.cos[p] + x0 * token.sin[p];
  }
  return rstd;
}

static inline void norm_rope_bwd_from_output(const float* __restrict dy, const float* __restrict y,
                                             const float* __restrict w, const float* __restrict inverse_w,
                                             const Token& token, float rstd, float* __restrict dx, int64_t head_dim) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < head_dim; ++j) sum += dy[j] * y[j];
  const float mean = sum / head_dim;
  for (int64_t p = 0; p < head_dim / 2; ++p) {
    const float c = token.cos[p];
    const float s = token.sin[p];
    const float g0 = (dy[2 * p] * c + dy[2 * p + 1] * s) * w[2 * p];
    const float g1 = (dy[2 * p + 1] * c - dy[2 * p] * s) * w[2 * p + 1];
    const float xhat0 = (y[2 * p] * c + y[2 * p + 1] * s) * inverse_w[2 * p];
    const float xhat1 = (y[2 * p + 1] * c - y[2 * p] * s) * inverse_w[2 * p + 1];
    dx[2 * p] = rstd * (g0 - xhat0 * mean);
    dx[2 * p + 1] = rstd * (g1 - xhat1 * mean);
  }
}

// dx and x may be the same memory: each element is read before its gradient is written
static inline void norm_rope_bwd_from_input(const float* __restrict dy, const float* x, const float* __restrict w,
                                            const Token& token, float rstd, float* dx, int64_t head_dim) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t p = 0; p < head_dim / 2; ++p) {
    const float c = token.cos[p];
    const float s = token.sin[p];
    sum += (dy[2 * p] * c + dy[2 * p + 1] * s) * w[2 * p] * (x[2 * p] * rstd);
    sum += (dy[2 * p + 1] * c - dy[2 * p] * s) * w[2 * p + 1] * (x[2 * p + 1] * rstd);
  }
  const float mean = sum / head_dim;
#pragma omp simd
  for (int64_t p = 0; p < head_dim / 2; ++p) {
    const float c = token.cos[p];
    const float s = token.sin[p];
    const float g0 = (dy[2 * p] * c + dy[2 * p + 1] * s) * w[2 * p];
    const float g1 = (dy[2 * p + 1] * c - dy[2 * p] * s) * w[2 * p + 1];
    dx[2 * p] = rstd * (g0 - x[2 * p] * rstd * mean);
    dx[2 * p + 1] = rstd * (g1 - x[2 * p + 1] * rstd * mean);
  }
}

void qk_norm_rope_fwd(Rows qkv, Rows txt_qkv, const float* weights, Rope rope, float* q, float* k, float* v, float* rstd,
                      HeadsShape shape, float eps, int threads) {
  const int64_t head_dim = shape.head_dim;
  const int64_t width = shape.heads * head_dim;
  const RowTasks tasks(joint_shape(shape), 1);
  parallel_for(tasks.count(shape.batch), threads, [=](int64_t task) {
    for (int64_t s = tasks.begin(task); s < tasks.end(task); ++s) {
      const Token token(shape, rope, tasks.sample(task), s);
      const float* packed = token.packed(qkv, txt_qkv);
      const float* w = weights + (token.is_txt ? 2 * head_dim : 0);
      float* r = rstd + token.joint_row * 2 * shape.heads;
      float* out[2] = {q + token.joint_row * width, k + token.joint_row * width};
      for (int64_t i = 0; i < 2; ++i) {
        for (int64_t head = 0; head < shape.heads; ++head) {
          r[i * shape.heads + head] = norm_rope(packed + i * width + head * head_dim, w + i * head_dim, token,
                                                out[i] + head * head_dim, head_dim, eps);
        }
      }
      memcpy(v + token.joint_row * width, packed + 2 * width, sizeof(float) * width);
    }
  });
}

void qk_norm_rope_bwd(Heads dq, Heads dk, Heads dv, const float* q, const float* k, Rows qkv, Rows txt_qkv,
                      const float* rstd, const float* weights, Rope rope, OutRows dqkv, OutRows dtxt_qkv, HeadsShape shape,
                      int threads) {
  const int64_t head_dim = shape.head_dim;
  const int64_t width = shape.heads * head_dim;
  const int64_t weight_count = (shape.txt_rows ? 4 : 2) * head_dim;
  float* inverse = static_cast<float*>(malloc(sizeof(float) * weight_count));
  for (int64_t j = 0; j < weight_count; ++j) inverse[j] = 1.0f / weights[j];

  const RowTasks tasks(joint_shape(shape), 1);
  parallel_for(tasks.count(shape.batch), threads, [=](int64_t task) {
    for (int64_t s = tasks.begin(task); s < tasks.end(task); ++s) {
      const Token token(shape, rope, tasks.sample(task), s);
      const int64_t weight_row = token.is_txt ? 2 * head_dim : 0;
      const float* r = rstd + token.joint_row * 2 * shape.heads;
      const Heads dys[2] = {dq, dk};
      const float* ys[2] = {q, k};
      float* dpacked = token.is_txt ? row_at(dtxt_qkv, token.b, token.txt_row) : row_at(dqkv, token.b, token.img_row);
      for (int64_t i = 0; i < 2; ++i) {
        const float* w = weights + weight_row + i * head_dim;
        for (int64_t head = 0; head < shape.heads; ++head) {
          const float* dy = head_at(dys[i], token, s, head);
          const int64_t at = i * width + head * head_dim;
          const float head_rstd = r[i * shape.heads + head];
          if (ys[i]) {
            const float* y = ys[i] + token.joint_row * width + head * head_dim;
            norm_rope_bwd_from_output(dy, y, w, inverse + weight_row + i * head_dim, token, head_rstd, dpacked + at,
                                      head_dim);
          } else {
            const float* x = token.packed(qkv, txt_qkv) + at;
            norm_rope_bwd_from_input(dy, x, w, token, head_rstd, dpacked + at, head_dim);
          }
        }
      }
      for (int64_t head = 0; head < shape.heads; ++head) {
        memcpy(dpacked + 2 * width + head * head_dim, head_at(dv, token, s, head), sizeof(float) * head_dim);
      }
    }
  });
  free(inverse);
}

void qk_norm_rope_invertible(const float* weights, int64_t weight_count, const float* cos, const float* sin,
                             int64_t table_count, bool* invertible) {
  bool ok = true;
  for (int64_t j = 0; j < weight_count; j += 2) {
    const float a = fabsf(weights[j]);
    const float b = fabsf(weights[j + 1]);
    ok = ok && a >= kMinWeight && b >= kMinWeight && a <= kMaxWeightRatio * b && b <= kMaxWeightRatio * a;
  }
  int bad = 0;
#pragma omp simd reduction(+ : bad)
  for (int64_t j = 0; j < table_count; ++j) {
    bad += !(fabsf(cos[j] * cos[j] + sin[j] * sin[j] - 1.0f) <= kMaxTableError);
  }
  *invertible = ok && bad == 0;
}

void rope_index_in_range(RowIndex index, int64_t batch, int64_t tokens, int64_t table_rows, bool* in_range) {
  *in_range = true;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t s = 0; s < tokens; ++s) {
      const int64_t row = table_row(index, b, s);
      if (row < 0 || row >= table_rows) *in_range = false;
    }
  }
}

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
