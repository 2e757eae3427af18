// SwiGLU (Shazeer, 2020) on a packed [gate | up] row, forward and backward, computed in fp32. Bound by
// memory.
//
// A thread takes an access of 16 bytes of each input, from wherever in (rows, intermediate) they are: no row
// is too short or too odd to fill the blocks.
#include <climits>

#include "swiglu.cuh"

namespace openllama::cuda {
namespace {

constexpr int kThreads = 128;

// ---------------------------------------------------------------- kernels

// Where a thread's access is: in `row`, at this column of the intermediate.
struct Place {
  int64_t row, column;
};

template <int N>
__device__ __forceinline__ bool find_place(const Swiglu& a, Place& place) {
  const auto packs = static_cast<unsigned>(a.intermediate / N);
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;  // the launcher keeps it in 32 bits
  place = {static_cast<int64_t>(i / packs), static_cast<int64_t>(i % packs) * N};
  return i < static_cast<unsigned>(a.rows) * packs;
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) fwd_kernel(Swiglu a) {
  Place at;
  if (!find_place<N>(a, at)) return;
  const T* from = static_cast<const T*>(a.gate_up) + at.row * a.gate_up_stride + at.column;
  const auto gate = load<N>(from), up = load<N>(from + a.intermediate);
  store(static_cast<T*>(a.out) + at.row * a.out_stride + at.column, swiglu(gate, up));
}

template <class T, int N, bool with_act>
__global__ void __launch_bounds__(kThreads) bwd_kernel(Swiglu a) {
  Place at;
  if (!find_place<N>(a, at)) return;
  const T* from = static_cast<const T*>(a.gate_up) + at.row * a.gate_up_stride + at.column;
  const auto gate = load<N>(from), up = load<N>(from + a.intermediate);
  const auto dact = load<N>(static_cast<const T*>(a.dact) + at.row * a.dact_stride + at.column);
  const auto d = swiglu_gradient(gate, up, dact);
  T* to = static_cast<T*>(a.out) + at.row * a.out_stride + at.column;
  store(to, d.gate);
  store(to + a.intermediate, d.up);
  if constexpr (with_act) store(static_cast<T*>(a.act) + at.row * a.act_stride + at.column, d.act);
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
      const auto blocks = static_cast<unsigned>(ceil_div(part.rows * accesses, kThreads));
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
