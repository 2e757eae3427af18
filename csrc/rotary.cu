// Rotary position embedding (Su et al., 2021), in place in a packed QKV or not. Bound by memory.
//
// A block takes a token. A thread takes one access of cos and sin and turns those columns in several heads
// with it, with the loads of four heads under way at once.
#include <cassert>
#include <climits>

#include "common.cuh"

namespace openllama::cuda {
namespace {

constexpr int kThreads = 128;  // of a block, about
constexpr int kHeads = 4;      // loaded before the first is turned

// ---------------------------------------------------------------- kernel

// Columns first + n and second + n are a pair for n < N; interleaved, 2 n and 2 n + 1 of the 2 N from `first`
// on.
template <class T, int N, bool interleaved>
struct Columns {
  Vec<T, N> low, high;

  __device__ __forceinline__ void load_from(const T* head, int first, int second) {
    low = stream<N>(head + first);
    high = stream<N>(head + second);
  }
  __device__ __forceinline__ float pair(int n, bool upper) const {
    if constexpr (interleaved) {
      const int i = 2 * n + upper;
      return i < N ? low[i] : high[i - N];
    } else {
      return upper ? high[n] : low[n];
    }
  }
  __device__ __forceinline__ void turn(T* head, int first, int second, const float (&cos)[N],
                                       const float (&sin)[N]) const {
    float a[N], b[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float x = pair(n, false), y = pair(n, true);
      const float left = x * cos[n] - y * sin[n], right = y * cos[n] + x * sin[n];
      if constexpr (interleaved) {
        (2 * n < N ? a[2 * n % N] : b[2 * n % N]) = left;
        (2 * n + 1 < N ? a[(2 * n + 1) % N] : b[(2 * n + 1) % N]) = right;
      } else {
        a[n] = left;
        b[n] = right;
      }
    }
    store(head + first, Vec<T, N>::of(a));
    store(head + second, Vec<T, N>::of(b));
  }
};

template <class T, int N>
__device__ void copy_columns(const T* x, T* out, int64_t begin, int64_t end) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  for (int64_t c = begin + thread * N; c < end; c += threads * N) store(out + c, stream<N>(x + c));
}

template <class T, int N, bool interleaved>
__global__ void __launch_bounds__(2 * kThreads) rotary_kernel(Rotary a) {
  const int64_t i = blockIdx.x;
  const int64_t position = (a.positions ? a.positions[i] : i) + a.offset;
  const int half = static_cast<int>(a.rotary_dim / 2), head_dim = static_cast<int>(a.head_dim);
  const int rotated = static_cast<int>(a.rotated);
  const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
  T* out = static_cast<T*>(a.out) + i * a.out_stride;
  assert(position >= 0 && position < a.table_rows && "rotary: a position lies outside the tables");
  for (int c = threadIdx.x * N; c < half; c += blockDim.x * N) {
    const int first = interleaved ? 2 * c : c, second = interleaved ? 2 * c + N : c + half;
    float cos[N], sin[N];
    bool known = false;
    for (int head = threadIdx.y; head < rotated; head += blockDim.y * kHeads) {
      Columns<T, N, interleaved> columns[kHeads];
#pragma unroll
      for (int k = 0; k < kHeads; ++k)
        if (head + k * blockDim.y < rotated)
          columns[k].load_from(x + (head + k * blockDim.y) * head_dim, first, second);
      if (!known) {  // behind the first loads of x, which do not have to wait for the position
        const auto turn_cos = load<N>(a.cos + position * half + c),
                   turn_sin = load<N>(a.sin + position * half + c);
#pragma unroll
        for (int n = 0; n < N; ++n) cos[n] = turn_cos[n], sin[n] = a.inverse ? -turn_sin[n] : turn_sin[n];
        known = true;
      }
#pragma unroll
      for (int k = 0; k < kHeads; ++k)
        if (head + k * blockDim.y < rotated)
          columns[k].turn(out + (head + k * blockDim.y) * head_dim, first, second, cos, sin);
    }
  }
  if (x == out) return;
  for (int head = 0; a.rotary_dim < head_dim && head < rotated; ++head)
    copy_columns<T, N>(x, out, static_cast<int64_t>(head) * head_dim + a.rotary_dim,
                       static_cast<int64_t>(head + 1) * head_dim);
  copy_columns<T, N>(x, out, a.rotated * a.head_dim, a.heads * a.head_dim);
}

// ---------------------------------------------------------------- launcher

template <class T, int N>
cudaError_t launch(const Rotary& a, cudaStream_t stream) {
  const auto columns = static_cast<unsigned>(std::clamp<int64_t>(ceil_div(a.rotary_dim / 2, N), 1, kThreads));
  const dim3 block(columns, std::max(1u, kThreads / columns));
  const auto kernel = a.interleaved ? rotary_kernel<T, N, true> : rotary_kernel<T, N, false>;
  kernel<<<static_cast<unsigned>(a.tokens), block, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t rotary(const Rotary& a, cudaStream_t stream) {
  if (a.tokens == 0 || a.heads == 0 || a.head_dim == 0) return cudaSuccess;
  if (a.tokens > INT_MAX) return cudaErrorInvalidConfiguration;  // a grid has at most 2^31 - 1 blocks
  return with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int N = kPack<T>;
    const int64_t size = sizeof(T);
    const bool packs = aligned(a.x, a.x_stride * size) && aligned(a.out, a.out_stride * size) &&
                       aligned(a.cos) && aligned(a.sin) && a.head_dim % N == 0 && a.rotary_dim % (2 * N) == 0;
    return packs ? launch<T, N>(a, stream) : launch<T, 1>(a, stream);
  });
}

}  // namespace openllama::cuda
