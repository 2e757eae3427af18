// Shared by the CUDA kernels: element conversion, vector access, reductions. No torch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

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

// N neighbouring elements, moved as one access where N * sizeof(T) is at most 16 bytes.
template <class T, int N>
struct alignas(N * sizeof(T) > 16 ? 16 : N * sizeof(T)) Vec {
  T data[N];
};

template <int N, class T>
__device__ __forceinline__ void load(float (&to)[N], const T* from) {
  const auto v = *reinterpret_cast<const Vec<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_float(v.data[i]);
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, const float (&from)[N]) {
  Vec<T, N> v;
#pragma unroll
  for (int i = 0; i < N; ++i) v.data[i] = from_float<T>(from[i]);
  *reinterpret_cast<Vec<T, N>*>(to) = v;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lane = 16; lane; lane /= 2) v += __shfl_xor_sync(0xffffffff, v, lane);
  return v;
}

// Sum over the block; every thread gets it. `scratch` holds 33 floats; call with all threads of the block.
__device__ __forceinline__ float block_sum(float v, float* scratch) {
  v = warp_sum(v);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = (blockDim.x + 31) / 32;
  __syncthreads();  // the last sum's readers are done with scratch
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  if (warp == 0) {
    v = warp_sum(lane < warps ? scratch[lane] : 0.0f);
    if (lane == 0) scratch[32] = v;
  }
  __syncthreads();
  return scratch[32];
}

inline bool aligned(const void* pointer, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride_bytes % 16 == 0;
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
