// x *= factor, in place, with the factor read on the device. Where it is 1 nothing is read or written: that
// is what the gradient of a loss mostly is, and the host can't know without waiting for it.
#include <climits>

#include "common.cuh"

namespace openllama::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 2048;

template <class T, int N>
__global__ void __launch_bounds__(kThreads) scale_kernel(Scale a) {
  const float factor = *a.factor;
  if (factor == 1.0f) return;
  const int64_t accesses = a.columns / N;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < a.rows * accesses;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    T* at = static_cast<T*>(a.x) + i / accesses * a.x_stride + i % accesses * N;
    const auto v = load<N>(at);
    float scaled[N];
#pragma unroll
    for (int n = 0; n < N; ++n) scaled[n] = v[n] * factor;
    store(at, Vec<T, N>::of(scaled));
  }
}

}  // namespace

cudaError_t scale(Scale a, cudaStream_t stream) {
  if (a.rows == 0 || a.columns == 0) return cudaSuccess;
  if (a.x_stride == a.columns) a.columns *= a.rows, a.rows = 1;
  return with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int N = kPack<T>;
    const bool packs = aligned(a.x, a.rows > 1 ? a.x_stride * sizeof(T) : 0) && a.columns % N == 0;
    const auto kernel = packs ? scale_kernel<T, N> : scale_kernel<T, 1>;
    const int64_t blocks = ceil_div(a.rows * (a.columns / (packs ? N : 1)), kThreads);
    kernel<<<static_cast<unsigned>(std::min<int64_t>(blocks, kBlocks)), kThreads, 0, stream>>>(a);
    return cudaGetLastError();
  });
}

}  // namespace openllama::cuda
