// Cross-entropy over rows of logits: forward, backward, and both at once, which reads the logits once and
// writes their gradient over them. Bound by memory. The formulas are with CrossEntropy in ops.h.
//
// A row of a large vocabulary (256 KB at 128,000 in bf16) fits no block's registers. On Hopper a cluster of
// up to eight blocks takes it and holds it there between the sum and the gradient, with the next row on its
// way. The blocks send each other their parts of the sum by st.async: a cluster barrier would wait for the
// last row's stores. Elsewhere, and where rows can't be held, a block reads the row twice; the second time
// much of it is still in L2.
#include <cooperative_groups.h>

#include <climits>

#include "common.cuh"
#include "hopper/mbarrier.cuh"

namespace openllama::cuda {
namespace {

constexpr int kThreads = 512;      // of a block, at most
constexpr int kHeldThreads = 256;  // of a block that holds a part of a row, if eight such are enough
constexpr int kPacks = 8;          // accesses of a thread to a row that is held
constexpr int kMaxCluster = 8;     // what every Hopper card can do
constexpr int kLine = 128;         // bytes of a cache line
constexpr float kLog2e = 1.44269504f;

// ---------------------------------------------------------------- arithmetic

// l(x) = softcap tanh(x / softcap), or x itself. For 16-bit logits with the fast exp and division, whose
// errors of 2 ulps of fp32 rounding hides.
template <class T, bool capped>
struct Cap {
  float cap;

  __device__ __forceinline__ float operator()(float x) const {
    if constexpr (!capped) return x;
    if constexpr (sizeof(T) == 4) return cap * tanhf(x / cap);
    const float t = __fdividef(x, cap), square = t * t;
    // For small t by a polynomial (Cephes' tanhf), as 1 - 2 / (exp(2 t) + 1) would cancel.
    float small = fmaf(square, -5.70498873e-3f, 2.06390888e-2f);
    small = fmaf(small, square, -5.37397156e-2f);
    small = fmaf(small, square, 1.33314422e-1f);
    small = fmaf(small, square, -3.33332819e-1f);
    const float large = 1.0f - __fdividef(2.0f, fast_exp2(2.0f * kLog2e * t) + 1.0f);
    return cap * (square < 0.39f ? fmaf(small * square, t, t) : large);
  }
  __device__ __forceinline__ float slope(float l) const {
    return capped ? 1.0f - (l / cap) * (l / cap) : 1.0f;
  }
};

// exp(l - top). The rounding of top * log2(e) is the same for all of a row, and cancels in the softmax.
template <class T>
__device__ __forceinline__ float exp_above(float l, float top) {
  return sizeof(T) == 4 ? expf(l - top) : fast_exp2(fmaf(l, kLog2e, -top * kLog2e));
}

// The largest of some numbers, and the sum of exp(number - largest). NaN stays in the sum.
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

// Of a block, for every thread. `turn` is 0, 1, 0, 1, ... from call to call.
__device__ LogSumExp block_logsumexp(LogSumExp mine, int turn = 0) {
  __shared__ LogSumExp all_warps[2][32];  // two, as a slow warp may still read one row's when the next comes
  LogSumExp* warps = all_warps[turn];
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

__device__ __forceinline__ void write_loss(const CrossEntropy& a, int64_t i, float top, float log_sum,
                                           float at_label) {
  const float s = top + log_sum;
  a.loss[i] = log_sum - (at_label - top) + (a.z_loss != 0.0f ? a.z_loss * s * s : 0.0f);
  a.lse[2 * i] = top, a.lse[2 * i + 1] = log_sum;
}

__device__ __forceinline__ void write_ignored(const CrossEntropy& a, int64_t i) {
  a.loss[i] = a.lse[2 * i] = a.lse[2 * i + 1] = 0;
}

__device__ __forceinline__ void check_label(const CrossEntropy& a, int64_t label) {
  require(label >= 0 && label < a.vocab, "cross_entropy: a label lies outside the vocabulary");
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
    if (whole(c)) return stream<N>(begin + c);
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

// ---------------------------------------------------------------- a block a row, read once or twice

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
    float l[N], most = mine.top;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      l[n] = whole || (c + n >= row.lead && c + n < row.end) ? cap(v[n]) : -INFINITY;
      most = fmaxf(most, l[n]);
    }
    if (most > mine.top) {
      mine.sum *= expf(mine.top - most);
      mine.top = most;
    }
    const float base = mine.base();
#pragma unroll
    for (int n = 0; n < N; ++n) mine.sum += exp_above<T>(l[n], base);
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

// ---------------------------------------------------------------- a cluster a row, held in registers

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define OPENLLAMA_CLUSTERS

// As they travel between blocks.
__device__ __forceinline__ uint64_t bits_of(LogSumExp v) {
  return static_cast<uint64_t>(__float_as_uint(v.sum)) << 32 | __float_as_uint(v.top);
}
__device__ __forceinline__ LogSumExp logsumexp_of(uint64_t bits) {
  return {__uint_as_float(static_cast<uint32_t>(bits)), __uint_as_float(static_cast<uint32_t>(bits >> 32))};
}
#endif

// exp of it is 0.
template <class T>
__device__ __forceinline__ Vec<T, kPack<T>> minus_infinity() {
  float v[kPack<T>];
#pragma unroll
  for (int n = 0; n < kPack<T>; ++n) v[n] = -INFINITY;
  return Vec<T, kPack<T>>::of(v);
}

// The largest element, as two at a time where there are two in a word.
template <class T, int P>
__device__ __forceinline__ float largest(const Vec<T, kPack<T>> (&row)[P]) {
  if constexpr (sizeof(T) == 4) {
    float most = -INFINITY;
#pragma unroll
    for (int k = 0; k < P; ++k)
#pragma unroll
      for (int n = 0; n < kPack<T>; ++n) most = fmaxf(most, row[k][n]);
    return most;
  } else {
    using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    Two most = reinterpret_cast<const Two&>(row[0].words[0]);
#pragma unroll
    for (int k = 0; k < P; ++k)
#pragma unroll
      for (int n = 0; n < kPack<T> / 2; ++n)
        most = __hmax2(most, reinterpret_cast<const Two&>(row[k].words[n]));
    return fmaxf(__low2float(most), __high2float(most));
  }
}

// A row in accesses of 16 bytes. What these leave at its ends, at most 7 elements each, is for the cluster's
// first 16 threads.
template <class T, bool edged>
struct Parted {
  static constexpr int N = kPack<T>;
  T* line;                         // the cache line in which the row begins: columns are counted from here
  unsigned lead, head, tail, end;  // the row is lead ... end - 1; head ... tail - 1 in whole accesses

  __device__ __forceinline__ Parted(T* row, unsigned vocab) {
    lead = static_cast<unsigned>(reinterpret_cast<uintptr_t>(row) % kLine / sizeof(T)), end = lead + vocab;
    line = row - lead;
    head = edged ? (lead + N - 1) / N * N : lead;
    tail = edged ? max(head, end / N * N) : end;
  }
  __device__ __forceinline__ bool whole(unsigned c) const { return c - head < tail - head; }
  // The column of this thread's edge element; `end` where it has none.
  __device__ __forceinline__ unsigned edge(unsigned thread) const {
    const unsigned c = thread < N ? lead + thread : tail + thread - N;
    const bool has = thread < N ? c < head : thread < 2 * N;
    return has ? min(c, end) : end;
  }
};

// This thread's part of a row. `edged`: whether rows begin or end amid 16 bytes.
template <class T>
struct Held {
  Vec<T, kPack<T>> packs[kPacks];
  float edge;
  float at_label;
  int64_t label;
};

template <class T, bool edged>
__global__ void __launch_bounds__(kThreads) held_kernel(CrossEntropy a) {
#ifdef OPENLLAMA_CLUSTERS
  constexpr int N = kPack<T>;
  // Two, as a slow block may still read one row's when the next one's come.
  __shared__ uint64_t blocks[2][kMaxCluster], barriers[2];
  const auto cluster = cooperative_groups::this_cluster();
  const unsigned size = cluster.num_blocks(), rank = cluster.block_rank(), clusters = gridDim.x / size;
  const unsigned thread = rank * blockDim.x + threadIdx.x, first = thread * N, step = size * blockDim.x * N;
  const auto rows = static_cast<unsigned>(a.rows);
  const auto row_of = [&](unsigned i) {
    return Parted<T, edged>(static_cast<T*>(a.dlogits) + i * a.logits_stride, static_cast<unsigned>(a.vocab));
  };
  Held<T> next;
  const auto fetch = [&](unsigned i) {
    if (i >= rows) return;
    next.label = a.labels[i];
    if (next.label == a.ignore_index) return;
    check_label(a, next.label);
    const Parted<T, edged> row = row_of(i);
    next.at_label = to_float(row.line[row.lead + next.label]);  // before its gradient takes its place
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      next.packs[k] = minus_infinity<T>();
      if (row.whole(first + k * step)) next.packs[k] = stream<N>(row.line + first + k * step);
    }
    if (edged) next.edge = row.edge(thread) < row.end ? to_float(row.line[row.edge(thread)]) : -INFINITY;
  };
  if (threadIdx.x == 0) hopper::init(barriers[0], 1), hopper::init(barriers[1], 1);
  cluster.sync();  // all blocks run: from here on they may write to each other's shared memory
  unsigned i = blockIdx.x / size;
  fetch(i);
  uint32_t count = 0;  // rows that were not ignored
  for (; i < rows; i += clusters) {
    const Held<T> held = next;
    const Parted<T, edged> row = row_of(i);
    fetch(i + clusters);
    if (held.label == a.ignore_index) {  // for the whole cluster
      if (thread == 0) write_ignored(a, i);
      float zeros[N] = {};
#pragma unroll
      for (int k = 0; k < kPacks; ++k)
        if (row.whole(first + k * step)) store(row.line + first + k * step, Vec<T, N>::of(zeros));
      if (edged && row.edge(thread) < row.end) row.line[row.edge(thread)] = from_float<T>(0.0f);
      continue;
    }
    LogSumExp mine{largest(held.packs)};
    if (edged) mine.top = fmaxf(mine.top, held.edge);
    const float base = mine.base();
    if (edged) mine.sum = exp_above<T>(held.edge, base);
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (row.whole(first + k * step))
#pragma unroll
        for (int n = 0; n < N; ++n) mine.sum += exp_above<T>(held.packs[k][n], base);
    const int turn = count % 2;
    mine = block_logsumexp(mine, turn);
    if (size > 1) {
      if (threadIdx.x == 0) hopper::arrive_expecting(barriers[turn], size * sizeof(uint64_t));
      if (threadIdx.x < size) hopper::send(blocks[turn][rank], bits_of(mine), barriers[turn], threadIdx.x);
      hopper::wait(barriers[turn], count / 2 % 2);
      mine = logsumexp_of(blocks[turn][0]);
      for (unsigned other = 1; other < size; ++other) mine.merge(logsumexp_of(blocks[turn][other]));
    }
    ++count;
    const float top = mine.base(), log_sum = logf(mine.sum);
    if (thread == 0) write_loss(a, i, top, log_sum, held.at_label);
    const Gradient g = gradient_of(a, i, top, log_sum);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (!row.whole(first + k * step)) continue;
      float d[N];
#pragma unroll
      for (int n = 0; n < N; ++n) d[n] = exp_above<T>(held.packs[k][n], g.top) * g.scale;
      store(row.line + first + k * step, Vec<T, N>::of(d));
    }
    const unsigned label = row.lead + static_cast<unsigned>(held.label);
    bool wrote_it = label / N * N % step == first;
    if (edged) {
      const unsigned c = row.edge(thread);
      if (c < row.end) row.line[c] = from_float<T>(exp_above<T>(held.edge, g.top) * g.scale);
      wrote_it = row.whole(label) ? wrote_it : label == c;
    }
    if (wrote_it) row.line[label] = from_float<T>(exp_above<T>(held.at_label, g.top) * g.scale - g.dloss);
  }
#endif
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

// A cluster that holds a row: its blocks (0 where none can) and their threads.
struct Holding {
  int blocks, threads;
};

Holding holding_of(const CrossEntropy& a) {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (major < 9 || a.softcap != 0.0f || a.rows > INT_MAX) return {0, 0};
  const int64_t threads = ceil_div(a.vocab * size_of(a.dtype) + kLine, 16 * kPacks);
  int64_t blocks = 1;  // a power of two: others leave more of the card's processors without a cluster
  while (blocks < kMaxCluster && blocks * kHeldThreads < threads) blocks *= 2;
  const int64_t each = ceil_div(ceil_div(threads, blocks), 32) * 32;
  return each <= kThreads ? Holding{static_cast<int>(blocks), static_cast<int>(each)} : Holding{0, 0};
}

template <class T>
cudaError_t launch_held(const CrossEntropy& a, Holding holding, cudaStream_t stream) {
  const int64_t size = sizeof(T);
  const bool edged = !aligned(a.dlogits, a.dlogits_stride * size) || a.vocab * size % 16;
  const auto kernel = edged ? held_kernel<T, true> : held_kernel<T, false>;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(holding.blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(holding.blocks));
  config.blockDim = dim3(static_cast<unsigned>(holding.threads));
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int resident = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&resident, kernel, &config);
  if (error != cudaSuccess) return error;
  config.gridDim.x = static_cast<unsigned>(even_blocks(a.rows, std::max(resident, 1)) * holding.blocks);
  return cudaLaunchKernelEx(&config, kernel, a);
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
