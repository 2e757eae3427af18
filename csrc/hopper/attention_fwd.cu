// Attention forward: softmax(scale q k^T + mask) v, one pass over the keys (FlashAttention 3, Shah et al.,
// 2024).
//
// A block is one thread that loads q, k and v by TMA, and two or three warpgroups of 64 queries each, which
// take turns: while one has its products on the tensor cores, another has its softmax. In a warpgroup the
// product with v of one block of keys runs beside the softmax of the next. Blocks stay and take tiles, the
// longest first.
#include "attention.cuh"

namespace openllama::cuda {
namespace {

using namespace hopper;

constexpr int kKeys = 128;               // of a block of keys
constexpr float kRise = 8;               // in base 2: probabilities stay below 256
constexpr int64_t kCache = 16 << 20;     // bytes of L2 for keys and values
constexpr int kTurn = 1, kTileRead = 4;  // named barriers: one for each warpgroup

// What a head's width asks for. Of 64 columns a block's products take 512 cycles of the tensor cores, and its
// exponentials as many of their unit, where 128 columns take 1024: a third warpgroup keeps both busy, and
// keys, which would come from the L2 cache twice as fast, serve more queries.
template <int width>
struct Plan {
  static constexpr int panels = width / kPanel;
  static constexpr int groups = width == 64 ? 3 : 2,
                       queries = groups * kRows;      // warpgroups; a tile's queries
  static constexpr int stages = width == 64 ? 4 : 2;  // blocks of keys under way
  static constexpr int threads = 128 * (1 + groups);
  static constexpr int loading = width == 64 ? 32 : 40, computing = width == 64 ? 160 : 232;  // registers
};

struct Maps {
  CUtensorMap q, k, v;
};

struct alignas(16) Tile {
  int first, head, batch,
      blocks;  // the first query; blocks of keys that some query sees, -1: no tile is left
};

template <class T, class P>
struct Memory {
  alignas(1024) T q[2][P::panels][P::queries][kPanel];
  alignas(1024) T k[P::stages][P::panels][kKeys][kPanel];
  alignas(1024) T v[P::stages][P::panels][kKeys][kPanel];
  alignas(1024) T out[P::groups][P::panels * kRows][kPanel];
  Tile tile[2];  // of q
  uint64_t q_full[2], q_empty[2], k_full[P::stages], k_empty[P::stages], v_full[P::stages],
      v_empty[P::stages];
};

// Blocks of keys that queries before `end` see some of.
__device__ __forceinline__ int blocks_before(int end, const Shape& s) {
  return max(0, (min(s.seq_k, end + s.ahead) + kKeys - 1) / kKeys);
}

// The last queries, which see most keys, come first. A head's last tile may begin before its first query, by
// whole warpgroups: of the tile with the fewest keys.
template <class P>
__device__ __forceinline__ Tile tile_of(int index, const Shape& s) {
  const Place place = place_of(index, s, s.batch * s.heads);
  const int first = (s.seq_q + kRows - 1) / kRows * kRows - (place.tile + 1) * P::queries;
  return {first, place.which % s.heads, place.which / s.heads, blocks_before(first + P::queries, s)};
}

// ---------------------------------------------------------------- loading: one thread

template <class T, class P>
struct Producer {
  Memory<T, P>& m;
  const Maps& maps;
  const Shape& s;
  Ring<P::stages> k_ring, v_ring;
  Ring<2> q_ring;

  __device__ __forceinline__ void run(int tiles, int* next_tile) {
    const int blocks = static_cast<int>(gridDim.x);  // have a first tile each, and take others as they end
    for (int index = blockIdx.x;; index = blocks + atomicAdd(next_tile, 1)) {
      const int at = q_ring.stage;
      wait(&m.q_empty[at], q_ring.parity ^ 1);
      const Tile t = index < tiles ? tile_of<P>(index, s) : Tile{.blocks = -1};
      m.tile[at] = t;
      q_ring.next();
      if (t.blocks > 0) {
        arrive_expecting(&m.q_full[at], sizeof(m.q[0]));
        load_rows(m.q[at], maps.q, &m.q_full[at], t.first, t.head, t.batch);
        load_keys(t);
      } else {
        arrive(&m.q_full[at]);
      }
      if (index >= tiles) break;
    }
  }

  // The last keys first: they are the masked ones.
  __device__ __forceinline__ void load_keys(const Tile& t) {
    load(m.k, m.k_full, m.k_empty, k_ring, maps.k, t, t.blocks - 1);
    for (int n = t.blocks - 1; n >= 0; --n) {
      if (n > 0) load(m.k, m.k_full, m.k_empty, k_ring, maps.k, t, n - 1);
      load(m.v, m.v_full, m.v_empty, v_ring, maps.v, t, n);
    }
  }

  __device__ __forceinline__ void load(T (&to)[P::stages][P::panels][kKeys][kPanel], uint64_t* full,
                                       uint64_t* empty, Ring<P::stages>& ring, const CUtensorMap& map,
                                       const Tile& t, int n) {
    wait(&empty[ring.stage], ring.parity ^ 1);
    arrive_expecting(&full[ring.stage], sizeof(to[0]));
    load_rows(to[ring.stage], map, &full[ring.stage], n * kKeys, t.head / s.sharing, t.batch);
    ring.next();
  }
};

// ---------------------------------------------------------------- computing: the other warpgroups

// A warpgroup's 64 queries of a tile.
template <class T, class P>
struct Consumer {
  Memory<T, P>& m;
  const Shape& s;
  const int wg, thread;
  Ring<P::stages> k_ring, v_ring;
  Ring<2> q_ring;
  float score[kKeys / 2], out[P::panels * kPanel / 2];
  uint32_t p[kKeys / 16][4];
  // Of the rows thread / 4 and 8 below; sums are this thread's part.
  float highest[2], sum[2], rescale[2], inverse[2];

  __device__ __forceinline__ Consumer(Memory<T, P>& m, const Shape& s)
      : m(m), s(s), wg(__shfl_sync(~0u, threadIdx.x / 128 - 1, 0)), thread(threadIdx.x % 128) {}

  __device__ __forceinline__ int row(int half) const {
    return wg * kRows + thread / 32 * 16 + thread % 32 / 4 + 8 * half;
  }

  // Products of the warpgroups take turns.
  __device__ __forceinline__ void my_turn() const { named_sync(kTurn + wg, 256); }
  __device__ __forceinline__ void your_turn() const {
    named_arrive(kTurn + (wg + 1 == P::groups ? 0 : wg + 1), 256);
  }

  __device__ __forceinline__ void release(uint64_t* b) const {
    if (thread == 0) arrive(b);
  }

  __device__ __forceinline__ void multiply_qk() {
    multiply(score, shared(m.q[q_ring.stage][0][wg * kRows]), sizeof(m.q[0][0]), m.k[k_ring.stage]);
  }

  __device__ __forceinline__ void release_q() {
    release(&m.q_empty[q_ring.stage]);
    q_ring.next();
  }
  __device__ __forceinline__ void release_k() {
    release(&m.k_empty[k_ring.stage]);
    k_ring.next();
  }

  __device__ __forceinline__ void release_v() {
    release(&m.v_empty[v_ring.stage]);
    v_ring.next();
  }

  __device__ __forceinline__ void mask(const Tile& t, int n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // keys of this block that the row sees, from this thread's first on
      const int limit = min(s.seq_k, t.first + row(half) + 1 + s.ahead) - n * kKeys - 2 * (thread % 4);
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (8 * j + e >= limit) score[4 * j + 2 * half + e] = -INFINITY;
    }
  }

  // Scores become probabilities, relative to the highest so far; what was added up before is to be scaled.
  __device__ __forceinline__ void softmax() {
    const float c = s.scale * kLog2e;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = score[2 * half];
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
        top = fmaxf(top, fmaxf(score[4 * j + 2 * half], score[4 * j + 2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      // a maximum that is a little too low does no harm; one that stays saves scaling out
      const bool rises = top * c > highest[half] * c + kRise;
      const float now = rises ? top : highest[half];
      const float base = now == -INFINITY ? 0.0f : now * c;  // a row that saw no key yet
      rescale[half] = rises ? fast_exp2(highest[half] * c - base) : 1.0f;
      highest[half] = now;
      float total = 0;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = score[4 * j + 2 * half + e];
          x = fast_exp2(fmaf(x, c, -base));
          total += x;
        }
      sum[half] = sum[half] * rescale[half] + total;
    }
  }

  // Ends the product with v that runs, of the block before; its sum is made relative to the scores that came
  // since.
  __device__ __forceinline__ void settle(bool runs) {
    wgmma_wait<0>();
    keep(out);
    if (runs) release_v();
    if (rescale[0] != 1 || rescale[1] != 1)
#pragma unroll
      for (int i = 0; i < P::panels * kPanel / 2; ++i) out[i] *= rescale[i / 2 % 2];
    round_to<T>(p, score);
  }

  // The product with v of the block before runs beside the softmax of this one. The next step ends it: the
  // wait stands after a branch, as the assembler moves a softmax behind a wait in the same basic block.
  template <bool masked>
  __device__ __forceinline__ void step(const Tile& t, int n, bool second) {
    wait(&m.k_full[k_ring.stage], k_ring.parity);
    settle(!second);
    my_turn();
    multiply_qk();
    wait(&m.v_full[v_ring.stage], v_ring.parity);
    add_product(out, p, m.v[v_ring.stage]);
    your_turn();
    wgmma_wait<1>();
    keep(score);
    release_k();
    if (masked) mask(t, n);
    softmax();
  }

  // The last block of keys, which no product with v runs beside.
  __device__ __forceinline__ void first_step(const Tile& t, int n) {
    wait(&m.k_full[k_ring.stage], k_ring.parity);
    my_turn();
    multiply_qk();
    your_turn();
    wgmma_wait<0>();
    keep(score);
    release_k();
    mask(t, n);
    begin_sums();
    softmax();
  }

  // A block of keys that others of the tile's queries see, and none of this warpgroup's. `v_at`: where its v
  // is.
  __device__ __forceinline__ void pass(const Ring<P::stages>& v_at) {
    wait(&m.k_full[k_ring.stage], k_ring.parity);
    wait(&m.v_full[v_at.stage], v_at.parity);
    my_turn();
    your_turn();
    release_k();
    release(&m.v_empty[v_at.stage]);
  }

  __device__ __forceinline__ Tile next_tile() {
    wait(&m.q_full[q_ring.stage], q_ring.parity);
    return m.tile[q_ring.stage];
  }

  // This warpgroup's first query of a tile.
  __device__ __forceinline__ int first_of(const Tile& t) const { return t.first + wg * kRows; }

  __device__ __forceinline__ int seen_of(const Tile& t) const {
    return first_of(t) < 0 ? 0 : blocks_before(first_of(t) + kRows, s);
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < P::panels * kPanel / 2; ++i) out[i] = 0;
  }
  __device__ __forceinline__ void begin_sums() {
    highest[0] = highest[1] = -INFINITY;
    sum[0] = sum[1] = 0;
  }

  // The tile's sums are complete: lse, and what to scale out with.
  __device__ __forceinline__ void end_sums(const Tile& t, float* lse) {
    const int64_t heads = int64_t(t.batch) * s.heads + t.head;
    const bool writes = thread % 4 == 0 && first_of(t) >= 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[half];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      inverse[half] = total == 0 ? 0 : 1 / total;
      if (writes && t.first + row(half) < s.seq_q)
        lse[heads * s.seq_q + t.first + row(half)] =
            total == 0 ? -INFINITY : highest[half] * s.scale + __logf(total);
    }
  }

  __device__ __forceinline__ void write(const Tile& t, T* to) {
    constexpr int width = P::panels * kPanel;
    const int first = first_of(t);
#pragma unroll
    for (int i = 0; i < width / 2; ++i) out[i] *= inverse[i / 2 % 2];
    T* const at = to + ((int64_t(t.batch) * s.seq_q + first) * s.heads + t.head) * width;
    write_rows(out, 1.0f, m.out[wg], at, int64_t(s.heads) * width, first < 0 ? 0 : s.seq_q - first);
  }

  // From `t` on to a tile that this warpgroup sees keys of, without scores under way; whether there is one.
  __device__ __forceinline__ bool find(Tile& t, int& seen, T* to, float* lse) {
#pragma unroll 1
    for (; t.blocks >= 0; t = next_tile()) {
      seen = seen_of(t);
#pragma unroll 1
      for (int n = t.blocks; n > seen; --n) {
        pass(v_ring);
        v_ring.next();
      }
      if (seen) return true;
      clear();
      begin_sums();
      end_sums(t, lse);
      write(t, to);
      named_sync(kTileRead + wg, 128);  // all have read what the tile is
      release_q();
    }
    return false;
  }

  // Tile after tile. The last product with v of one runs beside the first scores of the next.
  __device__ __forceinline__ void run(T* to, float* lse) {
    Tile t = next_tile();
    int seen = 0;
    bool goes_on = false;  // the first block's softmax is done
#pragma unroll 1
    for (;;) {
      if (!goes_on) {
        if (!find(t, seen, to, lse)) return;
        first_step(t, seen - 1);
      }
      clear();
      // blocks that end after what the first row sees
      const int whole = max(0, first_of(t) + 1 + s.ahead) / kKeys;
      int n = seen - 2;
      for (; n >= whole; --n) step<true>(t, n, n == seen - 2);
      for (; n >= 0; --n) step<false>(t, n, n == seen - 2);
      release_q();
      Ring<P::stages> v_after = v_ring;
      if (seen > 1) v_after.next();
      wait(&m.v_full[v_after.stage], v_after.parity);
      settle(seen > 1);
      end_sums(t, lse);

      const Tile next = next_tile();
      seen = next.blocks > 0 ? seen_of(next) : 0;
      goes_on = seen > 0;
      v_after.next();
      if (goes_on) {
        static_assert(P::queries - kRows <= kKeys);
        if (seen < next.blocks) {  // by one
          pass(v_after);
          v_after.next();
        }
        wait(&m.k_full[k_ring.stage], k_ring.parity);
        my_turn();
      }
      // where there is no next tile the scores are not used, but a branch would make all products wait
      multiply_qk();
      add_product(out, p, m.v[v_ring.stage]);
      if (goes_on) your_turn();
      wgmma_wait<1>();
      keep(score);
      if (goes_on) {
        release_k();
        mask(next, seen - 1);
        begin_sums();
        softmax();
      }
      wait(&m.v_full[v_ring.stage], v_ring.parity);  // long so: a branch before the wait, as in `step`
      wgmma_wait<0>();
      keep(out);
      release(&m.v_empty[v_ring.stage]);
      v_ring = v_after;
      write(t, to);
      t = next;
    }
  }
};

// ---------------------------------------------------------------- kernel

template <class T, class P>
__device__ __forceinline__ void init(Memory<T, P>& m) {
  for (int i = 0; i < 2; ++i) {
    barrier_init(&m.q_full[i], 1);
    barrier_init(&m.q_empty[i], P::groups);
  }
  for (int i = 0; i < P::stages; ++i) {
    barrier_init(&m.k_full[i], 1);
    barrier_init(&m.k_empty[i], P::groups);
    barrier_init(&m.v_full[i], 1);
    barrier_init(&m.v_empty[i], P::groups);
  }
  barrier_init_done();
}

template <class T, class P>
__global__ void __launch_bounds__(P::threads, 1)
    attention_fwd_kernel(const __grid_constant__ Maps maps, T* out, float* lse, int* next_tile, const Shape s,
                         int tiles) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& m = *reinterpret_cast<Memory<T, P>*>(raw);
  if (threadIdx.x == 0) init(m);
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<P::loading>();
    if (threadIdx.x == 0) Producer<T, P>{m, maps, s}.run(tiles, next_tile);
  } else {
    take_registers<P::computing>();
    Consumer<T, P> c(m, s);
    if (c.wg == P::groups - 1) c.your_turn();  // the first turn is warpgroup 0's
    c.run(out, lse);
    if (c.wg == 0) c.my_turn();  // takes the last arrival, so that none is left over
  }
}

// ---------------------------------------------------------------- launchers

template <class T, class P>
cudaError_t launch(const AttentionFwd& a, cudaStream_t stream) {
  Maps maps{};
  cudaError_t error = describe_inputs(maps, a, P::queries, kKeys);
  if (error != cudaSuccess) return error;
  const auto kernel = attention_fwd_kernel<T, P>;
  const int bytes = sizeof(Memory<T, P>);
  const int64_t cached_kv = std::max<int64_t>(1, kCache / (2 * a.seq_k * a.head_dim * size_of(a.dtype)));
  const Shape s = shape_of(a, a.seq_q, P::queries, a.heads, cached_kv * (a.heads / a.kv_heads));
  const int tiles = s.tiles * s.batch * s.heads;
  unsigned blocks = 0;
  error = prepare(kernel, bytes, 1, tiles, blocks);
  if (error == cudaSuccess) error = cudaMemsetAsync(a.next_tile, 0, sizeof(*a.next_tile), stream);
  if (error != cudaSuccess) return error;
  kernel<<<blocks, P::threads, bytes, stream>>>(maps, static_cast<T*>(a.out), a.lse, a.next_tile, s, tiles);
  return cudaGetLastError();
}

}  // namespace

cudaError_t attention_fwd(const AttentionFwd& a, cudaStream_t stream) {
  return with_kind(a, [&](auto t, auto width) { return launch<decltype(t), Plan<width>>(a, stream); });
}

}  // namespace openllama::cuda
