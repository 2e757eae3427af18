// swiglu: binding of its CPU and CUDA kernels.
#include "common.h"

namespace openllama {
namespace {

Swiglu arguments(const Tensor& gate_up, const Tensor* dact, const Tensor& out, const Tensor* act) {
  const int64_t rows = gate_up.size(0), intermediate = gate_up.size(1) / 2;
  check_rows(gate_up, "gate_up", rows, 2 * intermediate, gate_up);
  if (dact) check_rows(*dact, "dact", rows, intermediate, gate_up);
  return {gate_up.const_data_ptr(),
          dact ? dact->const_data_ptr() : nullptr,
          out.mutable_data_ptr(),
          act ? act->mutable_data_ptr() : nullptr,
          rows,
          intermediate,
          gate_up.stride(0),
          dact ? dact->stride(0) : 0,
          out.stride(0),
          act ? act->stride(0) : 0,
          dtype_of(gate_up)};
}

Tensor new_act(const Tensor& gate_up) { return new_like(gate_up, {gate_up.size(0), gate_up.size(1) / 2}); }

void run_bwd_cpu(const Swiglu& args) {
  for_rows(args.rows, args.intermediate * 20,
           [&](int64_t begin, int64_t end) { CPU_CALL(swiglu_bwd, args, begin, end); });
}

Tensor fwd_cpu(Tensor gate_up) {
  cpu_dtype_of(gate_up);
  Tensor act = new_act(gate_up);
  const Swiglu args = arguments(gate_up, nullptr, act, nullptr);
  for_rows(args.rows, args.intermediate * 12,
           [&](int64_t begin, int64_t end) { CPU_CALL(swiglu_fwd, args, begin, end); });
  return act;
}

Tensor bwd_cpu(Tensor dact, Tensor gate_up) {
  cpu_dtype_of(gate_up);
  Tensor dgate_up = new_like(gate_up, {gate_up.size(0), gate_up.size(1)});
  run_bwd_cpu(arguments(gate_up, &dact, dgate_up, nullptr));
  return dgate_up;
}

void bwd_inplace_cpu(Tensor dact, Tensor gate_up) {
  cpu_dtype_of(gate_up);
  run_bwd_cpu(arguments(gate_up, &dact, gate_up, &dact));
}

#ifdef USE_CUDA

Tensor fwd_cuda(Tensor gate_up) {
  const CudaScope scope(gate_up);
  Tensor act = new_act(gate_up);
  check(cuda::swiglu_fwd(arguments(gate_up, nullptr, act, nullptr), scope.stream), "swiglu_fwd");
  return act;
}

Tensor bwd_cuda(Tensor dact, Tensor gate_up) {
  const CudaScope scope(gate_up);
  Tensor dgate_up = new_like(gate_up, {gate_up.size(0), gate_up.size(1)});
  check(cuda::swiglu_bwd(arguments(gate_up, &dact, dgate_up, nullptr), scope.stream), "swiglu_bwd");
  return dgate_up;
}

void bwd_inplace_cuda(Tensor dact, Tensor gate_up) {
  const CudaScope scope(gate_up);
  check(cuda::swiglu_bwd(arguments(gate_up, &dact, gate_up, &dact), scope.stream), "swiglu_bwd_");
}

#endif

}  // namespace
}  // namespace openllama

STABLE_TORCH_LIBRARY_FRAGMENT(openllama, m) {
  m.def("swiglu_fwd(Tensor gate_up) -> Tensor");
  m.def("swiglu_bwd(Tensor dact, Tensor gate_up) -> Tensor");
  m.def("swiglu_bwd_(Tensor(a!) dact, Tensor(b!) gate_up) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(openllama, CPU, m) {
  m.impl("swiglu_fwd", TORCH_BOX(&openllama::fwd_cpu));
  m.impl("swiglu_bwd", TORCH_BOX(&openllama::bwd_cpu));
  m.impl("swiglu_bwd_", TORCH_BOX(&openllama::bwd_inplace_cpu));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(openllama, CUDA, m) {
  m.impl("swiglu_fwd", TORCH_BOX(&openllama::fwd_cuda));
  m.impl("swiglu_bwd", TORCH_BOX(&openllama::bwd_cuda));
  m.impl("swiglu_bwd_", TORCH_BOX(&openllama::bwd_inplace_cuda));
}
#endif
