// What attention's two passes share: the order of tiles, products of whole heads, rows on their way to
// memory.
#pragma once

#include <cuda_runtime_api.h>

#include "../common.cuh"
#include "launch.h"
#include "pipeline.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace openllama::cuda::hopper {

constexpr int kRows = 64;                        // of a warpgroup's product
constexpr int kPart = kAttentionBlock * kPanel;  // of dq that a warpgroup of backward makes at once
constexpr float kLog2e = 1.44269504f;

// In 32 bits, which the binding checks to be enough. The host works out what follows from the rest: threads
// that load have few registers.
struct Shape {
  int batch, heads, kv_heads, seq_q, seq_k;
  int ahead;        // query i sees keys up to i + ahead: all of them, where attention is not causal
  int sharing;      // heads to a key head
  int blocks;       // backward's, of queries, to a head
  int tiles;        // to a head (backward: to a key head)
  int group;        // such heads, whose tiles come together: what they read stays in the L2 cache
  int group_tiles;  // theirs
  float scale;
};

// `rows`: a tile's, of `seq`. `cached`: heads whose rows the L2 cache holds.
inline Shape shape_of(const Attention& a, int64_t seq, int64_t rows, int64_t heads, int64_t cached) {
  const auto narrow = [](int64_t n) { return static_cast<int>(n); };
  const int64_t tiles = ceil_div(seq, rows), group = std::clamp<int64_t>(cached, 1, a.batch * heads);
  return {.batch = narrow(a.batch),
          .heads = narrow(a.heads),
          .kv_heads = narrow(a.kv_heads),
          .seq_q = narrow(a.seq_q),
          .seq_k = narrow(a.seq_k),
          .ahead = narrow(a.causal ? a.seq_k - a.seq_q : a.seq_k - 1),
          .sharing = narrow(a.heads / a.kv_heads),
          .blocks = narrow(attention_blocks(a.seq_q, a.head_dim)),
          .tiles = narrow(tiles),
          .group = narrow(group),
          .group_tiles = narrow(group * tiles),
          .scale = a.scale};
}

// ---------------------------------------------------------------- tiles

struct Place {
  int tile, which;  // of a head's tiles; of batch x heads
};

// Where tile `index` lies, of `all` heads. Within a group come the first tiles of all heads, then the second.
__device__ __forceinline__ Place place_of(int index, const Shape& s, int all) {
  const int before = index / s.group_tiles * s.group, rest = index % s.group_tiles;
  const int size = min(s.group, all - before);
  return {rest / size, before + rest % size};
}

// Rows of a head to shared memory.
template <class T, int panels, int rows>
__device__ __forceinline__ void load_rows(T (&to)[panels][rows][kPanel], const CUtensorMap& map,
                                          uint64_t* full, int row, int head, int batch) {
  for (int p = 0; p < panels; ++p) load_box(to[p], &map, full, p * kPanel, row, head, batch);
}

// ---------------------------------------------------------------- products

// d (64 rows, n columns) = a b^T; a's 64 rows begin at this address, `panel` bytes to a panel.
template <class T, int panels, int n>
__device__ __forceinline__ void multiply(float (&d)[n / 2], uint32_t a, uint32_t panel,
                                         const T (&b)[panels][n][kPanel]) {
  const uint64_t at = matrix(a), bt = matrix(shared(b));
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < panels * kPanel / 16; ++i)
    wgmma<T, Major::k, Major::k>(d, at + (i / 4 * (panel >> 4) + i % 4 * kDeeperInRow),
                                 bt + (i / 4 * (sizeof(b[0]) >> 4) + i % 4 * kDeeperInRow), i > 0);
  wgmma_commit();
}

// The same of a's 64 rows out of registers.
template <class T, int panels, int n>
__device__ __forceinline__ void multiply(float (&d)[n / 2], const uint32_t (&a)[panels * kPanel / 16][4],
                                         const T (&b)[panels][n][kPanel]) {
  const uint64_t bt = matrix(shared(b));
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < panels * kPanel / 16; ++i)
    wgmma<T, Major::k>(d, a[i], bt + (i / 4 * (sizeof(b[0]) >> 4) + i % 4 * kDeeperInRow), i > 0);
  wgmma_commit();
}

// d (64 rows, a head's columns) += a b
template <class T, int panels, int n>
__device__ __forceinline__ void add_product(float (&d)[panels * kPanel / 2], const uint32_t (&a)[n / 16][4],
                                            const T (&b)[panels][n][kPanel]) {
  const uint64_t at = matrix(shared(b), sizeof(b[0]));
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < n / 16; ++i) wgmma<T, Major::mn>(d, a[i], at + i * kDeeperInRows, true);
  wgmma_commit();
}

// A product's elements, rounded, as another takes them out of registers.
template <class T, int n>
__device__ __forceinline__ void round_to(uint32_t (&to)[n / 8][4], const float (&from)[n]) {
#pragma unroll
  for (int i = 0; i < n / 2; ++i) to[i / 4][i % 4] = Pair<T>::of(from[2 * i], from[2 * i + 1]);
}

// 16 bytes of a row of 64 columns, swizzled as TMA has them.
template <class T>
__device__ __forceinline__ T* part(T (*rows)[kPanel], int row, int number) {
  return &rows[row][(number ^ row % 8) * kPack<T>];
}

// A warpgroup's 64 rows of a head, scaled, to memory, the first `count` of them: through shared memory, where
// they lie panel by panel, so that a row is written 16 bytes at a time. Each warp has 16 of the rows.
template <class T, int half>
__device__ __forceinline__ void write_rows(const float (&d)[half], float scale, T (*room)[kPanel], T* to,
                                           int64_t stride, int count) {
  constexpr int parts = 2 * half / kPack<T>;
  const int lane = threadIdx.x % 32, first = threadIdx.x % 128 / 32 * 16, own = first + lane % 16;
  const auto at = [=](int row, int number) { return part(room + number / 8 * kRows, row, number % 8); };
  const auto pair = [&](int i) { return Pair<T>::of(scale * d[i], scale * d[i + 1]); };
#pragma unroll
  for (int j = 0; j < half / 4; j += 2)
    store_matrices(shared(at(own, j + lane / 16)), pair(4 * j), pair(4 * j + 2), pair(4 * j + 4),
                   pair(4 * j + 6));
  __syncwarp();
#pragma unroll
  for (int i = lane; i < 16 * parts; i += 32) {
    const int row = first + i / parts, number = i % parts;
    if (row < count) store(to + row * stride + number * kPack<T>, load<kPack<T>>(at(row, number)));
  }
  __syncwarp();
}

// ---------------------------------------------------------------- launches

// Before backward's products and after them.
cudaError_t attention_bwd_begin(const AttentionBwd& a, cudaStream_t stream);
cudaError_t attention_bwd_end(const AttentionBwd& a, cudaStream_t stream);

// Of one element's dimension the stride may be anything, and is nothing that TMA would read.
inline cudaError_t describe_heads(CUtensorMap& map, const Attention& a, const void* data,
                                  const HeadStrides& strides, int64_t seq, int64_t heads, int rows) {
  const auto dimension = [&](int64_t size, int64_t stride) {
    return Dimension{size, size > 1 ? stride : a.head_dim};
  };
  return describe(
      map, a.dtype, data, a.head_dim,
      {dimension(seq, strides.row), dimension(heads, strides.head), dimension(a.batch, strides.batch)}, rows);
}

// q, k and v, in boxes of so many rows.
template <class Maps>
cudaError_t describe_inputs(Maps& maps, const Attention& a, int queries, int keys) {
  cudaError_t error = describe_heads(maps.q, a, a.q, a.q_strides, a.seq_q, a.heads, queries);
  if (error == cudaSuccess) error = describe_heads(maps.k, a, a.k, a.k_strides, a.seq_k, a.kv_heads, keys);
  if (error == cudaSuccess) error = describe_heads(maps.v, a, a.v, a.v_strides, a.seq_k, a.kv_heads, keys);
  return error;
}

// Calls body(T{}, width), both known when it is compiled.
template <class F>
cudaError_t with_kind(const Attention& a, const F& body) {
  return with_half(a.dtype, [&](auto t) {
    return a.head_dim == 64 ? body(t, std::integral_constant<int, 64>{})
                            : body(t, std::integral_constant<int, 128>{});
  });
}

}  // namespace openllama::cuda::hopper
