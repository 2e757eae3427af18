// Shared by the CUDA kernels: element conversion, vector access, reductions, launch sizes. No torch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <type_traits>

#include "ops.h"

namespace openllama::cuda {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}

// To 2 ulps.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Stops the kernel, and every later CUDA call, with the message on stderr. (assert would put the build's
// folder there.)
__device__ __forceinline__ void require(bool condition, const char* message) {
  if (!condition) __assert_fail(message, "openllama", 0, "");
}

// ---------------------------------------------------------------- memory

// Two 16-bit elements in a word. (Held one by one, the compiler gives each a register of its own.)
template <class T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  static __device__ __forceinline__ float low(uint32_t word) { return __uint_as_float(word << 16); }
  static __device__ __forceinline__ float high(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
  static __device__ __forceinline__ uint32_t of(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};
template <>
struct Pair<__half> {
  static __device__ __forceinline__ float low(uint32_t word) {
    return __low2float(reinterpret_cast<const __half2&>(word));
  }
  static __device__ __forceinline__ float high(uint32_t word) {
    return __high2float(reinterpret_cast<const __half2&>(word));
  }
  static __device__ __forceinline__ uint32_t of(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

// N neighbouring elements as they lie in memory, moved 16 bytes at a time. A row waits in this form, in half
// as many registers as its floats would take.
template <class T, int N>
struct alignas(N * sizeof(T) > 16 ? 16 : N * sizeof(T)) Vec {
  static constexpr bool pairs = sizeof(T) == 2 && N % 2 == 0;
  std::conditional_t<pairs, uint32_t, T> words[pairs ? N / 2 : N];

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (pairs)
      return i % 2 ? Pair<T>::high(words[i / 2]) : Pair<T>::low(words[i / 2]);
    else
      return to_float(words[i]);
  }

  static __device__ __forceinline__ Vec of(const float (&from)[N]) {
    Vec v;
    if constexpr (pairs) {
#pragma unroll
      for (int i = 0; i < N; i += 2) v.words[i / 2] = Pair<T>::of(from[i], from[i + 1]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) v.words[i] = from_float<T>(from[i]);
    }
    return v;
  }
};

// Elements of one access.
template <class T>
constexpr int kPack = 16 / sizeof(T);

template <int N, class T>
__device__ __forceinline__ Vec<T, N> load(const T* from) {
  return *reinterpret_cast<const Vec<T, N>*>(from);
}

template <class T, int N>
__device__ __forceinline__ void store(T* to, const Vec<T, N>& v) {
  *reinterpret_cast<Vec<T, N>*>(to) = v;
}

// 16 bytes to shared memory while the thread goes on; copies_end closes a group of them.
__device__ __forceinline__ void copy_async(uint4* to, const void* from) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ __forceinline__ void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's groups but the last `pending` ones.
template <int pending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---------------------------------------------------------------- reductions

// Over `lanes` neighbouring threads of a warp, a power of two; each of them gets the result.
__device__ __forceinline__ float warp_sum(float v, int lanes = 32) {
  for (int lane = lanes / 2; lane; lane /= 2) v += __shfl_xor_sync(0xffffffff, v, lane);
  return v;
}

// Sums over the threads of equal threadIdx.y, which are whole warps, one after the other, each at the price
// of one barrier among them. `several`: such rows to a block, 15 at most. A kernel that names barriers by a
// number is given all 16, and a processor has 64: elsewhere that would leave it four blocks.
template <bool several>
struct RowSum {
  float warps[3][32];  // several, as a slow warp may still read one sum when the next one is written

  // Every thread gets the sum of its row's v; `turn` is 0, 1, 0, 1, ... from call to call, or 0, 1, 2, 0, ...
  __device__ __forceinline__ float operator()(float v, int turn) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, count = blockDim.x / 32;
    float* row = warps[turn] + (several ? threadIdx.y * count : 0);
    v = warp_sum(v);
    if (lane == 0) row[warp] = v;
    if constexpr (several)
      asm volatile("bar.sync %0, %1;" ::"r"(threadIdx.y + 1), "r"(blockDim.x) : "memory");
    else
      __syncthreads();
    return warp_sum(lane < count ? row[lane] : 0.0f);
  }
};

// ---------------------------------------------------------------- launches

inline bool aligned(const void* pointer, int64_t stride_bytes = 0) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride_bytes % 16 == 0;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of `kernel` that the current device holds at once, at least 1.
template <class Kernel>
int64_t resident_blocks(Kernel kernel, int threads, size_t shared = 0) {
  int device = 0, processors = 1, each = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared);
  return static_cast<int64_t>(std::max(each, 1)) * processors;
}

// As few blocks as take `items` in as many rounds as `resident` blocks would: all have the same number, to
// one.
inline int64_t even_blocks(int64_t items, int64_t resident) {
  return ceil_div(items, std::max<int64_t>(1, ceil_div(items, resident)));
}

// Launches a kernel that is set up while the one before it still runs (on Hopper), and that has to begin with
// wait_for_last_kernel.
template <class... Args>
cudaError_t launch_early(void (*kernel)(Args...), dim3 grid, dim3 block, cudaStream_t stream,
                         const Args&... args) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

__device__ __forceinline__ void wait_for_last_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Calls body(T{}) for the element type.
template <class F>
cudaError_t with_dtype(Dtype dtype, F body) {
  switch (dtype) {
    case Dtype::f32:
      return body(float{});
    case Dtype::bf16:
      return body(__nv_bfloat16{});
    case Dtype::f16:
      return body(__half{});
  }
  return cudaErrorInvalidValue;
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

}  // namespace openllama::cuda
