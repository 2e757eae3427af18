// Cross-entropy's forward and backward at once on Hopper: the logits are read once, and their gradient is
// written over them. Bound by memory.
//
// A row of a large vocabulary (256 KB at 128,000 in bf16) fits no block's registers, and those under way do
// not fit L2. A cluster of up to eight blocks takes it, each warp a slice of its own: bulk copies bring the
// slices of three rows to shared memory, so that the gradient is worked out where the sum was. Nothing makes
// a block wait as one: the warps of a cluster send each other their sums by st.async, a row before they are
// needed.
#include <cooperative_groups.h>

#include <climits>

#include "cross_entropy.cuh"
#include "hopper/mbarrier.cuh"

namespace openllama::cuda {
namespace {

constexpr int kMaxWarps = 32;       // of a block
constexpr int kMaxCluster = 8;      // what every Hopper card can do
constexpr int kStages = 3;          // rows held: one becomes its gradient, one is summed, one is on its way
constexpr int kBeside = 10 * 1024;  // bytes of shared memory that a block takes beside its rows
constexpr int64_t kShortRow = 128 * 1024;  // bytes: a block a row finds most of it in L1 and L2 again

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define OPENLLAMA_CLUSTERS

constexpr int kExchanges = 4;  // sums under way: who sends one may have others still at that of 3 rows before

// As they travel between blocks.
__device__ __forceinline__ uint64_t bits_of(LogSumExp v) {
  return static_cast<uint64_t>(__float_as_uint(v.sum)) << 32 | __float_as_uint(v.top);
}
__device__ __forceinline__ LogSumExp logsumexp_of(uint64_t bits) {
  return {__uint_as_float(static_cast<uint32_t>(bits)), __uint_as_float(static_cast<uint32_t>(bits >> 32))};
}

// The largest of a warp's, for all of its lanes: as whole numbers of the same order, which one instruction
// compares.
__device__ __forceinline__ float warp_largest(float v) {
  const auto ordered = [](int bits) { return bits ^ (bits >> 31 & 0x7fffffff); };
  return __int_as_float(ordered(__reduce_max_sync(0xffffffff, ordered(__float_as_int(v)))));
}

// Of the lanes of a warp, for each of them.
template <class T>
__device__ __forceinline__ LogSumExp warp_logsumexp(LogSumExp mine) {
  LogSumExp all{warp_largest(mine.top)};
  all.sum = warp_sum(mine.sum * exp_above<T>(mine.top, all.base()));
  return all;
}

// The largest element, as two at a time where there are two in a word.
template <class T, int P>
__device__ __forceinline__ float largest(const Vec<T, kPack<T>> (&packs)[P]) {
  if constexpr (sizeof(T) == 4) {
    float most = -INFINITY;
#pragma unroll
    for (int k = 0; k < P; ++k)
#pragma unroll
      for (int n = 0; n < kPack<T>; ++n) most = fmaxf(most, packs[k][n]);
    return most;
  } else {
    using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    Two most[kPack<T> / 2];
#pragma unroll
    for (int n = 0; n < kPack<T> / 2; ++n) most[n] = reinterpret_cast<const Two&>(packs[0].words[n]);
#pragma unroll
    for (int k = 1; k < P; ++k)
#pragma unroll
      for (int n = 0; n < kPack<T> / 2; ++n)
        most[n] = __hmax2(most[n], reinterpret_cast<const Two&>(packs[k].words[n]));
#pragma unroll
    for (int n = 1; n < kPack<T> / 2; ++n) most[0] = __hmax2(most[0], most[n]);
    return fmaxf(__low2float(most[0]), __high2float(most[0]));
  }
}

// exp of it is 0.
template <class T>
__device__ __forceinline__ Vec<T, kPack<T>> minus_infinity() {
  float v[kPack<T>];
#pragma unroll
  for (int n = 0; n < kPack<T>; ++n) v[n] = -INFINITY;
  return Vec<T, kPack<T>>::of(v);
}

// A warp's slice of a row, P accesses of 16 bytes a lane, 32 apart, in shared memory as in the row, whose
// cache lines it keeps to. Columns are counted from the line in which the row begins.
template <class T, int P>
struct Slice {
  static constexpr int N = kPack<T>;
  static constexpr unsigned length = P * 32 * N;
  T* line;
  unsigned begin;      // the slice's first column
  unsigned lead, end;  // the row's columns are lead, lead + 1, ..., end - 1

  __device__ __forceinline__ Slice(T* row, unsigned vocab, unsigned begin) : begin(begin) {
    lead = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(row)) % kLine / sizeof(T);
    end = lead + vocab;
    line = row - lead;
  }
  // Of this lane's access k: its place in the slice.
  static __device__ __forceinline__ unsigned place(int k) { return (k * 32 + threadIdx.x % 32) * N; }
  __device__ __forceinline__ bool inside() const { return begin >= lead && begin + length <= end; }
  __device__ __forceinline__ bool whole(unsigned c) const { return c >= lead && c + N <= end; }
  __device__ __forceinline__ bool partial(unsigned c) const { return c < end && c + N > lead; }
  __device__ __forceinline__ bool has(unsigned c) const { return c >= lead && c < end; }

  // Brings it to `held`, one lane's call: whole 16 bytes, with up to 15 of what lies around the row.
  __device__ __forceinline__ void fetch(uint32_t held, uint32_t barrier) const {
    const unsigned from = max(begin, lead / N * N), to = min(begin + length, (end + N - 1) / N * N);
    const uint32_t bytes = from < to ? (to - from) * sizeof(T) : 0;
    hopper::arrive_expecting(barrier, bytes);
    if (bytes) hopper::bulk_load(held + (from - begin) * sizeof(T), line + from, bytes, barrier);
  }
  // Elements outside of the row are -inf.
  __device__ __forceinline__ void read(Vec<T, N> (&to)[P], const T* held) const {
    if (inside()) {
#pragma unroll
      for (int k = 0; k < P; ++k) to[k] = load<N>(held + place(k));
      return;
    }
#pragma unroll
    for (int k = 0; k < P; ++k) {
      const unsigned c = begin + place(k);
      to[k] = minus_infinity<T>();
      if (whole(c)) {
        to[k] = load<N>(held + place(k));
      } else if (partial(c)) {
        T* elements = reinterpret_cast<T*>(&to[k]);
#pragma unroll
        for (int n = 0; n < N; ++n)
          if (has(c + n)) elements[n] = held[place(k) + n];
      }
    }
  }
  __device__ __forceinline__ void write(const Vec<T, N> (&from)[P]) const {
    T* to = line + begin;
    if (inside()) {
#pragma unroll
      for (int k = 0; k < P; ++k) store(to + place(k), from[k]);
      return;
    }
#pragma unroll
    for (int k = 0; k < P; ++k) {
      const unsigned c = begin + place(k);
      if (whole(c)) {
        store(to + place(k), from[k]);
      } else if (partial(c)) {
        const T* elements = reinterpret_cast<const T*>(&from[k]);
#pragma unroll
        for (int n = 0; n < N; ++n)
          if (has(c + n)) to[place(k) + n] = elements[n];
      }
    }
  }
};

constexpr int kIgnored = -1;
#endif

// Warps for which a processor has the registers, where a lane has so many accesses to its slice.
constexpr int held_warps(int64_t accesses) { return accesses > 4 ? 28 : kMaxWarps; }

// P: accesses of a lane to its warp's slice. Shared memory: (warps, kStages, P, 32) accesses.
template <class T, int P>
__global__ void __launch_bounds__(held_warps(P) * 32, 1) held_kernel(CrossEntropy a) {
#ifdef OPENLLAMA_CLUSTERS
  constexpr int N = kPack<T>;
  constexpr unsigned length = Slice<T, P>::length;
  extern __shared__ uint4 slots[];
  __shared__ uint64_t sums[kExchanges][kMaxCluster * kMaxWarps], exchanged_barriers[kExchanges];
  __shared__ uint64_t fetched_barriers[kMaxWarps][kStages];
  const auto cluster = cooperative_groups::this_cluster();
  const unsigned blocks = cluster.num_blocks(), clusters = gridDim.x / blocks, first = blockIdx.x / blocks;
  const unsigned warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned all = blocks * warps, self = cluster.block_rank() * warps + warp;  // among the cluster's
  // This cluster's rows are first, first + clusters, ...: it takes `turns` of them.
  const unsigned turns = (static_cast<unsigned>(a.rows) - first + clusters - 1) / clusters;
  const int64_t step = clusters * a.logits_stride;
  T* row = static_cast<T*>(a.dlogits) + first * a.logits_stride;  // of the turn
  const T* held = reinterpret_cast<const T*>(slots) + warp * kStages * length;
  const uint32_t held_address = hopper::shared_address(held);
  const uint32_t fetched = hopper::shared_address(fetched_barriers[warp]);
  const uint32_t exchanged = hopper::shared_address(exchanged_barriers);
  const uint32_t to = hopper::remote_address(hopper::shared_address(&sums[0][self]), lane % blocks);
  const uint32_t to_barrier = hopper::remote_address(exchanged, lane % blocks);
  const auto slice_of = [&](T* row) {
    return Slice<T, P>(row, static_cast<unsigned>(a.vocab), self * length);
  };
  const auto read_label = [&](unsigned turn) {
    return turn < turns ? a.labels[first + static_cast<int64_t>(turn) * clusters] : a.ignore_index;
  };
  // The label of a row, of which nothing is read if it is ignored.
  const auto fetch = [&](T* row, unsigned stage, int64_t label) {
    if (label == a.ignore_index) return kIgnored;
    if (self == 0) check_label(a, label);
    if (lane == 0)
      slice_of(row).fetch(held_address + stage * length * sizeof(T), fetched + stage * sizeof(uint64_t));
    return static_cast<int>(label);
  };
  uint32_t parities = 0;  // of the stages' barriers, a bit each: those of ignored rows stand still
  // Sends the slice's sum to all blocks of the cluster.
  const auto send_sum = [&](T* row, unsigned turn, unsigned stage, bool ignored) {
    LogSumExp mine;
    if (!ignored) {
      hopper::wait(fetched + stage * sizeof(uint64_t), parities >> stage & 1);
      parities ^= 1u << stage;
      Vec<T, N> packs[P];
      slice_of(row).read(packs, held + stage * length);
      mine.top = largest(packs);
      const float base = mine.base();
      float parts[4] = {};  // so that a term does not have to wait for the one before
#pragma unroll
      for (int k = 0; k < P; ++k)
#pragma unroll
        for (int n = 0; n < N; ++n) parts[n % 4] += exp_above<T>(packs[k][n], base);
      mine.sum = (parts[0] + parts[1]) + (parts[2] + parts[3]);
      mine = warp_logsumexp<T>(mine);
    }
    const unsigned exchange = turn % kExchanges;
    const uint32_t place = exchange * sizeof(sums[0]), barrier = exchange * sizeof(uint64_t);
    if (threadIdx.x == 0) hopper::arrive_expecting(exchanged + barrier, all * sizeof(uint64_t));
    if (lane < blocks) hopper::send(to + place, bits_of(mine), to_barrier + barrier);
  };
  const auto receive_sum = [&](unsigned turn) {
    const unsigned exchange = turn % kExchanges;
    hopper::wait<true>(exchanged + exchange * sizeof(uint64_t), turn / kExchanges % 2);
    const uint64_t* from = sums[exchange] + lane;
    LogSumExp mine;
#pragma unroll 4
    for (unsigned k = 0; k < all; k += 32) mine.top = fmaxf(mine.top, logsumexp_of(from[k]).top);
    const float base = mine.base();
#pragma unroll 4
    for (unsigned k = 0; k < all; k += 32) {
      const LogSumExp part = logsumexp_of(from[k]);
      mine.sum += part.sum * exp_above<T>(part.top, base);
    }
    return warp_logsumexp<T>(mine);
  };
  const auto write_gradient = [&](T* row, int64_t i, unsigned stage, LogSumExp sum, int label) {
    const Slice<T, P> slice = slice_of(row);
    const float top = sum.base(), dloss = a.dloss ? a.dloss[i] : 1.0f;
    float scale = sizeof(T) == 4 ? dloss / sum.sum : __fdividef(dloss, sum.sum);
    if (a.z_loss != 0.0f) scale *= 1.0f + 2.0f * a.z_loss * (top + logf(sum.sum));
    const auto gradient = [&](float logit) { return exp_above<T>(logit, top) * scale; };
    Vec<T, N> packs[P];
    slice.read(packs, held + stage * length);
#pragma unroll
    for (int k = 0; k < P; ++k) {
      float d[N];
#pragma unroll
      for (int n = 0; n < N; ++n) d[n] = gradient(packs[k][n]);
      packs[k] = Vec<T, N>::of(d);
    }
    slice.write(packs);
    const unsigned c = slice.lead + static_cast<unsigned>(label), place = c - slice.begin;
    if (place >= length || place / N % 32 != lane) return;
    const float at_label = to_float(held[stage * length + place]);
    slice.line[c] = from_float<T>(gradient(at_label) - dloss);  // where this lane has just written
    write_loss(a, i, top, logf(sum.sum), at_label);
  };
  const auto write_zeros = [&](T* row, int64_t i) {
    Vec<T, N> zeros[P];
#pragma unroll
    for (int k = 0; k < P; ++k) zeros[k] = Vec<T, N>{};
    slice_of(row).write(zeros);
    if (self == 0 && lane == 0) write_ignored(a, i);
  };

  if (lane == 0)
    for (int stage = 0; stage < kStages; ++stage) hopper::init(fetched + stage * sizeof(uint64_t), 1);
  if (threadIdx.x == 0)
    for (int i = 0; i < kExchanges; ++i) hopper::init(exchanged + i * sizeof(uint64_t), 1);
  // sums that nobody sends, so that all lanes have as many to add
  for (unsigned i = threadIdx.x; i < kMaxCluster * kMaxWarps; i += blockDim.x)
    for (int k = 0; i >= all && k < kExchanges; ++k) sums[k][i] = bits_of(LogSumExp{});
  cluster.sync();  // all blocks run: from here on they may write to each other's shared memory
  int labels[kStages];
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage)
    labels[stage] = fetch(row + stage * step, stage, read_label(stage));
  int64_t next_label = read_label(kStages);
  if (turns) send_sum(row, 0, 0, labels[0] == kIgnored);
  for (unsigned turn = 0, stage = 0; turn < turns; ++turn, row += step) {
    const unsigned next = stage + 1 < kStages ? stage + 1 : 0;
    if (turn + 1 < turns) send_sum(row + step, turn + 1, next, labels[1] == kIgnored);
    const LogSumExp sum = receive_sum(turn);
    const int64_t i = first + static_cast<int64_t>(turn) * clusters;
    if (labels[0] == kIgnored)
      write_zeros(row, i);
    else
      write_gradient(row, i, stage, sum, labels[0]);
    __syncwarp();  // all lanes have read what is held there
#pragma unroll
    for (int k = 0; k + 1 < kStages; ++k) labels[k] = labels[k + 1];
    labels[kStages - 1] = fetch(row + kStages * step, stage, next_label);
    next_label = read_label(turn + kStages + 1);
    stage = next;
  }
#endif
}

// ---------------------------------------------------------------- launcher

// A cluster that holds a row: its blocks (0 where none can), their warps, and a lane's accesses to its slice.
struct Holding {
  int64_t blocks, warps, accesses;

  int64_t shared() const { return warps * kStages * accesses * 32 * 16; }
  // Whether a processor has the registers and the shared memory for `count` blocks.
  bool fits(int64_t count, int64_t memory) const {
    return count * warps <= held_warps(accesses) && count * (shared() + kBeside) <= memory;
  }
  bool enough(int64_t memory) const {
    return fits(2, memory) || (fits(1, memory) && warps * accesses >= 4 * kMaxWarps);
  }
};

// Where the fewest lanes are left without work; among equals, blocks of which two share a processor and do
// not wait at the same time, then the fewest. None where a block a row is faster: more than 3% of the lanes
// without work, or a single block too small for its processor.
Holding holding_of(const CrossEntropy& a, int64_t memory) {
  Holding best{};
  if (a.softcap != 0.0f || a.rows > INT_MAX || a.vocab > INT_MAX / 2) return best;
  if (a.vocab * size_of(a.dtype) <= kShortRow) return best;
  const int64_t accesses = ceil_div(a.vocab * size_of(a.dtype) + kLine, 32 * 16);  // of a warp to a row
  int64_t most = 0;
  for (int64_t blocks = 2; blocks <= kMaxCluster; blocks *= 2)
    for (const int64_t each : {4, 5}) {
      const Holding holding{blocks, ceil_div(ceil_div(accesses, blocks), each), each};
      const int64_t percent = 100 * accesses / (blocks * holding.warps * each);
      const int64_t score = 2 * percent + holding.fits(2, memory);
      if (percent >= 97 && score > most && holding.enough(memory)) best = holding, most = score;
    }
  return best;
}

// Shared memory of a processor; 0 where there are no clusters.
int64_t held_memory() {
  int device = 0, major = 0, most = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return major < 9 ? 0 : most;
}

template <class T>
cudaError_t launch_held(const CrossEntropy& a, Holding holding, int64_t memory, cudaStream_t stream) {
  const auto kernel = holding.accesses == 4 ? held_kernel<T, 4> : held_kernel<T, 5>;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(holding.blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(holding.blocks));
  config.blockDim = dim3(static_cast<unsigned>(holding.warps * 32));
  config.dynamicSmemBytes = static_cast<size_t>(holding.shared());
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int resident = 0;
  // always to the same limit: another thread's launch may come in between
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(memory - kBeside));
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&resident, kernel, &config);
  if (error != cudaSuccess) return error;
  config.gridDim.x = static_cast<unsigned>(even_blocks(a.rows, std::max(resident, 1)) * holding.blocks);
  return cudaLaunchKernelEx(&config, kernel, a);
}

}  // namespace

bool cross_entropy_held(const CrossEntropy& a, cudaStream_t stream, cudaError_t& error) {
  const int64_t memory = held_memory();
  const Holding holding = holding_of(a, memory);
  if (!holding.blocks) return false;
  error = with_dtype(a.dtype, [&](auto t) { return launch_held<decltype(t)>(a, holding, memory, stream); });
  return true;
}

}  // namespace openllama::cuda
