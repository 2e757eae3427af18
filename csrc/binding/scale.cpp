// scale: binding of its CUDA kernel.
#include "common.h"

namespace openllama {
namespace {

#ifdef USE_CUDA

void scale_cuda(Tensor x, Tensor factor) {
  const CudaScope scope(x);
  check_like(x, "x", x);
  check_flat(factor, "factor", 1, ScalarType::Float, x);
  check(cuda::scale({x.mutable_data_ptr(), floats(factor), x.size(0), x.size(1), x.stride(0), dtype_of(x)},
                    scope.stream),
        "scale_");
}

#endif

}  // namespace
}  // namespace openllama

STABLE_TORCH_LIBRARY_FRAGMENT(openllama, m) { m.def("scale_(Tensor(a!) x, Tensor factor) -> ()"); }

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(openllama, CUDA, m) { m.impl("scale_", TORCH_BOX(&openllama::scale_cuda)); }
#endif
