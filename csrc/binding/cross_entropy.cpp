// cross_entropy: binding of its CPU and CUDA kernels.
#include <atomic>

#include "common.h"

namespace openllama {
namespace {

// What every one of the ops takes beside its tensors.
struct Options {
  int64_t ignore_index;
  double softcap, z_loss;
};

CrossEntropy arguments(const Tensor& logits, const Tensor& labels, const Options& options) {
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  check_like(logits, "logits", logits);
  check_flat(labels, "labels", rows, ScalarType::Long, logits);
  CrossEntropy args{};
  args.logits = logits.const_data_ptr();
  args.labels = static_cast<const int64_t*>(labels.const_data_ptr());
  args.rows = rows;
  args.vocab = vocab;
  args.logits_stride = logits.stride(0);
  args.ignore_index = options.ignore_index;
  args.softcap = static_cast<float>(options.softcap);
  args.z_loss = static_cast<float>(options.z_loss);
  args.dtype = dtype_of(logits);
  return args;
}

struct Forward {
  Tensor loss, lse;
  CrossEntropy args;
};

Forward prepare_fwd(const Tensor& logits, const Tensor& labels, const Options& options) {
  Forward f{new_f32(logits, {logits.size(0)}), new_f32(logits, {logits.size(0), 2}),
            arguments(logits, labels, options)};
  f.args.loss = mutable_floats(f.loss);
  f.args.lse = mutable_floats(f.lse);
  return f;
}

CrossEntropy prepare_bwd(const OptionalTensor& dloss, const Tensor& logits, const Tensor& labels,
                         const Tensor& lse, const Options& options, const Tensor& dlogits) {
  CrossEntropy args = arguments(logits, labels, options);
  if (dloss) check_flat(*dloss, "dloss", args.rows, ScalarType::Float, logits);
  check_flat(lse, "lse", 2 * args.rows, ScalarType::Float, logits);
  args.lse = mutable_floats(lse);
  args.dloss = dloss ? floats(*dloss) : nullptr;
  args.dlogits = dlogits.mutable_data_ptr();
  args.dlogits_stride = dlogits.stride(0);
  return args;
}

// ---------------------------------------------------------------- CPU

// Runs body(begin, end) -> bad row or -1 over the rows, and names a row whose label is impossible.
template <class F>
void for_labels(const CrossEntropy& args, const F& body) {
  std::atomic<int64_t> bad{-1};
  for_rows(args.rows, args.vocab * 4, [&](int64_t begin, int64_t end) {
    const int64_t first = body(begin, end);
    if (first >= 0) bad = first;
  });
  const int64_t row = bad;
  require(row < 0, "cross_entropy: labels[", row, "] is ", row < 0 ? 0 : args.labels[row],
          ", takes an id below the vocabulary's ", args.vocab, " or ignore_index=", args.ignore_index);
}

void run_fwd_cpu(const CrossEntropy& args) {
  for_labels(args, [&](int64_t begin, int64_t end) { return CPU_CALL(cross_entropy_fwd, args, begin, end); });
}

void run_bwd_cpu(const CrossEntropy& args) {
  for_labels(args, [&](int64_t begin, int64_t end) { return CPU_CALL(cross_entropy_bwd, args, begin, end); });
}

std::tuple<Tensor, Tensor> fwd_cpu(Tensor logits, Tensor labels, int64_t ignore_index, double softcap,
                                   double z_loss) {
  cpu_dtype_of(logits);
  auto f = prepare_fwd(logits, labels, {ignore_index, softcap, z_loss});
  run_fwd_cpu(f.args);
  return {f.loss, f.lse};
}

Tensor bwd_cpu(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, int64_t ignore_index, double softcap,
               double z_loss) {
  cpu_dtype_of(logits);
  Tensor dlogits = new_like(logits, {logits.size(0), logits.size(1)});
  run_bwd_cpu(prepare_bwd(dloss, logits, labels, lse, {ignore_index, softcap, z_loss}, dlogits));
  return dlogits;
}

void bwd_inplace_cpu(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, int64_t ignore_index,
                     double softcap, double z_loss) {
  cpu_dtype_of(logits);
  run_bwd_cpu(prepare_bwd(dloss, logits, labels, lse, {ignore_index, softcap, z_loss}, logits));
}

Tensor fwd_bwd_inplace_cpu(Tensor logits, Tensor labels, OptionalTensor dloss, int64_t ignore_index,
                           double softcap, double z_loss) {
  cpu_dtype_of(logits);
  const Options options{ignore_index, softcap, z_loss};
  auto f = prepare_fwd(logits, labels, options);
  const auto bwd = prepare_bwd(dloss, logits, labels, f.lse, options, logits);
  run_fwd_cpu(f.args);  // finds an impossible label before anything is written
  run_bwd_cpu(bwd);
  return f.loss;
}

// ---------------------------------------------------------------- CUDA

#ifdef USE_CUDA

std::tuple<Tensor, Tensor> fwd_cuda(Tensor logits, Tensor labels, int64_t ignore_index, double softcap,
                                    double z_loss) {
  const CudaScope scope(logits);
  auto f = prepare_fwd(logits, labels, {ignore_index, softcap, z_loss});
  check(cuda::cross_entropy_fwd(f.args, scope.stream), "cross_entropy_fwd");
  return {f.loss, f.lse};
}

Tensor bwd_cuda(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, int64_t ignore_index, double softcap,
                double z_loss) {
  const CudaScope scope(logits);
  Tensor dlogits = new_like(logits, {logits.size(0), logits.size(1)});
  check(cuda::cross_entropy_bwd(
            prepare_bwd(dloss, logits, labels, lse, {ignore_index, softcap, z_loss}, dlogits), scope.stream),
        "cross_entropy_bwd");
  return dlogits;
}

void bwd_inplace_cuda(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, int64_t ignore_index,
                      double softcap, double z_loss) {
  const CudaScope scope(logits);
  check(cuda::cross_entropy_bwd(
            prepare_bwd(dloss, logits, labels, lse, {ignore_index, softcap, z_loss}, logits), scope.stream),
        "cross_entropy_bwd_");
}

Tensor fwd_bwd_inplace_cuda(Tensor logits, Tensor labels, OptionalTensor dloss, int64_t ignore_index,
                            double softcap, double z_loss) {
  const CudaScope scope(logits);
  const Options options{ignore_index, softcap, z_loss};
  auto f = prepare_fwd(logits, labels, options);
  CrossEntropy args = prepare_bwd(dloss, logits, labels, f.lse, options, logits);
  args.loss = f.args.loss;
  check(cuda::cross_entropy_fwd_bwd(args, scope.stream), "cross_entropy_fwd_bwd_");
  return f.loss;
}

#endif

}  // namespace
}  // namespace openllama

STABLE_TORCH_LIBRARY_FRAGMENT(openllama, m) {
  m.def(
      "cross_entropy_fwd(Tensor logits, Tensor labels, int ignore_index, float softcap, float z_loss)"
      " -> (Tensor loss, Tensor lse)");
  m.def(
      "cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, int ignore_index,"
      " float softcap, float z_loss) -> Tensor dlogits");
  m.def(
      "cross_entropy_bwd_(Tensor dloss, Tensor(a!) logits, Tensor labels, Tensor lse, int ignore_index,"
      " float softcap, float z_loss) -> ()");
  m.def(
      "cross_entropy_fwd_bwd_(Tensor(a!) logits, Tensor labels, Tensor? dloss, int ignore_index,"
      " float softcap, float z_loss) -> Tensor loss");
}

STABLE_TORCH_LIBRARY_IMPL(openllama, CPU, m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&openllama::fwd_cpu));
  m.impl("cross_entropy_bwd", TORCH_BOX(&openllama::bwd_cpu));
  m.impl("cross_entropy_bwd_", TORCH_BOX(&openllama::bwd_inplace_cpu));
  m.impl("cross_entropy_fwd_bwd_", TORCH_BOX(&openllama::fwd_bwd_inplace_cpu));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(openllama, CUDA, m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&openllama::fwd_cuda));
  m.impl("cross_entropy_bwd", TORCH_BOX(&openllama::bwd_cuda));
  m.impl("cross_entropy_bwd_", TORCH_BOX(&openllama::bwd_inplace_cuda));
  m.impl("cross_entropy_fwd_bwd_", TORCH_BOX(&openllama::fwd_bwd_inplace_cuda));
}
#endif
