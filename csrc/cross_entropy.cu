// Cross-entropy over rows of logits: forward, backward, and both at once, which writes their gradient over
// them. Bound by memory. The formulas are with CrossEntropy in ops.h.
//
// A block takes a row. Both at once needs it twice, and keeps what it can of it: the first accesses in shared
// memory, the last ones in registers, and those in between, if any, are read again from L2, backwards, as the
// last ones read are the likeliest to be there still. So there are only as many rows under way as these can
// keep; on Hopper a cluster of blocks takes a row that is too long for that.
#include <cooperative_groups.h>

#include <climits>

#include "cross_entropy.cuh"

namespace openllama::cuda {
namespace {

constexpr int kMaxThreads = 1024;                // of a processor: 64 registers each
[[maybe_unused]] constexpr int kMaxCluster = 8;  // what every Hopper card can do
constexpr int kAccesses = 4;                     // of a tile: what a thread reads before it works on any
constexpr int kAhead = 8;                        // accesses on their way to shared memory
constexpr int kEarly = 4;                        // of them, those asked for before the row's label is known
constexpr int kLine = 128;                       // bytes of a cache line
constexpr int kBeside = 1536;  // bytes of shared memory that a block takes beside what it holds

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

// The threads that share a row: a block's, or a cluster's.
template <bool clusters>
struct Team {
  int blocks = 1, rank = 0;

  __device__ __forceinline__ Team() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (clusters) {
      const auto cluster = cooperative_groups::this_cluster();
      blocks = cluster.num_blocks(), rank = cluster.block_rank();
      cluster.barrier_arrive();  // logsumexp waits for the others to have begun
    }
#endif
  }
  __device__ __forceinline__ int size() const { return blocks * blockDim.x; }
  __device__ __forceinline__ int thread() const { return rank * blockDim.x + threadIdx.x; }

  // For every thread; once a kernel.
  __device__ __forceinline__ LogSumExp logsumexp(LogSumExp mine) const {
    mine = block_logsumexp(mine);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if constexpr (clusters) {
      __shared__ LogSumExp parts[kMaxCluster];
      const auto cluster = cooperative_groups::this_cluster();
      cluster.barrier_wait();
      if (threadIdx.x < blocks) *cluster.map_shared_rank(&parts[rank], threadIdx.x) = mine;
      cluster.sync();
      mine = parts[0];
      for (int k = 1; k < blocks; ++k) mine.merge(parts[k]);
    }
#endif
    return mine;
  }
};

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

// ---------------------------------------------------------------- a team a row

// The largest element, two at a time where there are two in a word.
template <class T, int N, int P>
__device__ __forceinline__ float largest(const Vec<T, N> (&v)[P]) {
  if constexpr (Vec<T, N>::pairs) {
    using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    Two most[N / 2];
#pragma unroll
    for (int n = 0; n < N / 2; ++n) most[n] = reinterpret_cast<const Two&>(v[0].words[n]);
#pragma unroll
    for (int k = 1; k < P; ++k)
#pragma unroll
      for (int n = 0; n < N / 2; ++n) most[n] = __hmax2(most[n], reinterpret_cast<const Two&>(v[k].words[n]));
#pragma unroll
    for (int n = 1; n < N / 2; ++n) most[0] = __hmax2(most[0], most[n]);
    return fmaxf(__low2float(most[0]), __high2float(most[0]));
  } else {
    float most = -INFINITY;
#pragma unroll
    for (int k = 0; k < P; ++k)
#pragma unroll
      for (int n = 0; n < N; ++n) most = fmaxf(most, v[k][n]);
    return most;
  }
}

// 16 bytes to shared memory while the thread goes on, by a policy of L2.
__device__ __forceinline__ void copy_async(uint4* to, const void* from, uint64_t policy) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "l"(policy)
               : "memory");
}

// What is held of a row need not stay in L2 where rows fill it.
__device__ __forceinline__ uint64_t policy_of(bool evict_first) {
  uint64_t policy;
  if (evict_first)
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  else
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// A thread's accesses to its row from the first on, as many as its part of a block's shared memory holds.
template <class T, int N>
struct Held {
  const Lines<T, N>& row;
  const int first, step;  // columns: of access 0, from one to the next
  const int count;
  const uint64_t policy;
  uint4* const slots;

  // Asks for access k; a group of copies each.
  __device__ __forceinline__ void ask(int k) const {
    if (k < count) {
      const int c = first + k * step;
      uint4* slot = slots + k * blockDim.x;
      if (row.whole(c)) {
        copy_async(slot, row.begin + c, policy);
      } else {
        const Vec<T, N> v = row.read(c);
        *slot = reinterpret_cast<const uint4&>(v);
      }
    }
    copies_end();
  }
  __device__ __forceinline__ Vec<T, N> operator[](int k) const {
    const uint4 v = slots[k * blockDim.x];
    return reinterpret_cast<const Vec<T, N>&>(v);
  }
};

// P accesses, `step` columns apart.
template <int P, class T, int N>
__device__ __forceinline__ void read(Vec<T, N> (&to)[P], const Lines<T, N>& row, int c, int step) {
#pragma unroll
  for (int k = 0; k < P; ++k) to[k] = row.read(c + k * step);
}

template <int P, class T, int N, bool capped>
__device__ __forceinline__ void add(LogSumExp& mine, const Vec<T, N> (&v)[P], const Lines<T, N>& row, int c,
                                    int step, Cap<T, capped> cap) {
  if constexpr (capped) {
#pragma unroll
    for (int k = 0; k < P; ++k) {
      const bool whole = row.whole(c + k * step);
      float l[N], most = -INFINITY;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        l[n] = whole || row.has(c + k * step + n) ? cap(v[k][n]) : -INFINITY;  // a capped -inf is finite
        most = fmaxf(most, l[n]);
      }
      mine.raise<T>(most);
      mine.add<T, N>(l);
    }
  } else {
    mine.raise<T>(largest(v));
#pragma unroll
    for (int k = 0; k < P; ++k) mine.add<T, N>(v[k]);
  }
}

template <bool evict_first, int P, class T, int N, bool capped>
__device__ __forceinline__ void write_gradient(const Lines<T, N>& row, int c, int step,
                                               const Vec<T, N> (&v)[P], Gradient g, Cap<T, capped> cap) {
#pragma unroll
  for (int k = 0; k < P; ++k) {
    float d[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float l = cap(v[k][n]);
      d[n] = exp_above<T>(l, g.top) * g.scale * cap.slope(l);
    }
    row.template write<evict_first>(c + k * step, Vec<T, N>::of(d));
  }
}

// held_count: the accesses of a thread to its row that are held, where both passes go at once; else 0.
template <class T, int N, bool capped, bool fwd, bool bwd, bool clusters = false>
__global__ void __launch_bounds__(kMaxThreads) row_kernel(CrossEntropy a, int held_count) {
  constexpr bool both = fwd && bwd, holds = both && !capped;
  extern __shared__ uint4 slots[];
  const Team<clusters> team;
  const int64_t i = blockIdx.x / team.blocks, label = a.labels[i];
  const T* logits = static_cast<const T*>(a.logits) + i * a.logits_stride;
  T* dlogits = bwd ? static_cast<T*>(a.dlogits) + i * a.dlogits_stride : nullptr;
  const Lines<T, N> from(logits, a.vocab), to(bwd ? dlogits : logits, a.vocab);
  const Cap<T, capped> cap{a.softcap};
  const int first = team.thread() * N, step = team.size() * N, tile = kAccesses * step;
  const int rest = first + held_count * step;  // where what is not held begins
  const int tiles = max(from.end - held_count * step + tile - 1, 0) / tile;
  const Held<T, N> held{from, first, step, held_count, policy_of(tiles > 1), slots + threadIdx.x};
  if constexpr (holds)
    for (int k = 0; k < kEarly; ++k) held.ask(k);
  if (label == a.ignore_index) {
    if (fwd && team.thread() == 0) write_ignored(a, i);
    if constexpr (bwd)
      for (int c = first; c < to.end; c += step) to.template write<false>(c, Vec<T, N>{});
    copies_wait<0>();
    return;
  }
  check_label(a, label);
  const float at_label = cap(to_float(logits[label]));  // before its gradient takes its place

  Vec<T, N> last[kAccesses];  // tile, which stays in registers between the passes
  float top = 0, log_sum = 0;
  if constexpr (fwd) {
    LogSumExp mine;
    if constexpr (holds) {
      for (int k = kEarly; k < kAhead; ++k) held.ask(k);
      for (int k = 0; k < held_count; ++k) {
        copies_wait<kAhead - 1>();
        const Vec<T, N> v[1] = {held[k]};
        add(mine, v, from, first + k * step, step, cap);
        held.ask(k + kAhead);
      }
    }
    for (int k = 0; k < tiles; ++k) {
      read(last, from, rest + k * tile, step);
      add(mine, last, from, rest + k * tile, step, cap);
    }
    mine = team.logsumexp(mine);
    top = mine.base(), log_sum = logf(mine.sum);
    if (team.thread() == 0) write_loss(a, i, top, log_sum, at_label);
  } else {
    top = a.lse[2 * i], log_sum = a.lse[2 * i + 1];
  }
  if constexpr (bwd) {
    const Gradient g = gradient_of(a, i, top, log_sum);
    for (int k = tiles - 1; k >= 0; --k) {
      if (!both || k < tiles - 1) read(last, from, rest + k * tile, step);
      write_gradient<both>(to, rest + k * tile, step, last, g, cap);
    }
    if constexpr (holds)
      for (int k = 0; k < held_count; ++k) {
        const Vec<T, N> v[1] = {held[k]};
        write_gradient<both>(to, first + k * step, step, v, g, cap);
      }
    if (static_cast<int>(from.lead + label) / N % team.size() == team.thread())  // who has written its column
      dlogits[label] =
          from_float<T>((exp_above<T>(at_label, g.top) * g.scale - g.dloss) * cap.slope(at_label));
  }
}

// ---------------------------------------------------------------- launchers

// Blocks to a row (a cluster where there are several), threads of a block, and accesses that each holds.
struct Plan {
  int64_t blocks = 1, threads, held = 0;
};

// The widest block up to `most` threads that leaves few of them idle in a row of so many accesses, of which a
// thread takes `some` at a time.
int64_t width_of(int64_t accesses, int64_t some, int64_t most) {
  const auto idle = [&](int64_t threads) {
    return threads * some * ceil_div(accesses, threads * some) - accesses;
  };
  int64_t width = std::min(most, 32 * ceil_div(accesses, 32 * some));
  for (int64_t threads = width - 32; 4 * threads >= 3 * most && 100 * idle(width) > 3 * accesses;
       threads -= 32)
    if (idle(threads) < idle(width)) width = threads;
  return width;
}

// Of the current device.
int64_t attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}
int64_t shared_memory() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// Nothing held: several blocks on a processor, which hide each other's starts and sums.
Plan plan_of(int64_t accesses, int64_t each, int64_t most) {
  return {.threads = width_of(accesses, kAccesses, std::min(most, 32 * ceil_div(accesses, 32 * each)))};
}

// As many rows at once as processors and L2 keep; or by clusters, each of whose blocks fills a quarter of a
// processor.
Plan plan_held(int64_t accesses) {
  constexpr int64_t kKept = 208 * 1024 / 16, kLong = 340 * 1024 / 16, kVeryLong = 448 * 1024 / 16;
  Plan plan{};
  int64_t rows = std::clamp<int64_t>((kKept + accesses / 2) / accesses, 1, 16);  // of a processor
  if (attribute(cudaDevAttrComputeCapabilityMajor) >= 9 && accesses > kLong)
    plan.blocks = accesses > kVeryLong ? 8 : 4, rows = 4;
  const int64_t share = ceil_div(accesses, plan.blocks);
  plan.threads = width_of(share, 1, kMaxThreads / rows / 32 * 32);
  const int64_t each = ceil_div(share, plan.threads), bytes = shared_memory() / rows - kBeside;
  const int64_t rest = std::max<int64_t>(each - bytes / (16 * plan.threads), 0);
  plan.held = std::max<int64_t>(each - kAccesses * ceil_div(rest, kAccesses), 0);  // whole tiles are left
  return plan;
}

// Whether accesses of both tensors fall on 16 bytes together.
bool in_step(const CrossEntropy& a) {
  const int64_t size = size_of(a.dtype);
  const auto apart = reinterpret_cast<intptr_t>(a.logits) - reinterpret_cast<intptr_t>(a.dlogits);
  return apart % kLine == 0 && (a.logits_stride - a.dlogits_stride) * size % kLine == 0;
}

using Kernel = void (*)(CrossEntropy, int);

cudaError_t launch(Kernel kernel, const CrossEntropy& a, Plan plan, cudaStream_t stream) {
  if (plan.held) {
    // always to the same limit: another thread's launch may come in between
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_memory() - kBeside));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(plan.blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(a.rows * plan.blocks));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = static_cast<size_t>(plan.held * plan.threads * 16);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = plan.blocks > 1;
  return cudaLaunchKernelEx(&config, kernel, a, static_cast<int>(plan.held));
}

template <class T, int N, bool fwd, bool bwd>
Kernel kernel_of(const CrossEntropy& a) {
  return a.softcap != 0.0f ? row_kernel<T, N, true, fwd, bwd> : row_kernel<T, N, false, fwd, bwd>;
}

// Calls launch(T{}, accesses of 16 bytes to a row).
template <class F>
cudaError_t with_rows(const CrossEntropy& a, F launch) {
  if (a.rows == 0) return cudaSuccess;
  // a grid has at most 2^31 - 1 blocks, and columns are counted in 32 bits
  if (a.rows > INT_MAX || a.vocab > INT_MAX / 2) return cudaErrorInvalidConfiguration;
  return with_dtype(a.dtype, [&](auto t) {
    const int64_t size = sizeof(t);
    const bool lines = (reinterpret_cast<uintptr_t>(a.logits) | a.logits_stride * size) % kLine == 0;
    return launch(t, ceil_div(a.vocab * size + (lines ? 0 : kLine), 16));  // wherever rows begin in a line
  });
}

}  // namespace

cudaError_t cross_entropy_fwd(const CrossEntropy& a, cudaStream_t stream) {
  return with_rows(a, [&](auto t, int64_t accesses) {
    using T = decltype(t);
    return launch(kernel_of<T, kPack<T>, true, false>(a), a, plan_of(accesses, 32, kMaxThreads / 4), stream);
  });
}

cudaError_t cross_entropy_bwd(const CrossEntropy& a, cudaStream_t stream) {
  return with_rows(a, [&](auto t, int64_t accesses) {
    using T = decltype(t);
    const Kernel kernel =
        in_step(a) ? kernel_of<T, kPack<T>, false, true>(a) : kernel_of<T, 1, false, true>(a);
    return launch(kernel, a, plan_of(accesses, 16, kMaxThreads / 2), stream);
  });
}

// dlogits are the logits.
cudaError_t cross_entropy_fwd_bwd(const CrossEntropy& a, cudaStream_t stream) {
  return with_rows(a, [&](auto t, int64_t accesses) {
    using T = decltype(t);
    constexpr int N = kPack<T>;
    if (a.softcap != 0.0f)  // bound by its tanh
      return launch(row_kernel<T, N, true, true, true>, a, plan_of(accesses, 16, kMaxThreads / 2), stream);
    const Plan plan = plan_held(accesses);
    return launch(
        plan.blocks > 1 ? row_kernel<T, N, false, true, true, true> : row_kernel<T, N, false, true, true>, a,
        plan, stream);
  });
}

}  // namespace openllama::cuda
