// Cross-entropy over rows of logits: forward, backward, and both at once, which reads the logits once and
// writes their gradient over them. Bound by memory. The formulas are with CrossEntropy in ops.h.
//
// A row of a large vocabulary (256 KB at 128,000 in bf16) fits no block's registers. On Hopper a cluster of
// up to eight blocks takes it and holds it there between the sum and the gradient; two or three clusters
// share their processors, so that one loads while another computes. Elsewhere, and where rows can't be held,
// a block reads the row twice; the second time much of it is still in L2.
#include <cooperative_groups.h>

#include <cassert>
#include <climits>

#include "common.cuh"

namespace openllama::cuda {
namespace {

constexpr int kThreads = 512;   // of a block, at most
constexpr int kPacks = 8;       // accesses of a thread to a row that is held
constexpr int kMaxCluster = 8;  // what every Hopper card can do
constexpr float kLog2e = 1.44269504f;

// ---------------------------------------------------------------- arithmetic

// exp(x) for x <= 0. The fast one's error is 2 ulps of fp32, which rounding to 16 bits hides.
template <class T>
__device__ __forceinline__ float exponential(float x) {
  return sizeof(T) == 4 ? expf(x) : exp2f(x * kLog2e);
}

// l = softcap tanh(logit / softcap) and its slope, or the logit itself.
struct Cap {
  float cap;
  __device__ __forceinline__ float operator()(float logit) const {
    return cap != 0.0f ? cap * tanhf(logit / cap) : logit;
  }
  __device__ __forceinline__ float slope(float l) const {
    return cap != 0.0f ? 1.0f - (l / cap) * (l / cap) : 1.0f;
  }
};

// The largest of some numbers, and the sum of exp(number - largest).
struct LogSumExp {
  float top = -INFINITY, sum = 0;

  // What exp is taken relative to; where all are -inf so far, anything finite.
  __device__ __forceinline__ float base() const { return top == -INFINITY ? 0.0f : top; }

  __device__ __forceinline__ void merge(LogSumExp other) {
    const float most = fmaxf(top, other.top), to = most == -INFINITY ? 0.0f : most;
    sum = sum * expf(top - to) + other.sum * expf(other.top - to);
    top = most;
  }
};

// Of a block, for every thread. NaN stays in the sum.
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

// What a row's loss and gradient are made of.
struct RowTerms {
  float top, log_sum, dloss, z;  // z: 2 z_loss s

  template <class T>
  __device__ __forceinline__ float gradient(float logit, float onehot, Cap cap) const {
    const float l = cap(logit), p = exponential<T>((l - top) - log_sum);
    return ((p - onehot) + z * p) * dloss * cap.slope(l);
  }
};

__device__ __forceinline__ RowTerms terms_of(const CrossEntropy& a, int64_t i, float top, float log_sum) {
  const float z = a.z_loss != 0.0f ? 2.0f * a.z_loss * (top + log_sum) : 0.0f;
  return {top, log_sum, a.dloss ? a.dloss[i] : 1.0f, z};
}

__device__ __forceinline__ void write_loss(const CrossEntropy& a, int64_t i, float top, float log_sum,
                                           float at_label) {
  const float s = top + log_sum;
  a.loss[i] = log_sum - (at_label - top) + (a.z_loss != 0.0f ? a.z_loss * s * s : 0.0f);
  if (a.lse) a.lse[2 * i] = top, a.lse[2 * i + 1] = log_sum;
}

__device__ __forceinline__ void write_ignored(const CrossEntropy& a, int64_t i) {
  a.loss[i] = 0;
  if (a.lse) a.lse[2 * i] = a.lse[2 * i + 1] = 0;
}

__device__ __forceinline__ void check_label(const CrossEntropy& a, int64_t label) {
  assert(label >= 0 && label < a.vocab && "cross_entropy: a label lies outside the vocabulary");
}

// ---------------------------------------------------------------- a block a row, read once or twice

// Calls body(column, Vec<T, N>) for this thread's accesses to a row, and writes what body returns where `to`
// is given. N is 1, or all rows lie on 16 bytes.
template <int N, class T, class F>
__device__ __forceinline__ void for_columns(const T* from, int64_t vocab, const F& body) {
  for (int64_t c = threadIdx.x * N; c < vocab; c += kThreads * N) body(c, load<N>(from + c));
}

template <class T, int N>
__device__ void zero_row(T* to, int64_t vocab) {
  float zeros[N] = {};
  for (int64_t c = threadIdx.x * N; c < vocab; c += kThreads * N) store(to + c, Vec<T, N>::of(zeros));
}

template <class T, int N>
__device__ LogSumExp row_logsumexp(const T* logits, int64_t vocab, Cap cap) {
  LogSumExp mine;
  for_columns<N>(logits, vocab, [&](int64_t, Vec<T, N> v) {
    float l[N], most = mine.top;
#pragma unroll
    for (int n = 0; n < N; ++n) l[n] = cap(v[n]), most = fmaxf(most, l[n]);
    if (most > mine.top) {
      mine.sum *= exponential<T>(mine.top - most);
      mine.top = most;
    }
    const float base = mine.base();
#pragma unroll
    for (int n = 0; n < N; ++n) mine.sum += exponential<T>(l[n] - base);
  });
  return block_logsumexp(mine);
}

template <class T, int N>
__device__ void write_gradient(const CrossEntropy& a, int64_t i, int64_t label, float at_label,
                               const RowTerms& terms, Cap cap) {
  const T* logits = static_cast<const T*>(a.logits) + i * a.logits_stride;
  T* dlogits = static_cast<T*>(a.dlogits) + i * a.dlogits_stride;
  for_columns<N>(logits, a.vocab, [&](int64_t c, Vec<T, N> v) {
    float d[N];
#pragma unroll
    for (int n = 0; n < N; ++n) d[n] = terms.gradient<T>(v[n], 0.0f, cap);
    store(dlogits + c, Vec<T, N>::of(d));
  });
  if (label / N % kThreads == threadIdx.x)  // who has just written its column
    dlogits[label] = from_float<T>(terms.gradient<T>(at_label, 1.0f, cap));
}

template <class T, int N, bool fwd, bool bwd>
__global__ void __launch_bounds__(kThreads) row_kernel(CrossEntropy a) {
  const int64_t i = blockIdx.x, label = a.labels[i];
  const T* logits = static_cast<const T*>(a.logits) + i * a.logits_stride;
  const Cap cap{a.softcap};
  if (label == a.ignore_index) {
    if (fwd && threadIdx.x == 0) write_ignored(a, i);
    if (bwd) zero_row<T, N>(static_cast<T*>(a.dlogits) + i * a.dlogits_stride, a.vocab);
    return;
  }
  check_label(a, label);
  const float at_label = to_float(logits[label]);  // before its gradient takes its place
  float top = 0, log_sum = 0;
  if constexpr (fwd) {
    const LogSumExp row = row_logsumexp<T, N>(logits, a.vocab, cap);
    top = row.base(), log_sum = logf(row.sum);
    if (threadIdx.x == 0) write_loss(a, i, top, log_sum, cap(at_label));
  } else {
    top = a.lse[2 * i], log_sum = a.lse[2 * i + 1];
  }
  if constexpr (bwd) write_gradient<T, N>(a, i, label, at_label, terms_of(a, i, top, log_sum), cap);
}

// ---------------------------------------------------------------- a cluster a row, held in registers

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define OPENLLAMA_CLUSTERS
#endif

template <class T>
__global__ void __launch_bounds__(kThreads, 2) held_kernel(CrossEntropy a) {
#ifdef OPENLLAMA_CLUSTERS
  constexpr int N = kPack<T>;
  __shared__ LogSumExp blocks[kMaxCluster];
  __shared__ float at_label;  // here and not in each thread, whose registers are full of logits
  const auto cluster = cooperative_groups::this_cluster();
  const unsigned size = cluster.num_blocks(), rank = cluster.block_rank(), i = blockIdx.x / size;
  T* logits = static_cast<T*>(a.dlogits) + i * a.logits_stride;
  const unsigned step = size * blockDim.x * N, first = (rank * blockDim.x + threadIdx.x) * N;
  const auto here = [&](int k) { return first + k * step < static_cast<unsigned>(a.vocab); };
  if (a.labels[i] == a.ignore_index) {
    if (rank == 0 && threadIdx.x == 0) write_ignored(a, i);
    float zeros[N] = {};
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (here(k)) store(logits + first + k * step, Vec<T, N>::of(zeros));
    return;  // the whole cluster
  }
  check_label(a, a.labels[i]);
  auto arrived = cluster.barrier_arrive();  // until all blocks run, none may write to another's shared memory
  Vec<T, N> row[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k)
    if (here(k)) row[k] = stream<N>(logits + first + k * step);
  if (threadIdx.x == 0) at_label = to_float(logits[a.labels[i]]);  // before its gradient takes its place
  LogSumExp mine;
#pragma unroll
  for (int k = 0; k < kPacks; ++k)
    if (here(k))
#pragma unroll
      for (int n = 0; n < N; ++n) mine.top = fmaxf(mine.top, row[k][n]);
  const float base = mine.base();
#pragma unroll
  for (int k = 0; k < kPacks; ++k)
    if (here(k))
#pragma unroll
      for (int n = 0; n < N; ++n) mine.sum += exponential<T>(row[k][n] - base);
  mine = block_logsumexp(mine);
  cluster.barrier_wait(std::move(arrived));
  if (threadIdx.x < size) *cluster.map_shared_rank(&blocks[rank], threadIdx.x) = mine;
  cluster.sync();
  mine = blocks[0];
  for (unsigned other = 1; other < size; ++other) mine.merge(blocks[other]);
  const RowTerms terms = terms_of(a, i, mine.base(), logf(mine.sum));
  if (rank == 0 && threadIdx.x == 0) write_loss(a, i, terms.top, terms.log_sum, at_label);
  const float scale = terms.dloss * (1.0f + terms.z);
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    if (!here(k)) continue;
    float d[N];
#pragma unroll
    for (int n = 0; n < N; ++n) d[n] = exponential<T>((row[k][n] - terms.top) - terms.log_sum) * scale;
    store(logits + first + k * step, Vec<T, N>::of(d));
  }
  const auto label = static_cast<unsigned>(a.labels[i]);
  if (label / N * N % step == first)  // who has just written its column
    logits[label] = from_float<T>(terms.gradient<T>(at_label, 1.0f, Cap{0.0f}));
#endif
}

// ---------------------------------------------------------------- launchers

bool on_16_bytes(const CrossEntropy& a) {
  const int64_t size = size_of(a.dtype);
  return aligned(a.logits, a.logits_stride * size) && aligned(a.dlogits, a.dlogits_stride * size) &&
         a.vocab * size % 16 == 0;
}

template <bool fwd, bool bwd>
cudaError_t run_rows(const CrossEntropy& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  if (a.rows > INT_MAX) return cudaErrorInvalidConfiguration;  // a grid has at most 2^31 - 1 blocks
  return with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    const auto kernel = on_16_bytes(a) ? row_kernel<T, kPack<T>, fwd, bwd> : row_kernel<T, 1, fwd, bwd>;
    kernel<<<static_cast<unsigned>(a.rows), kThreads, 0, stream>>>(a);
    return cudaGetLastError();
  });
}

// The cluster and its blocks' threads that hold a row, about 512 threads each; 0 blocks where none can.
struct Holding {
  int blocks, threads;
};

Holding holding_of(const CrossEntropy& a) {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (major < 9 || a.softcap != 0.0f || !on_16_bytes(a)) return {0, 0};
  const int64_t threads = ceil_div(a.vocab * size_of(a.dtype) / 16, kPacks);
  int blocks = 1;
  while (blocks < kMaxCluster && blocks * kThreads < threads) blocks *= 2;
  const int64_t each = ceil_div(ceil_div(threads, blocks), 32) * 32;
  return each <= kThreads && a.rows * blocks <= INT_MAX ? Holding{blocks, static_cast<int>(each)}
                                                        : Holding{0, 0};
}

template <class T>
cudaError_t launch_held(const CrossEntropy& a, Holding holding, cudaStream_t stream) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(holding.blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(a.rows * holding.blocks));
  config.blockDim = dim3(static_cast<unsigned>(holding.threads));
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, held_kernel<T>, a);
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
  const Holding holding = holding_of(a);
  if (!holding.blocks) return run_rows<true, true>(a, stream);
  return with_dtype(a.dtype, [&](auto t) { return launch_held<decltype(t)>(a, holding, stream); });
}

}  // namespace openllama::cuda
