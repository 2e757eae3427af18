// RMSNorm (Zhang and Sennrich, 2019), forward and backward, with the residual add fused in. Bound by memory.
//
// A row waits in registers between its two uses, so that it is read from memory once. It takes a few lanes of
// a warp (qk-norm's 64 or 128 columns), a warp, or as many warps as give each thread two or four accesses of
// 16 bytes. Forward's blocks take a row, or some where rows are short. Backward's walk over rows, with the
// next ones on their way to shared memory: a block fills its processor, and each of its threads keeps its
// columns of dweight (and of the weight) in registers, so that there are as few partial sums as processors. A
// second kernel adds them in a fixed order, so that every run gives the same bits.
//
// Rows that do not lie on 16 bytes, or are longer than that, go element by element and are read twice.
#include <climits>

#include "common.cuh"

namespace openllama::cuda {
namespace {

constexpr int kPacks = 4;         // accesses of a thread to a row, at most
constexpr int kMaxThreads = 512;  // of a row of four accesses each
constexpr int kFwdThreads = 128;  // of a block that takes several rows
constexpr int kMaxRows = 15;      // of a block whose rows take several warps: as many barriers as there are
constexpr int kFwdShortRow = 8 * 1024;  // bytes of a row, up to which two accesses do
constexpr int kBwdShared = 96 * 1024;   // bytes of backward's rows: three deep where they fit, else two
constexpr int kLooseThreads = 512;      // of a row that goes element by element
constexpr int kMaxShared = 64 * 1024;   // then: 16,384 columns of dweight

// Threads of a block of backward, at most, by the accesses of each to a row.
constexpr unsigned bwd_threads(int packs) { return packs == 1 ? 1024 : packs == 2 ? 768 : kMaxThreads; }

// ---------------------------------------------------------------- rows by accesses of 16 bytes

// The column at which this thread's access number k to a row begins.
template <class T>
__device__ __forceinline__ int column(int k) {
  return (threadIdx.x + k * blockDim.x) * kPack<T>;
}

// This thread's part of a row.
template <class T, int P>
struct Row {
  Vec<T, kPack<T>> packs[P];

  __device__ __forceinline__ void load_from(const void* base, int64_t offset, int hidden) {
    const T* from = static_cast<const T*>(base) + offset;
#pragma unroll
    for (int k = 0; k < P; ++k)
      if (column<T>(k) < hidden) packs[k] = load<kPack<T>>(from + column<T>(k));
  }
};

// Sum over the threads of a row: some lanes of a warp, or several warps.
template <bool several>
__device__ __forceinline__ float row_sum(float v, RowSum<several>& sums, int turn) {
  return blockDim.x <= 32 ? warp_sum(v, blockDim.x) : sums(v, turn);
}

template <class T, class W, int P, bool residual>
__global__ void __launch_bounds__(P == 1 ? kFwdThreads : kMaxThreads, 1) fwd_kernel(RmsNormFwd a) {
  constexpr int N = kPack<T>;
  __shared__ RowSum<false> sums;
  const int hidden = static_cast<int>(a.hidden);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool here = i < a.rows;  // the last rows of a block that takes several
  Row<T, P> h, residual_row;
  Vec<W, N> weight[P];
  if (here) {
    h.load_from(a.x, i * a.x_stride, hidden);
    if constexpr (residual) residual_row.load_from(a.residual, i * a.residual_stride, hidden);
  }
#pragma unroll
  for (int k = 0; k < P; ++k)
    if (column<T>(k) < hidden) weight[k] = load<N>(static_cast<const W*>(a.weight) + column<T>(k));
  float sum = 0;
#pragma unroll
  for (int k = 0; k < P; ++k) {
    if (column<T>(k) >= hidden || !here) continue;
    if constexpr (residual) {
      float v[N];
#pragma unroll
      for (int n = 0; n < N; ++n) v[n] = h.packs[k][n] + residual_row.packs[k][n];
      h.packs[k] = Vec<T, N>::of(v);  // what the readers of h will see
      store(static_cast<T*>(a.h) + i * a.hidden + column<T>(k), h.packs[k]);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) sum += h.packs[k][n] * h.packs[k][n];
  }
  // not rsqrtf, which is off by up to 2 ulps: this is once a row
  const float rstd = 1.0f / sqrtf(row_sum(sum, sums, 0) / static_cast<float>(hidden) + a.eps);
  if (!here) return;
  if (threadIdx.x == 0) a.rstd[i] = rstd;
#pragma unroll
  for (int k = 0; k < P; ++k) {
    if (column<T>(k) >= hidden) continue;
    float y[N];
#pragma unroll
    for (int n = 0; n < N; ++n) y[n] = h.packs[k][n] * rstd * weight[k][n];
    store(static_cast<T*>(a.y) + i * a.hidden + column<T>(k), Vec<T, N>::of(y));
  }
}

// The inputs of backward come through shared memory: for the next rows there is no room in registers.
// Each thread copies and reads its own columns only, so that it has nothing to wait for but its own copies.
template <class T, int P, int arrays>
struct Stages {
  uint4* slots;           // of this thread: (stages, arrays, P), a block of threads apart
  const T* next[arrays];  // this thread's first column of the row to be fetched next
  int64_t jumps[arrays];  // from there to the one after that

  __device__ __forceinline__ uint4* slot(int stage, int array, int k) const {
    return slots + ((stage * arrays + array) * P + k) * (blockDim.x * blockDim.y);
  }
  __device__ __forceinline__ void fetch(int stage, bool there, int hidden) {
#pragma unroll
    for (int array = 0; array < arrays; ++array) {
#pragma unroll
      for (int k = 0; k < P; ++k)
        if (there && column<T>(k) < hidden)
          copy_async(slot(stage, array, k), next[array] + k * blockDim.x * kPack<T>);
      next[array] += jumps[array];
    }
    copies_end();
  }
  __device__ __forceinline__ Vec<T, kPack<T>> read(int stage, int array, int k) const {
    return load<kPack<T>>(reinterpret_cast<const T*>(slot(stage, array, k)));
  }
};

// This thread's part of the weight: held where there are registers for it, else read, from L1, for each row.
template <class W, int P, int N>
struct Weight {
  static constexpr bool held = P == 2;
  const W* from;
  Vec<W, N> packs[held ? P : 1];

  __device__ __forceinline__ Weight(const RmsNormBwd& a, int begin)
      : from(static_cast<const W*>(a.weight) + begin) {
    if constexpr (held)
#pragma unroll
      for (int k = 0; k < P; ++k)
        if (begin + k * blockDim.x * N < a.hidden) packs[k] = load<N>(from + k * blockDim.x * N);
  }
  __device__ __forceinline__ Vec<W, N> operator[](int k) const {
    if constexpr (held) return packs[k];
    return load<N>(from + k * blockDim.x * N);
  }
};

// Adds up the block's rows of dweight, (blockDim.y, hidden) in shared memory, and writes the block's.
__device__ void write_dweight(const RmsNormBwd& a, const float* rows) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  for (int64_t c = thread; c < a.hidden; c += threads) {
    float sum = 0;
    for (int y = 0; y < blockDim.y; ++y) sum += rows[y * a.hidden + c];
    a.dweight_blocks[blockIdx.x * a.hidden + c] = sum;
  }
}

template <class T, class W, int P, bool residual>
__global__ void __launch_bounds__(bwd_threads(P)) bwd_kernel(RmsNormBwd a) {
  constexpr int N = kPack<T>, arrays = residual ? 3 : 2;
  extern __shared__ uint4 shared[];  // the stages, and at the end the rows of dweight
  __shared__ RowSum<true> sums;
  const int hidden = static_cast<int>(a.hidden);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  Stages<T, P, arrays> stages{shared + threadIdx.y * blockDim.x + threadIdx.x};
  const auto add = [&](int array, const void* base, int64_t stride) {
    stages.next[array] = static_cast<const T*>(base) + i * stride + column<T>(0);
    stages.jumps[array] = step * stride;
  };
  add(0, a.dy, a.dy_stride);
  add(1, a.h, a.h_stride);
  if constexpr (residual) add(2, a.dh, a.dh_stride);
  stages.fetch(0, i < a.rows, hidden);
  if (a.stages == 3) stages.fetch(1, i + step < a.rows, hidden);
  float next_rstd = i < a.rows ? a.rstd[i] : 0.0f;
  const Weight<W, P, N> weight(a, column<T>(0));
  float dweight[P][N] = {};
  T* dx_row = static_cast<T*>(a.dx) + i * a.hidden + column<T>(0);
  int turn = 0;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * blockDim.y; base < a.rows; base += step, i += step) {
    const bool here = i < a.rows;
    const float rstd = next_rstd;
    if (i + step < a.rows) next_rstd = a.rstd[i + step];
    stages.fetch(turn ? turn - 1 : a.stages - 1, i + (a.stages - 1) * step < a.rows, hidden);
    a.stages == 2 ? copies_wait<1>() : copies_wait<2>();
    Vec<T, N> dy[P], h[P];
    float dot = 0;
#pragma unroll
    for (int k = 0; k < P; ++k) {
      if (column<T>(k) >= hidden || !here) continue;
      dy[k] = stages.read(turn, 0, k), h[k] = stages.read(turn, 1, k);
      const auto w = weight[k];
#pragma unroll
      for (int n = 0; n < N; ++n) {
        dot += dy[k][n] * w[n] * h[k][n];
        dweight[k][n] += dy[k][n] * (h[k][n] * rstd);
      }
    }
    const float scale = row_sum(dot, sums, turn) * rstd * rstd * rstd / static_cast<float>(hidden);
#pragma unroll
    for (int k = 0; k < P; ++k) {
      if (column<T>(k) >= hidden || !here || !a.dx) continue;
      const auto w = weight[k];
      float dx[N];
#pragma unroll
      for (int n = 0; n < N; ++n) dx[n] = dy[k][n] * w[n] * rstd - h[k][n] * scale;
      if constexpr (residual) {
        const auto dh = stages.read(turn, 2, k);
#pragma unroll
        for (int n = 0; n < N; ++n) dx[n] += dh[n];
      }
      store(dx_row + k * blockDim.x * N, Vec<T, N>::of(dx));
    }
    dx_row += step * a.hidden;
    turn = turn + 1 < a.stages ? turn + 1 : 0;
  }
  if (!a.dweight) return;
  float* rows = reinterpret_cast<float*>(shared);
  __syncthreads();  // all are done with the stages
#pragma unroll
  for (int k = 0; k < P; ++k)
    if (column<T>(k) < hidden)
#pragma unroll
      for (int n = 0; n < N; ++n) rows[threadIdx.y * hidden + column<T>(k) + n] = dweight[k][n];
  __syncthreads();
  write_dweight(a, rows);
}

// ---------------------------------------------------------------- rows element by element

template <class T, class W>
__global__ void __launch_bounds__(kLooseThreads) loose_fwd_kernel(RmsNormFwd a) {
  __shared__ RowSum<false> sums;
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
  __shared__ RowSum<false> sums;
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
  wait_for_last_kernel();
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

// Accesses of a thread to a row. Forward: few to a short one, whose block would else be too small to hide its
// sum. Backward: two where a block has threads enough.
template <class Args>
int row_packs(const Args& a) {
  const int64_t bytes = a.hidden * size_of(a.dtype);
  const int64_t short_row = std::is_same_v<Args, RmsNormFwd> ? kFwdShortRow : 2 * 16 * bwd_threads(2);
  return bytes <= 32 * 16 ? 1 : bytes <= short_row ? 2 : kPacks;
}

// Threads of a row, in accesses of 16 bytes; 0 where rows must go element by element.
template <class Args>
unsigned row_threads(const Args& a) {
  const int64_t size = size_of(a.dtype), packs = a.hidden * size / 16, each = row_packs(a);
  if (a.hidden * size % 16 || !on_16_bytes(a) || packs > int64_t{kPacks} * kMaxThreads) return 0;
  unsigned threads = 1;
  while (threads < 32 && threads < packs) threads *= 2;  // few columns: one access a lane
  return packs <= 32 * each ? threads : static_cast<unsigned>(ceil_div(ceil_div(packs, each), 32) * 32);
}

unsigned loose_threads(int64_t hidden) {
  return static_cast<unsigned>(std::min<int64_t>(ceil_div(hidden, 32) * 32, kLooseThreads));
}

// Calls body(T{}, W{}) for the types of rows and weight.
template <class Args, class F>
cudaError_t with_dtypes(const Args& a, F body) {
  return with_dtype(a.dtype, [&](auto t) {
    if (a.weight_dtype == a.dtype) return body(t, t);
    return a.weight_dtype == Dtype::f32 ? body(t, float{}) : cudaErrorInvalidValue;
  });
}

// body(P) for the number of a thread's accesses to a row.
template <class Args, class F>
auto with_packs(const Args& a, F body) {
  const int packs = row_packs(a);
  return packs == 1   ? body(std::integral_constant<int, 1>{})
         : packs == 2 ? body(std::integral_constant<int, 2>{})
                      : body(std::integral_constant<int, kPacks>{});
}

// The kernel, its block and its shared memory.
struct BwdPlan {
  void (*kernel)(RmsNormBwd);
  dim3 block;
  int64_t shared;
};

// Rows of a block: a power of two, which measured better than what fills it; 0 where shared memory is too
// small for one.
unsigned bwd_rows(unsigned threads, int packs, int64_t row_bytes, int64_t most) {
  unsigned rows = 1;
  while (2 * rows * threads <= bwd_threads(packs) && (threads <= 32 || 2 * rows <= kMaxRows)) rows *= 2;
  while (rows * row_bytes > most) rows /= 2;
  return rows;
}

cudaError_t plan_bwd(RmsNormBwd& a, BwdPlan& plan) {
  int device = 0, most = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  most -= sizeof(RowSum<true>);
  const unsigned threads = row_threads(a);
  const int packs = row_packs(a);
  const int64_t row = int64_t{a.dh ? 3 : 2} * packs * sizeof(uint4) * threads;  // bytes, of all arrays
  const unsigned rows = threads ? bwd_rows(threads, packs, 2 * row, most) : 0;
  a.stages = 3 * row * rows <= std::min(most, kBwdShared) ? 3 : 2;
  const cudaError_t error = with_dtypes(a, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    plan.kernel = !rows ? loose_bwd_kernel<T, W> : with_packs(a, [&](auto p) {
      return a.dh ? bwd_kernel<T, W, p, true> : bwd_kernel<T, W, p, false>;
    });
    return cudaSuccess;
  });
  plan.block = rows ? dim3(threads, rows) : dim3(loose_threads(a.hidden));
  plan.shared = rows ? a.stages * row * rows : a.dweight ? a.hidden * int64_t{sizeof(float)} : 0;
  if (error != cudaSuccess || plan.shared <= 32 * 1024) return error;
  // always to the same limit: another thread's launch may come in between
  return cudaFuncSetAttribute(plan.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              rows ? most : kMaxShared);
}

}  // namespace

cudaError_t rms_norm_fwd(const RmsNormFwd& a, cudaStream_t stream) {
  if (a.rows == 0 || a.hidden == 0) return cudaSuccess;
  if (a.rows > INT_MAX) return cudaErrorInvalidConfiguration;  // a grid has at most 2^31 - 1 blocks
  return with_dtypes(a, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    const unsigned threads = row_threads(a);
    if (!threads) {
      loose_fwd_kernel<T, W><<<static_cast<unsigned>(a.rows), loose_threads(a.hidden), 0, stream>>>(a);
      return cudaGetLastError();
    }
    const auto kernel = with_packs(
        a, [&](auto p) { return a.residual ? fwd_kernel<T, W, p, true> : fwd_kernel<T, W, p, false>; });
    const dim3 block(threads, threads > 32 ? 1 : kFwdThreads / threads);
    kernel<<<static_cast<unsigned>(ceil_div(a.rows, block.y)), block, 0, stream>>>(a);
    return cudaGetLastError();
  });
}

int64_t rms_norm_bwd_blocks(RmsNormBwd a) {
  BwdPlan plan;
  if (a.rows == 0 || plan_bwd(a, plan) != cudaSuccess) return 1;
  const int64_t resident =
      resident_blocks(plan.kernel, static_cast<int>(plan.block.x * plan.block.y), plan.shared);
  // On an H200's 132 processors 128 blocks are up to a tenth faster than 132, which don't keep step.
  int64_t power = 1;
  while (2 * power <= resident) power *= 2;
  return even_blocks(ceil_div(a.rows, plan.block.y), power > resident - resident / 16 ? power : resident);
}

cudaError_t rms_norm_bwd(RmsNormBwd a, cudaStream_t stream) {
  if (a.hidden == 0) return cudaSuccess;
  BwdPlan plan;
  cudaError_t error = plan_bwd(a, plan);
  if (error != cudaSuccess) return error;
  plan.kernel<<<static_cast<unsigned>(a.blocks), plan.block, plan.shared, stream>>>(a);
  if ((error = cudaGetLastError()) != cudaSuccess || !a.dweight) return error;
  return launch_early(reduce_kernel, static_cast<unsigned>(ceil_div(a.hidden, 32)), dim3(32, 8), stream, a);
}

}  // namespace openllama::cuda
