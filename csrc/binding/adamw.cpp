// adamw: binding of its CPU kernel.
#include <cmath>

#include "common.h"

namespace openllama {
namespace {

constexpr int64_t kBlock = 16 * 1024;  // elements: 256 KB of fp32 state, half of an L2 slice

struct Block {
  size_t tensor;
  int64_t begin, end;
};

using Tensors = torch::headeronly::HeaderOnlyArrayRef<Tensor>;

void check_beside(const Tensor& t, const char* name, ScalarType dtype, const Tensor& param) {
  check_flat(t, name, param.numel(), dtype, param);
  require(std::ranges::equal(t.sizes(), param.sizes()), "openllama: ", name, " must have its param's shape");
}

// Everything is checked before the kernel writes anything.
std::vector<AdamWTensor> checked(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                                 const Tensors& exp_avg_sqs, const Tensors& masters) {
  const size_t count = params.size();
  const bool needs_masters = count && params[0].scalar_type() != ScalarType::Float;
  require(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count &&
              masters.size() == (needs_masters ? count : 0),
          "openllama: adamw takes lists of one length, and masters for params that are not float32");
  std::vector<AdamWTensor> list;
  for (size_t i = 0; i < count; ++i) {
    const int64_t size = params[i].numel();
    check_flat(params[i], "param", size, params[0].scalar_type(), params[0]);
    check_beside(grads[i], "grad", grads[i].scalar_type(), params[i]);
    check_beside(exp_avgs[i], "exp_avg", ScalarType::Float, params[i]);
    check_beside(exp_avg_sqs[i], "exp_avg_sq", ScalarType::Float, params[i]);
    if (needs_masters) check_beside(masters[i], "master", ScalarType::Float, params[i]);
    list.push_back({params[i].mutable_data_ptr(), grads[i].const_data_ptr(), mutable_floats(exp_avgs[i]),
                    mutable_floats(exp_avg_sqs[i]), needs_masters ? mutable_floats(masters[i]) : nullptr,
                    size, cpu_dtype_of(params[i]), cpu_dtype_of(grads[i])});
  }
  return list;
}

void adamw_cpu(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors masters,
               double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step) {
  const auto list = checked(params, grads, exp_avgs, exp_avg_sqs, masters);
  const AdamWStep s{float(beta2),
                    float(eps),
                    float(1 - lr * weight_decay),
                    float(1 - beta1),
                    float(1 - beta2),
                    float(lr / (1 - std::pow(beta1, double(step)))),
                    float(1 / std::sqrt(1 - std::pow(beta2, double(step))))};
  std::vector<Block> blocks;
  for (size_t i = 0; i < list.size(); ++i)
    for (int64_t begin = 0; begin < list[i].size; begin += kBlock)
      blocks.push_back({i, begin, std::min(list[i].size, begin + kBlock)});
  torch::stable::parallel_for(0, int64_t(blocks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      CPU_CALL(adamw, list[blocks[i].tensor], s, blocks[i].begin, blocks[i].end);
  });
}

}  // namespace
}  // namespace openllama

STABLE_TORCH_LIBRARY_FRAGMENT(openllama, m) {
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
      " Tensor(d!)[] masters, float lr, float beta1, float beta2, float eps, float weight_decay, int step)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(openllama, CPU, m) { m.impl("adamw_", TORCH_BOX(&openllama::adamw_cpu)); }
