// A matrix product of tokens and weights, with what follows it elementwise hidden behind it.
//
// A block's tile is 128 tokens by 256 columns. Two warpgroups multiply 64 tokens each and leave their sums,
// rounded, in shared memory. Of the third, one thread loads by TMA, and three warps finish that tile (the
// elementwise work, and what goes to memory) while the next one is multiplied. Two blocks, a cluster, have
// neighbouring tokens and the same columns: each loads half of the weights' block, for both. Blocks stay, and
// take one tile after the other.
//
// A Finisher says what is multiplied and what becomes of it:
//
//   Element              of x, the weights and the tile
//   Arguments            has tokens and hidden, the depth of the product
//   Maps                 has x
//   Room                 its shared memory; clear(Room&), by one thread
//   major                along what the depth of its weights lies
//   step, columns(a)     columns of the result to a tile, and in all
//   load_half(...)       half of a tile's weights, for both blocks
//   tile(...)            finishes one
#pragma once

#include "../common.cuh"
#include "launch.h"
#include "pipeline.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace openllama::cuda::hopper {

constexpr int kRows = 128, kColumns = 256, kDeep = 64, kStages = 3, kBlocks = 2;
constexpr int kThreads = 384, kFinishers = 96, kWarps = kFinishers / 32;
constexpr int kGroup = 8;  // clusters' tiles along the tokens: their inputs stay in L2 over all columns
constexpr int kPart = 8;   // elements of 16 bytes
constexpr uint16_t kBoth = (1 << kBlocks) - 1;

template <class Finisher>
struct Memory {
  using T = typename Finisher::Element;
  alignas(1024) T x[kStages][kRows][kPanel];
  alignas(1024) T weight[kStages][kColumns * kDeep];
  alignas(1024) T tile[kColumns / kPanel][kRows][kPanel];
  typename Finisher::Room room;
  uint64_t full[kStages], empty[kStages], tile_full, tile_empty;

  // 16 bytes of the tile, whose panels lie swizzled as TMA has them.
  __device__ __forceinline__ T* part(int row, int column) {
    return &tile[column / kPanel][row][(column % kPanel / kPart ^ row % kPart) * kPart];
  }
};

// Calls go(row, column), where this block's tile begins, for one tile after the other.
template <class Finisher, class F>
__device__ __forceinline__ void for_tiles(const typename Finisher::Arguments& a, const F& go) {
  const int across = static_cast<int>(ceil_div(Finisher::columns(a), Finisher::step));
  const int down = static_cast<int>(ceil_div(a.tokens, kBlocks * kRows));
  for (int i = blockIdx.x / kBlocks; i < across * down; i += gridDim.x / kBlocks) {
    const int group = i / (kGroup * across), rest = i % (kGroup * across);
    const int size = min(kGroup, down - group * kGroup), pair = group * kGroup + rest % size;
    go((pair * kBlocks + static_cast<int>(cluster_rank())) * kRows, rest / size * Finisher::step);
  }
}

// One thread loads.
template <class Finisher>
__device__ __forceinline__ void produce(Memory<Finisher>& m, const typename Finisher::Maps& maps,
                                        const typename Finisher::Arguments& a) {
  constexpr uint32_t bytes = sizeof(m.x[0]) + sizeof(m.weight[0]);
  const int rank = static_cast<int>(cluster_rank());
  Ring<kStages> ring;
  for_tiles<Finisher>(a, [&](int row, int column) {
    for (int k = 0; k < a.hidden; k += kDeep, ring.next()) {
      uint64_t* const full = &m.full[ring.stage];
      wait(&m.empty[ring.stage], ring.parity ^ 1);
      arrive_expecting(full, bytes);
      load_box(m.x[ring.stage], &maps.x, full, k, row);
      Finisher::load_half(m.weight[ring.stage] + rank * (kColumns / 2 * kDeep), maps, a, full, rank, column,
                          k);
    }
  });
}

// Two warpgroups multiply.
template <class Finisher>
__device__ __forceinline__ void multiply(Memory<Finisher>& m, const typename Finisher::Arguments& a) {
  using T = typename Finisher::Element;
  constexpr uint64_t deeper = Finisher::major == Major::k ? kDeeperInRow : kDeeperInRows;
  const int first = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0) * 64, thread = threadIdx.x % 128;
  Ring<kStages> ring;
  uint32_t parity = 1;
  const auto release = [&](int stage) {
    if (thread < kBlocks) arrive_at(&m.empty[stage], thread);
  };
  for_tiles<Finisher>(a, [&](int, int) {
    float sum[kColumns / 2];
    int before = 0;
    for (int k = 0; k < a.hidden; k += kDeep, ring.next()) {
      const uint64_t x = matrix(shared(m.x[ring.stage][first]));
      const uint64_t weight = matrix(shared(m.weight[ring.stage]), kDeep * kPanel * sizeof(T));
      wait(&m.full[ring.stage], ring.parity);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kDeep / 16; ++i)
        wgmma<T, Major::k, Finisher::major>(sum, x + i * kDeeperInRow, weight + i * deeper, k > 0 || i > 0);
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
      store_matrices(shared(m.part(row, 8 * j + beside)), Pair<T>::of(sum[4 * j], sum[4 * j + 1]),
                     Pair<T>::of(sum[4 * j + 2], sum[4 * j + 3]), Pair<T>::of(sum[4 * j + 4], sum[4 * j + 5]),
                     Pair<T>::of(sum[4 * j + 6], sum[4 * j + 7]));
    fence_async();
    arrive(&m.tile_full);
  });
}

// Three warps finish.
template <class Finisher>
__device__ __forceinline__ void finish(Memory<Finisher>& m, const typename Finisher::Maps& maps,
                                       const typename Finisher::Arguments& a) {
  Finisher finisher{m, maps, a};
  uint32_t parity = 0;
  for_tiles<Finisher>(a, [&](int row, int column) {
    finisher.tile(row, column, [&] { wait(&m.tile_full, parity); });
    parity ^= 1;
    arrive(&m.tile_empty);
  });
}

template <class Finisher>
__global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ typename Finisher::Maps maps,
                   const typename Finisher::Arguments a) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& m = *reinterpret_cast<Memory<Finisher>*>(raw);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&m.full[i], 1);
      barrier_init(&m.empty[i], 2 * kBlocks);
    }
    barrier_init(&m.tile_full, 256);
    barrier_init(&m.tile_empty, kFinishers);
    Finisher::clear(m.room);
    barrier_init_done();
  }
  cluster_sync();
  if (__shfl_sync(~0u, threadIdx.x / 128, 0) == 0) {
    give_registers<88>();
    if (threadIdx.x == 0) produce<Finisher>(m, maps, a);
    if (threadIdx.x >= 32) finish<Finisher>(m, maps, a);
  } else {
    take_registers<208>();
    multiply<Finisher>(m, a);
  }
  __syncwarp();
  cluster_sync();  // until then the other block writes here
}

template <class Finisher>
cudaError_t launch(const typename Finisher::Maps& maps, const typename Finisher::Arguments& a,
                   cudaStream_t stream) {
  const auto kernel = product_kernel<Finisher>;
  const int bytes = sizeof(Memory<Finisher>);
  const int64_t tiles = ceil_div(Finisher::columns(a), Finisher::step) * ceil_div(a.tokens, kBlocks * kRows);
  unsigned clusters = 0;
  const cudaError_t error = prepare(kernel, bytes, kBlocks, tiles, clusters);
  if (error != cudaSuccess) return error;
  kernel<<<clusters * kBlocks, kThreads, bytes, stream>>>(maps, a);
  return cudaGetLastError();
}

}  // namespace openllama::cuda::hopper
