// Decoding int4, int2 and nf4 to bf16: in fp32 as the references of fluxfast/quant compute it, and
// rounded once.
#include "compat.cuh"

#include "eight.cuh"
#include "ops.h"

namespace fluxfast {
namespace FLUXFAST_ISA {

// each thread decodes eight columns of a row
static constexpr int kDecodeThreads = 128;

struct Int4Eight {
  Int4Parts parts;
  int64_t groups;

  FLUXFAST_FN Eight<float> operator()(int64_t row, int64_t col, int64_t) const {
    const int64_t group = row * groups + col / Int4Format::kGroup;
    const uint8_t* bytes = parts.packed + (group * Int4Format::kGroup + col % Int4Format::kGroup) / 2;
    const float scale = BF16::load(parts.scale[group]);
    const int zero = parts.zero[group];
    Eight<float> w;
    for (int i = 0; i < kEight; ++i) {
      const int code = bytes[i / 2] >> (i % 2 ? 0 : 4) & 15;
      w.of[i] = scale * static_cast<float>(Int4Format::kUnit * code - zero);
    }
    return w;
  }
};

struct Int2Eight {
  Int2Parts parts;
  int64_t groups;

  FLUXFAST_FN Eight<float> operator()(int64_t row, int64_t col, int64_t) const {
    const int64_t in_row = col / Int2Format::kGroup, group = row * groups + in_row;
    const uint8_t* bytes = parts.packed + (group * Int2Format::kGroup + col % Int2Format::kGroup) / 4;
    const float scale = Int2Format::value(parts.scale[group], *parts.global_scale);
    const int zero = parts.zero[row * ((groups + 1) / 2) + in_row / 2] >> (in_row % 2 ? 0 : 4) & 15;
    Eight<float> w;
    for (int i = 0; i < kEight; ++i) {
      const int code = bytes[i / 4] >> (6 - i % 4 * 2) & 3;
      w.of[i] = scale * static_cast<float>(Int2Format::kUnit * code - zero);
    }
    return w;
  }
};

struct Nf4Eight {
  GpuNf4Parts parts;
  int64_t cols;

  FLUXFAST_FN float absmax(int64_t block) const {
    return parts.values[parts.absmax[block]] * parts.nested_absmax[block / Nf4Format::kNestedBlock] + *parts.offset;
  }
  // a row may begin within a block, and within a byte
  FLUXFAST_FN Eight<float> operator()(int64_t row, int64_t col, int64_t n) const {
    const int64_t first = row * cols + col;
    int64_t block = first / Nf4Format::kBlock;
    float top = absmax(block);
    Eight<float> w = {};
    for (int i = 0; i < kEight && i < n; ++i) {
      const int64_t index = first + i;
      if (index / Nf4Format::kBlock != block) top = absmax(++block);
      w.of[i] = parts.levels[parts.packed[index / 2] >> (index % 2 ? 0 : 4) & 15] * top;
    }
    return w;
  }
};

template <class Decoder>
static __global__ void dequant_kernel(Decoder decoder, uint16_t* out, int64_t cols, int64_t blocks_per_row, bool whole) {
  const int64_t row = blockIdx.x / static_cast<unsigned>(blocks_per_row);
  const int64_t piece = blockIdx.x % static_cast<unsigned>(blocks_per_row);
  const int64_t col = (piece * blockDim.x + threadIdx.x) * kEight;
  if (col >= cols) return;
  const Eight<float> w = decoder(row, col, cols - col);
  Eight<uint16_t> y;
  for (int i = 0; i < kEight; ++i) y.of[i] = BF16::store(w.of[i]);
  store_eight(out + row * cols + col, y, cols - col, whole);
}

template <class Decoder>
static const char* dequant(const Decoder& decoder, uint16_t* out, int64_t rows, int64_t cols, GpuQueue queue) {
  const DeviceScope scope(queue.device);
  if (scope.error != nullptr) return scope.error;
  // as plain C++, blocks have one thread
#if defined(FLUXFAST_GPU_ON_CPU)
  const int64_t per_block = kEight;
#else
  const int64_t per_block = kDecodeThreads * kEight;
#endif
  const int64_t blocks_per_row = (cols + per_block - 1) / per_block;
  return launch(dequant_kernel<Decoder>, rows * blocks_per_row, kDecodeThreads, queue.stream, decoder, out, cols,
                blocks_per_row, in_eights<uint16_t>(out, cols));
}

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace FLUXFAST_ISA

using namespace FLUXFAST_ISA;

const char* gpu_dequantize_int4(uint16_t* out, int64_t rows, int64_t cols, Int4Parts parts, GpuQueue queue) {
  return dequant(Int4Eight{parts, ceil_div(cols, Int4Format::kGroup)}, out, rows, cols, queue);
}

const char* gpu_dequantize_int2(uint16_t* out, int64_t rows, int64_t cols, Int2Parts parts, GpuQueue queue) {
  return dequant(Int2Eight{parts, ceil_div(cols, Int2Format::kGroup)}, out, rows, cols, queue);
}

const char* gpu_dequantize_nf4(uint16_t* out, int64_t rows, int64_t cols, GpuNf4Parts parts, GpuQueue queue) {
  return dequant(Nf4Eight{parts, cols}, out, rows, cols, queue);
}

const char* gpu_error() {
#if defined(FLUXFAST_GPU_ON_CPU)
  return nullptr;
#else
  int count = 0;
  if (const char* error = words(FLUXFAST_GPU(GetDeviceCount)(&count))) return error;
  return count == 0 ? "the driver knows no device" : nullptr;
#endif
}

}  // namespace fluxfast
