// Attention backward: what a block has in shared memory, and the two threads that fill it and empty it. The
// computing is in attention_bwd.cu.
#pragma once

#include "attention.cuh"

namespace openllama::cuda::hopper {

constexpr int kQueries = kAttentionBlock, kKeys = 2 * kRows;  // of a step; of a tile

// What a head's width asks for. dq is made for as many blocks of queries that each warpgroup has 64 rows of
// 64 columns: of one block half the columns, or, where that is all of them, one of two blocks.
template <int width>
struct Plan {
  static constexpr int panels = width / kPanel;
  static constexpr int loading = width == 64 ? 40 : 24, computing = width == 64 ? 232 : 240;  // registers
  static constexpr int blocks = 2 / panels;           // of queries, to a product for dq
  static constexpr int stages = width == 64 ? 4 : 3;  // blocks of queries under way
  static constexpr int tiles = width == 64 ? 2 : 1;   // tiles' keys under way
};

struct Maps {
  CUtensorMap q, k, v, dout;
};

template <class T, class P>
struct Memory {
  alignas(1024) T k[P::tiles][P::panels][kKeys][kPanel];
  alignas(1024) T v[P::tiles][P::panels][kKeys][kPanel];
  alignas(1024) T q[P::stages][P::panels][kQueries][kPanel];
  alignas(1024) T dout[P::stages][P::panels][kQueries][kPanel];
  alignas(1024) T ds[2][P::blocks][kKeys][kPanel];  // dS^T
  alignas(1024) float dq[2][kPart];                 // of each warpgroup
  alignas(16) float stats[P::stages][2][kQueries];  // of each query: lse in base 2, delta
  int tile[P::tiles];                               // its number, while k and v are there
  uint64_t k_full[P::tiles], v_full[P::tiles], kv_empty[P::tiles], q_full[P::stages], q_empty[P::stages],
      dout_full[P::stages], dout_empty[P::stages], ds_full, dq_full[2], dq_empty[2];
};

struct Tile {
  int first_key, kv_head, batch, first;  // the first block of queries that sees any of its keys
};

template <class P>
__device__ __forceinline__ Tile tile_of(int index, const Shape& s) {
  const Place place = place_of(index, s, s.batch * s.kv_heads);
  const int key = place.tile * kKeys;  // the first keys are seen by most queries
  // the first tile sets dq of all queries, also of those that see no key
  const int first = key > 0 ? max(0, key - s.ahead) / (P::blocks * kQueries) * P::blocks : 0;
  return {key, place.which % s.kv_heads, place.which / s.kv_heads, first};
}

// Calls go(head, i, first) for every `step`th block i of queries that sees keys of the tile, of all heads
// that share it, the last queries first: all tiles of a head begin with the same ones.
template <class P, int step, class F>
__device__ __forceinline__ void for_queries(const Tile& t, const Shape& s, const F& go) {
#pragma unroll 1
  for (int i = s.blocks - P::blocks, n = 0; i >= t.first;) {
#pragma unroll 1
    for (int b = 0; b < P::blocks; b += step)
      go(t.kv_head * s.sharing + n, i + b, n == 0 && b == 0 && i == s.blocks - P::blocks);
    if (++n == s.sharing) n = 0, i -= P::blocks;
  }
}

// Of a block of queries, among those of all heads.
__device__ __forceinline__ int64_t number_of(const Tile& t, const Shape& s, int head, int i) {
  return (t.batch * s.heads + head) * s.blocks + i;
}

// ---------------------------------------------------------------- loading: one thread

template <class T, class P>
__device__ __forceinline__ void produce(Memory<T, P>& m, const Maps& maps, const float* stats, const Shape& s,
                                        int tiles, int* next_tile) {
  Ring<P::stages> ring;
  Ring<P::tiles> kv;
  int index;
#pragma unroll 1
  while ((index = atomicAdd(next_tile, 1)) < tiles) {
    const Tile t = tile_of<P>(index, s);
    for_queries<P, 1>(t, s, [&](int head, int i, bool first) {
      const int at = ring.stage;
      wait(&m.q_empty[at], ring.parity ^ 1);
      arrive_expecting(&m.q_full[at], sizeof(m.q[0]) + sizeof(m.stats[0]));
      load_bulk(m.stats[at], stats + number_of(t, s, head, i) * (2 * kQueries), sizeof(m.stats[0]),
                &m.q_full[at]);
      load_rows(m.q[at], maps.q, &m.q_full[at], i * kQueries, head, t.batch);
      if (first) {  // after the first queries, as the room of keys is taken longer
        wait(&m.kv_empty[kv.stage], kv.parity ^ 1);
        m.tile[kv.stage] = index;
        arrive_expecting(&m.k_full[kv.stage], sizeof(m.k[0]));
        load_rows(m.k[kv.stage], maps.k, &m.k_full[kv.stage], t.first_key, t.kv_head, t.batch);
        arrive_expecting(&m.v_full[kv.stage], sizeof(m.v[0]));
        load_rows(m.v[kv.stage], maps.v, &m.v_full[kv.stage], t.first_key, t.kv_head, t.batch);
        kv.next();
      }
      wait(&m.dout_empty[at], ring.parity ^ 1);
      arrive_expecting(&m.dout_full[at], sizeof(m.dout[0]));
      load_rows(m.dout[at], maps.dout, &m.dout_full[at], i * kQueries, head, t.batch);
      ring.next();
    });
  }
  wait(&m.kv_empty[kv.stage], kv.parity ^ 1);
  m.tile[kv.stage] = index;  // none
  arrive(&m.k_full[kv.stage]);
}

// ---------------------------------------------------------------- adding dq to global memory: one thread

// `set`: of each key head, how many steps its first tile has set dq of. That was taken before its others, by
// a block that runs: what is waited for here comes.
template <class T, class P>
__device__ __forceinline__ void add_dq(Memory<T, P>& m, float* dq, int* set, const Shape& s, int tiles) {
  uint32_t parity = 0;
  Ring<P::tiles> kv;
#pragma unroll 1
  for (;;) {
    wait(&m.k_full[kv.stage], kv.parity);
    const int index = m.tile[kv.stage];
    arrive(&m.kv_empty[kv.stage]);  // the number is read
    kv.next();
    if (index >= tiles) break;
    const Tile t = tile_of<P>(index, s);
    int* const done = set + t.batch * s.kv_heads + t.kv_head;
    const bool sets = t.first_key == 0;
    int step = 0, seen = 0;
    for_queries<P, P::blocks>(t, s, [&](int head, int i, bool) {
      ++step;
      if (!sets && seen < step) {
        while ((seen = load_acquire(done)) < step);
        fence_async_global();
      }
      float* const to = dq + number_of(t, s, head, i) * (P::panels * kPart);
#pragma unroll
      for (int wg = 0; wg < 2; ++wg) {
        wait(&m.dq_full[wg], parity);
        if (sets)
          store_bulk(to + wg * kPart, m.dq[wg], sizeof(m.dq[0]));
        else
          add_bulk(to + wg * kPart, m.dq[wg], sizeof(m.dq[0]));
        bulk_commit();
      }
      bulk_wait_read<1>();
      arrive(&m.dq_empty[0]);
      bulk_wait_read<0>();
      arrive(&m.dq_empty[1]);
      parity ^= 1;
      if (!sets) return;
      bulk_wait<0>();
      fence_async_global();
      store_release(done, step);
    });
  }
  bulk_wait<0>();
}

}  // namespace openllama::cuda::hopper
