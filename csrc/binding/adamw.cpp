// adamw and grad_norm: binding of their CPU and CUDA kernels.
#include <cmath>

#include "common.h"

namespace openllama {
namespace {

using Tensors = torch::headeronly::HeaderOnlyArrayRef<Tensor>;

struct Form {
  Master master;
  Moments moments;
};

// The arguments of the kernels, and the form that all tensors share.
struct List {
  Form form;
  std::vector<AdamWTensor> tensors;
  std::vector<AdamWGroup> groups;
};

Form form_of(const Tensors& params, const Tensors& exp_avgs, const Tensors& masters) {
  const ScalarType param = params[0].scalar_type(), moment = exp_avgs[0].scalar_type();
  require(moment == ScalarType::Float || moment == ScalarType::BFloat16 || moment == ScalarType::Byte,
          "openllama: adamw takes moments in float32, bfloat16 or uint8");
  const Moments moments = moment == ScalarType::Float      ? Moments::f32
                          : moment == ScalarType::BFloat16 ? Moments::bf16
                                                           : Moments::u8;
  if (param == ScalarType::Float) return {Master::param, moments};
  if (masters.size() == 0) return {Master::none, moments};
  return {masters[0].scalar_type() == ScalarType::Short ? Master::remainder : Master::f32, moments};
}

void check_beside(const Tensor& t, const char* name, ScalarType dtype, const Tensor& param) {
  check_flat(t, name, param.numel(), dtype, param);
  require(std::ranges::equal(t.sizes(), param.sizes()), "openllama: ", name, " must have its param's shape");
}

// Everything is checked before the kernel writes anything.
List checked(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
             const Tensors& masters, const Tensors& scales, const std::vector<int64_t>& groups,
             const std::vector<double>& numbers, const std::vector<int64_t>& firsts) {
  List list;
  const size_t count = params.size();
  if (!count) return list;
  require(exp_avgs.size() == count, "openllama: adamw takes lists of one length");
  list.form = form_of(params, exp_avgs, masters);
  const bool has_masters = list.form.master == Master::f32 || list.form.master == Master::remainder;
  const bool has_scales = list.form.moments == Moments::u8;
  require(grads.size() == count && exp_avg_sqs.size() == count && groups.size() == count &&
              firsts.size() == count && masters.size() == (has_masters ? count : 0) &&
              scales.size() == (has_scales ? count : 0) && numbers.size() % 6 == 0,
          "openllama: adamw takes lists of one length, masters and scales where the form has them, and six"
          " numbers a group");
  const ScalarType dtype = params[0].scalar_type(), moment = exp_avgs[0].scalar_type();
  require(dtype == ScalarType::BFloat16 || list.form.master == Master::param ||
              (dtype == ScalarType::Half && list.form.master == Master::f32),
          "openllama: adamw without fp32 masters takes bfloat16 params");
  const ScalarType master = list.form.master == Master::f32 ? ScalarType::Float : ScalarType::Short;
  for (size_t i = 0; i < count; ++i) {
    const int64_t size = params[i].numel(), blocks = (size + kMomentBlock - 1) / kMomentBlock;
    check_flat(params[i], "param", size, dtype, params[0]);
    check_beside(grads[i], "grad", grads[i].scalar_type(), params[i]);
    check_beside(exp_avgs[i], "exp_avg", moment, params[i]);
    check_beside(exp_avg_sqs[i], "exp_avg_sq", moment, params[i]);
    if (has_masters) check_beside(masters[i], "master", master, params[i]);
    if (has_scales) check_flat(scales[i], "scales", 2 * blocks, ScalarType::Float, params[i]);
    require(groups[i] >= 0 && groups[i] < int64_t(numbers.size() / 6), "openllama: adamw has no group ",
            groups[i]);
    list.tensors.push_back({params[i].mutable_data_ptr(), grads[i].const_data_ptr(),
                            exp_avgs[i].mutable_data_ptr(), exp_avg_sqs[i].mutable_data_ptr(),
                            has_masters ? masters[i].mutable_data_ptr() : nullptr,
                            has_scales ? mutable_floats(scales[i]) : nullptr, size, firsts[i],
                            int32_t(groups[i]), dtype_of(params[i]), dtype_of(grads[i]), false});
  }
  for (size_t i = 0; i < numbers.size(); i += 6)
    list.groups.push_back(
        {numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3], numbers[i + 4], numbers[i + 5]});
  return list;
}

// ---------------------------------------------------------------- CPU

constexpr int64_t kBlock = 16 * 1024;  // elements: 256 KB of fp32 state, half of an L2 slice

struct Block {
  size_t tensor;
  int64_t begin, end;
};

AdamWStep step_of(const AdamWGroup& g, float grad_scale) {
  return {float(g.beta2),
          float(g.eps),
          float(1 - g.lr * g.weight_decay),
          float(1 - g.beta1),
          float(1 - g.beta2),
          float(g.lr / (1 - std::pow(g.beta1, g.step))),
          float(1 / std::sqrt(1 - std::pow(g.beta2, g.step))),
          grad_scale};
}

void adamw_cpu(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors masters,
               Tensors scales, std::vector<int64_t> groups, std::vector<double> numbers, OptionalTensor lrs,
               OptionalTensor steps, OptionalTensor grad_scale, int64_t, std::vector<int64_t> firsts) {
  List list = checked(params, grads, exp_avgs, exp_avg_sqs, masters, scales, groups, numbers, firsts);
  if (list.tensors.empty()) return;
  require(list.form.moments == Moments::f32 &&
              (list.form.master == Master::param || list.form.master == Master::f32),
          "openllama: the CPU kernel of adamw takes fp32 moments and fp32 masters");
  for (const auto& t : list.tensors)
    require(t.param_dtype != Dtype::f16 && t.grad_dtype != Dtype::f16,
            "openllama: the CPU kernels take float32 or bfloat16");
  const int64_t count = list.groups.size();
  if (lrs) check_flat(*lrs, "lrs", count, ScalarType::Float, params[0]);
  if (steps) check_flat(*steps, "steps", count, ScalarType::Float, params[0]);
  if (grad_scale) check_flat(*grad_scale, "grad_scale", 1, ScalarType::Float, params[0]);
  std::vector<AdamWStep> of;
  for (int64_t i = 0; i < count; ++i) {
    if (lrs) list.groups[i].lr = floats(*lrs)[i];
    if (steps) list.groups[i].step = floats(*steps)[i];
    of.push_back(step_of(list.groups[i], grad_scale ? *floats(*grad_scale) : 1.0f));
  }
  std::vector<Block> blocks;
  for (size_t i = 0; i < list.tensors.size(); ++i)
    for (int64_t begin = 0; begin < list.tensors[i].size; begin += kBlock)
      blocks.push_back({i, begin, std::min(list.tensors[i].size, begin + kBlock)});
  torch::stable::parallel_for(0, int64_t(blocks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const AdamWTensor& t = list.tensors[blocks[i].tensor];
      CPU_CALL(adamw, t, of[t.group], blocks[i].begin, blocks[i].end);
    }
  });
}

// ---------------------------------------------------------------- CUDA

#ifdef USE_CUDA

void adamw_cuda(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors masters,
                Tensors scales, std::vector<int64_t> groups, std::vector<double> numbers, OptionalTensor lrs,
                OptionalTensor steps, OptionalTensor grad_scale, int64_t seed, std::vector<int64_t> firsts) {
  const List list = checked(params, grads, exp_avgs, exp_avg_sqs, masters, scales, groups, numbers, firsts);
  if (list.tensors.empty()) return;
  const CudaScope scope(params[0]);
  const int64_t count = list.groups.size();
  if (lrs) check_flat(*lrs, "lrs", count, ScalarType::Float, params[0]);
  if (steps) check_flat(*steps, "steps", count, ScalarType::Float, params[0]);
  if (grad_scale) check_flat(*grad_scale, "grad_scale", 1, ScalarType::Float, params[0]);
  check(cuda::adamw(list.tensors, list.groups, list.form.master, list.form.moments,
                    static_cast<const float*>(data(lrs)), static_cast<const float*>(data(steps)),
                    static_cast<const float*>(data(grad_scale)), uint32_t(seed), scope.stream),
        "adamw_");
}

// (norm, the factor that clips it to max_norm)
Tensor grad_norm_cuda(Tensors grads, double max_norm) {
  require(grads.size() > 0, "openllama: grad_norm takes at least one tensor");
  const CudaScope scope(grads[0]);
  std::vector<GradNormTensor> list;
  for (const Tensor& grad : grads) {
    check_flat(grad, "grad", grad.numel(), grad.scalar_type(), grads[0]);
    list.push_back({grad.const_data_ptr(), grad.numel(), dtype_of(grad), false});
  }
  Tensor out = new_f32(grads[0], {2});
  Tensor partial = new_f32(grads[0], {cuda::grad_norm_blocks()});
  check(cuda::grad_norm(list, float(max_norm), mutable_floats(partial), mutable_floats(out), scope.stream),
        "grad_norm");
  return out;
}

#endif

}  // namespace
}  // namespace openllama

STABLE_TORCH_LIBRARY_FRAGMENT(openllama, m) {
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
      " Tensor(d!)[] masters, Tensor(e!)[] scales, int[] groups, float[] numbers, Tensor? lrs,"
      " Tensor? steps, Tensor? grad_scale, int seed, int[] firsts) -> ()");
  m.def("grad_norm(Tensor[] grads, float max_norm) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(openllama, CPU, m) { m.impl("adamw_", TORCH_BOX(&openllama::adamw_cpu)); }

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(openllama, CUDA, m) {
  m.impl("adamw_", TORCH_BOX(&openllama::adamw_cuda));
  m.impl("grad_norm", TORCH_BOX(&openllama::grad_norm_cuda));
}
#endif
