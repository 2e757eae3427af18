// Attention forward: softmax(scale q k^T + mask) v, one pass over the keys (FlashAttention 3, Shah et al.,
// 2024).
//
// A block is one thread that loads q, k and v by TMA, and two warpgroups of 64 queries each, which take
// turns: while one has its products on the tensor cores, the other has its softmax. In a warpgroup the
// product with v of one block of keys runs beside the softmax of the next. Blocks stay and take tiles, the
// longest first.
#include "attention.cuh"

namespace openllama::cuda {
namespace {

using namespace hopper;

constexpr int kQueries = 2 * kRows, kKeys = 128, kStages = 2;  // of a tile; of a block of keys; such blocks
constexpr int kThreads = 384;
constexpr float kRise = 8;               // in base 2: probabilities stay below 256
constexpr int64_t kCache = 16 << 20;     // bytes of L2 for keys and values
constexpr int kTurn = 1, kTileRead = 3;  // named barriers: one for each warpgroup

struct Maps {
  CUtensorMap q, k, v;
};

template <class T>
struct Memory {
  alignas(1024) T q[2][kPanels][kQueries][kPanel];
  alignas(1024) T k[kStages][kPanels][kKeys][kPanel];
  alignas(1024) T v[kStages][kPanels][kKeys][kPanel];
  alignas(1024) T out[2][kPanels * kRows][kPanel];
  int tile[2];  // the number of the tile of q
  uint64_t q_full[2], q_empty[2], k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

struct Tile {
  int first, head, batch, blocks;  // the first query; blocks of keys that some query of the tile sees
};

template <bool causal>
__device__ __forceinline__ Tile tile_of(int index, const Shape& s) {
  const Place place = place_of(index, s, s.batch * s.heads);
  const int first = (s.tiles - 1 - place.tile) * kQueries;  // the last queries see most keys
  const int keys = causal ? min(s.seq_k, first + kQueries + s.seq_k - s.seq_q) : s.seq_k;
  return {first, place.which % s.heads, place.which / s.heads, max(0, (keys + kKeys - 1) / kKeys)};
}

// ---------------------------------------------------------------- loading: one thread

template <class T>
struct Producer {
  Memory<T>& m;
  const Maps& maps;
  const Shape& s;
  Ring<kStages> k_ring, v_ring;
  Ring<2> q_ring;

  template <bool causal>
  __device__ __forceinline__ void run(int tiles, int* next_tile) {
    const int blocks = static_cast<int>(gridDim.x);  // have a first tile each, and take others as they end
    for (int index = blockIdx.x;; index = blocks + atomicAdd(next_tile, 1)) {
      const int at = q_ring.stage;
      wait(&m.q_empty[at], q_ring.parity ^ 1);
      m.tile[at] = index;
      q_ring.next();
      const Tile t = index < tiles ? tile_of<causal>(index, s) : Tile{};
      if (t.blocks) {
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

  __device__ __forceinline__ void load(T (&to)[kStages][kPanels][kKeys][kPanel], uint64_t* full,
                                       uint64_t* empty, Ring<kStages>& ring, const CUtensorMap& map,
                                       const Tile& t, int n) {
    wait(&empty[ring.stage], ring.parity ^ 1);
    arrive_expecting(&full[ring.stage], sizeof(to[0]));
    load_rows(to[ring.stage], map, &full[ring.stage], n * kKeys, t.head / s.sharing, t.batch);
    ring.next();
  }
};

// ---------------------------------------------------------------- computing: two warpgroups

// A warpgroup's 64 queries of a tile.
template <class T, bool causal>
struct Consumer {
  Memory<T>& m;
  const Shape& s;
  const int wg, thread;
  Ring<kStages> k_ring, v_ring;
  Ring<2> q_ring;
  float score[kKeys / 2], out[kWidth / 2];
  uint32_t p[kKeys / 16][4];
  float highest[2], sum[2], rescale[2];  // of the rows thread / 4 and 8 below; sums are this thread's part

  __device__ __forceinline__ Consumer(Memory<T>& m, const Shape& s)
      : m(m), s(s), wg(__shfl_sync(~0u, threadIdx.x / 128 - 1, 0)), thread(threadIdx.x % 128) {}

  __device__ __forceinline__ int row(int half) const {
    return wg * kRows + thread / 32 * 16 + thread % 32 / 4 + 8 * half;
  }

  // Products of the two warpgroups take turns.
  __device__ __forceinline__ void my_turn() const { named_sync(kTurn + wg, 256); }
  __device__ __forceinline__ void your_turn() const { named_arrive(kTurn + 1 - wg, 256); }

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

  __device__ __forceinline__ void mask(const Tile& t, int n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int limit = s.seq_k - n * kKeys;  // keys of this block that the row sees
      if (causal) limit = min(limit, t.first + row(half) + 1 + s.seq_k - s.seq_q - n * kKeys);
      limit -= 2 * (thread % 4);
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
    if (runs) {
      release(&m.v_empty[v_ring.stage]);
      v_ring.next();
    }
    if (rescale[0] != 1 || rescale[1] != 1)
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) out[i] *= rescale[i / 2 % 2];
    round_to<T>(p, score);
  }

  // The product with v of the block before runs beside the softmax of this one. The next step ends it: the
  // wait stands after a branch, as the assembler moves a softmax behind a wait in the same basic block.
  template <bool masked>
  __device__ __forceinline__ void step(const Tile& t, int n) {
    wait(&m.k_full[k_ring.stage], k_ring.parity);
    settle(n + 2 < t.blocks);
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
  __device__ __forceinline__ void first_step(const Tile& t) {
    wait(&m.k_full[k_ring.stage], k_ring.parity);
    my_turn();
    multiply_qk();
    your_turn();
    wgmma_wait<0>();
    keep(score);
    release_k();
    mask(t, t.blocks - 1);
    softmax();
  }

  // The product with v of the first block of keys.
  __device__ __forceinline__ void last_product(bool runs) {
    Ring<kStages> last = v_ring;
    if (runs) last.next();
    wait(&m.v_full[last.stage], last.parity);
    settle(runs);
    add_product(out, p, m.v[v_ring.stage]);
    wgmma_wait<0>();
    keep(out);
    release(&m.v_empty[v_ring.stage]);
    v_ring.next();
  }

  __device__ __forceinline__ void attend(const Tile& t) {
    highest[0] = highest[1] = -INFINITY;
    sum[0] = sum[1] = 0;
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) out[i] = 0;
    // No query of the tile sees a key. (An `if` around the rest would make the assembler wait for each
    // product.)
    if (!t.blocks) {
      named_sync(kTileRead + wg, 128);  // all have read the tile's number
      release_q();
      return;
    }
    first_step(t);
    // blocks that end after what the first row sees
    const int whole = causal ? max(0, t.first + wg * kRows + 1 + s.seq_k - s.seq_q) / kKeys : t.blocks;
    int n = t.blocks - 2;
    for (; n >= whole; --n) step<true>(t, n);
    for (; n >= 0; --n) step<false>(t, n);
    release_q();
    last_product(t.blocks > 1);
  }

  __device__ __forceinline__ void write(const Tile& t, T* to, float* lse) {
    const int64_t heads = int64_t(t.batch) * s.heads + t.head;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[half];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      const float inverse = total == 0 ? 0 : 1 / total;
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j)
        out[4 * j + 2 * half] *= inverse, out[4 * j + 2 * half + 1] *= inverse;
      if (thread % 4 == 0 && t.first + row(half) < s.seq_q)
        lse[heads * s.seq_q + t.first + row(half)] =
            total == 0 ? -INFINITY : highest[half] * s.scale + __logf(total);
    }
    const int first = t.first + wg * kRows;
    T* const at = to + ((int64_t(t.batch) * s.seq_q + first) * s.heads + t.head) * kWidth;
    write_rows(out, 1.0f, m.out[wg], at, int64_t(s.heads) * kWidth, s.seq_q - first);
  }
};

// ---------------------------------------------------------------- kernel

template <class T>
__device__ __forceinline__ void init(Memory<T>& m) {
  for (int i = 0; i < 2; ++i) {
    barrier_init(&m.q_full[i], 1);
    barrier_init(&m.q_empty[i], 2);
  }
  for (int i = 0; i < kStages; ++i) {
    barrier_init(&m.k_full[i], 1);
    barrier_init(&m.k_empty[i], 2);
    barrier_init(&m.v_full[i], 1);
    barrier_init(&m.v_empty[i], 2);
  }
  barrier_init_done();
}

template <class T, bool causal>
__global__ void __launch_bounds__(kThreads, 1)
    attention_fwd_kernel(const __grid_constant__ Maps maps, T* out, float* lse, int* next_tile, const Shape s,
                         int tiles) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& m = *reinterpret_cast<Memory<T>*>(raw);
  if (threadIdx.x == 0) init(m);
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<40>();
    if (threadIdx.x == 0) Producer<T>{m, maps, s}.template run<causal>(tiles, next_tile);
  } else {
    take_registers<232>();
    Consumer<T, causal> c(m, s);
    if (c.wg == 1) c.your_turn();  // the first turn is warpgroup 0's
    for (;;) {
      wait(&m.q_full[c.q_ring.stage], c.q_ring.parity);
      const int index = m.tile[c.q_ring.stage];
      if (index >= tiles) break;
      const Tile t = tile_of<causal>(index, s);
      c.attend(t);
      c.write(t, out, lse);
    }
    if (c.wg == 0) c.my_turn();  // takes the last arrival, so that none is left over
  }
}

// ---------------------------------------------------------------- launchers

template <class T, bool causal>
cudaError_t launch(const Maps& maps, const AttentionFwd& a, cudaStream_t stream) {
  const auto kernel = attention_fwd_kernel<T, causal>;
  const int bytes = sizeof(Memory<T>);
  const int64_t cached_kv = std::max<int64_t>(1, kCache / (2 * a.seq_k * kHeadDim * size_of(a.dtype)));
  const Shape s = shape_of(a, a.seq_q, kQueries, a.heads, cached_kv * (a.heads / a.kv_heads));
  const int tiles = s.tiles * s.batch * s.heads;
  unsigned blocks = 0;
  cudaError_t error = prepare(kernel, bytes, 1, tiles, blocks);
  if (error == cudaSuccess) error = cudaMemsetAsync(a.next_tile, 0, sizeof(*a.next_tile), stream);
  if (error != cudaSuccess) return error;
  kernel<<<blocks, kThreads, bytes, stream>>>(maps, static_cast<T*>(a.out), a.lse, a.next_tile, s, tiles);
  return cudaGetLastError();
}

}  // namespace

cudaError_t attention_fwd(const AttentionFwd& a, cudaStream_t stream) {
  Maps maps{};
  for (const cudaError_t error : {describe_heads(maps.q, a, a.q, a.q_strides, a.seq_q, a.heads, kQueries),
                                  describe_heads(maps.k, a, a.k, a.k_strides, a.seq_k, a.kv_heads, kKeys),
                                  describe_heads(maps.v, a, a.v, a.v_strides, a.seq_k, a.kv_heads, kKeys)})
    if (error != cudaSuccess) return error;
  return with_half(a.dtype, [&](auto t) {
    using T = decltype(t);
    return a.causal ? launch<T, true>(maps, a, stream) : launch<T, false>(maps, a, stream);
  });
}

}  // namespace openllama::cuda
