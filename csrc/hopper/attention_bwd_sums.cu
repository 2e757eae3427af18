// What comes before attention's backward and after it: sums over rows of dout and out, and an empty sum for
// dq; that sum, scaled and rounded.
#include "attention.cuh"

namespace openllama::cuda {
namespace {

using namespace hopper;

constexpr int kQueries = kAttentionBlock, kThreads = 256;

// Of a block of queries: delta, and lse in base 2, padded with what makes P zero; and an empty sum for dq.
// The first tile to be taken is the one behind those that blocks begin with.
template <class T, int width>
__global__ void __launch_bounds__(kThreads)
    attention_bwd_begin_kernel(const AttentionBwd a, int blocks, int first_taken) {
  constexpr int lanes = width / kPack<T>, rows = kThreads / lanes;
  const int i = blockIdx.x % blocks, lane = threadIdx.x % lanes;
  const int64_t head = blockIdx.x / blocks, batch = head / a.heads, which = head % a.heads;
  const T* const out =
      static_cast<const T*>(a.out) + (batch * a.seq_q * a.heads + which) * width + lane * kPack<T>;
  const T* const dout = static_cast<const T*>(a.dout) + batch * a.dout_strides.batch +
                        which * a.dout_strides.head + lane * kPack<T>;
  float* const stats = a.stats + int64_t(blockIdx.x) * (2 * kQueries);
#pragma unroll
  for (int r = threadIdx.x / lanes; r < kQueries; r += rows) {
    const int64_t row = int64_t(i) * kQueries + r;
    float sum = 0;
    if (row < a.seq_q) {
      const auto o = load<kPack<T>>(out + row * a.heads * width),
                 d = load<kPack<T>>(dout + row * a.dout_strides.row);
#pragma unroll
      for (int e = 0; e < kPack<T>; ++e) sum += o[e] * d[e];
    }
    sum = warp_sum(sum, lanes);
    if (lane) continue;
    const float lse = row < a.seq_q ? a.lse[head * a.seq_q + row] : INFINITY;
    stats[r] = lse == -INFINITY ? INFINITY : lse * kLog2e;
    stats[kQueries + r] = sum;
  }
  float4* const empty = reinterpret_cast<float4*>(a.dq_sum) + int64_t(blockIdx.x) * (kQueries * width / 4);
#pragma unroll
  for (int k = threadIdx.x; k < kQueries * width / 4; k += kThreads) empty[k] = make_float4(0, 0, 0, 0);
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.next_tile = first_taken;
}

// dq, scaled and rounded, out of the order of the products' registers: float4 j of thread t of warpgroup w is
// rows 16 (t / 32) + t % 32 / 4 and 8 below, columns 8 j + 2 (t % 4) and one more, of the panel or the block
// of queries that is the warpgroup's. Through shared memory, to write rows.
template <class T, int width>
__global__ void __launch_bounds__(kThreads) attention_bwd_end_kernel(const AttentionBwd a, int blocks) {
  constexpr int parts = width / kPack<T>, panels = width / kPanel, queries = 2 / panels * kQueries;
  // 16 bytes more to a row, so that rows lie in other banks
  __shared__ __align__(16) T tile[queries][width + kPack<T>];
  const int i = blockIdx.x % blocks, wg = threadIdx.x / 128, t = threadIdx.x % 128;
  const int64_t head = blockIdx.x / blocks;
  const float4* const from =
      reinterpret_cast<const float4*>(a.dq_sum) + (2 * int64_t(blockIdx.x) + wg) * (kPart / 4) + t;
  const int first = wg / panels * kQueries + t / 32 * 16 + t % 32 / 4;
#pragma unroll
  for (int j = 0; j < kPanel / 8; ++j) {
    const float4 z = from[128 * j];
    const int column = wg % panels * kPanel + 8 * j + 2 * (t % 4);
    *reinterpret_cast<uint32_t*>(&tile[first][column]) = Pair<T>::of(a.scale * z.x, a.scale * z.y);
    *reinterpret_cast<uint32_t*>(&tile[first + 8][column]) = Pair<T>::of(a.scale * z.z, a.scale * z.w);
  }
  __syncthreads();
  T* const dq =
      static_cast<T*>(a.dq) + head / a.heads * a.dq_strides.batch + head % a.heads * a.dq_strides.head;
#pragma unroll
  for (int k = threadIdx.x; k < queries * parts; k += kThreads) {
    const int r = k / parts, column = k % parts * kPack<T>;
    const int64_t row = int64_t(i) * queries + r;
    if (row < a.seq_q) store(dq + row * a.dq_strides.row + column, load<kPack<T>>(&tile[r][column]));
  }
}

// ---------------------------------------------------------------- launchers

// Calls body(T{}, width).
template <class F>
cudaError_t with_kind(const AttentionBwd& a, const F& body) {
  with_half(a.dtype, [&](auto t) {
    if (a.head_dim == 64)
      body(t, std::integral_constant<int, 64>{});
    else
      body(t, std::integral_constant<int, 128>{});
    return cudaSuccess;
  });
  return cudaGetLastError();
}

}  // namespace

cudaError_t hopper::attention_bwd_begin(const AttentionBwd& a, int first_taken, cudaStream_t stream) {
  const int blocks = static_cast<int>(attention_blocks(a.seq_q, a.head_dim));
  const auto all = static_cast<unsigned>(a.batch * a.heads * blocks);
  return with_kind(a, [&](auto t, auto width) {
    attention_bwd_begin_kernel<decltype(t), width><<<all, kThreads, 0, stream>>>(a, blocks, first_taken);
  });
}

cudaError_t hopper::attention_bwd_end(const AttentionBwd& a, cudaStream_t stream) {
  const int at_a_time = a.head_dim == 64 ? 2 : 1;
  const int blocks = static_cast<int>(attention_blocks(a.seq_q, a.head_dim)) / at_a_time;
  const auto all = static_cast<unsigned>(a.batch * a.heads * blocks);
  return with_kind(a, [&](auto t, auto width) {
    attention_bwd_end_kernel<decltype(t), width><<<all, kThreads, 0, stream>>>(a, blocks);
  });
}

}  // namespace openllama::cuda
