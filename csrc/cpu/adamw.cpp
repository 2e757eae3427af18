// AdamW: one pass over weight, gradient and both moments.
#include <cmath>

#include "vec.h"

namespace openllama::cpu::CPU_ARCH {
namespace {

template <class P, class G>
void update(const AdamWTensor& t, const AdamWStep& s, int64_t begin, int64_t end) {
  P* param = static_cast<P*>(t.param);
  const G* grad = static_cast<const G*>(t.grad);
  float *exp_avg = static_cast<float*>(t.exp_avg), *exp_avg_sq = static_cast<float*>(t.exp_avg_sq);
  float* master = static_cast<float*>(t.master);
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    const float g = to_float(grad[i]) * s.grad_scale;
    const float m = exp_avg[i] + (g - exp_avg[i]) * s.new1;
    const float v = s.beta2 * exp_avg_sq[i] + s.new2 * g * g;
    const float weight = master ? master[i] : to_float(param[i]);
    const float next = weight * s.keep - s.step_size * m / (std::sqrt(v) * s.root_scale + s.eps);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    if (master) master[i] = next;
    param[i] = from_float<P>(next);
  }
}

}  // namespace

void adamw(const AdamWTensor& t, const AdamWStep& s, int64_t begin, int64_t end) {
  with_dtype(t.param_dtype, [&](auto p) {
    with_dtype(t.grad_dtype, [&](auto g) { update<decltype(p), decltype(g)>(t, s, begin, end); });
  });
}

}  // namespace openllama::cpu::CPU_ARCH
