// From a decoder of rows to a whole weight in floats, or to the codes with one scale a row that an
// 8-bit product takes.
//
// A decoder has `template <class T> void decode(int64_t row, typename T::Stored* y) const`, which
// writes one row.
#pragma once

#include "quant_rows.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

// writes the codes of n numbers, and returns their scale
template <class C, class T>
static inline float encode_row(const typename T::Stored* __restrict x, int64_t n, typename C::Stored* __restrict codes) {
  const float scale = scale_of<C>(top_of<T>(x, n));
  const float inverse = 1.0f / scale;
  for (int64_t j = 0; j < n; ++j) codes[j] = C::encode(T::load(x[j]) * inverse);
  return scale;
}

template <class Decoder>
static inline void decode_rows(const Decoder& decoder, const DenseWeight& weight, int threads) {
  with_type(weight.type, [&](auto type) {
    using T = decltype(type);
    for_each_row(weight.rows, weight.cols, threads, [&](int64_t row) {
      decoder.template decode<T>(row, static_cast<typename T::Stored*>(weight.data) + row * weight.cols);
    });
  });
}

template <class C, class Decoder>
static inline void recode_rows_as(const Decoder& decoder, const Codes& out, int threads) {
  const RowTasks tasks({1, out.rows, out.cols}, 1);
  typename C::Stored* const codes = static_cast<typename C::Stored*>(out.data);
  parallel_for(tasks.count(1), threads, [&](int64_t task) {
    // each row as floats, before it becomes codes
    float* const values = static_cast<float*>(malloc(sizeof(float) * static_cast<size_t>(out.cols)));
    for (int64_t row = tasks.begin(task); row < tasks.end(task); ++row) {
      decoder.template decode<F32>(row, values);
      out.scale[row] = encode_row<C, F32>(values, out.cols, codes + row * out.cols);
    }
    free(values);
  });
}

template <class Decoder>
static inline void recode_rows(const Decoder& decoder, const Codes& out, int threads) {
  if (out.type == Code::int8) return recode_rows_as<Int8Code>(decoder, out, threads);
  recode_rows_as<E4M3Code>(decoder, out, threads);
}

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
