// The Python module fluxfast._C. It knows nothing of torch: tensors arrive as addresses, sizes and
// strides.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#ifdef FLUXFAST_GPU_BACKEND
#include "gpu/ops.h"
#endif

namespace py = pybind11;
using namespace fluxfast;
using Address = uintptr_t;

namespace {

const float* in(Address address) { return reinterpret_cast<const float*>(address); }
float* out(Address address) { return reinterpret_cast<float*>(address); }
template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// the four strides of a tensor [B, S, heads, head_dim]; the last one is 1
using Strides = std::array<int64_t, 4>;
Heads heads_in(Address address, const Strides& strides) { return {in(address), strides[0], strides[1], strides[2]}; }

// a LoraAdapter as Python passes it
using LoraTuple = std::tuple<Address, Address, Address, Address, int64_t, int64_t, int64_t, float>;

// S, P, Q and R of a Kron
using KronSizes = std::array<int64_t, 4>;
Kron kron_of(Address u, Address v, const KronSizes& sizes) {
  return {in(u), in(v), sizes[0], sizes[1], sizes[2], sizes[3]};
}

Weight weight_in(Address data, int64_t type, int64_t rows, int64_t cols, int64_t row_stride) {
  return {at<const void>(data), static_cast<Float>(type), rows, cols, row_stride};
}
Codes codes_out(Address data, int64_t type, Address scale, int64_t rows, int64_t cols) {
  return {at<void>(data), static_cast<Code>(type), at<float>(scale), rows, cols};
}
DenseWeight weight_out(Address data, int64_t type, int64_t rows, int64_t cols) {
  return {at<void>(data), static_cast<Float>(type), rows, cols};
}
Int4Parts int4_parts(Address packed, Address scale, Address zero) {
  return {at<uint8_t>(packed), at<uint16_t>(scale), at<uint8_t>(zero)};
}
Int2Parts int2_parts(Address packed, Address scale, Address zero, Address global_scale) {
  return {at<uint8_t>(packed), at<uint8_t>(scale), at<uint8_t>(zero), out(global_scale)};
}

// a product with a weight as Python passes it: the weight's format, x, y, batch, rows, cols, and the
// addresses of the weight's parts
using GemvTuple = std::tuple<std::string, Address, Address, int64_t, int64_t, int64_t, std::vector<Address>>;
using GemvOfParts = void (*)(Gemv gemv, const Address* parts, int threads);

// "float" has the number of its type and its row stride behind its address
const std::map<std::string, GemvOfParts>& gemv_by_format() {
  static const std::map<std::string, GemvOfParts> by_format = {
      {"float",
       [](Gemv gemv, const Address* p, int threads) {
         const auto type = static_cast<int64_t>(p[1]), stride = static_cast<int64_t>(p[2]);
         cpu().gemv_float(gemv, weight_in(p[0], type, gemv.rows, gemv.cols, stride), threads);
       }},
      {"int8",
       [](Gemv gemv, const Address* p, int threads) { cpu().gemv_int8(gemv, at<int8_t>(p[0]), in(p[1]), threads); }},
      {"fp8_e4m3",
       [](Gemv gemv, const Address* p, int threads) {
         cpu().gemv_fp8_e4m3(gemv, at<uint8_t>(p[0]), in(p[1]), threads);
       }},
      {"int4",
       [](Gemv gemv, const Address* p, int threads) { cpu().gemv_int4(gemv, int4_parts(p[0], p[1], p[2]), threads); }},
      {"int2",
       [](Gemv gemv, const Address* p, int threads) {
         cpu().gemv_int2(gemv, int2_parts(p[0], p[1], p[2], p[3]), threads);
       }},
      {"nf4",
       [](Gemv gemv, const Address* p, int threads) {
         cpu().gemv_nf4(gemv, {at<uint8_t>(p[0]), at<uint8_t>(p[1]), in(p[2]), in(p[3]), in(p[4])}, threads);
       }},
  };
  return by_format;
}

#ifdef FLUXFAST_GPU_BACKEND
void check(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string(FLUXFAST_GPU_BACKEND) + ": " + error);
}
#endif

}  // namespace

// the ops of a storage format; `addresses` are its parts as Python passes them, `parts` as the ops
// take them
#define FLUXFAST_UNWRAP(...) __VA_ARGS__
#define BIND_FORMAT(name, addresses, parts)                                                                             \
  m.def(                                                                                                                \
      "quantize_" #name,                                                                                                \
      [](Address w, int64_t type, int64_t rows, int64_t cols, int64_t stride, FLUXFAST_UNWRAP addresses, int threads) { \
        cpu().quantize_##name(weight_in(w, type, rows, cols, stride), FLUXFAST_UNWRAP parts, threads);                  \
      },                                                                                                                \
      no_gil);                                                                                                          \
  m.def(                                                                                                                \
      "dequantize_" #name,                                                                                              \
      [](Address w, int64_t type, int64_t rows, int64_t cols, FLUXFAST_UNWRAP addresses, int threads) {                 \
        cpu().dequantize_##name(weight_out(w, type, rows, cols), FLUXFAST_UNWRAP parts, threads);                       \
      },                                                                                                                \
      no_gil);                                                                                                          \
  m.def(                                                                                                                \
      "codes_from_" #name,                                                                                              \
      [](Address q, int64_t type, Address q_scale, int64_t rows, int64_t cols, FLUXFAST_UNWRAP addresses,               \
         int threads) {                                                                                                 \
        cpu().codes_from_##name(codes_out(q, type, q_scale, rows, cols), FLUXFAST_UNWRAP parts, threads);               \
      },                                                                                                                \
      no_gil);

PYBIND11_MODULE(_C, m) {
  const py::call_guard<py::gil_scoped_release> no_gil;

  m.def("cpu_isas", &cpu_isas);
  m.def("use_cpu_isa", &use_cpu_isa);
  m.def("cpu_isa", [] { return std::string(cpu().isa); });

  m.def(
      "attention_fwd",
      [](Address q, Strides q_strides, Address k, Strides k_strides, Address v, Strides v_strides, Address o, Address lse,
         int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim, int threads) {
        cpu().attention_fwd(heads_in(q, q_strides), heads_in(k, k_strides), heads_in(v, v_strides), out(o), out(lse),
                            {batch, tokens, heads, head_dim}, threads);
      },
      no_gil);
  m.def(
      "attention_bwd",
      [](Address dout, Strides dout_strides, Address q, Strides q_strides, Address k, Strides k_strides, Address v,
         Strides v_strides, Address o, Strides o_strides, Address lse, Address dq, Address dk, Address dv, int64_t batch,
         int64_t tokens, int64_t heads, int64_t head_dim, int threads) {
        const AttentionForward fwd{heads_in(q, q_strides), heads_in(k, k_strides), heads_in(v, v_strides),
                                   heads_in(o, o_strides), in(lse)};
        cpu().attention_bwd(heads_in(dout, dout_strides), fwd, out(dq), out(dk), out(dv), {batch, tokens, heads, head_dim},
                            threads);
      },
      no_gil);
  m.def(
      "gated_residual_fwd",
      [](Address x, int64_t x_b, int64_t x_s, Address gate, int64_t gate_b, Address y, int64_t y_b, int64_t y_s, Address o,
         int64_t batch, int64_t rows, int64_t cols, int threads) {
        cpu().gated_residual_fwd({in(x), x_b, x_s}, {in(gate), gate_b}, {in(y), y_b, y_s}, out(o), {batch, rows, cols},
                                 threads);
      },
      no_gil);
  m.def(
      "gated_residual_bwd",
      [](Address dout, int64_t dout_b, int64_t dout_s, Address gate, int64_t gate_b, Address y, int64_t y_b, int64_t y_s,
         Address dy, Address dgate, int64_t batch, int64_t rows, int64_t cols, int threads) {
        cpu().gated_residual_bwd({in(dout), dout_b, dout_s}, {in(gate), gate_b}, {in(y), y_b, y_s}, out(dy), out(dgate),
                                 {batch, rows, cols}, threads);
      },
      no_gil);
  m.def(
      "gelu_fwd",
      [](Address x, int64_t x_s, Address y, int64_t y_s, int64_t rows, int64_t cols, int threads) {
        cpu().gelu_fwd({in(x), 0, x_s}, {out(y), 0, y_s}, {1, rows, cols}, threads);
      },
      no_gil);
  m.def(
      "gelu_bwd",
      [](Address dy, int64_t dy_s, Address x, int64_t x_s, Address dx, int64_t dx_s, int64_t rows, int64_t cols,
         int threads) {
        cpu().gelu_bwd({in(dy), 0, dy_s}, {in(x), 0, x_s}, {out(dx), 0, dx_s}, {1, rows, cols}, threads);
      },
      no_gil);
  m.def(
      "kron_add",
      [](Address a, int64_t a_s, Address u, Address v, const KronSizes& sizes, Address y_cols, Address y, int64_t y_s,
         int64_t rows, int threads) {
        cpu().kron_add({in(a), 0, a_s}, kron_of(u, v, sizes), in(y_cols), {out(y), 0, y_s}, rows, threads);
      },
      no_gil);
  m.def(
      "kron_grads",
      [](Address dy, int64_t dy_s, Address x, int64_t x_s, Address u, Address v, const KronSizes& sizes, Address dw1,
         Address dw2, Address dx, int64_t dx_s, int64_t rows, int threads) {
        const KronGrads grads{out(dw1), out(dw2), {out(dx), 0, dx_s}};
        cpu().kron_grads({in(dy), 0, dy_s}, {in(x), 0, x_s}, kron_of(u, v, sizes), grads, rows, threads);
      },
      no_gil);
  m.def(
      "lora_grads",
      [](Address x, int64_t x_s, Address dy, int64_t dy_s, const std::vector<LoraTuple>& adapters, int64_t rows, int64_t cols,
         int threads) {
        std::vector<LoraAdapter> all;
        for (const auto& [a, b, da, db, rank, first_col, width, scale] : adapters) {
          all.push_back({in(a), in(b), out(da), out(db), rank, first_col, width, scale});
        }
        const LoraAdapters list{all.data(), static_cast<int64_t>(all.size())};
        cpu().lora_grads({in(x), 0, x_s}, {in(dy), 0, dy_s}, list, {1, rows, cols}, threads);
      },
      no_gil);
  m.def(
      "modulated_layer_norm_fwd",
      [](Address x, int64_t x_b, int64_t x_s, Address scale, int64_t scale_b, Address shift, int64_t shift_b, Address y,
         Address stats, int64_t batch, int64_t rows, int64_t cols, float eps, int threads) {
        cpu().modulated_layer_norm_fwd({in(x), x_b, x_s}, {in(scale), scale_b}, {in(shift), shift_b}, out(y), out(stats),
                                       {batch, rows, cols}, eps, threads);
      },
      no_gil);
  m.def(
      "modulated_layer_norm_bwd",
      [](Address dy, int64_t dy_b, int64_t dy_s, Address x, int64_t x_b, int64_t x_s, Address scale, int64_t scale_b,
         Address stats, Address dx, Address dmodulation, int64_t batch, int64_t rows, int64_t cols, int threads) {
        cpu().modulated_layer_norm_bwd({in(dy), dy_b, dy_s}, {in(x), x_b, x_s}, {in(scale), scale_b}, in(stats), out(dx),
                                       out(dmodulation), {batch, rows, cols}, threads);
      },
      no_gil);
  m.def(
      "qk_norm_rope_fwd",
      [](Address qkv, int64_t qkv_b, int64_t qkv_s, Address txt, int64_t txt_b, int64_t txt_s, Address weights, Address cos,
         Address sin, Address index, int64_t index_bytes, int64_t index_b, Address q, Address k, Address v, Address rstd,
         int64_t batch, int64_t txt_rows, int64_t img_rows, int64_t heads, int64_t head_dim, float eps, int threads) {
        const RowIndex rows{reinterpret_cast<const void*>(index), index_bytes, index_b};
        cpu().qk_norm_rope_fwd({in(qkv), qkv_b, qkv_s}, {in(txt), txt_b, txt_s}, in(weights), {in(cos), in(sin), rows},
                               out(q), out(k), out(v), out(rstd), {batch, txt_rows, img_rows, heads, head_dim}, eps,
                               threads);
      },
      no_gil);
  m.def(
      "qk_norm_rope_bwd",
      [](Address dq, int64_t dq_b, int64_t dq_s, int64_t dq_h, Address dk, int64_t dk_b, int64_t dk_s, int64_t dk_h,
         Address dv, int64_t dv_b, int64_t dv_s, int64_t dv_h, Address q, Address k, Address qkv, int64_t qkv_b,
         int64_t qkv_s, Address txt, int64_t txt_b, int64_t txt_s, Address rstd, Address weights, Address cos, Address sin,
         Address index, int64_t index_bytes, int64_t index_b, Address dqkv, int64_t dqkv_b, int64_t dqkv_s, Address dtxt,
         int64_t dtxt_b, int64_t dtxt_s, int64_t batch, int64_t txt_rows, int64_t img_rows, int64_t heads,
         int64_t head_dim, int threads) {
        const RowIndex rows{reinterpret_cast<const void*>(index), index_bytes, index_b};
        cpu().qk_norm_rope_bwd({in(dq), dq_b, dq_s, dq_h}, {in(dk), dk_b, dk_s, dk_h}, {in(dv), dv_b, dv_s, dv_h}, in(q),
                               in(k), {in(qkv), qkv_b, qkv_s}, {in(txt), txt_b, txt_s}, in(rstd), in(weights),
                               {in(cos), in(sin), rows}, {out(dqkv), dqkv_b, dqkv_s}, {out(dtxt), dtxt_b, dtxt_s},
                               {batch, txt_rows, img_rows, heads, head_dim}, threads);
      },
      no_gil);
  m.def("qk_norm_rope_invertible",
        [](Address weights, int64_t weight_count, Address cos, Address sin, int64_t table_count) {
          bool invertible;
          cpu().qk_norm_rope_invertible(in(weights), weight_count, in(cos), in(sin), table_count, &invertible);
          return invertible;
        });
  m.def("rope_index_in_range",
        [](Address index, int64_t index_bytes, int64_t index_b, int64_t batch, int64_t tokens, int64_t table_rows) {
          bool in_range;
          cpu().rope_index_in_range({reinterpret_cast<const void*>(index), index_bytes, index_b}, batch, tokens, table_rows,
                                    &in_range);
          return in_range;
        });

  BIND_FORMAT(int8, (Address packed, Address scale), (at<int8_t>(packed), out(scale)))
  BIND_FORMAT(fp8, (Address packed, Address scale), (at<uint8_t>(packed), out(scale)))
  BIND_FORMAT(int4, (Address packed, Address scale, Address zero), (int4_parts(packed, scale, zero)))
  BIND_FORMAT(int2, (Address packed, Address scale, Address zero, Address global_scale),
              (int2_parts(packed, scale, zero, global_scale)))
  BIND_FORMAT(nf4, (Address packed, Address absmax), (at<uint8_t>(packed), out(absmax)))

  m.def("gemv_formats", [] {
    std::vector<std::string> names;
    for (const auto& [name, run] : gemv_by_format()) names.push_back(name);
    return names;
  });
  // one call for all of a model's modulation: between calls a thread would wait for Python's lock
  m.def(
      "gemv",
      [](const std::vector<GemvTuple>& products, int threads) {
        for (const auto& [format, x, y, batch, rows, cols, parts] : products)
          gemv_by_format().at(format)({in(x), out(y), batch, rows, cols}, parts.data(), threads);
      },
      no_gil);

#ifndef FLUXFAST_GPU_BACKEND
  m.def("gpu_backend", [] { return ""; });
#else
  m.def("gpu_backend", [] { return FLUXFAST_GPU_BACKEND; });
  m.def("gpu_error", &gpu_error, no_gil);
  m.def(
      "gpu_row_quant",
      [](Address x, int64_t type, int64_t rows, int64_t cols, int64_t stride, Address col_scale, Address q, int64_t q_type,
         Address q_scale, int device, Address stream) {
        check(gpu_row_quant(weight_in(x, type, rows, cols, stride), in(col_scale), codes_out(q, q_type, q_scale, rows, cols),
                            {device, stream}));
      },
      no_gil);
  m.def(
      "gpu_dequantize_int4",
      [](Address w, int64_t rows, int64_t cols, Address packed, Address scale, Address zero, int device, Address stream) {
        check(gpu_dequantize_int4(at<uint16_t>(w), rows, cols, int4_parts(packed, scale, zero), {device, stream}));
      },
      no_gil);
  m.def(
      "gpu_dequantize_int2",
      [](Address w, int64_t rows, int64_t cols, Address packed, Address scale, Address zero, Address global_scale, int device,
         Address stream) {
        check(gpu_dequantize_int2(at<uint16_t>(w), rows, cols,
                                  int2_parts(packed, scale, zero, global_scale), {device, stream}));
      },
      no_gil);
  m.def(
      "gpu_dequantize_nf4",
      [](Address w, int64_t rows, int64_t cols, Address packed, Address absmax, Address nested_absmax, Address offset,
         Address levels, Address values, int device, Address stream) {
        check(gpu_dequantize_nf4(at<uint16_t>(w), rows, cols,
                                 {at<uint8_t>(packed), at<uint8_t>(absmax), in(nested_absmax), in(offset), in(levels),
                                  in(values)},
                                 {device, stream}));
      },
      no_gil);
#endif
}
