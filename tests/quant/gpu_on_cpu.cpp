// The GPU kernels as plain C++, in blocks of one thread, for test_gpu_source.py to call.
#define FLUXFAST_GPU_ON_CPU

#include "gpu/dequant.cu"
#include "gpu/row_quant.cu"

using namespace fluxfast;

extern "C" {

void row_quant(const void* x, int64_t type, int64_t rows, int64_t cols, int64_t stride, const float* col_scale, void* q,
               int64_t q_type, float* q_scale) {
  gpu_row_quant({x, static_cast<Float>(type), rows, cols, stride}, col_scale,
                {q, static_cast<Code>(q_type), q_scale, rows, cols}, {0, 0});
}

void dequantize_int4(uint16_t* out, int64_t rows, int64_t cols, uint8_t* packed, uint16_t* scale, uint8_t* zero) {
  gpu_dequantize_int4(out, rows, cols, {packed, scale, zero}, {0, 0});
}

void dequantize_int2(uint16_t* out, int64_t rows, int64_t cols, uint8_t* packed, uint8_t* scale, uint8_t* zero,
                     float* global_scale) {
  gpu_dequantize_int2(out, rows, cols, {packed, scale, zero, global_scale}, {0, 0});
}

void dequantize_nf4(uint16_t* out, int64_t rows, int64_t cols, uint8_t* packed, uint8_t* absmax, float* nested_absmax,
                    float* offset, float* levels, float* values) {
  gpu_dequantize_nf4(out, rows, cols, {packed, absmax, nested_absmax, offset, levels, values}, {0, 0});
}

}  // extern "C"
