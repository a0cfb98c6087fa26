// What CUDA and HIP name differently. Nothing else in this project names HIP's functions, and no
// kernel uses their own types of 16 or 8 bits: HIP 5.2 has no bf16, and neither has a GPU that both
// agree on.
//
// A third target is plain C++, FLUXFAST_GPU_ON_CPU, in which kernels run as blocks of one thread.
// With it tests run every line of the kernels but block_max without a GPU.
#pragma once

#include <stdint.h>

#define FLUXFAST_ISA gpu

#if defined(FLUXFAST_GPU_ON_CPU)

#define FLUXFAST_FN inline
#define __global__
#define __device__

namespace fluxfast {

struct Index {
  unsigned x;
};
static Index blockIdx, threadIdx, blockDim = {1};

static inline uint32_t block_max(uint32_t value) { return value; }

struct DeviceScope {
  explicit DeviceScope(int) {}
  const char* error = nullptr;
};

template <class... Parameters, class... Arguments>
static const char* launch(void (*kernel)(Parameters...), int64_t blocks, int, uintptr_t, Arguments... arguments) {
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) kernel(arguments...);
  return nullptr;
}

}  // namespace fluxfast

#else

#define FLUXFAST_FN __host__ __device__ inline

#if defined(__HIPCC__)

#include <hip/hip_runtime.h>

#define FLUXFAST_GPU(name) hip##name
#define FLUXFAST_SHUFFLE_XOR(value, mask) __shfl_xor(value, mask)

#else

#include <cuda_runtime.h>

#define FLUXFAST_GPU(name) cuda##name
#define FLUXFAST_SHUFFLE_XOR(value, mask) __shfl_xor_sync(0xFFFFFFFFu, value, mask)

#endif

namespace fluxfast {

// what went wrong, or nullptr
static inline const char* words(FLUXFAST_GPU(Error_t) error) {
  return error == FLUXFAST_GPU(Success) ? nullptr : FLUXFAST_GPU(GetErrorString)(error);
}

// gives all threads of a block their largest value; usable once in a kernel, since its shared
// memory is not freed
static __device__ inline uint32_t block_max(uint32_t value) {
  // a block has at most 1024 threads, in warps of 32
  __shared__ uint32_t warps[32];
  for (int mask = warpSize / 2; mask > 0; mask /= 2) {
    const uint32_t other = FLUXFAST_SHUFFLE_XOR(value, mask);
    value = other > value ? other : value;
  }
  if (threadIdx.x % warpSize == 0) warps[threadIdx.x / warpSize] = value;
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / warpSize; ++warp) value = warps[warp] > value ? warps[warp] : value;
  return value;
}

// makes a device the thread's current one, and restores the one before at the end of the scope
struct DeviceScope {
  explicit DeviceScope(int device) {
    error = words(FLUXFAST_GPU(GetDevice)(&before));
    if (error == nullptr && device != before) error = words(FLUXFAST_GPU(SetDevice)(device));
  }
  ~DeviceScope() {
    if (error == nullptr) (void)FLUXFAST_GPU(SetDevice)(before);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  const char* error = nullptr;
  int before = 0;
};

template <class... Parameters, class... Arguments>
static const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, uintptr_t stream,
                          Arguments... arguments) {
  if (blocks > INT32_MAX) return "the weight has more rows than a grid has blocks";
  kernel<<<dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), 0,
           reinterpret_cast<FLUXFAST_GPU(Stream_t)>(stream)>>>(arguments...);
  return words(FLUXFAST_GPU(GetLastError)());
}

}  // namespace fluxfast

#endif
