// SwiGLU inside the matrix products beside it, which hide it:
//
//   forward:  [gate | up] = x [w_gate | w_up]^T, and act = silu(gate) up
//   backward: dact = dout w_down, and out of it, gate and up: their gradients, and act again
//
// A block's tile is 128 tokens by 256 columns (of which forward has half from gate and half from up). Two
// warpgroups multiply 64 tokens each and leave their sums, rounded, in shared memory. Of the third, one
// thread loads by TMA, and three warps finish that tile, the elementwise work and what goes to memory, while
// the next one is multiplied. Two blocks, a cluster, have neighbouring tokens and the same columns: each
// loads half of the weights' block, for both.
#include "../swiglu.cuh"
#include "pipeline.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace openllama::cuda {
namespace {

using namespace hopper;

constexpr int kRows = 128, kColumns = 256, kDeep = 64, kStages = 3, kBlocks = 2;
constexpr int kThreads = 384, kFinishers = 96, kWarps = kFinishers / 32;
constexpr int kGroup = 8;  // clusters' tiles along the tokens: their inputs stay in L2 over all columns
constexpr int kPart = 8;   // elements of 16 bytes
constexpr int kBatch =
    2;  // rows that a finishing warp takes at once: its instructions wait less for one another
constexpr int kAhead = 3 * kBatch;  // rows of gate and up that it has on their way

enum class Pass { forward, backward };

template <Pass pass>
constexpr int kStep = pass == Pass::forward ? kColumns / 2 : kColumns;  // columns of act or dact to a tile

struct Maps {
  CUtensorMap x, weight[2], gate_up[2];  // weight: w_gate and w_up, or w_down
};

template <class T>
struct Memory {
  alignas(1024) T x[kStages][kRows][kPanel];
  alignas(1024) T weight[kStages][kColumns * kDeep];
  alignas(1024) T tile[kColumns / kPanel][kRows][kPanel];
  alignas(16) T ahead[kWarps][kAhead][2][kColumns];  // gate and up
  uint64_t full[kStages], empty[kStages], tile_full, tile_empty, there[kWarps][kAhead];
};

// 16 bytes of the tile, whose panels lie swizzled as TMA has them.
template <class T>
__device__ __forceinline__ T* part(Memory<T>& m, int row, int column) {
  return &m.tile[column / kPanel][row][(column % kPanel / kPart ^ row % kPart) * kPart];
}

// Calls go(row, column), where this block's tile begins, for one tile after the other.
template <Pass pass, class F>
__device__ __forceinline__ void for_tiles(const LinearSwiglu& a, const F& go) {
  const int across = static_cast<int>((a.intermediate + kStep<pass> - 1) / kStep<pass>);
  const int down = static_cast<int>((a.tokens + kBlocks * kRows - 1) / (kBlocks * kRows));
  for (int i = blockIdx.x / kBlocks; i < across * down; i += gridDim.x / kBlocks) {
    const int group = i / (kGroup * across), rest = i % (kGroup * across);
    const int size = min(kGroup, down - group * kGroup), pair = group * kGroup + rest % size;
    go((pair * kBlocks + static_cast<int>(cluster_rank())) * kRows, rest / size * kStep<pass>);
  }
}

// ---------------------------------------------------------------- loading: one thread

template <class T, Pass pass>
__device__ __forceinline__ void produce(Memory<T>& m, const Maps& maps, const LinearSwiglu& a) {
  constexpr uint32_t bytes = sizeof(m.x[0]) + sizeof(m.weight[0]);
  constexpr uint16_t both = (1 << kBlocks) - 1;
  const int rank = static_cast<int>(cluster_rank());
  Ring<kStages> ring;
  for_tiles<pass>(a, [&](int row, int column) {
    for (int k = 0; k < a.hidden; k += kDeep, ring.next()) {
      uint64_t* const full = &m.full[ring.stage];
      wait(&m.empty[ring.stage], ring.parity ^ 1);
      arrive_expecting(full, bytes);
      load_box(m.x[ring.stage], &maps.x, full, k, row);
      T* const half = m.weight[ring.stage] + rank * (kColumns / 2 * kDeep);
      if constexpr (pass == Pass::forward)
        load_box_for(both, half, &maps.weight[rank], full, k, column);
      else
        for (int p = 0; p < kColumns / kPanel / 2; ++p)
          load_box_for(both, half + p * (kDeep * kPanel), &maps.weight[0], full,
                       column + (2 * rank + p) * kPanel, k);
    }
  });
}

// ---------------------------------------------------------------- multiplying: two warpgroups

template <class T, Pass pass>
__device__ __forceinline__ void multiply(Memory<T>& m, const LinearSwiglu& a) {
  constexpr Major major = pass == Pass::forward ? Major::k : Major::mn;
  constexpr uint64_t deeper = pass == Pass::forward ? kDeeperInRow : kDeeperInRows;
  const int first = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0) * 64, thread = threadIdx.x % 128;
  Ring<kStages> ring;
  uint32_t parity = 1;
  const auto release = [&](int stage) {
    if (thread < kBlocks) arrive_at(&m.empty[stage], thread);
  };
  for_tiles<pass>(a, [&](int, int) {
    float sum[kColumns / 2];
    int before = 0;
    for (int k = 0; k < a.hidden; k += kDeep, ring.next()) {
      const uint64_t x = matrix(shared(m.x[ring.stage][first]));
      const uint64_t weight = matrix(shared(m.weight[ring.stage]), kDeep * kPanel * sizeof(T));
      wait(&m.full[ring.stage], ring.parity);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kDeep / 16; ++i)
        wgmma<T, Major::k, major>(sum, x + i * kDeeperInRow, weight + i * deeper, k > 0 || i > 0);
      wgmma_commit();
      wgmma_wait<1>();
      if (k > 0) release(before);
      before = ring.stage;
    }
    wgmma_wait<0>();
    keep(sum);
    release(before);
    wait(&m.tile_empty, parity);
    parity ^= 1;
    const int row = first + thread / 32 * 16 + thread % 16, beside = thread % 32 / 16 * 8;
#pragma unroll
    for (int j = 0; j < kColumns / 8; j += 2)
      store_matrices(shared(part(m, row, 8 * j + beside)), Pair<T>::of(sum[4 * j], sum[4 * j + 1]),
                     Pair<T>::of(sum[4 * j + 2], sum[4 * j + 3]), Pair<T>::of(sum[4 * j + 4], sum[4 * j + 5]),
                     Pair<T>::of(sum[4 * j + 6], sum[4 * j + 7]));
    fence_async();
    arrive(&m.tile_full);
  });
}

// ---------------------------------------------------------------- finishing: three warps

// Gate and up go from the tile to memory as they are; act is made of them.
template <class T>
struct Forward {
  Memory<T>& m;
  const Maps& maps;
  const LinearSwiglu& a;
  const bool first = threadIdx.x == 32;

  template <class F>
  __device__ __forceinline__ void tile(int row, int column, const F& wait_for_tile) {
    constexpr int width = kColumns / 2, parts = width / kPart;
    wait_for_tile();
    if (first) {
      for (int p = 0; p < kColumns / kPanel; ++p)
        store_box(&maps.gate_up[p / 2], m.tile[p], column + p % 2 * kPanel, row);
      bulk_commit();
    }
    T* const act = static_cast<T*>(a.act) + row * a.intermediate + column;
#pragma unroll 4
    for (int i = threadIdx.x - 32; i < kRows * parts; i += kFinishers) {
      const int r = i / parts, c = i % parts * kPart;
      if (row + r < a.tokens && column + c < a.intermediate)
        store(act + r * a.intermediate + c,
              swiglu(load<kPart>(part(m, r, c)), load<kPart>(part(m, r, width + c))));
    }
    if (first) bulk_wait_read<0>();
  }
};

// A warp takes every third row of the tile, which holds dact; its gate and up come to shared memory
// meanwhile.
template <class T>
struct Backward {
  using Eight = Vec<T, kPart>;
  Memory<T>& m;
  const Maps& maps;
  const LinearSwiglu& a;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32 - 1, 0), lane = threadIdx.x % 32;
  Ring<kAhead> ring;

  __device__ __forceinline__ T* gate_at(int64_t row, int column) const {
    return static_cast<T*>(a.gate_up) + row * (2 * a.intermediate) + column;
  }

  __device__ __forceinline__ void fetch(int slot, int64_t row, int column) {
    if (lane) return;
    const uint32_t bytes = min(kColumns, static_cast<int>(a.intermediate) - column) * sizeof(T);
    uint64_t* const there = &m.there[warp][slot];
    arrive_expecting(there, 2 * bytes);
    for (int which = 0; which < 2; ++which)
      load_bulk(m.ahead[warp][slot][which], gate_at(row, column) + which * a.intermediate, bytes, there);
  }

  template <class F>
  __device__ __forceinline__ void tile(int row, int column, const F& wait_for_tile) {
    const int rows = min(kRows, static_cast<int>(a.tokens) - row), c = lane * kPart;
    int next = warp;
    for (int i = 0; i < kAhead && next < rows; ++i, next += kWarps)
      fetch((ring.stage + i) % kAhead, row + next, column);
    wait_for_tile();
#pragma unroll 1
    for (int r = warp; r < rows; r += kBatch * kWarps) {
      Eight gate[kBatch], up[kBatch], dact[kBatch];
      const int slot = ring.stage;
#pragma unroll
      for (int b = 0; b < kBatch && r + b * kWarps < rows; ++b, ring.next()) {
        wait(&m.there[warp][ring.stage], ring.parity);
        gate[b] = load<kPart>(&m.ahead[warp][ring.stage][0][c]);
        up[b] = load<kPart>(&m.ahead[warp][ring.stage][1][c]);
        dact[b] = load<kPart>(part(m, r + b * kWarps, c));
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
        if (r + b * kWarps < rows && column + c < a.intermediate)
          write(row + r + b * kWarps, column + c, swiglu_gradient(gate[b], up[b], dact[b]));
      __syncwarp();
      for (int b = 0; b < kBatch && next < rows; ++b, next += kWarps)
        fetch((slot + b) % kAhead, row + next, column);
    }
  }

  __device__ __forceinline__ void write(int64_t row, int column, const SwigluGradient<T, kPart>& d) const {
    store(gate_at(row, column), d.gate);
    store(gate_at(row, column) + a.intermediate, d.up);
    if (a.act) store(static_cast<T*>(a.act) + row * a.intermediate + column, d.act);
  }
};

template <class T, Pass pass>
__device__ __forceinline__ void finish(Memory<T>& m, const Maps& maps, const LinearSwiglu& a) {
  std::conditional_t<pass == Pass::forward, Forward<T>, Backward<T>> finisher{m, maps, a};
  uint32_t parity = 0;
  for_tiles<pass>(a, [&](int row, int column) {
    finisher.tile(row, column, [&] { wait(&m.tile_full, parity); });
    parity ^= 1;
    arrive(&m.tile_empty);
  });
}

// ---------------------------------------------------------------- kernel

template <class T, Pass pass>
__global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads, 1)
    linear_swiglu_kernel(const __grid_constant__ Maps maps, const LinearSwiglu a) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& m = *reinterpret_cast<Memory<T>*>(raw);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&m.full[i], 1);
      barrier_init(&m.empty[i], 2 * kBlocks);
    }
    for (int i = 0; i < kWarps * kAhead; ++i) barrier_init(&m.there[0][i], 1);
    barrier_init(&m.tile_full, 256);
    barrier_init(&m.tile_empty, kFinishers);
    barrier_init_done();
  }
  cluster_sync();
  if (__shfl_sync(~0u, threadIdx.x / 128, 0) == 0) {
    give_registers<88>();
    if (threadIdx.x == 0) produce<T, pass>(m, maps, a);
    if (threadIdx.x >= 32) finish<T, pass>(m, maps, a);
  } else {
    take_registers<208>();
    multiply<T, pass>(m, a);
  }
  __syncwarp();
  cluster_sync();  // until then the other block writes here
}

// ---------------------------------------------------------------- launchers

template <class T, Pass pass>
cudaError_t launch(const Maps& maps, const LinearSwiglu& a, cudaStream_t stream) {
  const auto kernel = linear_swiglu_kernel<T, pass>;
  const int bytes = sizeof(Memory<T>);
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int64_t tiles = ceil_div(a.intermediate, kStep<pass>) * ceil_div(a.tokens, kBlocks * kRows);
  const auto clusters = static_cast<unsigned>(std::min<int64_t>(tiles, processors / kBlocks));
  kernel<<<clusters * kBlocks, kThreads, bytes, stream>>>(maps, a);
  return cudaGetLastError();
}

template <Pass pass>
cudaError_t launch_as(const Maps& maps, const LinearSwiglu& a, cudaStream_t stream) {
  return a.dtype == Dtype::bf16 ? launch<__nv_bfloat16, pass>(maps, a, stream)
                                : launch<__half, pass>(maps, a, stream);
}

}  // namespace

cudaError_t linear_swiglu_fwd(const LinearSwiglu& a, cudaStream_t stream) {
  Maps maps{};
  const auto up = static_cast<char*>(a.gate_up) + 2 * a.intermediate;
  for (const cudaError_t error :
       {describe(maps.x, a.dtype, a.x, a.hidden, {{a.tokens, a.x_stride}}, kRows),
        describe(maps.weight[0], a.dtype, a.w_gate, a.hidden, {{a.intermediate, a.w_gate_stride}},
                 kColumns / 2),
        describe(maps.weight[1], a.dtype, a.w_up, a.hidden, {{a.intermediate, a.w_up_stride}}, kColumns / 2),
        describe(maps.gate_up[0], a.dtype, a.gate_up, a.intermediate, {{a.tokens, 2 * a.intermediate}},
                 kRows),
        describe(maps.gate_up[1], a.dtype, up, a.intermediate, {{a.tokens, 2 * a.intermediate}}, kRows)})
    if (error != cudaSuccess) return error;
  return launch_as<Pass::forward>(maps, a, stream);
}

cudaError_t linear_swiglu_bwd(const LinearSwiglu& a, cudaStream_t stream) {
  Maps maps{};
  for (const cudaError_t error :
       {describe(maps.x, a.dtype, a.x, a.hidden, {{a.tokens, a.x_stride}}, kRows),
        describe(maps.weight[0], a.dtype, a.w_down, a.intermediate, {{a.hidden, a.w_down_stride}}, kDeep)})
    if (error != cudaSuccess) return error;
  return launch_as<Pass::backward>(maps, a, stream);
}

}  // namespace openllama::cuda
