#include "quant_decoders.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

template <class Decoder>
static void gemv_rows(const Decoder& decoder, const Gemv& gemv, int threads) {
  const int64_t cols = gemv.cols;
  const RowTasks tasks({1, gemv.rows, cols}, 1);
  parallel_for(tasks.count(1), threads, [&](int64_t task) {
    // one row in floats at a time, which stays in the first-level cache for all vectors
    float* const values = static_cast<float*>(malloc(sizeof(float) * static_cast<size_t>(cols)));
    for (int64_t row = tasks.begin(task); row < tasks.end(task); ++row) {
      decoder.template decode<F32>(row, values);
      for (int64_t b = 0; b < gemv.batch; ++b) {
        const float* __restrict x = gemv.x + b * cols;
        gemv.y[b * gemv.rows + row] = sum_of(cols, [&](int64_t j) { return values[j] * x[j]; });
      }
    }
    free(values);
  });
}

template <class T>
struct FloatDecoder {
  Weight weight;

  template <class>
  void decode(int64_t row, float* __restrict y) const {
    const typename T::Stored* __restrict x = row_of<T>(weight, row);
    for (int64_t j = 0; j < weight.cols; ++j) y[j] = T::load(x[j]);
  }
};

void gemv_float(Gemv gemv, Weight weight, int threads) {
  with_type(weight.type, [&](auto type) { gemv_rows(FloatDecoder<decltype(type)>{weight}, gemv, threads); });
}

void gemv_int8(Gemv gemv, const int8_t* packed, const float* scale, int threads) {
  gemv_rows(EightBitDecoder<Int8Code>{packed, scale, gemv.cols}, gemv, threads);
}

void gemv_fp8_e4m3(Gemv gemv, const uint8_t* packed, const float* scale, int threads) {
  gemv_rows(EightBitDecoder<E4M3Code>{packed, scale, gemv.cols}, gemv, threads);
}

void gemv_int4(Gemv gemv, Int4Parts parts, int threads) { gemv_rows(Int4Decoder(parts, gemv.cols), gemv, threads); }

void gemv_int2(Gemv gemv, Int2Parts parts, int threads) { gemv_rows(Int2Decoder(parts, gemv.cols), gemv, threads); }

void gemv_nf4(Gemv gemv, StoredNf4 parts, int threads) {
  const NestedAbsmax absmax{parts.absmax, parts.nested_absmax, parts.offset, parts.values};
  gemv_rows(Nf4Decoder<NestedAbsmax>{parts.packed, absmax, gemv.cols}, gemv, threads);
}

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
