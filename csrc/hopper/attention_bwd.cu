// Attention backward. With P = exp(scale q k^T - lse), dP = dout v^T, delta = sum(dout out), dS = P (dP -
// delta):
//
//   dv = P^T dout,   dk = scale dS^T q,   dq = scale dS k
//
// A block owns 128 keys of a key head and goes over the queries that see them, 64 at a time, of all heads
// that share it: dk and dv stay in registers. P and dS are made transposed, a warpgroup 64 keys, so that they
// feed dv and dk out of registers; dS goes through shared memory for dq, of which each warpgroup makes half
// the columns. dq adds up in fp32 in global memory, as the products' registers hold it: the tile of a head's
// first keys, which is taken first, sets it, the others add to it by bulk reductions, in any order. The
// kernel after this one scales and rounds it, and turns it back where rotary turned q.
#include "attention.cuh"

namespace openllama::cuda {
namespace {

using namespace hopper;

constexpr int kQueries = kAttentionBlock, kKeys = 2 * kRows, kStages = 3;
constexpr int kThreads = 384, kThreadsAround = 256;  // the latter: of the kernels before and after
constexpr int64_t kCache = 32 << 20;                 // bytes of L2 for q, dout and the sum of dq
constexpr int64_t kHeadsTogether = 4;                // which the kernel after turns by the same angles
constexpr int kBoth = 1;                             // named barrier of both warpgroups

struct Maps {
  CUtensorMap q, k, v, dout;
};

template <class T>
struct Memory {
  alignas(1024) T k[kPanels][kKeys][kPanel];
  alignas(1024) T v[kPanels][kKeys][kPanel];
  alignas(1024) T q[kStages][kPanels][kQueries][kPanel];
  alignas(1024) T dout[kStages][kPanels][kQueries][kPanel];
  alignas(1024) T ds[2][kKeys][kPanel];              // dS^T
  alignas(1024) float dq[2][kQueries * kWidth / 2];  // of each warpgroup
  alignas(16) float stats[kStages][2][kQueries];     // of each query: lse in base 2, delta
  int tile;                                          // its number, while k and v are there
  uint64_t k_full, v_full, kv_empty, q_full[kStages], q_empty[kStages], dout_full[kStages],
      dout_empty[kStages], dq_full[2], dq_empty[2];
};

// Two neighbouring pairs (low, high) turn back.
__device__ __forceinline__ void turn_back(float* low, float* high, const float* cos, const float* sin) {
  const float2 c = *reinterpret_cast<const float2*>(cos), d = *reinterpret_cast<const float2*>(sin);
  const float2 x = {low[0], low[1]}, y = {high[0], high[1]};
  low[0] = x.x * c.x + y.x * d.x, low[1] = x.y * c.y + y.y * d.y;
  high[0] = y.x * c.x - x.x * d.x, high[1] = y.y * c.y - x.y * d.y;
}

struct Tile {
  int first_key, kv_head, batch, first;  // the first block of queries that sees any of its keys
};

template <bool causal>
__device__ __forceinline__ Tile tile_of(int index, const Shape& s) {
  const Place place = place_of(index, s, s.batch * s.kv_heads);
  const int key = place.tile * kKeys;  // the first keys are seen by most queries
  // the first tile sets dq of all queries, also of those that see no key
  const int first = causal && key > 0 ? max(0, key - (s.seq_k - s.seq_q)) / kQueries : 0;
  return {key, place.which % s.kv_heads, place.which / s.kv_heads, first};
}

// Calls go(head, i, first) for each block i of queries that sees keys of the tile, of all heads that share
// it, the last queries first: all tiles of a head begin with the same ones.
template <class F>
__device__ __forceinline__ void for_queries(const Tile& t, const Shape& s, const F& go) {
#pragma unroll 1
  for (int i = s.blocks - 1, n = 0; i >= t.first;) {
    go(t.kv_head * s.sharing + n, i, n == 0 && i == s.blocks - 1);
    if (++n == s.sharing) n = 0, --i;
  }
}

// Of a block of queries, among those of all heads.
__device__ __forceinline__ int64_t number_of(const Tile& t, const Shape& s, int head, int i) {
  return (t.batch * s.heads + head) * s.blocks + i;
}

// ---------------------------------------------------------------- loading: one thread

template <class T, bool causal>
__device__ __forceinline__ void produce(Memory<T>& m, const Maps& maps, const float* stats, const Shape& s,
                                        int tiles, int* next_tile) {
  Ring<kStages> ring;
  uint32_t kv_parity = 1;
  int index;
#pragma unroll 1
  while ((index = atomicAdd(next_tile, 1)) < tiles) {
    const Tile t = tile_of<causal>(index, s);
    for_queries(t, s, [&](int head, int i, bool first) {
      const int at = ring.stage;
      wait(&m.q_empty[at], ring.parity ^ 1);
      arrive_expecting(&m.q_full[at], sizeof(m.q[0]) + sizeof(m.stats[0]));
      load_bulk(m.stats[at], stats + number_of(t, s, head, i) * (2 * kQueries), sizeof(m.stats[0]),
                &m.q_full[at]);
      load_rows(m.q[at], maps.q, &m.q_full[at], i * kQueries, head, t.batch);
      if (first) {  // after the first queries, as the room of keys is taken longer
        wait(&m.kv_empty, kv_parity);
        kv_parity ^= 1;
        m.tile = index;
        arrive_expecting(&m.k_full, sizeof(m.k));
        load_rows(m.k, maps.k, &m.k_full, t.first_key, t.kv_head, t.batch);
        arrive_expecting(&m.v_full, sizeof(m.v));
        load_rows(m.v, maps.v, &m.v_full, t.first_key, t.kv_head, t.batch);
      }
      wait(&m.dout_empty[at], ring.parity ^ 1);
      arrive_expecting(&m.dout_full[at], sizeof(m.dout[0]));
      load_rows(m.dout[at], maps.dout, &m.dout_full[at], i * kQueries, head, t.batch);
      ring.next();
    });
  }
  wait(&m.kv_empty, kv_parity);
  m.tile = index;  // none
  arrive(&m.k_full);
}

// ---------------------------------------------------------------- adding dq to global memory: one thread

// `set`: of each key head, how many steps its first tile has set dq of. That was taken before its others, by
// a block that runs: what is waited for here comes.
template <class T, bool causal>
__device__ __forceinline__ void add_dq(Memory<T>& m, float* dq, int* set, const Shape& s, int tiles) {
  constexpr int half = kQueries * kWidth / 2;
  uint32_t parity = 0, k_parity = 0;
#pragma unroll 1
  for (;;) {
    wait(&m.k_full, k_parity);
    k_parity ^= 1;
    const int index = m.tile;
    arrive(&m.kv_empty);  // the number is read
    if (index >= tiles) break;
    const Tile t = tile_of<causal>(index, s);
    int* const done = set + t.batch * s.kv_heads + t.kv_head;
    const bool sets = t.first_key == 0;
    int step = 0, seen = 0;
    for_queries(t, s, [&](int head, int i, bool) {
      ++step;
      if (!sets && seen < step) {
        while ((seen = load_acquire(done)) < step);
        fence_async_global();
      }
      float* const to = dq + number_of(t, s, head, i) * (2 * half);
#pragma unroll
      for (int wg = 0; wg < 2; ++wg) {
        wait(&m.dq_full[wg], parity);
        if (sets)
          store_bulk(to + wg * half, m.dq[wg], sizeof(m.dq[0]));
        else
          add_bulk(to + wg * half, m.dq[wg], sizeof(m.dq[0]));
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

// ---------------------------------------------------------------- computing: two warpgroups

// A warpgroup's 64 keys of a tile. Element 4 j + 2 h + e of a (64 keys, 64 queries) product is of key(h) and
// query 8 j + 2 (thread % 4) + e.
template <class T, bool causal>
struct Consumer {
  Memory<T>& m;
  const Shape& s;
  const int wg, thread;
  Ring<kStages> ring;
  uint32_t kv_parity = 0, dq_parity = 1;
  int ds_at = 0;
  float dk[kWidth / 2], dv[kWidth / 2];

  __device__ __forceinline__ Consumer(Memory<T>& m, const Shape& s)
      : m(m), s(s), wg(__shfl_sync(~0u, threadIdx.x / 128 - 1, 0)), thread(threadIdx.x % 128) {}

  static __device__ __forceinline__ int before(int stage) { return stage == 0 ? kStages - 1 : stage - 1; }
  static __device__ __forceinline__ int after(int stage) { return stage + 1 == kStages ? 0 : stage + 1; }

  __device__ __forceinline__ void release(uint64_t* b) const {
    if (thread == 0) arrive(b);
  }

  __device__ __forceinline__ int key(const Tile& t, int half) const {
    return t.first_key + wg * kRows + thread / 32 * 16 + thread % 32 / 4 + 8 * half;
  }

  // d (64 of the keys, 64 queries) = keys queries^T
  __device__ __forceinline__ void multiply_keys(float (&d)[kQueries / 2],
                                                const T (&keys)[kPanels][kKeys][kPanel],
                                                const T (&queries)[kPanels][kQueries][kPanel]) {
    uint32_t at = shared(keys[0][wg * kRows]);
    // made anew each time: kept over the loop, the descriptors of k and v would spill
    asm volatile("" : "+r"(at));
    multiply(d, at, sizeof(keys[0]), queries);
  }

  // z (64 queries, half of the columns) = dS k
  __device__ __forceinline__ void multiply_dq(float (&z)[kWidth / 4]) {
    const uint64_t ds = matrix(shared(m.ds[ds_at])), k = matrix(shared(m.k[wg]), sizeof(m.k[0]));
    wgmma_fence();
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n)
      wgmma<T, Major::mn, Major::mn>(z, ds + n * kDeeperInRows, k + n * kDeeperInRows, n > 0);
    wgmma_commit();
  }

  // Scores become P.
  __device__ __forceinline__ void probabilities(float (&x)[kQueries / 2]) {
    const float c = s.scale * kLog2e;
    const float* lse = &m.stats[ring.stage][0][2 * (thread % 4)];
#pragma unroll
    for (int j = 0; j < kQueries / 8; ++j) {
      const float2 l = *reinterpret_cast<const float2*>(lse + 8 * j);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float &a = x[4 * j + 2 * half], &b = x[4 * j + 2 * half + 1];
        a = fast_exp2(fmaf(a, c, -l.x));
        b = fast_exp2(fmaf(b, c, -l.y));
      }
    }
  }

  __device__ __forceinline__ void mask(float (&x)[kQueries / 2], const Tile& t, int i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // the first of this block's queries that sees the key; none sees one past the end
      const int seen_from = causal ? key(t, half) - (s.seq_k - s.seq_q) - i * kQueries : 0;
      const int from = (key(t, half) >= s.seq_k ? kQueries : seen_from) - 2 * (thread % 4);
#pragma unroll
      for (int j = 0; j < kQueries / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (8 * j + e < from) x[4 * j + 2 * half + e] = 0;
    }
  }

  // dP becomes dS.
  __device__ __forceinline__ void score_gradients(float (&y)[kQueries / 2], const float (&p)[kQueries / 2],
                                                  int at) {
    const float* delta = &m.stats[at][1][2 * (thread % 4)];
#pragma unroll
    for (int j = 0; j < kQueries / 8; ++j) {
      const float2 d = *reinterpret_cast<const float2*>(delta + 8 * j);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        y[4 * j + 2 * half] = p[4 * j + 2 * half] * (y[4 * j + 2 * half] - d.x);
        y[4 * j + 2 * half + 1] = p[4 * j + 2 * half + 1] * (y[4 * j + 2 * half + 1] - d.y);
      }
    }
  }

  // dS^T to shared memory, for both warpgroups.
  __device__ __forceinline__ void share(const uint32_t (&ds)[kQueries / 16][4]) {
    const int row = wg * kRows + thread / 32 * 16 + thread % 16;
#pragma unroll
    for (int n = 0; n < kQueries / 16; ++n)
      store_matrices(shared(part(m.ds[ds_at], row, 2 * n + thread % 32 / 16)), ds[n][0], ds[n][1], ds[n][2],
                     ds[n][3]);
    fence_async();
    named_sync(kBoth, 256);
  }

  __device__ __forceinline__ void hand_over(const float (&dq)[kWidth / 4]) {
    float4* const to = reinterpret_cast<float4*>(m.dq[wg]) + thread;
#pragma unroll
    for (int j = 0; j < kWidth / 16; ++j)
      to[128 * j] = make_float4(dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
    fence_async();
    arrive(&m.dq_full[wg]);
  }

  // The scores of a step are made in the step before, while dS is stored; dk of a step ends in the step
  // after: the tensor cores have work while this warpgroup computes.
  __device__ __forceinline__ void step(const Tile& t, float (&x)[kQueries / 2], int i, bool first, bool last,
                                       bool masked) {
    float y[kQueries / 2];  // dP; x is the scores, then P, then the next scores
    uint32_t p[kQueries / 16][4], ds[kQueries / 16][4];
    const int at = ring.stage;
    if (first) {
      wait(&m.v_full, kv_parity);
      kv_parity ^= 1;
    }
    wait(&m.dout_full[at], ring.parity);
    multiply_keys(y, m.v, m.dout[at]);
    probabilities(x);
    if (masked) mask(x, t, i);
    wgmma_wait<1>();  // dk of the step before: its dS's registers are P's
    keep(dk);
    keep(x);
    if (!first) release(&m.q_empty[before(at)]);
    round_to<T>(p, x);
    add_product(dv, p, m.dout[at]);
    wait(&m.dq_empty[wg], dq_parity);  // for later
    dq_parity ^= 1;
    wgmma_wait<1>();  // dP
    keep(y);
    score_gradients(y, x, at);
    // the last step's are not used, but a branch would make all products wait
    const int next = last ? at : after(at);
    wait(&m.q_full[next], ring.parity ^ (next == 0 && at != 0));
    multiply_keys(x, m.k, m.q[next]);
    wgmma_wait<1>();  // dv: its P's registers are dS's, then dq's
    keep(dv);
    keep(y);
    release(&m.dout_empty[at]);
    round_to<T>(ds, y);
    share(ds);
    float z[kWidth / 4];
    multiply_dq(z);
    add_product(dk, ds, m.q[at]);
    wgmma_wait<1>();  // the next scores, dq
    keep(x);
    keep(z);
    hand_over(z);
    ds_at ^= 1;
    ring.next();
  }

  __device__ __forceinline__ void run(const Tile& t) {
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) dk[i] = dv[i] = 0;
    // queries from this block on see all keys of the tile
    const int last_key = t.first_key + kKeys - 1 - (s.seq_k - s.seq_q);
    const bool tail = t.first_key + kKeys > s.seq_k;
    const int whole = tail     ? s.blocks
                      : causal ? min(s.blocks, max(t.first, (last_key + kQueries - 1) / kQueries))
                               : t.first;
    float x[kQueries / 2];
    wait(&m.q_full[ring.stage], ring.parity);
    multiply_keys(x, m.k, m.q[ring.stage]);
    wgmma_wait<0>();
    keep(x);
    const int masked = s.sharing * (whole - t.first);  // steps, the last ones
    bool first = true;
    for (int left = s.sharing * (s.blocks - t.first); left > 0; first = false, --left)
      step(t, x, t.first + (left - 1) / s.sharing, first, left == 1, left <= masked);
    wgmma_wait<0>();
    keep(dk);
    release(&m.q_empty[before(ring.stage)]);
    release(&m.kv_empty);
  }

  // Through the memory of dS, of which each warpgroup has half.
  __device__ __forceinline__ void write(const Tile& t, T* to_dk, T* to_dv, const HeadStrides& dk_strides,
                                        const HeadStrides& dv_strides) {
    const int first = t.first_key + wg * kRows;
    const auto place = [&](T* to, const HeadStrides& strides) {
      return to + t.batch * strides.batch + t.kv_head * strides.head + first * strides.row;
    };
    named_sync(kBoth, 256);  // both are done with dS
    write_rows(dv, 1.0f, m.ds[wg], place(to_dv, dv_strides), dv_strides.row, s.seq_k - first);
    write_rows(dk, s.scale, m.ds[wg], place(to_dk, dk_strides), dk_strides.row, s.seq_k - first);
    named_sync(kBoth, 256);  // and with the room in it
  }
};

// ---------------------------------------------------------------- kernels

template <class T>
__device__ __forceinline__ void init(Memory<T>& m) {
  barrier_init(&m.k_full, 1);
  barrier_init(&m.v_full, 1);
  barrier_init(&m.kv_empty, 3);
  for (int i = 0; i < kStages; ++i) {
    barrier_init(&m.q_full[i], 1);
    barrier_init(&m.q_empty[i], 2);
    barrier_init(&m.dout_full[i], 1);
    barrier_init(&m.dout_empty[i], 2);
  }
  for (int i = 0; i < 2; ++i) {
    barrier_init(&m.dq_full[i], 128);
    barrier_init(&m.dq_empty[i], 1);
  }
  barrier_init_done();
}

template <class T, bool causal>
__global__ void __launch_bounds__(kThreads, 1)
    attention_bwd_kernel(const __grid_constant__ Maps maps, const float* stats, float* dq, T* dk, T* dv,
                         const HeadStrides dk_strides, const HeadStrides dv_strides, int* next_tile, int* set,
                         const Shape s, int tiles) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& m = *reinterpret_cast<Memory<T>*>(raw);
  if (threadIdx.x == 0) init(m);
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<24>();
    if (threadIdx.x == 0) produce<T, causal>(m, maps, stats, s, tiles, next_tile);
    if (threadIdx.x == 32) add_dq<T, causal>(m, dq, set, s, tiles);
  } else {
    take_registers<240>();
    Consumer<T, causal> c(m, s);
    for (;;) {
      wait(&m.k_full, c.kv_parity);
      const int index = m.tile;
      if (index >= tiles) break;
      const Tile t = tile_of<causal>(index, s);
      c.run(t);
      c.write(t, dk, dv, dk_strides, dv_strides);
    }
  }
}

// Of a block of queries: delta, and lse in base 2, padded with what makes P zero. And none set, none taken.
template <class T>
__global__ void __launch_bounds__(kThreadsAround)
    attention_bwd_begin_kernel(const AttentionBwd a, int blocks) {
  constexpr int lanes = kWidth / kPack<T>, step = kThreadsAround / lanes, mine = kQueries / step;
  const int lane = threadIdx.x % lanes, own = threadIdx.x / lanes;
  const int64_t head = blockIdx.x / blocks, batch = head / a.heads, which = head % a.heads;
  const int64_t first = int64_t(blockIdx.x % blocks) * kQueries;
  const T* const out =
      static_cast<const T*>(a.out) + (batch * a.seq_q * a.heads + which) * kWidth + lane * kPack<T>;
  const T* const dout = static_cast<const T*>(a.dout) + batch * a.dout_strides.batch +
                        which * a.dout_strides.head + lane * kPack<T>;
  Vec<T, kPack<T>> o[mine], d[mine];
  float lse[mine];
#pragma unroll
  for (int n = 0; n < mine; ++n) {
    const int64_t row = min(first + own + n * step, a.seq_q - 1);
    o[n] = load<kPack<T>>(out + row * a.heads * kWidth),
    d[n] = load<kPack<T>>(dout + row * a.dout_strides.row);
    lse[n] = a.lse[head * a.seq_q + row];
  }
  float* const stats = a.stats + int64_t(blockIdx.x) * (2 * kQueries);
#pragma unroll
  for (int n = 0; n < mine; ++n) {
    float sum = 0;
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) sum += o[n][e] * d[n][e];
    sum = warp_sum(sum, lanes);
    if (lane) continue;
    const int row = own + n * step;
    const bool sees_none = first + row >= a.seq_q || lse[n] == -INFINITY;
    stats[row] = sees_none ? INFINITY : lse[n] * kLog2e;
    stats[kQueries + row] = first + row < a.seq_q ? sum : 0;
  }
  if (threadIdx.x > 0) return;
  if (first == 0 && which % (a.heads / a.kv_heads) == 0)
    a.set[batch * a.kv_heads + which * a.kv_heads / a.heads] = 0;
  if (blockIdx.x == 0) *a.next_tile = 0;
}

// dq of a block of queries and some heads, scaled and rounded, out of the order of the products' registers:
// float4 j of thread t of warpgroup w is rows 16 (t / 32) + t % 32 / 4 and 8 below, columns w kWidth / 2 + 8
// j
// + 2 (t % 4) and one more. A thread takes the same of both warpgroups, which rotary has as pairs. Through
// shared memory, to write rows.
template <class T>
__global__ void __launch_bounds__(kThreadsAround, 2)
    attention_bwd_end_kernel(const AttentionBwd a, int blocks) {
  constexpr int parts = kWidth / kPack<T>, half_sum = kQueries * kWidth / 8, mine = kWidth / 32;
  // 16 bytes more to a row, so that rows lie in other banks
  __shared__ __align__(16) T tile[kQueries][kWidth + kPack<T>];
  const int t = threadIdx.x % 128, own = t / 32 * 16 + t % 32 / 4, j = threadIdx.x / 128 * mine;
  const int column = 8 * j + 2 * (t % 4);
  const int64_t batch = blockIdx.x / blocks, first = int64_t(blockIdx.x % blocks) * kQueries;
  float cos[2][mine][2], sin[2][mine][2];
  if (a.cos)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t position = a.positions[batch * a.seq_q + min(first + own + 8 * half, a.seq_q - 1)];
      require(position >= 0 && position < a.table_rows, "attention: a position is outside rotary's tables");
      const int64_t at = position * (kWidth / 2) + column;
#pragma unroll
      for (int n = 0; n < mine; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          cos[half][n][e] = a.cos[at + 8 * n + e], sin[half][n][e] = a.sin[at + 8 * n + e];
    }
#pragma unroll 1
  for (int64_t head = blockIdx.y * kHeadsTogether; head < min((blockIdx.y + 1) * kHeadsTogether, a.heads);
       ++head) {
    const float4* const from = reinterpret_cast<const float4*>(a.dq_sum) +
                               ((batch * a.heads + head) * blocks + blockIdx.x % blocks) * (2 * half_sum) +
                               128 * j + t;
    float4 x[mine], y[mine];
#pragma unroll
    for (int n = 0; n < mine; ++n) x[n] = from[128 * n], y[n] = from[half_sum + 128 * n];
    __syncthreads();  // the head before is written
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < mine; ++n) {
        float *const low = &x[n].x + 2 * half, *const high = &y[n].x + 2 * half;
        if (a.cos) turn_back(low, high, cos[half][n], sin[half][n]);
        T* const to = &tile[own + 8 * half][column + 8 * n];
        *reinterpret_cast<uint32_t*>(to) = Pair<T>::of(a.scale * low[0], a.scale * low[1]);
        *reinterpret_cast<uint32_t*>(to + kWidth / 2) = Pair<T>::of(a.scale * high[0], a.scale * high[1]);
      }
    __syncthreads();
    T* const dq = static_cast<T*>(a.dq) + batch * a.dq_strides.batch + head * a.dq_strides.head;
#pragma unroll
    for (int k = threadIdx.x; k < kQueries * parts; k += kThreadsAround) {
      const int r = k / parts, part = k % parts * kPack<T>;
      if (first + r < a.seq_q)
        store(dq + (first + r) * a.dq_strides.row + part, load<kPack<T>>(&tile[r][part]));
    }
  }
}

// ---------------------------------------------------------------- launchers

template <class T, bool causal>
cudaError_t launch(const Maps& maps, const AttentionBwd& a, cudaStream_t stream) {
  const auto kernel = attention_bwd_kernel<T, causal>;
  const int bytes = sizeof(Memory<T>);
  const int64_t cached = kCache / (a.seq_q * kHeadDim * (2 * size_of(a.dtype) + int64_t{sizeof(float)}));
  const Shape s = shape_of(a, a.seq_k, kKeys, a.kv_heads, cached);
  const int tiles = s.tiles * s.batch * s.kv_heads;
  const unsigned around = static_cast<unsigned>(s.batch * s.heads * s.blocks);
  unsigned blocks = 0;
  cudaError_t error = prepare(kernel, bytes, 1, tiles, blocks);
  if (error != cudaSuccess) return error;
  attention_bwd_begin_kernel<T><<<around, kThreadsAround, 0, stream>>>(a, s.blocks);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  kernel<<<blocks, kThreads, bytes, stream>>>(maps, a.stats, a.dq_sum, static_cast<T*>(a.dk),
                                              static_cast<T*>(a.dv), a.dk_strides, a.dv_strides, a.next_tile,
                                              a.set, s, tiles);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const dim3 ends(s.batch * s.blocks, static_cast<unsigned>(ceil_div(a.heads, kHeadsTogether)));
  attention_bwd_end_kernel<T><<<ends, kThreadsAround, 0, stream>>>(a, s.blocks);
  return cudaGetLastError();
}

}  // namespace

cudaError_t attention_bwd(const AttentionBwd& a, cudaStream_t stream) {
  Maps maps{};
  for (const cudaError_t error :
       {describe_heads(maps.q, a, a.q, a.q_strides, a.seq_q, a.heads, kQueries),
        describe_heads(maps.k, a, a.k, a.k_strides, a.seq_k, a.kv_heads, kKeys),
        describe_heads(maps.v, a, a.v, a.v_strides, a.seq_k, a.kv_heads, kKeys),
        describe_heads(maps.dout, a, a.dout, a.dout_strides, a.seq_q, a.heads, kQueries)})
    if (error != cudaSuccess) return error;
  return with_half(a.dtype, [&](auto t) {
    using T = decltype(t);
    return a.causal ? launch<T, true>(maps, a, stream) : launch<T, false>(maps, a, stream);
  });
}

}  // namespace openllama::cuda
