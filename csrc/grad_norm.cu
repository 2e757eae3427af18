// The l2 norm of a list of gradients, and the factor that clips it: one read of them, and no wait of the
// host.
//
// Each block sums its chunks in a fixed order, and one block then sums the blocks' parts in a fixed order:
// every run gives the same bits.
#include <climits>

#include "common.cuh"

namespace openllama::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 1024;
constexpr int kPacks = 4;         // accesses of a thread to a chunk
constexpr int kMaxTensors = 800;  // of a launch: under the 32,764 bytes of parameters

struct Table {
  GradNormTensor tensors[kMaxTensors];
  uint32_t first_chunk[kMaxTensors + 1];
  int32_t count;
};
static_assert(sizeof(Table) <= 32'000);

constexpr int64_t chunk_of(int64_t element_size) { return kThreads * kPacks * (16 / element_size); }

// ---------------------------------------------------------------- kernels

template <class T>
__device__ float chunk_sum(const GradNormTensor& t, int64_t chunk) {
  constexpr int N = kPack<T>;
  const int64_t begin = chunk * chunk_of(sizeof(T)), end = min(begin + chunk_of(sizeof(T)), t.size);
  const T* grad = static_cast<const T*>(t.grad);
  float sum = 0;
  if (t.packs && end - begin == chunk_of(sizeof(T))) {
    Vec<T, N> v[kPacks];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) v[k] = load<N>(grad + begin + (k * kThreads + threadIdx.x) * N);
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
#pragma unroll
      for (int n = 0; n < N; ++n) sum += v[k][n] * v[k][n];
  } else {
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads)
      sum += to_float(grad[i]) * to_float(grad[i]);
  }
  return sum;
}

// Adds to `partial`, or starts it.
__global__ void __launch_bounds__(kThreads)
    squares_kernel(const __grid_constant__ Table table, float* partial, bool first) {
  __shared__ RowSum<false> sums;
  float sum = 0;
  int at = 0;
  for (uint32_t chunk = blockIdx.x; chunk < table.first_chunk[table.count]; chunk += gridDim.x) {
    while (chunk >= table.first_chunk[at + 1]) ++at;
    const GradNormTensor& t = table.tensors[at];
    const uint32_t own = chunk - table.first_chunk[at];
    sum += t.dtype == Dtype::f32    ? chunk_sum<float>(t, own)
           : t.dtype == Dtype::bf16 ? chunk_sum<__nv_bfloat16>(t, own)
                                    : chunk_sum<__half>(t, own);
  }
  sum = sums(sum, 0);
  if (threadIdx.x == 0) partial[blockIdx.x] = (first ? 0.0f : partial[blockIdx.x]) + sum;
}

__global__ void __launch_bounds__(kBlocks) norm_kernel(const float* partial, float max_norm, float* out) {
  __shared__ RowSum<false> sums;
  wait_for_last_kernel();
  const float norm = sqrtf(sums(partial[threadIdx.x], 0));
  if (threadIdx.x) return;
  const float scale = max_norm / (norm + 1e-6f);
  out[0] = norm;
  out[1] = scale > 1.0f ? 1.0f : scale;  // NaN stays
}

}  // namespace

// ---------------------------------------------------------------- launcher

int64_t grad_norm_blocks() { return kBlocks; }

cudaError_t grad_norm(const std::vector<GradNormTensor>& tensors, float max_norm, float* partial, float* out,
                      cudaStream_t stream) {
  Table table;
  size_t next = 0;
  do {
    const bool first = next == 0;
    table.count = 0;
    table.first_chunk[0] = 0;
    for (; next < tensors.size() && table.count < kMaxTensors; ++next) {
      GradNormTensor t = tensors[next];
      t.packs = aligned(t.grad);
      const int64_t chunks = table.first_chunk[table.count] + ceil_div(t.size, chunk_of(size_of(t.dtype)));
      if (chunks > INT_MAX && table.count) break;
      table.tensors[table.count++] = t;
      table.first_chunk[table.count] = static_cast<uint32_t>(chunks);
    }
    squares_kernel<<<kBlocks, kThreads, 0, stream>>>(table, partial, first);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  } while (next < tensors.size());
  return launch_early(norm_kernel, 1, kBlocks, stream, static_cast<const float*>(partial), max_norm, out);
}

}  // namespace openllama::cuda
