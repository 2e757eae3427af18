// RMSNorm (Zhang and Sennrich, 2019), forward and backward, with the residual add fused in. Bound by memory.
//
// A row is held in registers between its two uses, so that it is read from memory once; the next row is on
// its way while one is summed. A row takes a few lanes of a warp (qk-norm's 64 or 128 columns), a warp, or a
// block of as many threads as give each four accesses of 16 bytes. Blocks walk over rows, and keep the
// weight, and in backward their part of dweight, in registers; a second kernel sums the blocks' parts in a
// fixed order, so that every run gives the same bits.
//
// Rows that do not lie on 16 bytes, or are longer than a block holds, go element by element through shared
// memory's dweight and read a row twice.
#include <climits>

#include "common.cuh"

namespace openllama::cuda {
namespace {

constexpr int kPacks = 4;              // accesses of a thread to a row
constexpr int kMaxThreads = 512;       // of a row
constexpr int kSmallBlock = 128;       // threads of a block that takes several rows
constexpr int kLooseThreads = 512;     // of a row that goes element by element
constexpr int kMaxShared = 64 * 1024;  // 16,384 columns of dweight
constexpr int kStages = 2;             // rows of backward on their way or in work
constexpr int kMaxStages = 96 * 1024;  // of the 99 KB that a block may have on sm_89

// ---------------------------------------------------------------- rows in registers

// One row, or its part of this thread: columns thread * N, (thread + threads) * N, ...
template <class T>
struct Row {
  Vec<T, kPack<T>> packs[kPacks];

  __device__ __forceinline__ void load_from(const void* base, int64_t offset, int hidden) {
    const T* from = static_cast<const T*>(base) + offset;
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (column<T>(k) < hidden) packs[k] = stream<kPack<T>>(from + column<T>(k));
  }

  template <class E>
  static __device__ __forceinline__ int column(int k) {
    return (threadIdx.x + k * blockDim.x) * kPack<E>;
  }
};

// Sum over the threads of a row: some lanes of a warp, or the block.
__device__ __forceinline__ float row_sum(float v, BlockSum& sums, int turn) {
  return blockDim.x <= 32 ? warp_sum(v, blockDim.x) : sums(v, turn);
}

template <class T, class W, bool residual>
__global__ void __launch_bounds__(kMaxThreads) fwd_kernel(RmsNormFwd a) {
  constexpr int N = kPack<T>;
  __shared__ BlockSum sums;
  const int hidden = static_cast<int>(a.hidden);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  Vec<W, N> weight[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k)
    if (Row<T>::template column<T>(k) < hidden)
      weight[k] = load<N>(static_cast<const W*>(a.weight) + Row<T>::template column<T>(k));
  Row<T> x, r;
  const auto fetch = [&](int64_t i) {
    if (i >= a.rows) return;
    x.load_from(a.x, i * a.x_stride, hidden);
    if constexpr (residual) r.load_from(a.residual, i * a.residual_stride, hidden);
  };
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  fetch(i);
  int turn = 0;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * blockDim.y; base < a.rows; base += step, i += step) {
    const bool here = i < a.rows;  // the last rows of a block that takes several
    Row<T> h = x;
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int c = Row<T>::template column<T>(k);
      if (c >= hidden || !here) continue;
      if constexpr (residual) {
        float v[N];
#pragma unroll
        for (int n = 0; n < N; ++n) v[n] = x.packs[k][n] + r.packs[k][n];
        h.packs[k] = Vec<T, N>::of(v);  // what the readers of h will see
        store(static_cast<T*>(a.h) + i * a.hidden + c, h.packs[k]);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) sum += h.packs[k][n] * h.packs[k][n];
    }
    fetch(i + step);
    // not rsqrtf, which is off by up to 2 ulps: this is once a row
    const float rstd = 1.0f / sqrtf(row_sum(sum, sums, turn) / static_cast<float>(hidden) + a.eps);
    turn ^= 1;
    if (!here) continue;
    if (threadIdx.x == 0) a.rstd[i] = rstd;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int c = Row<T>::template column<T>(k);
      if (c >= hidden) continue;
      float y[N];
#pragma unroll
      for (int n = 0; n < N; ++n) y[n] = h.packs[k][n] * rstd * weight[k][n];
      store(static_cast<T*>(a.y) + i * a.hidden + c, Vec<T, N>::of(y));
    }
  }
}

// The inputs of backward wait in shared memory for their turn: in registers there is no room beside dweight.
// Each thread copies and reads its own columns only, so that nothing has to be waited for but its own copies.
template <class T>
struct Stage {
  uint4* slots;  // of this thread: (kStages, arrays, kPacks), a block of threads apart
  int arrays;

  __device__ __forceinline__ uint4* slot(int stage, int array, int k) const {
    return slots + ((stage * arrays + array) * kPacks + k) * (blockDim.x * blockDim.y);
  }
  __device__ __forceinline__ void fetch(int stage, int array, const void* base, int64_t offset,
                                        int hidden) const {
    const T* from = static_cast<const T*>(base) + offset;
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (Row<T>::template column<T>(k) < hidden)
        copy_async(slot(stage, array, k), from + Row<T>::template column<T>(k));
  }
  __device__ __forceinline__ Vec<T, kPack<T>> read(int stage, int array, int k) const {
    return load<kPack<T>>(reinterpret_cast<const T*>(slot(stage, array, k)));
  }
};

template <class T, class W>
__global__ void __launch_bounds__(kMaxThreads) bwd_kernel(RmsNormBwd a) {
  constexpr int N = kPack<T>;
  extern __shared__ uint4 shared[];  // stages, then dweight's parts, where a block takes several rows
  __shared__ BlockSum sums;
  const int hidden = static_cast<int>(a.hidden);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  const Stage<T> stage{shared + threadIdx.y * blockDim.x + threadIdx.x, a.dh ? 3 : 2};
  const W* weight = static_cast<const W*>(a.weight);
  float dweight[kPacks][N] = {};
  float next_rstd = 0;
  const auto fetch = [&](int64_t i, int turn) {
    if (i < a.rows) {
      next_rstd = a.rstd[i];
      stage.fetch(turn, 0, a.dy, i * a.dy_stride, hidden);
      stage.fetch(turn, 1, a.h, i * a.h_stride, hidden);
      if (a.dh) stage.fetch(turn, 2, a.dh, i * a.dh_stride, hidden);
    }
    copies_end();
  };
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  fetch(i, 0);
  int turn = 0;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * blockDim.y; base < a.rows; base += step, i += step) {
    const bool here = i < a.rows;
    const float rstd = next_rstd;
    fetch(i + step, turn ^ 1);
    copies_wait<1>();
    float dot = 0;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int c = Row<T>::template column<T>(k);
      if (c >= hidden || !here) continue;
      const auto dy = stage.read(turn, 0, k), h = stage.read(turn, 1, k);
      const auto w = load<N>(weight + c);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        dot += dy[n] * w[n] * h[n];
        dweight[k][n] += dy[n] * (h[n] * rstd);
      }
    }
    const float scale = row_sum(dot, sums, turn) * rstd * rstd * rstd / static_cast<float>(hidden);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int c = Row<T>::template column<T>(k);
      if (c >= hidden || !here || !a.dx) continue;
      const auto dy = stage.read(turn, 0, k), h = stage.read(turn, 1, k);
      const auto w = load<N>(weight + c);
      float dx[N];
#pragma unroll
      for (int n = 0; n < N; ++n) dx[n] = dy[n] * w[n] * rstd - h[n] * scale;
      if (a.dh) {
        const auto dh = stage.read(turn, 2, k);
#pragma unroll
        for (int n = 0; n < N; ++n) dx[n] += dh[n];
      }
      store(static_cast<T*>(a.dx) + i * a.hidden + c, Vec<T, N>::of(dx));
    }
    turn ^= 1;
  }
  if (!a.dweight) return;
  // rows of the block, one after the other, add their parts up in shared memory, whose stages are done with
  float* parts = reinterpret_cast<float*>(shared);
  for (int y = 0; y < blockDim.y; ++y) {
    __syncthreads();
    if (threadIdx.y != y) continue;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int c = Row<T>::template column<T>(k);
      if (c >= hidden) continue;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float sum = dweight[k][n] + (y ? parts[c + n] : 0.0f);
        if (y + 1 < blockDim.y)
          parts[c + n] = sum;
        else
          a.dweight_blocks[blockIdx.x * a.hidden + c + n] = sum;
      }
    }
  }
}

// ---------------------------------------------------------------- rows element by element

template <class T, class W>
__global__ void __launch_bounds__(kLooseThreads) loose_fwd_kernel(RmsNormFwd a) {
  __shared__ BlockSum sums;
  const int64_t i = blockIdx.x;
  const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
  T* y = static_cast<T*>(a.y) + i * a.hidden;
  T* h = a.h ? static_cast<T*>(a.h) + i * a.hidden : nullptr;
  const T* residual = a.residual ? static_cast<const T*>(a.residual) + i * a.residual_stride : nullptr;
  float sum = 0;
  for (int64_t c = threadIdx.x; c < a.hidden; c += blockDim.x) {
    float v = to_float(x[c]);
    if (residual) {
      h[c] = from_float<T>(v + to_float(residual[c]));
      v = to_float(h[c]);
    }
    sum += v * v;
  }
  const float rstd = 1.0f / sqrtf(sums(sum, 0) / static_cast<float>(a.hidden) + a.eps);
  if (threadIdx.x == 0) a.rstd[i] = rstd;
  const T* from = residual ? h : x;  // each thread reads back its own columns
  for (int64_t c = threadIdx.x; c < a.hidden; c += blockDim.x)
    y[c] = from_float<T>(to_float(from[c]) * rstd * to_float(static_cast<const W*>(a.weight)[c]));
}

template <class T, class W>
__global__ void __launch_bounds__(kLooseThreads) loose_bwd_kernel(RmsNormBwd a) {
  extern __shared__ float dweight[];  // (hidden): each thread touches its own columns only
  __shared__ BlockSum sums;
  const W* weight = static_cast<const W*>(a.weight);
  if (a.dweight)
    for (int64_t c = threadIdx.x; c < a.hidden; c += blockDim.x) dweight[c] = 0;
  int turn = 0;
  for (int64_t i = blockIdx.x; i < a.rows; i += gridDim.x) {
    const T* dy = static_cast<const T*>(a.dy) + i * a.dy_stride;
    const T* h = static_cast<const T*>(a.h) + i * a.h_stride;
    const T* dh = a.dh ? static_cast<const T*>(a.dh) + i * a.dh_stride : nullptr;
    const float rstd = a.rstd[i];
    float dot = 0;
    for (int64_t c = threadIdx.x; c < a.hidden; c += blockDim.x) {
      const float d = to_float(dy[c]), v = to_float(h[c]);
      dot += d * to_float(weight[c]) * v;
      if (a.dweight) dweight[c] += d * (v * rstd);
    }
    if (!a.dx) continue;
    const float scale = sums(dot, turn) * rstd * rstd * rstd / static_cast<float>(a.hidden);
    turn ^= 1;
    T* dx = static_cast<T*>(a.dx) + i * a.hidden;
    for (int64_t c = threadIdx.x; c < a.hidden; c += blockDim.x) {
      const float d = to_float(dy[c]) * to_float(weight[c]) * rstd - to_float(h[c]) * scale;
      dx[c] = from_float<T>(dh ? d + to_float(dh[c]) : d);
    }
  }
  if (a.dweight)
    for (int64_t c = threadIdx.x; c < a.hidden; c += blockDim.x)
      a.dweight_blocks[blockIdx.x * a.hidden + c] = dweight[c];
}

// A block sums 32 columns: 8 warps walk over the partial sums, then meet in shared memory.
__global__ void reduce_kernel(RmsNormBwd a) {
  __shared__ float sums[8][32];
  const int64_t c = blockIdx.x * 32ll + threadIdx.x;
  float sum = 0;
  if (c < a.hidden)
    for (int64_t block = threadIdx.y; block < a.blocks; block += 8)
      sum += a.dweight_blocks[block * a.hidden + c];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || c >= a.hidden) return;
  for (int i = 1; i < 8; ++i) sum += sums[i][threadIdx.x];
  a.dweight[c] = sum;
}

// ---------------------------------------------------------------- launchers

// How a block of the register kernels is cut: x threads a row, y rows. x is 0 where rows must go element by
// element.
template <class T>
dim3 block_of(int64_t hidden) {
  const int64_t packs = hidden / kPack<T>;
  if (hidden % kPack<T> || packs > static_cast<int64_t>(kPacks) * kMaxThreads) return {0, 0, 0};
  unsigned threads = 1;
  while (threads < 32 && threads < packs) threads *= 2;  // few columns: one access a lane
  if (packs > 32 * kPacks) threads = static_cast<unsigned>(ceil_div(ceil_div(packs, kPacks), 32) * 32);
  return {threads, threads > 32 ? 1u : kSmallBlock / threads, 1};
}

bool on_16_bytes(const RmsNormFwd& a) {
  const int64_t size = size_of(a.dtype);
  return aligned(a.x, a.x_stride * size) && aligned(a.residual, a.residual_stride * size) &&
         aligned(a.weight) && aligned(a.y) && aligned(a.h);
}

bool on_16_bytes(const RmsNormBwd& a) {
  const int64_t size = size_of(a.dtype);
  return aligned(a.dy, a.dy_stride * size) && aligned(a.dh, a.dh_stride * size) &&
         aligned(a.h, a.h_stride * size) && aligned(a.weight) && aligned(a.dx);
}

template <class Args>
dim3 block_of(const Args& a) {
  const bool wide = a.dtype == Dtype::f32;
  return on_16_bytes(a) ? (wide ? block_of<float>(a.hidden) : block_of<__half>(a.hidden)) : dim3{0, 0, 0};
}

int loose_threads(int64_t hidden) {
  return static_cast<int>(std::min<int64_t>(ceil_div(hidden, 32) * 32, kLooseThreads));
}

// Calls body(T{}, W{}) for the types of rows and weight.
template <class Args, class F>
cudaError_t with_dtypes(const Args& a, F body) {
  return with_dtype(a.dtype, [&](auto t) {
    if (a.weight_dtype == a.dtype) return body(t, t);
    return a.weight_dtype == Dtype::f32 ? body(t, float{}) : cudaErrorInvalidValue;
  });
}

// The kernel, its block and its shared memory for these rows.
struct BwdPlan {
  void (*kernel)(RmsNormBwd);
  dim3 block;
  size_t shared;
};

cudaError_t plan_bwd(const RmsNormBwd& a, BwdPlan& plan) {
  dim3 block = block_of(a);
  const int64_t stages = int64_t{kStages} * (a.dh ? 3 : 2) * kPacks * sizeof(uint4) * block.x * block.y;
  if (stages > kMaxStages) block = {0, 0, 0};
  const cudaError_t error = with_dtypes(a, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    plan.kernel = block.x ? bwd_kernel<T, W> : loose_bwd_kernel<T, W>;
    return cudaSuccess;
  });
  plan.block = block.x ? block : dim3(loose_threads(a.hidden));
  plan.shared = block.x ? stages : a.dweight ? a.hidden * sizeof(float) : 0;
  if (error != cudaSuccess || plan.shared <= 48 * 1024) return error;
  // always to the same limit: another thread's launch may come in between
  return cudaFuncSetAttribute(plan.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              block.x ? kMaxStages : kMaxShared);
}

}  // namespace

cudaError_t rms_norm_fwd(const RmsNormFwd& a, cudaStream_t stream) {
  if (a.rows == 0 || a.hidden == 0) return cudaSuccess;
  if (a.rows > INT_MAX) return cudaErrorInvalidConfiguration;  // a grid has at most 2^31 - 1 blocks
  return with_dtypes(a, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    const dim3 block = block_of(a);
    if (!block.x) {
      loose_fwd_kernel<T, W><<<static_cast<unsigned>(a.rows), loose_threads(a.hidden), 0, stream>>>(a);
      return cudaGetLastError();
    }
    const auto kernel = a.residual ? fwd_kernel<T, W, true> : fwd_kernel<T, W, false>;
    const int64_t blocks = even_blocks(ceil_div(a.rows, block.y), resident_blocks(kernel, block.x * block.y));
    kernel<<<static_cast<unsigned>(blocks), block, 0, stream>>>(a);
    return cudaGetLastError();
  });
}

int64_t rms_norm_bwd_blocks(const RmsNormBwd& a) {
  BwdPlan plan;
  if (a.rows == 0 || plan_bwd(a, plan) != cudaSuccess) return 1;
  const int64_t resident = resident_blocks(plan.kernel, plan.block.x * plan.block.y, plan.shared);
  return even_blocks(ceil_div(a.rows, plan.block.y), resident);
}

cudaError_t rms_norm_bwd(const RmsNormBwd& a, cudaStream_t stream) {
  if (a.hidden == 0) return cudaSuccess;
  BwdPlan plan;
  cudaError_t error = plan_bwd(a, plan);
  if (error != cudaSuccess) return error;
  plan.kernel<<<static_cast<unsigned>(a.blocks), plan.block, plan.shared, stream>>>(a);
  if ((error = cudaGetLastError()) != cudaSuccess || !a.dweight) return error;
  reduce_kernel<<<static_cast<unsigned>(ceil_div(a.hidden, 32)), dim3(32, 8), 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace openllama::cuda
