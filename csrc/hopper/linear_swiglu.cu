// SwiGLU inside the matrix products beside it, which hide it:
//
//   forward:  [gate | up] = x [w_gate | w_up]^T, and act = silu(gate) up
//   backward: dact = dout w_down, and out of it, gate and up: their gradients, and act again
#include "../swiglu.cuh"
#include "product.cuh"

namespace openllama::cuda {
namespace {

using namespace hopper;

// A tile is 128 columns of gate and the same of up. They go from it to memory as they are; act is made of
// them.
template <class T>
struct Forward {
  using Element = T;
  using Arguments = LinearSwiglu;
  struct Maps {
    CUtensorMap x, weight[2], gate_up[2];
  };
  struct Room {};
  static constexpr Major major = Major::k;
  static constexpr int step = kColumns / 2, parts = step / kPart;

  Memory<Forward>& m;
  const Maps& maps;
  const Arguments& a;
  const bool first = threadIdx.x == 32;

  static __host__ __device__ int64_t columns(const Arguments& a) { return a.intermediate; }
  static __device__ __forceinline__ void clear(Room&) {}

  static __device__ __forceinline__ void load_half(T* to, const Maps& maps, const Arguments&, uint64_t* full,
                                                   int half, int column, int k) {
    load_box_for(kBoth, to, &maps.weight[half], full, k, column);
  }

  template <class F>
  __device__ __forceinline__ void tile(int row, int column, const F& wait_for_tile) {
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
              swiglu(load<kPart>(m.part(r, c)), load<kPart>(m.part(r, step + c))));
    }
    if (first) bulk_wait_read<0>();
  }
};

// The tile holds dact. A warp takes every third row of it, whose gate and up come to shared memory meanwhile.
template <class T>
struct Backward {
  using Element = T;
  using Arguments = LinearSwiglu;
  using Eight = Vec<T, kPart>;
  struct Maps {
    CUtensorMap x, weight;
  };
  static constexpr int kBatch =
      2;  // rows that a warp takes at once: its instructions wait less for one another
  static constexpr int kAhead = 3 * kBatch;  // rows that it has on their way
  struct Room {
    alignas(16) T ahead[kWarps][kAhead][2][kColumns];  // gate and up
    uint64_t there[kWarps][kAhead];
  };
  static constexpr Major major = Major::mn;
  static constexpr int step = kColumns;

  Memory<Backward>& m;
  const Maps& maps;
  const Arguments& a;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32 - 1, 0), lane = threadIdx.x % 32;
  Ring<kAhead> ring;

  static __host__ __device__ int64_t columns(const Arguments& a) { return a.intermediate; }

  static __device__ __forceinline__ void clear(Room& room) {
    for (int i = 0; i < kWarps * kAhead; ++i) barrier_init(&room.there[0][i], 1);
  }

  static __device__ __forceinline__ void load_half(T* to, const Maps& maps, const Arguments&, uint64_t* full,
                                                   int half, int column, int k) {
    constexpr int panels = kColumns / kPanel / 2;
    for (int p = 0; p < panels; ++p)
      load_box_for(kBoth, to + p * (kDeep * kPanel), &maps.weight, full,
                   column + (half * panels + p) * kPanel, k);
  }

  __device__ __forceinline__ T* gate_at(int64_t row, int column) const {
    return static_cast<T*>(a.gate_up) + row * (2 * a.intermediate) + column;
  }

  __device__ __forceinline__ void fetch(int slot, int64_t row, int column) {
    if (lane) return;
    const uint32_t bytes = min(kColumns, static_cast<int>(a.intermediate) - column) * sizeof(T);
    uint64_t* const there = &m.room.there[warp][slot];
    arrive_expecting(there, 2 * bytes);
    for (int which = 0; which < 2; ++which)
      load_bulk(m.room.ahead[warp][slot][which], gate_at(row, column) + which * a.intermediate, bytes, there);
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
        wait(&m.room.there[warp][ring.stage], ring.parity);
        gate[b] = load<kPart>(&m.room.ahead[warp][ring.stage][0][c]);
        up[b] = load<kPart>(&m.room.ahead[warp][ring.stage][1][c]);
        dact[b] = load<kPart>(m.part(r + b * kWarps, c));
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

}  // namespace

cudaError_t linear_swiglu_fwd(const LinearSwiglu& a, cudaStream_t stream) {
  return with_half(a.dtype, [&](auto t) {
    typename Forward<decltype(t)>::Maps maps{};
    const auto up = static_cast<char*>(a.gate_up) + 2 * a.intermediate;
    for (const cudaError_t error :
         {describe(maps.x, a.dtype, a.x, a.hidden, {{a.tokens, a.x_stride}}, kRows),
          describe(maps.weight[0], a.dtype, a.w_gate, a.hidden, {{a.intermediate, a.w_gate_stride}},
                   kColumns / 2),
          describe(maps.weight[1], a.dtype, a.w_up, a.hidden, {{a.intermediate, a.w_up_stride}},
                   kColumns / 2),
          describe(maps.gate_up[0], a.dtype, a.gate_up, a.intermediate, {{a.tokens, 2 * a.intermediate}},
                   kRows),
          describe(maps.gate_up[1], a.dtype, up, a.intermediate, {{a.tokens, 2 * a.intermediate}}, kRows)})
      if (error != cudaSuccess) return error;
    return launch<Forward<decltype(t)>>(maps, a, stream);
  });
}

cudaError_t linear_swiglu_bwd(const LinearSwiglu& a, cudaStream_t stream) {
  return with_half(a.dtype, [&](auto t) {
    typename Backward<decltype(t)>::Maps maps{};
    for (const cudaError_t error :
         {describe(maps.x, a.dtype, a.x, a.hidden, {{a.tokens, a.x_stride}}, kRows),
          describe(maps.weight, a.dtype, a.w_down, a.intermediate, {{a.hidden, a.w_down_stride}}, kDeep)})
      if (error != cudaSuccess) return error;
    return launch<Backward<decltype(t)>>(maps, a, stream);
  });
}

}  // namespace openllama::cuda
