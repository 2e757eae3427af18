// Cross-entropy over rows of logits: forward, backward, and both at once, which writes their gradient over
// them. Bound by memory. The formulas are with CrossEntropy in ops.h.
//
// A block takes a row, and for both at once reads it twice; the second time much of it is still in L2. Where
// clusters can hold a row, cross_entropy_held.cu reads it once.
#include <climits>

#include "cross_entropy.cuh"

namespace openllama::cuda {
namespace {

constexpr int kThreads = 512;

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
  int64_t lead, end;  // the row's columns are lead, lead + 1, ..., end - 1

  __device__ __forceinline__ Lines(const void* row, int64_t vocab)
      : lead(N == 1 ? 0 : reinterpret_cast<uintptr_t>(row) % kLine / sizeof(T)) {
    begin = static_cast<T*>(const_cast<void*>(row)) - lead;
    end = lead + vocab;
  }
  __device__ __forceinline__ bool whole(int64_t c) const { return c >= lead && c + N <= end; }

  // Elements outside of the row are -inf.
  __device__ __forceinline__ Vec<T, N> read(int64_t c) const {
    if (whole(c)) return load<N>(begin + c);
    float v[N];
#pragma unroll
    for (int n = 0; n < N; ++n) v[n] = c + n >= lead && c + n < end ? to_float(begin[c + n]) : -INFINITY;
    return Vec<T, N>::of(v);
  }
  __device__ __forceinline__ void write(int64_t c, Vec<T, N> v) const {
    if (whole(c)) return store(begin + c, v);
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (c + n >= lead && c + n < end) begin[c + n] = from_float<T>(v[n]);
  }
};

// ---------------------------------------------------------------- a block a row

// Calls body(column) for the first of this thread's columns in each of its accesses.
template <class T, int N, class F>
__device__ __forceinline__ void for_columns(const Lines<T, N>& row, const F& body) {
  for (int64_t c = threadIdx.x * N; c < row.end; c += kThreads * N) body(c);
}

template <class T, int N, bool capped>
__device__ LogSumExp row_logsumexp(const Lines<T, N>& row, Cap<T, capped> cap) {
  LogSumExp mine;
  for_columns(row, [&](int64_t c) {
    const Vec<T, N> v = row.read(c);
    const bool whole = row.whole(c);
    float l[N];
#pragma unroll
    for (int n = 0; n < N; ++n)
      l[n] = whole || (c + n >= row.lead && c + n < row.end) ? cap(v[n]) : -INFINITY;
    mine.add<T>(l);
  });
  return block_logsumexp(mine);
}

template <class T, int N, bool capped>
__device__ void write_gradient(const Lines<T, N>& from, const Lines<T, N>& to, Gradient g,
                               Cap<T, capped> cap) {
  for_columns(from, [&](int64_t c) {
    const Vec<T, N> v = from.read(c);
    float d[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float l = cap(v[n]);
      d[n] = exp_above<T>(l, g.top) * g.scale * cap.slope(l);
    }
    to.write(c, Vec<T, N>::of(d));
  });
}

template <class T, int N, bool capped, bool fwd, bool bwd>
__global__ void __launch_bounds__(kThreads) row_kernel(CrossEntropy a) {
  const int64_t i = blockIdx.x, label = a.labels[i];
  const T* logits = static_cast<const T*>(a.logits) + i * a.logits_stride;
  T* dlogits = bwd ? static_cast<T*>(a.dlogits) + i * a.dlogits_stride : nullptr;
  const Lines<T, N> from(logits, a.vocab), to(bwd ? dlogits : logits, a.vocab);
  const Cap<T, capped> cap{a.softcap};
  if (label == a.ignore_index) {
    if (fwd && threadIdx.x == 0) write_ignored(a, i);
    float zeros[N] = {};
    if constexpr (bwd) for_columns(to, [&](int64_t c) { to.write(c, Vec<T, N>::of(zeros)); });
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
    write_gradient(from, to, g, cap);
    if ((from.lead + label) / N % kThreads == threadIdx.x)  // who has just written its column
      dlogits[label] =
          from_float<T>((exp_above<T>(at_label, g.top) * g.scale - g.dloss) * cap.slope(at_label));
  }
}

// ---------------------------------------------------------------- launchers

// Whether accesses of both tensors fall on 16 bytes together.
bool in_step(const CrossEntropy& a) {
  const int64_t size = size_of(a.dtype);
  const auto apart = reinterpret_cast<intptr_t>(a.logits) - reinterpret_cast<intptr_t>(a.dlogits);
  return !a.dlogits || (apart % kLine == 0 && (a.logits_stride - a.dlogits_stride) * size % kLine == 0);
}

template <bool fwd, bool bwd>
cudaError_t run_rows(const CrossEntropy& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  if (a.rows > INT_MAX) return cudaErrorInvalidConfiguration;  // a grid has at most 2^31 - 1 blocks
  return with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int N = kPack<T>;
    const auto kernel =
        in_step(a)
            ? (a.softcap != 0.0f ? row_kernel<T, N, true, fwd, bwd> : row_kernel<T, N, false, fwd, bwd>)
            : (a.softcap != 0.0f ? row_kernel<T, 1, true, fwd, bwd> : row_kernel<T, 1, false, fwd, bwd>);
    kernel<<<static_cast<unsigned>(a.rows), kThreads, 0, stream>>>(a);
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
