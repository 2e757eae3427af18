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
constexpr int kAhead = 8;    // rows on their way; a divisor of 32

// kColumns of a row from column c on; those beyond its end are 0.
template <class T>
struct Columns {
  Vec<T, kPack<T>> packs[kColumns / kPack<T>];

  __device__ __forceinline__ void load_from(const T* row, int64_t c, int64_t hidden, bool whole) {
#pragma unroll
    for (int k = 0; k < kColumns / kPack<T>; ++k) {
      if (whole) {
        packs[k] = load<kPack<T>>(row + c + k * kPack<T>);
      } else {
        float v[kPack<T>];
#pragma unroll
        for (int n = 0; n < kPack<T>; ++n) {
          const int64_t at = c + k * kPack<T> + n;
          v[n] = at < hidden ? to_float(row[at]) : 0.0f;
        }
        packs[k] = Vec<T, kPack<T>>::of(v);
      }
    }
  }
  __device__ __forceinline__ float get(int n) const { return packs[n / kPack<T>][n % kPack<T>]; }
};

template <class T, class W>
__global__ void __launch_bounds__(kWarps * 32) segment_kernel(EmbeddingBwd a) {
  const int64_t first = blockIdx.x, id = a.ids[first];
  if (first && a.ids[first - 1] == id) return;
  const int64_t c = ((static_cast<int64_t>(blockIdx.y) * kWarps + threadIdx.y) * 32 + threadIdx.x) * kColumns;
  const bool whole = a.packs && c + kColumns <= a.hidden;
  float sum[kColumns] = {};
  // 32 tokens of the run are looked up at once, and kAhead rows are on their way before the first is added.
  for (int64_t base = first;; base += 32) {
    const int64_t i = base + threadIdx.x;
    const bool mine = i < a.tokens && a.ids[i] == id;
    const int64_t token = mine ? a.order[i] : 0;
    const int count = __popc(__ballot_sync(0xffffffff, mine));
    for (int k = 0; k < count; k += kAhead) {
      Columns<T> rows[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int64_t other = __shfl_sync(0xffffffff, token, (k + j) % 32);
        if (k + j < count)
          rows[j].load_from(static_cast<const T*>(a.dy) + other * a.dy_stride, c, a.hidden, whole);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (k + j < count)
#pragma unroll
          for (int n = 0; n < kColumns; ++n) sum[n] += rows[j].get(n);
    }
    if (count < 32) break;
  }
  if (c >= a.hidden) return;
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
