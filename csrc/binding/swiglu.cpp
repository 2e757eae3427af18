// swiglu: binding of its CPU kernels.
#include "common.h"

namespace openllama {
namespace {

Tensor fwd_cpu(Tensor gate_up) {
  const int64_t rows = gate_up.size(0), intermediate = gate_up.size(1) / 2;
  check_rows(gate_up, "gate_up", rows, 2 * intermediate, gate_up);
  Tensor act = new_like(gate_up, {rows, intermediate});
  const Swiglu args{gate_up.const_data_ptr(), nullptr, act.mutable_data_ptr(), rows, intermediate,
                    gate_up.stride(0),        0,       cpu_dtype_of(gate_up)};
  for_rows(rows, intermediate * 12,
           [&](int64_t begin, int64_t end) { CPU_CALL(swiglu_fwd, args, begin, end); });
  return act;
}

Tensor bwd_cpu(Tensor dact, Tensor gate_up) {
  const int64_t rows = gate_up.size(0), intermediate = gate_up.size(1) / 2;
  check_rows(gate_up, "gate_up", rows, 2 * intermediate, gate_up);
  check_rows(dact, "dact", rows, intermediate, gate_up);
  Tensor dgate_up = new_like(gate_up, {rows, 2 * intermediate});
  const Swiglu args{
      gate_up.const_data_ptr(), dact.const_data_ptr(), dgate_up.mutable_data_ptr(), rows, intermediate,
      gate_up.stride(0),        dact.stride(0),        cpu_dtype_of(gate_up)};
  for_rows(rows, intermediate * 20,
           [&](int64_t begin, int64_t end) { CPU_CALL(swiglu_bwd, args, begin, end); });
  return dgate_up;
}

}  // namespace
}  // namespace openllama

STABLE_TORCH_LIBRARY_FRAGMENT(openllama, m) {
  m.def("swiglu_fwd(Tensor gate_up) -> Tensor");
  m.def("swiglu_bwd(Tensor dact, Tensor gate_up) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(openllama, CPU, m) {
  m.impl("swiglu_fwd", TORCH_BOX(&openllama::fwd_cpu));
  m.impl("swiglu_bwd", TORCH_BOX(&openllama::bwd_cpu));
}
