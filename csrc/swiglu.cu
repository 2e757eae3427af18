// SwiGLU (Shazeer, 2020) on a packed [gate | up] row, forward and backward, computed in fp32. Bound by
// memory.
//
// A thread takes two accesses of 16 bytes of each input, from wherever in (rows, intermediate) they are: no
// row is too short or too odd to fill the blocks.
#include <climits>

#include "common.cuh"

namespace openllama::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSteps = 2;  // accesses of a thread to each input

// For 16-bit types the fast exp and division, whose errors of 2 ulps of fp32 rounding hides.
template <class T>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (sizeof(T) == 4)
    return 1.0f / (1.0f + expf(-x));
  else
    return __fdividef(1.0f, 1.0f + __expf(-x));
}

// ---------------------------------------------------------------- kernels

// Calls body(step, row, column of the intermediate) for this thread's accesses.
template <int N, class F>
__device__ __forceinline__ void for_accesses(const Swiglu& a, const F& body) {
  const auto packs = static_cast<unsigned>(a.intermediate / N);
  const unsigned end = static_cast<unsigned>(a.rows) * packs;  // the launcher keeps it in 32 bits
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const unsigned i = (blockIdx.x * kSteps + step) * kThreads + threadIdx.x;
    if (i < end) body(step, static_cast<int64_t>(i / packs), static_cast<int64_t>(i % packs) * N);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) fwd_kernel(Swiglu a) {
  Vec<T, N> gate[kSteps], up[kSteps];
  for_accesses<N>(a, [&](int step, int64_t row, int64_t c) {
    const T* from = static_cast<const T*>(a.gate_up) + row * a.gate_up_stride + c;
    gate[step] = stream<N>(from);
    up[step] = stream<N>(from + a.intermediate);
  });
  for_accesses<N>(a, [&](int step, int64_t row, int64_t c) {
    float act[N];
#pragma unroll
    for (int n = 0; n < N; ++n) act[n] = gate[step][n] * sigmoid<T>(gate[step][n]) * up[step][n];
    store(static_cast<T*>(a.out) + row * a.out_stride + c, Vec<T, N>::of(act));
  });
}

template <class T, int N, bool with_act>
__global__ void __launch_bounds__(kThreads) bwd_kernel(Swiglu a) {
  Vec<T, N> gate[kSteps], up[kSteps], dact[kSteps];
  for_accesses<N>(a, [&](int step, int64_t row, int64_t c) {
    const T* from = static_cast<const T*>(a.gate_up) + row * a.gate_up_stride + c;
    gate[step] = stream<N>(from);
    up[step] = stream<N>(from + a.intermediate);
    dact[step] = stream<N>(static_cast<const T*>(a.dact) + row * a.dact_stride + c);
  });
  for_accesses<N>(a, [&](int step, int64_t row, int64_t c) {
    float dgate[N], dup[N], act[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float g = gate[step][n], u = up[step][n], d = dact[step][n], s = sigmoid<T>(g);
      dgate[n] = d * u * s * (1.0f + g * (1.0f - s));
      dup[n] = d * g * s;
      act[n] = g * s * u;
    }
    T* to = static_cast<T*>(a.out) + row * a.out_stride + c;
    store(to, Vec<T, N>::of(dgate));
    store(to + a.intermediate, Vec<T, N>::of(dup));
    if constexpr (with_act) store(static_cast<T*>(a.act) + row * a.act_stride + c, Vec<T, N>::of(act));
  });
}

// ---------------------------------------------------------------- launchers

// Calls go(T{}, N, arguments, blocks) for as many rows at a time as 32 bits can number the accesses of.
template <class F>
cudaError_t for_slices(Swiglu a, const F& go) {
  if (a.rows == 0 || a.intermediate == 0) return cudaSuccess;
  return with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t size = sizeof(T);
    const bool packs = aligned(a.gate_up, a.gate_up_stride * size) && aligned(a.dact, a.dact_stride * size) &&
                       aligned(a.out, a.out_stride * size) && aligned(a.act, a.act_stride * size) &&
                       a.intermediate % kPack<T> == 0;
    const int64_t accesses = a.intermediate / (packs ? kPack<T> : 1);
    const int64_t slice = std::max<int64_t>(1, INT_MAX / accesses), rows = a.rows;
    if (accesses > INT_MAX) return cudaErrorInvalidConfiguration;
    const auto byte = [](auto* pointer, int64_t offset) { return (char*)pointer + offset; };
    cudaError_t error = cudaSuccess;
    for (int64_t row = 0; row < rows && error == cudaSuccess; row += slice) {
      Swiglu part = a;
      part.rows = std::min(slice, rows - row);
      part.gate_up = byte(a.gate_up, row * a.gate_up_stride * size);
      if (a.dact) part.dact = byte(a.dact, row * a.dact_stride * size);
      part.out = byte(a.out, row * a.out_stride * size);
      if (a.act) part.act = byte(a.act, row * a.act_stride * size);
      const auto blocks = static_cast<unsigned>(ceil_div(part.rows * accesses, kThreads * kSteps));
      if (packs)
        go(t, std::integral_constant<int, kPack<T>>{}, part, blocks);
      else
        go(t, std::integral_constant<int, 1>{}, part, blocks);
      error = cudaGetLastError();
    }
    return error;
  });
}

}  // namespace

cudaError_t swiglu_fwd(const Swiglu& a, cudaStream_t stream) {
  return for_slices(a, [&](auto t, auto n, const Swiglu& part, unsigned blocks) {
    fwd_kernel<decltype(t), n><<<blocks, kThreads, 0, stream>>>(part);
  });
}

cudaError_t swiglu_bwd(const Swiglu& a, cudaStream_t stream) {
  return for_slices(a, [&](auto t, auto n, const Swiglu& part, unsigned blocks) {
    if (part.act)
      bwd_kernel<decltype(t), n, true><<<blocks, kThreads, 0, stream>>>(part);
    else
      bwd_kernel<decltype(t), n, false><<<blocks, kThreads, 0, stream>>>(part);
  });
}

}  // namespace openllama::cuda
