// SwiGLU's elementwise work, in fp32: of swiglu.cu, and of hopper/linear_swiglu.cu.
#pragma once

#include "common.cuh"

namespace openllama::cuda {

// For 16-bit types by fast exp and reciprocal, whose errors of 2 ulps of fp32 rounding hides.
template <class T>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (sizeof(T) == 4) return 1.0f / (1.0f + expf(-x));
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + fast_exp2(-1.44269504f * x)));
  return y;
}

template <class T, int N>
__device__ __forceinline__ Vec<T, N> swiglu(const Vec<T, N>& gate, const Vec<T, N>& up) {
  float act[N];
#pragma unroll
  for (int n = 0; n < N; ++n) act[n] = gate[n] * sigmoid<T>(gate[n]) * up[n];
  return Vec<T, N>::of(act);
}

template <class T, int N>
struct SwigluGradient {
  Vec<T, N> gate, up, act;  // and act itself once more
};

template <class T, int N>
__device__ __forceinline__ SwigluGradient<T, N> swiglu_gradient(const Vec<T, N>& gate, const Vec<T, N>& up,
                                                                const Vec<T, N>& dact) {
  float dgate[N], dup[N], act[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const float g = gate[n], u = up[n], d = dact[n], s = sigmoid<T>(g);
    dgate[n] = d * u * s * (1.0f + g * (1.0f - s));
    dup[n] = d * g * s;
    act[n] = g * s * u;
  }
  return {Vec<T, N>::of(dgate), Vec<T, N>::of(dup), Vec<T, N>::of(act)};
}

}  // namespace openllama::cuda
