// Backward of an embedding: rows of dy that belong to one id are summed in fp32, in the order of their
// tokens, and added to that id's row of dweight. Every run gives the same bits, and nothing of the
// vocabulary's size is made.
//
// The ids come sorted. A warp takes 256 columns of a run of equal ids, whose first token it stands at.
#include <climits>

#include "common.cuh"

namespace openllama::cuda {
namespace {

constexpr int kWarps = 4;    // of a block
constexpr int kColumns = 8;  // of a thread

template <class T, class W>
__global__ void __launch_bounds__(kWarps * 32) segment_kernel(EmbeddingBwd a) {
  const int64_t first = blockIdx.x, id = a.ids[first];
  if (first && a.ids[first - 1] == id) return;
  const int64_t c = ((static_cast<int64_t>(blockIdx.y) * kWarps + threadIdx.y) * 32 + threadIdx.x) * kColumns;
  if (c >= a.hidden) return;
  const bool whole = a.packs && c + kColumns <= a.hidden;
  float sum[kColumns] = {};
  for (int64_t i = first; i < a.tokens && a.ids[i] == id; ++i) {
    const T* dy = static_cast<const T*>(a.dy) + a.order[i] * a.dy_stride + c;
#pragma unroll
    for (int half = 0; half < kColumns; half += kPack<T>) {
      if (whole) {
        const auto v = stream<kPack<T>>(dy + half);
#pragma unroll
        for (int n = 0; n < kPack<T>; ++n) sum[half + n] += v[n];
      } else {
#pragma unroll
        for (int n = 0; n < kPack<T>; ++n)
          if (c + half + n < a.hidden) sum[half + n] += to_float(dy[half + n]);
      }
    }
  }
  W* to = static_cast<W*>(a.dweight) + id * a.dweight_stride + c;
#pragma unroll
  for (int n = 0; n < kColumns; ++n)
    if (c + n < a.hidden) to[n] = from_float<W>(to_float(to[n]) + sum[n]);
}

}  // namespace

cudaError_t embedding_bwd(EmbeddingBwd a, cudaStream_t stream) {
  if (a.tokens == 0 || a.hidden == 0) return cudaSuccess;
  const int64_t parts = ceil_div(a.hidden, kWarps * 32 * kColumns);
  if (a.tokens > INT_MAX || parts > 65'535) return cudaErrorInvalidConfiguration;
  return with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    a.packs = aligned(a.dy, a.dy_stride * sizeof(T));
    const dim3 grid(static_cast<unsigned>(a.tokens), static_cast<unsigned>(parts)), block(32, kWarps);
    if (a.dweight_dtype == a.dtype)
      segment_kernel<T, T><<<grid, block, 0, stream>>>(a);
    else if (a.dweight_dtype == Dtype::f32)
      segment_kernel<T, float><<<grid, block, 0, stream>>>(a);
    else
      return cudaErrorInvalidValue;
    return cudaGetLastError();
  });
}

}  // namespace openllama::cuda
