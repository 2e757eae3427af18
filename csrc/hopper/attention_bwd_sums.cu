// What comes before attention's backward and after it: sums over rows of dout and out; the sum of dq, scaled,
// rounded, and turned back where rotary turned q.
#include "attention.cuh"

namespace openllama::cuda {
namespace {

using namespace hopper;

constexpr int kQueries = kAttentionBlock, kThreads = 256;
constexpr int64_t kHeadsTogether = 4;  // which turn back by the same angles

// Of a block of queries: delta, and lse in base 2, padded with what makes P zero. And none set, none taken.
template <class T, int width>
__global__ void __launch_bounds__(kThreads) attention_bwd_begin_kernel(const AttentionBwd a, int blocks) {
  constexpr int lanes = width / kPack<T>, step = kThreads / lanes, mine = kQueries / step;
  const int lane = threadIdx.x % lanes, own = threadIdx.x / lanes;
  const int64_t head = blockIdx.x / blocks, batch = head / a.heads, which = head % a.heads;
  const int64_t first = int64_t(blockIdx.x % blocks) * kQueries;
  const T* const out =
      static_cast<const T*>(a.out) + (batch * a.seq_q * a.heads + which) * width + lane * kPack<T>;
  const T* const dout = static_cast<const T*>(a.dout) + batch * a.dout_strides.batch +
                        which * a.dout_strides.head + lane * kPack<T>;
  Vec<T, kPack<T>> o[mine], d[mine];
  float lse[mine];
#pragma unroll
  for (int n = 0; n < mine; ++n) {
    const int64_t row = min(first + own + n * step, a.seq_q - 1);
    o[n] = load<kPack<T>>(out + row * a.heads * width),
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

// Two neighbouring pairs (low, high) turn back.
__device__ __forceinline__ void turn_back(float* low, float* high, const float* cos, const float* sin) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const float x = low[e], y = high[e];
    low[e] = x * cos[e] + y * sin[e], high[e] = y * cos[e] - x * sin[e];
  }
}

// dq of some heads, out of the order of the products' registers, in parts of 64 queries by 64 columns: float4
// j of thread t is rows 16 (t / 32) + t % 32 / 4 and 8 below, columns 8 j + 2 (t % 4) and one more. What
// rotary has as pairs, width / 2 apart, one thread takes: of two panels, or of one, where each half of the
// block has queries of its own. Through shared memory, to write rows.
template <class T, int width>
__global__ void __launch_bounds__(kThreads, 2) attention_bwd_end_kernel(const AttentionBwd a, int groups) {
  constexpr int panels = width / kPanel, queries = 2 / panels * kQueries, parts = width / kPack<T>;
  constexpr int mine = kPanel / 16, apart = panels == 2 ? kPart / 4 : 128 * mine;
  // 16 bytes more to a row, so that rows lie in other banks
  __shared__ __align__(16) T tile[queries][width + kPack<T>];
  const int t = threadIdx.x % 128, side = threadIdx.x / 128;
  const int own = (panels == 2 ? 0 : side * kQueries) + t / 32 * 16 + t % 32 / 4;
  const int column = (panels == 2 ? side * 8 * mine : 0) + 2 * (t % 4);
  const int64_t batch = blockIdx.x / groups, group = blockIdx.x % groups, first = group * queries;
  float cos[2][mine][2], sin[2][mine][2];
  if (a.cos)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t position = a.positions[batch * a.seq_q + min(first + own + 8 * half, a.seq_q - 1)];
      require(position >= 0 && position < a.table_rows, "attention: a position lies outside rotary's tables");
#pragma unroll
      for (int n = 0; n < mine; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int64_t at = position * (width / 2) + column + 8 * n + e;
          cos[half][n][e] = a.cos[at], sin[half][n][e] = a.sin[at];
        }
    }
  const int64_t end = min((blockIdx.y + 1) * kHeadsTogether, a.heads);
#pragma unroll 1
  for (int64_t head = blockIdx.y * kHeadsTogether; head < end; ++head) {
    const float4* const from = reinterpret_cast<const float4*>(a.dq_sum) +
                               ((batch * a.heads + head) * groups + group) * (kPart / 2) +
                               side * (panels == 2 ? 128 * mine : kPart / 4) + t;
    float4 x[mine], y[mine];
#pragma unroll
    for (int n = 0; n < mine; ++n) x[n] = from[128 * n], y[n] = from[apart + 128 * n];
    __syncthreads();  // the head before is written
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < mine; ++n) {
        float *const low = &x[n].x + 2 * half, *const high = &y[n].x + 2 * half;
        if (a.cos) turn_back(low, high, cos[half][n], sin[half][n]);
        T* const to = &tile[own + 8 * half][column + 8 * n];
        *reinterpret_cast<uint32_t*>(to) = Pair<T>::of(a.scale * low[0], a.scale * low[1]);
        *reinterpret_cast<uint32_t*>(to + width / 2) = Pair<T>::of(a.scale * high[0], a.scale * high[1]);
      }
    __syncthreads();
    T* const dq = static_cast<T*>(a.dq) + batch * a.dq_strides.batch + head * a.dq_strides.head;
#pragma unroll
    for (int k = threadIdx.x; k < queries * parts; k += kThreads) {
      const int r = k / parts, part = k % parts * kPack<T>;
      if (first + r < a.seq_q)
        store(dq + (first + r) * a.dq_strides.row + part, load<kPack<T>>(&tile[r][part]));
    }
  }
}

}  // namespace

// ---------------------------------------------------------------- launchers

cudaError_t hopper::attention_bwd_begin(const AttentionBwd& a, cudaStream_t stream) {
  const int blocks = static_cast<int>(attention_blocks(a.seq_q, a.head_dim));
  const auto all = static_cast<unsigned>(a.batch * a.heads * blocks);
  return with_kind(a, [&](auto t, auto width) {
    attention_bwd_begin_kernel<decltype(t), width><<<all, kThreads, 0, stream>>>(a, blocks);
    return cudaGetLastError();
  });
}

cudaError_t hopper::attention_bwd_end(const AttentionBwd& a, cudaStream_t stream) {
  const int at_a_time = a.head_dim == 64 ? 2 : 1;
  const int groups = static_cast<int>(attention_blocks(a.seq_q, a.head_dim)) / at_a_time;
  const dim3 all(static_cast<unsigned>(a.batch * groups),
                 static_cast<unsigned>(ceil_div(a.heads, kHeadsTogether)));
  return with_kind(a, [&](auto t, auto width) {
    attention_bwd_end_kernel<decltype(t), width><<<all, kThreads, 0, stream>>>(a, groups);
    return cudaGetLastError();
  });
}

}  // namespace openllama::cuda
