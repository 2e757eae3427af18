// The smallest Hopper-only kernel: it gives registers back, which only sm_90a code may do. `openllama info`
// calls it, to prove that files of this folder are compiled for sm_90a and run from the same library.
#include "../ops.h"

namespace openllama::cuda {
namespace {

__global__ void __launch_bounds__(128, 1) probe_kernel(int32_t* out) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
  if (threadIdx.x == 0) *out = 90;
#endif
}

}  // namespace

cudaError_t hopper_probe(int32_t* out, cudaStream_t stream) {
  probe_kernel<<<1, 128, 0, stream>>>(out);
  return cudaGetLastError();
}

}  // namespace openllama::cuda
