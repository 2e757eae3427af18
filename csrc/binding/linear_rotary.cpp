// linear_rotary: binding of its CUDA kernel, for Hopper.
#include "hopper.h"

namespace openllama {
namespace {

#ifdef USE_CUDA

constexpr int64_t kWidth = 128;  // a half tile has rows of one weight

Tensor linear_rotary_cuda(Tensor x, std::vector<Tensor> weights, Tensor cos, Tensor sin, Tensor positions,
                          int64_t head_dim, int64_t rotated) {
  const CudaScope scope(x);
  const int64_t tokens = x.size(0), hidden = x.size(1);
  check_matrix(x, "x", tokens, hidden, x);
  require(!weights.empty() && weights.size() <= 3, "openllama: linear_rotary takes one to three weights");
  require(head_dim == 64 || head_dim == 128, "openllama: linear_rotary takes a head_dim of 64 or 128");
  LinearRotary a{};
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    check_matrix(weight, "weights", weight.size(0), hidden, x);
    require(weight.size(0) > 0 && weight.size(0) % kWidth == 0,
            "openllama: linear_rotary takes weights whose rows are a multiple of ", kWidth);
    a.weight[i] = weight.const_data_ptr();
    a.width[i] = weight.size(0), a.weight_stride[i] = weight.stride(0);
    a.columns += weight.size(0);
  }
  require(a.columns <= INT32_MAX / 2 && rotated >= 0 && rotated * head_dim <= a.columns,
          "openllama: rotated must be at most heads");
  require(cos.dim() == 2, "openllama: cos must be (positions, head_dim / 2)");
  check_flat(cos, "cos", cos.size(0) * head_dim / 2, ScalarType::Float, x);
  check_flat(sin, "sin", cos.size(0) * head_dim / 2, ScalarType::Float, x);
  check_flat(positions, "positions", tokens, ScalarType::Int, x);
  Tensor out = new_like(x, {tokens, a.columns / head_dim, head_dim});
  a.x = x.const_data_ptr(), a.out = out.mutable_data_ptr();
  a.cos = floats(cos), a.sin = floats(sin);
  a.positions = static_cast<const int32_t*>(positions.const_data_ptr());
  a.tokens = tokens, a.hidden = hidden, a.rotated = rotated * head_dim, a.head_dim = head_dim;
  a.table_rows = cos.size(0), a.x_stride = x.stride(0), a.dtype = dtype_of(x);
  check(cuda::linear_rotary(a, scope.stream), "linear_rotary");
  return out;
}

#endif

}  // namespace
}  // namespace openllama

STABLE_TORCH_LIBRARY_FRAGMENT(openllama, m) {
  m.def(
      "linear_rotary(Tensor x, Tensor[] weights, Tensor cos, Tensor sin, Tensor positions, int head_dim, "
      "int rotated) -> Tensor");
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(openllama, CUDA, m) {
  m.impl("linear_rotary", TORCH_BOX(&openllama::linear_rotary_cuda));
}
#endif
