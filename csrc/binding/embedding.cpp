// embedding: binding of its CUDA kernel.
#include "common.h"

namespace openllama {
namespace {

#ifdef USE_CUDA

void bwd_cuda(Tensor dweight, Tensor dy, Tensor ids, Tensor order) {
  const CudaScope scope(dy);
  const int64_t tokens = dy.size(0), hidden = dy.size(1);
  check_like(dy, "dy", dy);
  check_flat(ids, "ids", tokens, ScalarType::Long, dy);
  check_flat(order, "order", tokens, ScalarType::Long, dy);
  check_device(dweight, "dweight", dy);
  require(dweight.dim() == 2 && dweight.size(1) == hidden && (dweight.stride(1) == 1 || hidden <= 1),
          "openllama: dweight must be (vocab, ", hidden, ") with contiguous rows");
  const EmbeddingBwd args{dweight.mutable_data_ptr(),
                          dy.const_data_ptr(),
                          static_cast<const int64_t*>(ids.const_data_ptr()),
                          static_cast<const int64_t*>(order.const_data_ptr()),
                          tokens,
                          hidden,
                          dy.stride(0),
                          dweight.stride(0),
                          false,
                          dtype_of(dy),
                          dtype_of(dweight)};
  check(cuda::embedding_bwd(args, scope.stream), "embedding_bwd_");
}

#endif

}  // namespace
}  // namespace openllama

STABLE_TORCH_LIBRARY_FRAGMENT(openllama, m) {
  m.def("embedding_bwd_(Tensor(a!) dweight, Tensor dy, Tensor ids, Tensor order) -> ()");
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(openllama, CUDA, m) { m.impl("embedding_bwd_", TORCH_BOX(&openllama::bwd_cuda)); }
#endif
