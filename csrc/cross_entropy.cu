// Cross-entropy over rows of logits: forward, backward, and both at once, which writes their gradient over
// them. Bound by memory. The formulas are with CrossEntropy in ops.h.
//
// A block takes a row, and for both at once reads it twice, the second time from its end, which lies in L1 or
// L2 still. Wide blocks have few rows under way, so that more of each does. Where the rows are too long for
// L2, cross_entropy_held.cu reads them once.
#include <climits>

#include "cross_entropy.cuh"

namespace openllama::cuda {
namespace {

constexpr int kMaxThreads = 512;  // of a block; a processor has registers for two
constexpr int kAccesses = 4;      // that a thread has under way

// Of a block, for every thread; once a kernel.
__device__ LogSumExp block_logsumexp(LogSumExp mine) {
  __shared__ LogSumExp warps[32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, count = blockDim.x / 32;
  const auto merge_lanes = [&] {
#pragma unroll
    for (int other = 16; other; other /= 2)
      mine.merge(
          {__shfl_xor_sync(0xffffffff, mine.top, other), __shfl_xor_sync(0xffffffff, mine.sum, other)});
  };
  merge_lanes();
  if (lane == 0) warps[warp] = mine;
  __syncthreads();
  mine = lane < count ? warps[lane] : LogSumExp{};
  merge_lanes();
  return mine;
}

// What a row's gradient is made of: dlogits = (exp(l - top) scale - onehot dloss) slope.
struct Gradient {
  float top, scale, dloss;
};

__device__ __forceinline__ Gradient gradient_of(const CrossEntropy& a, int64_t i, float top, float log_sum) {
  const float dloss = a.dloss ? a.dloss[i] : 1.0f;
  const float z = a.z_loss != 0.0f ? 2.0f * a.z_loss * (top + log_sum) : 0.0f;
  return {top, (1.0f + z) * dloss * expf(-log_sum), dloss};
}

// ---------------------------------------------------------------- rows, line by line

// A row in accesses of N elements that do not cross cache lines, wherever it begins: a warp whose stores
// straddle them is a quarter slower. The first access begins `lead` elements before the row.
template <class T, int N>
struct Lines {
  T* begin;
  int lead, end;  // the row's columns are lead, lead + 1, ..., end - 1

  __device__ __forceinline__ Lines(const void* row, int64_t vocab)
      : lead(N == 1 ? 0 : reinterpret_cast<uintptr_t>(row) % kLine / sizeof(T)) {
    begin = static_cast<T*>(const_cast<void*>(row)) - lead;
    end = lead + static_cast<int>(vocab);
  }
  __device__ __forceinline__ bool has(int c) const { return c >= lead && c < end; }
  __device__ __forceinline__ bool whole(int c) const { return c >= lead && c + N <= end; }

  // Elements outside of the row are -inf.
  __device__ __forceinline__ Vec<T, N> read(int c) const {
    if (whole(c)) return load<N>(begin + c);
    float v[N];
#pragma unroll
    for (int n = 0; n < N; ++n) v[n] = has(c + n) ? to_float(begin[c + n]) : -INFINITY;
    return Vec<T, N>::of(v);
  }
  // evict_first: leaves L2 to rows that are still to be read again.
  template <bool evict_first>
  __device__ __forceinline__ void write(int c, Vec<T, N> v) const {
    if constexpr (evict_first && N > 1)
      if (whole(c)) return __stcs(reinterpret_cast<uint4*>(begin + c), reinterpret_cast<const uint4&>(v));
    if (whole(c)) return store(begin + c, v);
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (has(c + n)) begin[c + n] = from_float<T>(v[n]);
  }
};

// ---------------------------------------------------------------- a block a row

// The columns of a block's access k to its tile `tile` of a row.
template <int N>
__device__ __forceinline__ int column(int tile, int k) {
  return ((tile * kAccesses + k) * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * N;
}
template <class T, int N>
__device__ __forceinline__ int tiles_of(const Lines<T, N>& row) {
  const int tile = kAccesses * static_cast<int>(blockDim.x) * N;
  return (row.end + tile - 1) / tile;
}

template <class T, int N>
__device__ __forceinline__ void read_tile(Vec<T, N> (&to)[kAccesses], const Lines<T, N>& row, int tile) {
#pragma unroll
  for (int k = 0; k < kAccesses; ++k) to[k] = row.read(column<N>(tile, k));
}

template <class T, int N, bool capped>
__device__ LogSumExp row_logsumexp(const Lines<T, N>& row, Cap<T, capped> cap) {
  LogSumExp mine;
  for (int tile = 0, tiles = tiles_of(row); tile < tiles; ++tile) {
    Vec<T, N> v[kAccesses];
    read_tile(v, row, tile);
#pragma unroll
    for (int k = 0; k < kAccesses; ++k) {
      const int c = column<N>(tile, k);
      const bool whole = !capped || row.whole(c);  // a capped -inf is finite
      float l[N];
#pragma unroll
      for (int n = 0; n < N; ++n) l[n] = whole || row.has(c + n) ? cap(v[k][n]) : -INFINITY;
      mine.add<T>(l);
    }
  }
  return block_logsumexp(mine);
}

template <bool evict_first, class T, int N, bool capped>
__device__ void write_gradient(const Lines<T, N>& from, const Lines<T, N>& to, Gradient g,
                               Cap<T, capped> cap) {
  for (int tile = tiles_of(from) - 1; tile >= 0; --tile) {
    Vec<T, N> v[kAccesses];
    read_tile(v, from, tile);
#pragma unroll
    for (int k = 0; k < kAccesses; ++k) {
      float d[N];
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float l = cap(v[k][n]);
        d[n] = exp_above<T>(l, g.top) * g.scale * cap.slope(l);
      }
      to.template write<evict_first>(column<N>(tile, k), Vec<T, N>::of(d));
    }
  }
}

template <class T, int N>
__device__ void write_zeros(const Lines<T, N>& to) {
  const float zeros[N] = {};
  for (int c = column<N>(0, 0); c < to.end; c += blockDim.x * N)
    to.template write<false>(c, Vec<T, N>::of(zeros));
}

template <class T, int N, bool capped, bool fwd, bool bwd>
__global__ void __launch_bounds__(kMaxThreads, 2) row_kernel(CrossEntropy a) {
  const int64_t i = blockIdx.x, label = a.labels[i];
  const T* logits = static_cast<const T*>(a.logits) + i * a.logits_stride;
  T* dlogits = bwd ? static_cast<T*>(a.dlogits) + i * a.dlogits_stride : nullptr;
  const Lines<T, N> from(logits, a.vocab), to(bwd ? dlogits : logits, a.vocab);
  const Cap<T, capped> cap{a.softcap};
  if (label == a.ignore_index) {
    if (fwd && threadIdx.x == 0) write_ignored(a, i);
    if constexpr (bwd) write_zeros(to);
    return;
  }
  check_label(a, label);
  const float at_label = cap(to_float(logits[label]));  // before its gradient takes its place
  float top = 0, log_sum = 0;
  if constexpr (fwd) {
    const LogSumExp row = row_logsumexp(from, cap);
    top = row.base(), log_sum = logf(row.sum);
    if (threadIdx.x == 0) write_loss(a, i, top, log_sum, at_label);
  } else {
    top = a.lse[2 * i], log_sum = a.lse[2 * i + 1];
  }
  if constexpr (bwd) {
    const Gradient g = gradient_of(a, i, top, log_sum);
    write_gradient<fwd>(from, to, g, cap);
    if ((from.lead + label) / N % blockDim.x == threadIdx.x)  // who has just written its column
      dlogits[label] =
          from_float<T>((exp_above<T>(at_label, g.top) * g.scale - g.dloss) * cap.slope(at_label));
  }
}

// ---------------------------------------------------------------- launchers

// Threads of a block for a row of so many accesses. Forward alone has several blocks on a processor, which
// hide each other's sums. Else as many rows are under way as L2 keeps, two at least: 34 MB of 132 processors.
template <bool bwd>
unsigned threads_for(int64_t accesses) {
  constexpr int64_t share = 256 * 1024 / 16;  // of a processor, in accesses
  const int64_t rows = bwd ? std::max<int64_t>((share + accesses / 2) / accesses, 2) : 4;
  const int64_t most = std::max<int64_t>(2 * kMaxThreads / rows / 32 * 32, 32);
  const int64_t tiles = std::max<int64_t>(ceil_div(accesses, most * kAccesses), bwd ? 1 : 8);
  return static_cast<unsigned>(32 * ceil_div(accesses, 32 * kAccesses * tiles));  // few idle in the last tile
}

// Whether accesses of both tensors fall on 16 bytes together.
bool in_step(const CrossEntropy& a) {
  const int64_t size = size_of(a.dtype);
  const auto apart = reinterpret_cast<intptr_t>(a.logits) - reinterpret_cast<intptr_t>(a.dlogits);
  return !a.dlogits || (apart % kLine == 0 && (a.logits_stride - a.dlogits_stride) * size % kLine == 0);
}

template <bool fwd, bool bwd>
cudaError_t run_rows(const CrossEntropy& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  // a grid has at most 2^31 - 1 blocks, and columns are counted in 32 bits
  if (a.rows > INT_MAX || a.vocab > INT_MAX / 2) return cudaErrorInvalidConfiguration;
  return with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int N = kPack<T>;
    const auto kernel =
        in_step(a)
            ? (a.softcap != 0.0f ? row_kernel<T, N, true, fwd, bwd> : row_kernel<T, N, false, fwd, bwd>)
            : (a.softcap != 0.0f ? row_kernel<T, 1, true, fwd, bwd> : row_kernel<T, 1, false, fwd, bwd>);
    const bool lines = (reinterpret_cast<uintptr_t>(a.logits) | a.logits_stride * sizeof(T)) % kLine == 0;
    const int64_t bytes = a.vocab * sizeof(T) + (lines ? 0 : kLine);  // whole lines, wherever rows begin
    const unsigned threads = threads_for<bwd>(ceil_div(bytes, 16));
    kernel<<<static_cast<unsigned>(a.rows), threads, 0, stream>>>(a);
    return cudaGetLastError();
  });
}

}  // namespace

cudaError_t cross_entropy_fwd(const CrossEntropy& a, cudaStream_t stream) {
  return run_rows<true, false>(a, stream);
}

cudaError_t cross_entropy_bwd(const CrossEntropy& a, cudaStream_t stream) {
  return run_rows<false, true>(a, stream);
}

// dlogits are the logits.
cudaError_t cross_entropy_fwd_bwd(const CrossEntropy& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  return cross_entropy_held(a, stream, error) ? error : run_rows<true, true>(a, stream);
}

}  // namespace openllama::cuda
