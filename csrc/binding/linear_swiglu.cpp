// linear_swiglu: binding of its CUDA kernels, for Hopper.
#include "hopper.h"

namespace openllama {
namespace {

#ifdef USE_CUDA

LinearSwiglu arguments(const Tensor& x, const Tensor& gate_up, const OptionalTensor& act) {
  const int64_t tokens = x.size(0), hidden = x.size(1), intermediate = gate_up.size(1) / 2;
  check_matrix(x, "x", tokens, hidden, x);
  check_matrix(gate_up, "gate_up", tokens, 2 * intermediate, x);
  require(intermediate % kMultiple == 0 && gate_up.is_contiguous() && (!act || act->is_contiguous()),
          "openllama: linear_swiglu takes a contiguous gate_up and act, whose width is a multiple of ",
          kMultiple);
  if (act) check_matrix(*act, "act", tokens, intermediate, x);
  LinearSwiglu a{};
  a.x = x.const_data_ptr();
  a.gate_up = gate_up.mutable_data_ptr();
  a.act = act ? act->mutable_data_ptr() : nullptr;
  a.tokens = tokens, a.hidden = hidden, a.intermediate = intermediate;
  a.x_stride = x.stride(0);
  a.dtype = dtype_of(x);
  return a;
}

void fwd_cuda(Tensor x, Tensor w_gate, Tensor w_up, Tensor gate_up, Tensor act) {
  const CudaScope scope(x);
  LinearSwiglu a = arguments(x, gate_up, act);
  check_matrix(w_gate, "w_gate", a.intermediate, a.hidden, x);
  check_matrix(w_up, "w_up", a.intermediate, a.hidden, x);
  a.w_gate = w_gate.const_data_ptr(), a.w_gate_stride = w_gate.stride(0);
  a.w_up = w_up.const_data_ptr(), a.w_up_stride = w_up.stride(0);
  check(cuda::linear_swiglu_fwd(a, scope.stream), "linear_swiglu_fwd");
}

void bwd_cuda(Tensor dout, Tensor w_down, Tensor gate_up, OptionalTensor act) {
  const CudaScope scope(dout);
  LinearSwiglu a = arguments(dout, gate_up, act);
  check_matrix(w_down, "w_down", a.hidden, a.intermediate, dout);
  a.w_down = w_down.const_data_ptr(), a.w_down_stride = w_down.stride(0);
  check(cuda::linear_swiglu_bwd(a, scope.stream), "linear_swiglu_bwd_");
}

#endif

}  // namespace
}  // namespace openllama

STABLE_TORCH_LIBRARY_FRAGMENT(openllama, m) {
  m.def("linear_swiglu_fwd(Tensor x, Tensor w_gate, Tensor w_up, Tensor(a!) gate_up, Tensor(b!) act) -> ()");
  m.def("linear_swiglu_bwd_(Tensor dout, Tensor w_down, Tensor(a!) gate_up, Tensor(b!)? act) -> ()");
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(openllama, CUDA, m) {
  m.impl("linear_swiglu_fwd", TORCH_BOX(&openllama::fwd_cuda));
  m.impl("linear_swiglu_bwd_", TORCH_BOX(&openllama::bwd_cuda));
}
#endif
