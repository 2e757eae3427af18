// What launches of persistent kernels share.
#pragma once

#include "../common.cuh"

namespace openllama::cuda::hopper {

// Calls body(T{}) with the 16-bit type.
template <class F>
cudaError_t with_half(Dtype dtype, const F& body) {
  return dtype == Dtype::bf16 ? body(__nv_bfloat16{}) : body(__half{});
}

// Gives a block of `kernel` its shared memory, and says how many clusters of `size` blocks there are to be
// for so many tiles: as many as the processors take at once, at most.
template <class Kernel>
cudaError_t prepare(Kernel kernel, int bytes, int size, int64_t tiles, unsigned& clusters) {
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  clusters = static_cast<unsigned>(std::min<int64_t>(tiles, processors / size));
  return error;
}

}  // namespace openllama::cuda::hopper
