// Rotary position embedding (Su et al., 2021), in place in a packed QKV or not, or packing q, k and v that
// lie apart, as attention's gradients do. Bound by memory.
//
// A block takes a token, or some where their heads are few. A thread takes one access of cos and sin and
// turns those columns in several heads with it, with the loads of four heads under way at once.
#include <climits>

#include "common.cuh"

namespace openllama::cuda {
namespace {

constexpr int kThreads = 128;  // of a block, about
constexpr int kHeads = 4;      // loaded before the first is turned

// ---------------------------------------------------------------- kernel

// Two accesses of a head, N elements each: the halves of N pairs; interleaved, N / 2 pairs each. (N is 1
// where single elements have to be moved; interleaved, the two are then one pair.)
template <class T, int N, bool interleaved>
struct Columns {
  Vec<T, N> low, high;

  __device__ __forceinline__ void load_from(const T* head, int first, int second) {
    low = load<N>(head + first);
    high = load<N>(head + second);
  }
  // Element `upper` of pair n.
  __device__ __forceinline__ float get(int n, int upper) const {
    if constexpr (!interleaved || N == 1) return upper ? high[n] : low[n];
    return n < N / 2 ? low[2 * n + upper] : high[2 * n + upper - N];
  }
  __device__ __forceinline__ void turn(T* head, int first, int second, const float (&cos)[N],
                                       const float (&sin)[N]) const {
    float to[2][N];  // low, high
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float x = get(n, 0), y = get(n, 1);
      const float left = x * cos[n] - y * sin[n], right = y * cos[n] + x * sin[n];
      if constexpr (!interleaved || N == 1) {
        to[0][n] = left, to[1][n] = right;
      } else {
        to[2 * n / N][2 * n % N] = left, to[2 * n / N][2 * n % N + 1] = right;
      }
    }
    store(head + first, Vec<T, N>::of(to[0]));
    store(head + second, Vec<T, N>::of(to[1]));
  }
};

// The N entries of a table's row that turn the columns at `first` and `second`.
template <int N, bool interleaved>
__device__ __forceinline__ void load_turns(float (&to)[N], const float* row, int first, int second) {
  constexpr int each = interleaved && N > 1 ? N / 2 : N;
  const auto one = load<each>(row + (interleaved ? first / 2 : first));
#pragma unroll
  for (int n = 0; n < each; ++n) to[n] = one[n];
  if constexpr (each < N) {
    const auto other = load<each>(row + second / 2);
#pragma unroll
    for (int n = 0; n < each; ++n) to[each + n] = other[n];
  }
}

template <class T, int N>
__device__ void copy_columns(const T* x, T* out, int64_t count) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;  // of a token
  constexpr int kAtOnce = N > 1 ? 4 : 1;  // single elements have no registers to spare
#pragma unroll kAtOnce
  for (int64_t c = thread * N; c < count; c += threads * N) store(out + c, load<N>(x + c));
}

template <class T, int N, bool interleaved, bool apart>
__global__ void __launch_bounds__(2 * kThreads) rotary_kernel(Rotary a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  if (i >= a.tokens) return;
  const int64_t position = (a.positions ? a.positions[i] : i) + a.offset;
  const int half = static_cast<int>(a.rotary_dim / 2), head_dim = static_cast<int>(a.head_dim);
  const int rotated = static_cast<int>(a.rotated), step = static_cast<int>(blockDim.y);
  const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
  T* out = static_cast<T*>(a.out) + i * a.out_stride;
  const T *k_row = nullptr, *v_row = x + a.rotated * a.head_dim;
  if constexpr (apart) {
    k_row = static_cast<const T*>(a.k) + i * a.k_stride - a.q_heads * a.head_dim;  // as if it followed q
    v_row = static_cast<const T*>(a.v) + i * a.v_stride;
  }
  const auto head_of = [&](int head) {
    return (apart && head >= a.q_heads ? k_row : x) + static_cast<int64_t>(head) * head_dim;
  };
  require(position >= 0 && position < a.table_rows, "rotary: a position lies outside the tables");
  for (int c = threadIdx.x * N; c < half; c += blockDim.x * N) {
    const int first = interleaved && N == 1 ? 2 * c : c,
              second = interleaved && N == 1 ? 2 * c + 1 : c + half;
    float cos[N], sin[N];
    for (int head = threadIdx.y; head < rotated; head += step * kHeads) {
      Columns<T, N, interleaved> columns[kHeads];
#pragma unroll
      for (int k = 0; k < kHeads; ++k)
        if (head + k * step < rotated) columns[k].load_from(head_of(head + k * step), first, second);
      if (head == threadIdx.y) {  // behind the first loads of x, which do not have to wait for the position
        load_turns<N, interleaved>(cos, a.cos + position * half, first, second);
        load_turns<N, interleaved>(sin, a.sin + position * half, first, second);
#pragma unroll
        for (int n = 0; n < N; ++n) sin[n] = a.inverse ? -sin[n] : sin[n];
      }
#pragma unroll
      for (int k = 0; k < kHeads; ++k)
        if (head + k * step < rotated)
          columns[k].turn(out + (head + k * step) * head_dim, first, second, cos, sin);
    }
  }
  if (x == out) return;
  for (int head = 0; a.rotary_dim < head_dim && head < rotated; ++head)
    copy_columns<T, N>(head_of(head) + a.rotary_dim,
                       out + static_cast<int64_t>(head) * head_dim + a.rotary_dim, head_dim - a.rotary_dim);
  copy_columns<T, N>(v_row, out + a.rotated * a.head_dim, (a.heads - a.rotated) * a.head_dim);
}

// ---------------------------------------------------------------- launcher

template <class T, int N>
cudaError_t launch(const Rotary& a, cudaStream_t stream) {
  const auto columns = static_cast<unsigned>(std::clamp<int64_t>(ceil_div(a.rotary_dim / 2, N), 1, kThreads));
  const auto heads = static_cast<unsigned>(
      std::clamp<int64_t>(ceil_div(a.rotated, kHeads), 1, std::max(1u, kThreads / columns)));
  const auto tokens = static_cast<unsigned>(std::min<int64_t>(ceil_div(kThreads, columns * heads), 64));
  const dim3 block(columns, heads, tokens);
  const auto kernel = a.k             ? rotary_kernel<T, N, false, true>
                      : a.interleaved ? rotary_kernel<T, N, true, false>
                                      : rotary_kernel<T, N, false, false>;
  kernel<<<static_cast<unsigned>(ceil_div(a.tokens, tokens)), block, 0, stream>>>(a);
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
                       aligned(a.k, a.k_stride * size) && aligned(a.v, a.v_stride * size) && aligned(a.cos) &&
                       aligned(a.sin) && a.head_dim % N == 0 && a.rotary_dim % (2 * N) == 0;
    return packs ? launch<T, N>(a, stream) : launch<T, 1>(a, stream);
  });
}

}  // namespace openllama::cuda
