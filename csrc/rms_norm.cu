// RMSNorm (Zhang and Sennrich, 2019), forward and backward, with the residual add fused in. Bound by memory.
//
// A block takes a row at a time and its threads own the columns thread * N, (thread + threads) * N, ...:
// neighbours read neighbouring 16 bytes. The second pass over a row finds it in L1 or L2. Backward's blocks
// walk over rows (block, block + blocks, ...) and keep their part of dweight in shared memory, so that each
// input is read from device memory once; a second kernel sums the blocks' parts in a fixed order, so that
// every run gives the same bits.
#include <climits>

#include "common.cuh"

namespace openllama::cuda {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kMaxShared = 64 * 1024;  // 16,384 columns of dweight

// ---------------------------------------------------------------- kernels

template <class T, class W, int N>
__global__ void __launch_bounds__(kMaxThreads) fwd_kernel(RmsNormFwd a) {
  __shared__ float scratch[33];
  const int64_t i = blockIdx.x;
  const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
  T* y = static_cast<T*>(a.y) + i * a.hidden;
  T* h = a.h ? static_cast<T*>(a.h) + i * a.hidden : nullptr;
  const T* residual = a.residual ? static_cast<const T*>(a.residual) + i * a.residual_stride : nullptr;
  const int first = threadIdx.x * N, step = blockDim.x * N;
  float sum = 0;
  for (int c = first; c < a.hidden; c += step) {
    float v[N];
    load(v, x + c);
    if (residual) {
      float r[N];
      load(r, residual + c);
#pragma unroll
      for (int k = 0; k < N; ++k) v[k] = to_float(from_float<T>(v[k] + r[k]));  // what a reader of h will see
      store(h + c, v);
    }
#pragma unroll
    for (int k = 0; k < N; ++k) sum += v[k] * v[k];
  }
  // not rsqrtf, which is off by up to 2 ulps: this is once a row
  const float rstd = 1.0f / sqrtf(block_sum(sum, scratch) / static_cast<float>(a.hidden) + a.eps);
  if (threadIdx.x == 0) a.rstd[i] = rstd;
  const T* from = residual ? h : x;  // each thread reads back its own columns
  for (int c = first; c < a.hidden; c += step) {
    float v[N], w[N];
    load(v, from + c);
    load(w, static_cast<const W*>(a.weight) + c);
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] = v[k] * rstd * w[k];
    store(y + c, v);
  }
}

template <class T, class W, int N>
__global__ void __launch_bounds__(kMaxThreads) bwd_kernel(RmsNormBwd a) {
  extern __shared__ float dweight[];  // (hidden): each thread touches its own columns only
  __shared__ float scratch[33];
  const int first = threadIdx.x * N, step = blockDim.x * N;
  const W* weight = static_cast<const W*>(a.weight);
  if (a.dweight)
    for (int c = first; c < a.hidden; c += step)
#pragma unroll
      for (int k = 0; k < N; ++k) dweight[c + k] = 0;
  for (int64_t i = blockIdx.x; i < a.rows; i += gridDim.x) {
    const T* dy = static_cast<const T*>(a.dy) + i * a.dy_stride;
    const T* h = static_cast<const T*>(a.h) + i * a.h_stride;
    const T* dh = a.dh ? static_cast<const T*>(a.dh) + i * a.dh_stride : nullptr;
    const float rstd = a.rstd[i];
    float dot = 0;
    for (int c = first; c < a.hidden; c += step) {
      float d[N], v[N], w[N];
      load(d, dy + c);
      load(v, h + c);
      load(w, weight + c);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        dot += d[k] * w[k] * v[k];
        if (a.dweight) dweight[c + k] += d[k] * (v[k] * rstd);
      }
    }
    if (!a.dx) continue;
    const float scale = block_sum(dot, scratch) * rstd * rstd * rstd / static_cast<float>(a.hidden);
    T* dx = static_cast<T*>(a.dx) + i * a.hidden;
    for (int c = first; c < a.hidden; c += step) {
      float d[N], v[N], w[N];
      load(d, dy + c);
      load(v, h + c);
      load(w, weight + c);
#pragma unroll
      for (int k = 0; k < N; ++k) d[k] = d[k] * w[k] * rstd - v[k] * scale;
      if (dh) {
        load(v, dh + c);
#pragma unroll
        for (int k = 0; k < N; ++k) d[k] += v[k];
      }
      store(dx + c, d);
    }
  }
  if (a.dweight)
    for (int c = first; c < a.hidden; c += step)
#pragma unroll
      for (int k = 0; k < N; ++k) a.dweight_blocks[blockIdx.x * a.hidden + c + k] = dweight[c + k];
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

int threads_for(int64_t hidden, int n) {
  const int64_t warps = (hidden + 32 * n - 1) / (32 * n);
  return static_cast<int>(warps * 32 < kMaxThreads ? warps * 32 : kMaxThreads);
}

template <class T, class W, int N>
cudaError_t launch(const RmsNormFwd& a, cudaStream_t stream) {
  fwd_kernel<T, W, N><<<static_cast<unsigned>(a.rows), threads_for(a.hidden, N), 0, stream>>>(a);
  return cudaGetLastError();
}

template <class T, class W, int N>
cudaError_t launch(const RmsNormBwd& a, cudaStream_t stream) {
  const size_t shared = a.dweight ? a.hidden * sizeof(float) : 0;
  cudaError_t error = cudaSuccess;
  if (shared > 48 * 1024)  // always to the same limit: another thread's launch may come in between
    error =
        cudaFuncSetAttribute(bwd_kernel<T, W, N>, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxShared);
  if (error != cudaSuccess) return error;
  bwd_kernel<T, W, N><<<static_cast<unsigned>(a.blocks), threads_for(a.hidden, N), shared, stream>>>(a);
  if ((error = cudaGetLastError()) != cudaSuccess || !a.dweight) return error;
  reduce_kernel<<<static_cast<unsigned>((a.hidden + 31) / 32), dim3(32, 8), 0, stream>>>(a);
  return cudaGetLastError();
}

// 16-byte accesses where every row starts on 16 bytes, else single elements.
template <class Args>
cudaError_t dispatch(const Args& a, bool vectors, cudaStream_t stream) {
  if (a.hidden == 0) return cudaSuccess;
  if (a.rows > INT_MAX) return cudaErrorInvalidConfiguration;  // a grid has at most 2^31 - 1 blocks
  return with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int N = 16 / sizeof(T);
    if (a.weight_dtype == a.dtype) return vectors ? launch<T, T, N>(a, stream) : launch<T, T, 1>(a, stream);
    if (a.weight_dtype != Dtype::f32) return cudaErrorInvalidValue;
    return vectors ? launch<T, float, N>(a, stream) : launch<T, float, 1>(a, stream);
  });
}

}  // namespace

cudaError_t rms_norm_fwd(const RmsNormFwd& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  const int64_t size = size_of(a.dtype);
  return dispatch(a,
                  aligned(a.x, a.x_stride * size) && aligned(a.residual, a.residual_stride * size) &&
                      aligned(a.weight, 0) && aligned(a.y, a.hidden * size),
                  stream);
}

cudaError_t rms_norm_bwd(const RmsNormBwd& a, cudaStream_t stream) {
  const int64_t size = size_of(a.dtype);
  return dispatch(a,
                  aligned(a.dy, a.dy_stride * size) && aligned(a.dh, a.dh_stride * size) &&
                      aligned(a.h, a.h_stride * size) && aligned(a.weight, 0) &&
                      aligned(a.dx, a.hidden * size),
                  stream);
}

}  // namespace openllama::cuda
