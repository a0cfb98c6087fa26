// The CPU ops: what each takes, and the table of one instruction set's implementations.
//
// Memory is float32, and the last dimension of every tensor is contiguous. A tensor whose other
// dimensions have strides of their own comes as one of the structs below, with strides in elements;
// all other tensors are contiguous. fluxfast/ops has checked shapes and dtypes.
//
// Each cpu/<op>.cpp is compiled once for each instruction set, in a namespace named after it. Such
// a file keeps its helpers static and includes no C++ library header: the linker keeps one copy of
// an inline function that several files share, and that copy may be one that this processor can't
// run.
#pragma once

#include <stdint.h>

#include "gemv.h"
#include "quant.h"

namespace fluxfast {

// [B, S, D] to read
struct Rows {
  const float* data;
  int64_t batch_stride, row_stride;
};

// [B, S, D] to write
struct OutRows {
  float* data;
  int64_t batch_stride, row_stride;
};

// [B, D] to read
struct PerSample {
  const float* data;
  int64_t batch_stride;
};

// [B, S, heads, head_dim] to read
struct Heads {
  const float* data;
  int64_t batch_stride, row_stride, head_stride;
};

// each token's row in the tables; `bytes` of an element tells int32 from int64. Without data, token
// i has row i
struct RowIndex {
  const void* data;
  int64_t bytes, batch_stride;
};

// cos and sin [table_rows, head_dim / 2]
struct Rope {
  const float* cos;
  const float* sin;
  RowIndex index;
};

struct Shape {
  int64_t batch, rows, cols;
};

struct HeadsShape {
  int64_t batch, txt_rows, img_rows, heads, head_dim;
};

struct AttentionShape {
  int64_t batch, tokens, heads, head_dim;
};

// the inputs and results of attention's forward; lse [B, heads, S]
struct AttentionForward {
  Heads q, k, v, out;
  const float* lse;
};

// an adapter on the columns [first_col, first_col + cols) of the gradient: a [rank, in], b [cols,
// rank], their gradients
struct LoraAdapter {
  const float *a, *b;
  float *da, *db;
  int64_t rank, first_col, cols;
  float scale;
};

struct LoraAdapters {
  const LoraAdapter* data;
  int64_t count;
};

// the factors of a Kronecker product that takes rows a [P · R] to y [S · Q]: u [S, P], v [R, Q]
struct Kron {
  const float *u, *v;
  int64_t s, p, q, r;
};

// dw1 [P, S], dw2 [R, Q], and what the gradient of x [S · Q] is added to
struct KronGrads {
  float *dw1, *dw2;
  OutRows dx;
};

// the name and arguments of every op; a gradient that nobody needs is a null pointer
#define FLUXFAST_CPU_OPS(OP)                                                                                              \
  OP(attention_fwd, (Heads q, Heads k, Heads v, float* out, float* lse, AttentionShape shape, int threads))               \
  OP(attention_bwd, (Heads dout, AttentionForward fwd, float* dq, float* dk, float* dv, AttentionShape shape,             \
                     int threads))                                                                                        \
  OP(gated_residual_fwd, (Rows x, PerSample gate, Rows y, float* out, Shape shape, int threads))                          \
  OP(gated_residual_bwd,                                                                                                  \
     (Rows dout, PerSample gate, Rows y, float* dy, float* dgate, Shape shape, int threads))                              \
  OP(gelu_fwd, (Rows x, OutRows y, Shape shape, int threads))                                                             \
  OP(gelu_bwd, (Rows dy, Rows x, OutRows dx, Shape shape, int threads))                                                   \
  OP(kron_add, (Rows a, Kron factors, const float* y_cols, OutRows y, int64_t rows, int threads))                         \
  OP(kron_grads, (Rows dy, Rows x, Kron factors, KronGrads grads, int64_t rows, int threads))                             \
  OP(lora_grads, (Rows x, Rows dy, LoraAdapters adapters, Shape shape, int threads))                                      \
  OP(modulated_layer_norm_fwd, (Rows x, PerSample scale, PerSample shift, float* y, float* stats, Shape shape, float eps,  \
                                int threads))                                                                             \
  OP(modulated_layer_norm_bwd, (Rows dy, Rows x, PerSample scale, const float* stats, float* dx, float* dmodulation,      \
                                Shape shape, int threads))                                                                \
  OP(qk_norm_rope_fwd, (Rows qkv, Rows txt_qkv, const float* weights, Rope rope, float* q, float* k, float* v,            \
                        float* rstd, HeadsShape shape, float eps, int threads))                                           \
  OP(qk_norm_rope_bwd, (Heads dq, Heads dk, Heads dv, const float* q, const float* k, Rows qkv, Rows txt_qkv,             \
                        const float* rstd, const float* weights, Rope rope, OutRows dqkv, OutRows dtxt_qkv,               \
                        HeadsShape shape, int threads))                                                                   \
  OP(qk_norm_rope_invertible, (const float* weights, int64_t weight_count, const float* cos, const float* sin,            \
                               int64_t table_count, bool* invertible))                                                    \
  OP(rope_index_in_range, (RowIndex index, int64_t batch, int64_t tokens, int64_t table_rows, bool* in_range))            \
  FLUXFAST_QUANT_OPS(OP)                                                                                                  \
  FLUXFAST_GEMV_OPS(OP)

struct CpuOps {
  const char* isa;
#define OP(name, arguments) void(*name) arguments;
  FLUXFAST_CPU_OPS(OP)
#undef OP
};

#ifdef FLUXFAST_ISA
namespace FLUXFAST_ISA {
#define OP(name, arguments) void name arguments;
FLUXFAST_CPU_OPS(OP)
#undef OP
}  // namespace FLUXFAST_ISA
#endif

}  // namespace fluxfast
