// rms_norm: binding of its CPU and CUDA kernels.
#include "common.h"

namespace openllama {
namespace {

struct Forward {
  Tensor y, h, rstd;
  RmsNormFwd args;
};

Forward prepare_fwd(const Tensor& x, const OptionalTensor& residual, const Tensor& weight, double eps) {
  const int64_t rows = x.size(0), hidden = x.size(1);
  check_like(x, "x", x);
  if (residual) check_like(*residual, "residual", x);
  check_flat(weight, "weight", hidden, weight.scalar_type(), x);
  Forward f{new_like(x, {rows, hidden}),
            new_like(x, {residual ? rows : 0, residual ? hidden : 0}),
            new_f32(x, {rows}),
            {}};
  f.args = {x.const_data_ptr(),
            data(residual),
            weight.const_data_ptr(),
            f.y.mutable_data_ptr(),
            residual ? f.h.mutable_data_ptr() : nullptr,
            mutable_floats(f.rstd),
            rows,
            hidden,
            x.stride(0),
            row_stride(residual),
            static_cast<float>(eps),
            dtype_of(x),
            dtype_of(weight)};
  return f;
}

struct Backward {
  Tensor dx, dweight, blocks;
  RmsNormBwd args;
};

// blocks_of(arguments) tells how many partial sums of dweight there are to be.
template <class F>
Backward prepare_bwd(const Tensor& dy, const OptionalTensor& dh, const Tensor& h, const Tensor& weight,
                     const Tensor& rstd, bool need_dx, bool need_dweight, const F& blocks_of) {
  const int64_t rows = h.size(0), hidden = h.size(1);
  check_like(h, "h", h);
  check_like(dy, "dy", h);
  if (dh) check_like(*dh, "dh", h);
  check_flat(weight, "weight", hidden, weight.scalar_type(), h);
  check_flat(rstd, "rstd", rows, ScalarType::Float, h);
  Backward b{new_like(h, {need_dx ? rows : 0, need_dx ? hidden : 0}),
             new_f32(h, {need_dweight ? hidden : 0}),
             new_f32(h, {0, hidden}),
             {}};
  b.args = {dy.const_data_ptr(),
            data(dh),
            h.const_data_ptr(),
            weight.const_data_ptr(),
            floats(rstd),
            need_dx ? b.dx.mutable_data_ptr() : nullptr,
            nullptr,
            need_dweight ? mutable_floats(b.dweight) : nullptr,
            rows,
            hidden,
            dy.stride(0),
            row_stride(dh),
            h.stride(0),
            0,
            dtype_of(h),
            dtype_of(weight)};
  b.args.blocks = blocks_of(b.args);
  if (need_dweight) {
    b.blocks = new_f32(h, {b.args.blocks, hidden});
    b.args.dweight_blocks = mutable_floats(b.blocks);
  }
  return b;
}

std::tuple<Tensor, Tensor, Tensor> fwd_cpu(Tensor x, OptionalTensor residual, Tensor weight, double eps) {
  cpu_dtype_of(x), cpu_dtype_of(weight);
  auto f = prepare_fwd(x, residual, weight, eps);
  for_rows(f.args.rows, f.args.hidden * 8,
           [&](int64_t begin, int64_t end) { CPU_CALL(rms_norm_fwd, f.args, begin, end); });
  return {f.y, f.h, f.rstd};
}

std::tuple<Tensor, Tensor> bwd_cpu(Tensor dy, OptionalTensor dh, Tensor h, Tensor weight, Tensor rstd,
                                   bool need_dx, bool need_dweight) {
  cpu_dtype_of(h), cpu_dtype_of(weight);
  const int64_t blocks = std::clamp<int64_t>(h.size(0) / 16, 1, 64);
  auto b =
      prepare_bwd(dy, dh, h, weight, rstd, need_dx, need_dweight, [&](const RmsNormBwd&) { return blocks; });
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) CPU_CALL(rms_norm_bwd, b.args, block);
  });
  if (need_dweight)
    for_rows(b.args.hidden, blocks * 4,
             [&](int64_t begin, int64_t end) { CPU_CALL(rms_norm_bwd_reduce, b.args, begin, end); });
  return {b.dx, b.dweight};
}

#ifdef USE_CUDA

std::tuple<Tensor, Tensor, Tensor> fwd_cuda(Tensor x, OptionalTensor residual, Tensor weight, double eps) {
  const CudaScope scope(x);
  auto f = prepare_fwd(x, residual, weight, eps);
  check(cuda::rms_norm_fwd(f.args, scope.stream), "rms_norm_fwd");
  return {f.y, f.h, f.rstd};
}

std::tuple<Tensor, Tensor> bwd_cuda(Tensor dy, OptionalTensor dh, Tensor h, Tensor weight, Tensor rstd,
                                    bool need_dx, bool need_dweight) {
  const CudaScope scope(h);
  auto b = prepare_bwd(dy, dh, h, weight, rstd, need_dx, need_dweight, cuda::rms_norm_bwd_blocks);
  check(cuda::rms_norm_bwd(b.args, scope.stream), "rms_norm_bwd");
  return {b.dx, b.dweight};
}

#endif

}  // namespace
}  // namespace openllama

STABLE_TORCH_LIBRARY_FRAGMENT(openllama, m) {
  m.def(
      "rms_norm_fwd(Tensor x, Tensor? residual, Tensor weight, float eps)"
      " -> (Tensor y, Tensor h, Tensor rstd)");
  m.def(
      "rms_norm_bwd(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor rstd, bool need_dx,"
      " bool need_dweight) -> (Tensor dx, Tensor dweight)");
}

STABLE_TORCH_LIBRARY_IMPL(openllama, CPU, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&openllama::fwd_cpu));
  m.impl("rms_norm_bwd", TORCH_BOX(&openllama::bwd_cpu));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(openllama, CUDA, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&openllama::fwd_cuda));
  m.impl("rms_norm_bwd", TORCH_BOX(&openllama::bwd_cuda));
}
#endif
