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
#include "attention_bwd.cuh"

namespace openllama::cuda {
namespace {

using namespace hopper;

constexpr int kThreads = 384;
constexpr int64_t kCache = 16 << 20;  // bytes of L2 for q, dout and the sum of dq
constexpr int64_t kFewest = 4;        // heads at a time: tiles of one are to start apart
constexpr int kBoth = 1, kOwn = 2;    // named barriers: of both warpgroups; one for each

// ---------------------------------------------------------------- computing: two warpgroups

// A warpgroup's 64 keys of a tile. Element 4 j + 2 h + e of a (64 keys, 64 queries) product is of key(h) and
// query 8 j + 2 (thread % 4) + e.
template <class T, class P>
struct Consumer {
  Memory<T, P>& m;
  const Shape& s;
  const int wg, thread;
  Ring<P::stages> ring;
  Ring<P::tiles> kv;
  uint32_t dq_parity = 1, ds_parity = 0;
  int ds_at = 0;
  float dk[P::panels * kPanel / 2], dv[P::panels * kPanel / 2];

  __device__ __forceinline__ Consumer(Memory<T, P>& m, const Shape& s)
      : m(m), s(s), wg(__shfl_sync(~0u, threadIdx.x / 128 - 1, 0)), thread(threadIdx.x % 128) {}

  static __device__ __forceinline__ int before(int stage) { return stage == 0 ? P::stages - 1 : stage - 1; }
  static __device__ __forceinline__ int after(int stage) { return stage + 1 == P::stages ? 0 : stage + 1; }

  __device__ __forceinline__ void release(uint64_t* b) const {
    if (thread == 0) arrive(b);
  }

  __device__ __forceinline__ int key(const Tile& t, int half) const {
    return t.first_key + wg * kRows + thread / 32 * 16 + thread % 32 / 4 + 8 * half;
  }

  // d (64 of the keys, 64 queries) = keys queries^T
  __device__ __forceinline__ void multiply_keys(float (&d)[kQueries / 2],
                                                const T (&keys)[P::panels][kKeys][kPanel],
                                                const T (&queries)[P::panels][kQueries][kPanel]) {
    uint32_t at = shared(keys[0][wg * kRows]);
    // made anew each time: kept over the loop, the descriptors of k and v would spill
    asm volatile("" : "+r"(at));
    multiply(d, at, sizeof(keys[0]), queries);
  }

  // z (64 queries, 64 columns) = dS k
  __device__ __forceinline__ void multiply_dq(float (&z)[kPart / 128]) {
    const auto& own_k = m.k[kv.stage];
    const uint64_t ds = matrix(shared(m.ds[ds_at][P::blocks == 2 ? wg : 0])),
                   k = matrix(shared(own_k[P::panels == 2 ? wg : 0]), sizeof(own_k[0]));
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
      const int seen_from = key(t, half) - s.ahead - i * kQueries;
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

  // The 16 bytes of a panel's row that this thread has for load_matrices and store_matrices, of columns from
  // 16 n on.
  __device__ __forceinline__ T* own_part(T (*rows)[kPanel], int n) const {
    return part(rows, wg * kRows + thread / 32 * 16 + thread % 16, 2 * n + thread % 32 / 16);
  }

  // dS^T of a block to shared memory, for both warpgroups.
  __device__ __forceinline__ void store(const uint32_t (&ds)[kQueries / 16][4], int block) {
#pragma unroll
    for (int n = 0; n < kQueries / 16; ++n)
      store_matrices(shared(own_part(m.ds[ds_at][block], n)), ds[n][0], ds[n][1], ds[n][2], ds[n][3]);
    fence_async();
  }

  __device__ __forceinline__ void hand_over(const float (&dq)[kPart / 128]) {
    float4* const to = reinterpret_cast<float4*>(m.dq[wg]) + thread;
#pragma unroll
    for (int j = 0; j < kPart / 512; ++j)
      to[128 * j] = make_float4(dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
    fence_async();
    arrive(&m.dq_full[wg]);
  }

  // ---- 128 columns
  //
  // The scores of a step are made in the step before, while dS is stored; dk of a step ends in the step
  // after: the tensor cores have work while this warpgroup computes.
  __device__ __forceinline__ void step(const Tile& t, float (&x)[kQueries / 2], int i, bool first, bool last,
                                       bool masked) {
    float y[kQueries / 2];  // dP; x is the scores, then P, then the next scores
    uint32_t p[kQueries / 16][4], ds[kQueries / 16][4];
    const int at = ring.stage;
    if (first) wait(&m.v_full[kv.stage], kv.parity);
    wait(&m.dout_full[at], ring.parity);
    multiply_keys(y, m.v[kv.stage], m.dout[at]);
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
    multiply_keys(x, m.k[kv.stage], m.q[next]);
    wgmma_wait<1>();  // dv: its P's registers are dS's, then dq's
    keep(dv);
    keep(y);
    release(&m.dout_empty[at]);
    round_to<T>(ds, y);
    store(ds, 0);
    named_sync(kBoth, 256);
    float z[kPart / 128];
    multiply_dq(z);
    add_product(dk, ds, m.q[at]);
    wgmma_wait<1>();  // the next scores, dq
    keep(x);
    keep(z);
    hand_over(z);
    ds_at ^= 1;
    ring.next();
  }

  __device__ __forceinline__ void run_wide(const Tile& t, int whole) {
    float x[kQueries / 2];
    wait(&m.q_full[ring.stage], ring.parity);
    multiply_keys(x, m.k[kv.stage], m.q[ring.stage]);
    wgmma_wait<0>();
    keep(x);
    const int masked = s.sharing * (whole - t.first);  // steps, the last ones
    bool first = true;
    for (int left = s.sharing * (s.blocks - t.first); left > 0; first = false, --left)
      step(t, x, t.first + (left - 1) / s.sharing, first, left == 1, left <= masked);
    wgmma_wait<0>();
    keep(dk);
    release(&m.q_empty[before(ring.stage)]);
  }

  // ---- 64 columns
  //
  // There are registers to spare: v stays in them, which saves reading shared memory, P and dS have some of
  // their own, so that a step waits less, and dq of two blocks is made in the first step of the next two,
  // where neither warpgroup has to wait for the other's dS.

  __device__ __forceinline__ void wait_for_ds() {
    wait(&m.ds_full, ds_parity);
    ds_parity ^= 1;
  }

  __device__ __forceinline__ void multiply_last_dq(float (&z)[kPart / 128]) {
    ds_at ^= 1;
    multiply_dq(z);
    ds_at ^= 1;
  }

  __device__ __forceinline__ void hand_over_when_empty(const float (&z)[kPart / 128]) {
    wait(&m.dq_empty[wg], dq_parity);
    dq_parity ^= 1;
    hand_over(z);
  }

  // `block`: which of the two; `opens`: they are the tile's first.
  template <int block, bool opens>
  __device__ __forceinline__ void half_step(const Tile& t, const uint32_t (&v)[kPanel / 16][4],
                                            float (&x)[kQueries / 2], int i, bool last, bool masked) {
    constexpr bool makes_dq = block == 0 && !opens;
    float y[kQueries / 2], z[kPart / 128];
    uint32_t p[kQueries / 16][4], ds[kQueries / 16][4];
    const int at = ring.stage;
    wait(&m.dout_full[at], ring.parity);
    multiply(y, v, m.dout[at]);
    probabilities(x);
    if (masked) mask(x, t, i);
    round_to<T>(p, x);
    add_product(dv, p, m.dout[at]);
    wgmma_wait<1>();  // dk of the step before, dP
    keep(y);
    keep(dk);
    if (block == 1 || !opens) release(&m.q_empty[before(at)]);
    score_gradients(y, x, at);
    // the last step's are not used, but a branch would make all products wait
    const int next = last ? at : after(at);
    wait(&m.q_full[next], ring.parity ^ (next == 0 && at != 0));
    multiply_keys(x, m.k[kv.stage], m.q[next]);
    round_to<T>(ds, y);
    if constexpr (makes_dq) wait_for_ds();  // both have made dq of what this room held, too
    store(ds, block);
    if constexpr (block == 1) {
      arrive(&m.ds_full);
      ds_at ^= 1;
    }
    if constexpr (makes_dq) multiply_last_dq(z);
    add_product(dk, ds, m.q[at]);
    wgmma_wait<1>();  // dv, the next scores, dq
    keep(x);
    keep(dv);
    release(&m.dout_empty[at]);
    if constexpr (makes_dq) {
      keep(z);
      hand_over_when_empty(z);
    }
    ring.next();
  }

  template <bool opens>
  __device__ __forceinline__ void two_steps(const Tile& t, const uint32_t (&v)[kPanel / 16][4],
                                            float (&x)[kQueries / 2], int i, bool last, int whole) {
    half_step<0, opens>(t, v, x, i, false, i < whole);
    half_step<1, opens>(t, v, x, i + 1, last, i + 1 < whole);
  }

  __device__ __forceinline__ void run_narrow(const Tile& t, int whole) {
    float x[kQueries / 2], z[kPart / 128];
    uint32_t v[kPanel / 16][4];
    wait(&m.q_full[ring.stage], ring.parity);
    multiply_keys(x, m.k[kv.stage], m.q[ring.stage]);
    wait(&m.v_full[kv.stage], kv.parity);
#pragma unroll
    for (int n = 0; n < kPanel / 16; ++n) load_matrices(v[n], shared(own_part(m.v[kv.stage][0], n)));
    wgmma_wait<0>();
    keep(x);
    int left = s.sharing * (s.blocks - t.first) / 2;
    two_steps<true>(t, v, x, s.blocks - 2, left == 1, whole);
    while (--left > 0) two_steps<false>(t, v, x, t.first + (left - 1) / s.sharing * 2, left == 1, whole);
    wait_for_ds();
    multiply_last_dq(z);
    wgmma_wait<0>();
    keep(z);
    keep(dk);
    hand_over_when_empty(z);
    release(&m.q_empty[before(ring.stage)]);
  }

  // ---- both

  __device__ __forceinline__ void run(const Tile& t) {
#pragma unroll
    for (int i = 0; i < P::panels * kPanel / 2; ++i) dk[i] = dv[i] = 0;
    // queries from this block on see all keys of the tile
    const int last_key = t.first_key + kKeys - 1 - s.ahead;
    const bool tail = t.first_key + kKeys > s.seq_k;
    const int whole = tail ? s.blocks : min(s.blocks, max(t.first, (last_key + kQueries - 1) / kQueries));
    if constexpr (P::blocks == 2)
      run_narrow(t, whole);
    else
      run_wide(t, whole);
  }

  // Through the memory of dS, of which each warpgroup has half, or that of its own part of v, which is in
  // registers: then it waits for nobody.
  __device__ __forceinline__ void write(const Tile& t, T* to_dk, T* to_dv, const HeadStrides& dk_strides,
                                        const HeadStrides& dv_strides) {
    const int first = t.first_key + wg * kRows;
    const auto place = [&](T* to, const HeadStrides& strides) {
      return to + t.batch * strides.batch + t.kv_head * strides.head + first * strides.row;
    };
    T(*const room)[kPanel] = P::blocks == 2 ? m.v[kv.stage][0] + wg * kRows : m.ds[wg][0];
    if constexpr (P::blocks == 1) {
      release(&m.kv_empty[kv.stage]);
      named_sync(kBoth, 256);  // both are done with dS
    }
    write_rows(dv, 1.0f, room, place(to_dv, dv_strides), dv_strides.row, s.seq_k - first);
    write_rows(dk, s.scale, room, place(to_dk, dk_strides), dk_strides.row, s.seq_k - first);
    if constexpr (P::blocks == 1) {
      named_sync(kBoth, 256);  // and with the room in it
    } else {
      fence_async();  // TMA writes there next
      named_sync(kOwn + wg, 128);
      release(&m.kv_empty[kv.stage]);
    }
    kv.next();
  }
};

// ---------------------------------------------------------------- kernels

template <class T, class P>
__device__ __forceinline__ void init(Memory<T, P>& m) {
  for (int i = 0; i < P::tiles; ++i) {
    barrier_init(&m.k_full[i], 1);
    barrier_init(&m.v_full[i], 1);
    barrier_init(&m.kv_empty[i], 3);
  }
  for (int i = 0; i < P::stages; ++i) {
    barrier_init(&m.q_full[i], 1);
    barrier_init(&m.q_empty[i], 2);
    barrier_init(&m.dout_full[i], 1);
    barrier_init(&m.dout_empty[i], 2);
  }
  barrier_init(&m.ds_full, 256);
  for (int i = 0; i < 2; ++i) {
    barrier_init(&m.dq_full[i], 128);
    barrier_init(&m.dq_empty[i], 1);
  }
  barrier_init_done();
}

template <class T, class P>
__global__ void __launch_bounds__(kThreads, 1)
    attention_bwd_kernel(const __grid_constant__ Maps maps, const float* stats, float* dq, T* dk, T* dv,
                         const HeadStrides dk_strides, const HeadStrides dv_strides, int* next_tile, int* set,
                         const Shape s, int tiles) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& m = *reinterpret_cast<Memory<T, P>*>(raw);
  if (threadIdx.x == 0) init(m);
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<P::loading>();
    if (threadIdx.x == 0) produce<T, P>(m, maps, stats, s, tiles, next_tile);
    if (threadIdx.x == 32) add_dq<T, P>(m, dq, set, s, tiles);
  } else {
    take_registers<P::computing>();
    Consumer<T, P> c(m, s);
    for (;;) {
      wait(&m.k_full[c.kv.stage], c.kv.parity);
      const int index = m.tile[c.kv.stage];
      if (index >= tiles) break;
      const Tile t = tile_of<P>(index, s);
      c.run(t);
      c.write(t, dk, dv, dk_strides, dv_strides);
    }
  }
}

// ---------------------------------------------------------------- launchers

template <class T, int width>
cudaError_t launch(const Maps& maps, const AttentionBwd& a, cudaStream_t stream) {
  using P = Plan<width>;
  const auto kernel = attention_bwd_kernel<T, P>;
  constexpr int bytes = sizeof(Memory<T, P>);
  static_assert(bytes <= 227 << 10);
  const int64_t head = a.seq_q * width * (2 * size_of(a.dtype) + int64_t{sizeof(float)});
  const int64_t cached = std::max(kFewest, kCache / head);
  const Shape s = shape_of(a, a.seq_k, kKeys, a.kv_heads, cached);
  const int tiles = s.tiles * s.batch * s.kv_heads;
  unsigned blocks = 0;
  cudaError_t error = prepare(kernel, bytes, 1, tiles, blocks);
  if (error != cudaSuccess) return error;
  error = attention_bwd_begin(a, stream);
  if (error != cudaSuccess) return error;
  kernel<<<blocks, kThreads, bytes, stream>>>(maps, a.stats, a.dq_sum, static_cast<T*>(a.dk),
                                              static_cast<T*>(a.dv), a.dk_strides, a.dv_strides, a.next_tile,
                                              a.set, s, tiles);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  return attention_bwd_end(a, stream);
}

}  // namespace

cudaError_t attention_bwd(const AttentionBwd& a, cudaStream_t stream) {
  Maps maps{};
  cudaError_t error = describe_inputs(maps, a, kQueries, kKeys);
  if (error == cudaSuccess)
    error = describe_heads(maps.dout, a, a.dout, a.dout_strides, a.seq_q, a.heads, kQueries);
  if (error != cudaSuccess) return error;
  return with_kind(a, [&](auto t, auto width) { return launch<decltype(t), width>(maps, a, stream); });
}

}  // namespace openllama::cuda
