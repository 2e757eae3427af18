// cross_entropy: binding of its CPU kernels.
#include <atomic>

#include "common.h"

namespace openllama {
namespace {

CrossEntropy arguments(const Tensor& logits, const Tensor& labels, int64_t ignore_index) {
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  check_like(logits, "logits", logits);
  check_flat(labels, "labels", rows, ScalarType::Long, logits);
  CrossEntropy args{};
  args.logits = logits.const_data_ptr();
  args.labels = static_cast<const int64_t*>(labels.const_data_ptr());
  args.rows = rows;
  args.vocab = vocab;
  args.logits_stride = logits.stride(0);
  args.ignore_index = ignore_index;
  args.dtype = cpu_dtype_of(logits);
  return args;
}

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

std::tuple<Tensor, Tensor> fwd_cpu(Tensor logits, Tensor labels, int64_t ignore_index) {
  CrossEntropy args = arguments(logits, labels, ignore_index);
  Tensor loss = new_f32(logits, {args.rows}), lse = new_f32(logits, {args.rows, 2});
  args.loss = mutable_floats(loss);
  args.lse = mutable_floats(lse);
  for_labels(args, [&](int64_t begin, int64_t end) { return CPU_CALL(cross_entropy_fwd, args, begin, end); });
  return {loss, lse};
}

void run_bwd(const Tensor& dloss, const Tensor& logits, const Tensor& labels, const Tensor& lse,
             int64_t ignore_index, const Tensor& dlogits) {
  CrossEntropy args = arguments(logits, labels, ignore_index);
  check_flat(dloss, "dloss", args.rows, ScalarType::Float, logits);
  check_flat(lse, "lse", 2 * args.rows, ScalarType::Float, logits);
  args.lse = mutable_floats(lse);
  args.dloss = floats(dloss);
  args.dlogits = dlogits.mutable_data_ptr();
  args.dlogits_stride = dlogits.stride(0);
  for_labels(args, [&](int64_t begin, int64_t end) { return CPU_CALL(cross_entropy_bwd, args, begin, end); });
}

Tensor bwd_cpu(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, int64_t ignore_index) {
  Tensor dlogits = new_like(logits, {logits.size(0), logits.size(1)});
  run_bwd(dloss, logits, labels, lse, ignore_index, dlogits);
  return dlogits;
}

void bwd_inplace_cpu(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, int64_t ignore_index) {
  run_bwd(dloss, logits, labels, lse, ignore_index, logits);
}

}  // namespace
}  // namespace openllama

STABLE_TORCH_LIBRARY_FRAGMENT(openllama, m) {
  m.def("cross_entropy_fwd(Tensor logits, Tensor labels, int ignore_index) -> (Tensor loss, Tensor lse)");
  m.def(
      "cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, int ignore_index)"
      " -> Tensor dlogits");
  m.def(
      "cross_entropy_bwd_(Tensor dloss, Tensor(a!) logits, Tensor labels, Tensor lse, int ignore_index)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(openllama, CPU, m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&openllama::fwd_cpu));
  m.impl("cross_entropy_bwd", TORCH_BOX(&openllama::bwd_cpu));
  m.impl("cross_entropy_bwd_", TORCH_BOX(&openllama::bwd_inplace_cpu));
}
