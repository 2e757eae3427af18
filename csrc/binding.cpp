// The op library `openllama`, on torch's stable ABI: one binary for every torch from 2.11 on.
//
// Schemas, allocation of outputs, and dispatch to the CPU and CUDA kernels. Arguments are checked with good
// messages in Python (kernels/<op>.py); the checks here only keep a direct call of a raw op from touching
// memory it must not.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "ops.h"

#ifdef USE_CUDA
#include <cuda_runtime_api.h>
// Weak: a CPU build of torch has no such symbol, and this library loads there all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);
#endif

namespace openllama {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---------------------------------------------------------------- arguments

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, "openllama: takes float32, bfloat16 or float16");
  }
}

Dtype cpu_dtype_of(const Tensor& t) {
  const Dtype dtype = dtype_of(t);
  STD_TORCH_CHECK(dtype != Dtype::f16, "openllama: the CPU kernels take float32 or bfloat16");
  return dtype;
}

void check_rows(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(
      t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && (t.stride(1) == 1 || columns <= 1),
      "openllama: ", name, " must be (", rows, ", ", columns, ") with contiguous rows");
}

void check_flat(const Tensor& t, const char* name, int64_t size, ScalarType dtype) {
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == size && t.scalar_type() == dtype, "openllama: ", name,
                  " must hold ", size, " contiguous elements of the right dtype");
}

void check_like(const Tensor& t, const char* name, const Tensor& x) {
  check_rows(t, name, x.size(0), x.size(1));
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.get_device_index() == x.get_device_index(),
                  "openllama: ", name, " must have the dtype and device of its partner");
}

const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }
int64_t row_stride(const OptionalTensor& t) { return t ? t->stride(0) : 0; }

Tensor new_f32(const Tensor& like, std::vector<int64_t> size) {
  return torch::stable::new_empty(like, size, ScalarType::Float);
}
Tensor new_like(const Tensor& like, std::vector<int64_t> size) {
  return torch::stable::new_empty(like, size);
}

// Rows of at least this many bytes a thread, so that small inputs are not split for nothing.
constexpr int64_t kGrainBytes = 32 * 1024;

template <class F>
void for_rows(int64_t rows, int64_t row_bytes, const F& body) {
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row_bytes));
  torch::stable::parallel_for(0, rows, grain, body);
}

// ---------------------------------------------------------------- rms_norm

struct NormForward {
  Tensor y, h, rstd;
  RmsNormFwd args;
};

NormForward prepare_rms_norm_fwd(const Tensor& x, const OptionalTensor& residual, const Tensor& weight,
                                 double eps) {
  const int64_t rows = x.size(0), hidden = x.size(1);
  check_rows(x, "x", rows, hidden);
  if (residual) check_like(*residual, "residual", x);
  check_flat(weight, "weight", hidden, weight.scalar_type());
  NormForward f{new_like(x, {rows, hidden}),
                new_like(x, {residual ? rows : 0, residual ? hidden : 0}),
                new_f32(x, {rows}),
                {}};
  f.args = {x.const_data_ptr(),
            data(residual),
            weight.const_data_ptr(),
            f.y.mutable_data_ptr(),
            residual ? f.h.mutable_data_ptr() : nullptr,
            static_cast<float*>(f.rstd.mutable_data_ptr()),
            rows,
            hidden,
            x.stride(0),
            row_stride(residual),
            static_cast<float>(eps),
            dtype_of(x),
            dtype_of(weight)};
  return f;
}

struct NormBackward {
  Tensor dx, dweight, blocks;
  RmsNormBwd args;
};

NormBackward prepare_rms_norm_bwd(const Tensor& dy, const OptionalTensor& dh, const Tensor& h,
                                  const Tensor& weight, const Tensor& rstd, bool need_dx, bool need_dweight,
                                  int64_t blocks) {
  const int64_t rows = h.size(0), hidden = h.size(1);
  check_rows(h, "h", rows, hidden);
  check_like(dy, "dy", h);
  if (dh) check_like(*dh, "dh", h);
  check_flat(weight, "weight", hidden, weight.scalar_type());
  check_flat(rstd, "rstd", rows, ScalarType::Float);
  NormBackward b{new_like(h, {need_dx ? rows : 0, need_dx ? hidden : 0}),
                 new_f32(h, {need_dweight ? hidden : 0}),
                 new_f32(h, {need_dweight ? blocks : 0, hidden}),
                 {}};
  b.args = {dy.const_data_ptr(),
            data(dh),
            h.const_data_ptr(),
            weight.const_data_ptr(),
            static_cast<const float*>(rstd.const_data_ptr()),
            need_dx ? b.dx.mutable_data_ptr() : nullptr,
            need_dweight ? static_cast<float*>(b.blocks.mutable_data_ptr()) : nullptr,
            need_dweight ? static_cast<float*>(b.dweight.mutable_data_ptr()) : nullptr,
            rows,
            hidden,
            dy.stride(0),
            row_stride(dh),
            h.stride(0),
            blocks,
            dtype_of(h),
            dtype_of(weight)};
  return b;
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_fwd_cpu(Tensor x, OptionalTensor residual, Tensor weight,
                                                    double eps) {
  cpu_dtype_of(x), cpu_dtype_of(weight);
  auto f = prepare_rms_norm_fwd(x, residual, weight, eps);
  for_rows(f.args.rows, f.args.hidden * 8,
           [&](int64_t begin, int64_t end) { CPU_CALL(rms_norm_fwd, f.args, begin, end); });
  return {f.y, f.h, f.rstd};
}

std::tuple<Tensor, Tensor> rms_norm_bwd_cpu(Tensor dy, OptionalTensor dh, Tensor h, Tensor weight,
                                            Tensor rstd, bool need_dx, bool need_dweight) {
  cpu_dtype_of(h), cpu_dtype_of(weight);
  const int64_t blocks = std::clamp<int64_t>(h.size(0) / 16, 1, 64);
  auto b = prepare_rms_norm_bwd(dy, dh, h, weight, rstd, need_dx, need_dweight, blocks);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) CPU_CALL(rms_norm_bwd, b.args, block);
  });
  if (need_dweight)
    for_rows(b.args.hidden, blocks * 4,
             [&](int64_t begin, int64_t end) { CPU_CALL(rms_norm_bwd_reduce, b.args, begin, end); });
  return {b.dx, b.dweight};
}

// ---------------------------------------------------------------- rotary

Rotary rotary_args(const Tensor& x, const Tensor& out, const Tensor& cos, const Tensor& sin,
                   const Tensor& positions, int64_t rotated, bool inverse) {
  STD_TORCH_CHECK(x.dim() == 3 && x.stride(2) == 1 && x.stride(1) == x.size(2),
                  "openllama: x must be (tokens, heads, head_dim) with contiguous tokens");
  const int64_t tokens = x.size(0), heads = x.size(1), head_dim = x.size(2), table_rows = cos.size(0);
  STD_TORCH_CHECK(head_dim % 2 == 0 && rotated >= 0 && rotated <= heads,
                  "openllama: head_dim must be even and rotated at most heads");
  check_flat(cos, "cos", table_rows * head_dim / 2, ScalarType::Float);
  check_flat(sin, "sin", table_rows * head_dim / 2, ScalarType::Float);
  check_flat(positions, "positions", tokens, ScalarType::Int);
  return {x.const_data_ptr(),
          out.mutable_data_ptr(),
          static_cast<const float*>(cos.const_data_ptr()),
          static_cast<const float*>(sin.const_data_ptr()),
          static_cast<const int32_t*>(positions.const_data_ptr()),
          tokens,
          heads,
          head_dim,
          rotated,
          x.stride(0),
          out.stride(0),
          table_rows,
          inverse,
          cpu_dtype_of(x)};
}

void run_rotary(const Rotary& args) {
  for (int64_t i = 0; i < args.tokens; ++i)  // first, or an in-place call would stop half-way
    STD_TORCH_CHECK(args.positions[i] >= 0 && args.positions[i] < args.table_rows, "rotary: positions[", i,
                    "] is ", args.positions[i], ", outside the table's ", args.table_rows,
                    " rows; raise max_positions or shorten the input");
  for_rows(args.tokens, args.heads * args.head_dim * 4,
           [&](int64_t begin, int64_t end) { CPU_CALL(rotary, args, begin, end); });
}

Tensor rotary_cpu(Tensor x, Tensor cos, Tensor sin, Tensor positions, int64_t rotated, bool inverse) {
  Tensor out = new_like(x, {x.size(0), x.size(1), x.size(2)});
  run_rotary(rotary_args(x, out, cos, sin, positions, rotated, inverse));
  return out;
}

void rotary_inplace_cpu(Tensor x, Tensor cos, Tensor sin, Tensor positions, int64_t rotated, bool inverse) {
  run_rotary(rotary_args(x, x, cos, sin, positions, rotated, inverse));
}

// ---------------------------------------------------------------- swiglu

Tensor swiglu_fwd_cpu(Tensor gate_up) {
  const int64_t rows = gate_up.size(0), intermediate = gate_up.size(1) / 2;
  check_rows(gate_up, "gate_up", rows, 2 * intermediate);
  Tensor act = new_like(gate_up, {rows, intermediate});
  const Swiglu args{gate_up.const_data_ptr(), nullptr, act.mutable_data_ptr(), rows, intermediate,
                    gate_up.stride(0),        0,       cpu_dtype_of(gate_up)};
  for_rows(rows, intermediate * 12,
           [&](int64_t begin, int64_t end) { CPU_CALL(swiglu_fwd, args, begin, end); });
  return act;
}

Tensor swiglu_bwd_cpu(Tensor dact, Tensor gate_up) {
  const int64_t rows = gate_up.size(0), intermediate = gate_up.size(1) / 2;
  check_rows(gate_up, "gate_up", rows, 2 * intermediate);
  check_rows(dact, "dact", rows, intermediate);
  STD_TORCH_CHECK(dact.scalar_type() == gate_up.scalar_type(), "openllama: dact must have gate_up's dtype");
  Tensor dgate_up = new_like(gate_up, {rows, 2 * intermediate});
  const Swiglu args{
      gate_up.const_data_ptr(), dact.const_data_ptr(), dgate_up.mutable_data_ptr(), rows, intermediate,
      gate_up.stride(0),        dact.stride(0),        cpu_dtype_of(gate_up)};
  for_rows(rows, intermediate * 20,
           [&](int64_t begin, int64_t end) { CPU_CALL(swiglu_bwd, args, begin, end); });
  return dgate_up;
}

// ---------------------------------------------------------------- cross_entropy

CrossEntropy cross_entropy_args(const Tensor& logits, const Tensor& labels, int64_t ignore_index) {
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  check_rows(logits, "logits", rows, vocab);
  check_flat(labels, "labels", rows, ScalarType::Long);
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
  STD_TORCH_CHECK(row < 0, "cross_entropy: labels[", row, "] is ", row < 0 ? 0 : args.labels[row],
                  ", takes an id below the vocabulary's ", args.vocab,
                  " or ignore_index=", args.ignore_index);
}

std::tuple<Tensor, Tensor> cross_entropy_fwd_cpu(Tensor logits, Tensor labels, int64_t ignore_index) {
  CrossEntropy args = cross_entropy_args(logits, labels, ignore_index);
  Tensor loss = new_f32(logits, {args.rows}), lse = new_f32(logits, {args.rows, 2});
  args.loss = static_cast<float*>(loss.mutable_data_ptr());
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  for_labels(args, [&](int64_t begin, int64_t end) { return CPU_CALL(cross_entropy_fwd, args, begin, end); });
  return {loss, lse};
}

void run_cross_entropy_bwd(const Tensor& dloss, const Tensor& logits, const Tensor& labels, const Tensor& lse,
                           int64_t ignore_index, const Tensor& dlogits) {
  CrossEntropy args = cross_entropy_args(logits, labels, ignore_index);
  check_flat(dloss, "dloss", args.rows, ScalarType::Float);
  check_flat(lse, "lse", 2 * args.rows, ScalarType::Float);
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  args.dloss = static_cast<const float*>(dloss.const_data_ptr());
  args.dlogits = dlogits.mutable_data_ptr();
  args.dlogits_stride = dlogits.stride(0);
  for_labels(args, [&](int64_t begin, int64_t end) { return CPU_CALL(cross_entropy_bwd, args, begin, end); });
}

Tensor cross_entropy_bwd_cpu(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, int64_t ignore_index) {
  Tensor dlogits = new_like(logits, {logits.size(0), logits.size(1)});
  run_cross_entropy_bwd(dloss, logits, labels, lse, ignore_index, dlogits);
  return dlogits;
}

void cross_entropy_bwd_inplace_cpu(Tensor dloss, Tensor logits, Tensor labels, Tensor lse,
                                   int64_t ignore_index) {
  run_cross_entropy_bwd(dloss, logits, labels, lse, ignore_index, logits);
}

// ---------------------------------------------------------------- adamw

constexpr int64_t kAdamWBlock = 16 * 1024;  // elements: 256 KB of fp32 state, half of an L2 slice

struct AdamWBlock {
  size_t tensor;
  int64_t begin, end;
};

using Tensors = torch::headeronly::HeaderOnlyArrayRef<Tensor>;

void check_state(const Tensor& t, const char* name, const Tensor& param) {
  check_flat(t, name, param.numel(), ScalarType::Float);
  STD_TORCH_CHECK(std::ranges::equal(t.sizes(), param.sizes()), "openllama: ", name,
                  " must have its param's shape");
}

// Everything is checked before the kernel writes anything.
std::vector<AdamWTensor> adamw_tensors(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
                                       const Tensors& exp_avg_sqs, const Tensors& masters) {
  const size_t count = params.size();
  const bool needs_masters = count && params[0].scalar_type() != ScalarType::Float;
  STD_TORCH_CHECK(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count &&
                      masters.size() == (needs_masters ? count : 0),
                  "openllama: adamw takes lists of one length, and masters for params that are not float32");
  std::vector<AdamWTensor> list;
  for (size_t i = 0; i < count; ++i) {
    const int64_t size = params[i].numel();
    check_flat(params[i], "param", size, params[0].scalar_type());
    check_flat(grads[i], "grad", size, grads[i].scalar_type());
    STD_TORCH_CHECK(std::ranges::equal(grads[i].sizes(), params[i].sizes()),
                    "openllama: grad must have its param's shape");
    check_state(exp_avgs[i], "exp_avg", params[i]);
    check_state(exp_avg_sqs[i], "exp_avg_sq", params[i]);
    if (needs_masters) check_state(masters[i], "master", params[i]);
    list.push_back({params[i].mutable_data_ptr(), grads[i].const_data_ptr(),
                    static_cast<float*>(exp_avgs[i].mutable_data_ptr()),
                    static_cast<float*>(exp_avg_sqs[i].mutable_data_ptr()),
                    needs_masters ? static_cast<float*>(masters[i].mutable_data_ptr()) : nullptr, size,
                    cpu_dtype_of(params[i]), cpu_dtype_of(grads[i])});
  }
  return list;
}

void adamw_cpu(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors masters,
               double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step,
               double grad_scale) {
  const auto list = adamw_tensors(params, grads, exp_avgs, exp_avg_sqs, masters);
  const AdamWStep s{float(beta2),
                    float(eps),
                    float(grad_scale),
                    float(1 - lr * weight_decay),
                    float(1 - beta1),
                    float(1 - beta2),
                    float(lr / (1 - std::pow(beta1, double(step)))),
                    float(1 / std::sqrt(1 - std::pow(beta2, double(step))))};
  std::vector<AdamWBlock> blocks;
  for (size_t i = 0; i < list.size(); ++i)
    for (int64_t begin = 0; begin < list[i].size; begin += kAdamWBlock)
      blocks.push_back({i, begin, std::min(list[i].size, begin + kAdamWBlock)});
  torch::stable::parallel_for(0, int64_t(blocks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      CPU_CALL(adamw, list[blocks[i].tensor], s, blocks[i].begin, blocks[i].end);
  });
}

// ---------------------------------------------------------------- CUDA

#ifdef USE_CUDA

void check(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, "openllama: ", op, ": ", cudaGetErrorName(error), ": ",
                  cudaGetErrorString(error));
}

// Sets the tensor's device for the scope and finds torch's current stream on it.
struct CudaScope {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;

  explicit CudaScope(const Tensor& t) : guard(t.get_device_index()) {
    STD_TORCH_CHECK(
        aoti_torch_get_current_cuda_stream != nullptr,
        "openllama: torch's current-stream symbol is missing; rebuild the library against this torch");
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

std::tuple<Tensor, Tensor, Tensor> rms_norm_fwd_cuda(Tensor x, OptionalTensor residual, Tensor weight,
                                                     double eps) {
  const CudaScope scope(x);
  auto f = prepare_rms_norm_fwd(x, residual, weight, eps);
  check(cuda::rms_norm_fwd(f.args, scope.stream), "rms_norm_fwd");
  return {f.y, f.h, f.rstd};
}

std::tuple<Tensor, Tensor> rms_norm_bwd_cuda(Tensor dy, OptionalTensor dh, Tensor h, Tensor weight,
                                             Tensor rstd, bool need_dx, bool need_dweight) {
  const CudaScope scope(h);
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, h.get_device_index()),
        "rms_norm_bwd");
  const int64_t blocks = std::clamp<int64_t>(h.size(0), 1, 2 * processors);
  auto b = prepare_rms_norm_bwd(dy, dh, h, weight, rstd, need_dx, need_dweight, blocks);
  check(cuda::rms_norm_bwd(b.args, scope.stream), "rms_norm_bwd");
  return {b.dx, b.dweight};
}

void hopper_probe_cuda(Tensor out) {
  const CudaScope scope(out);
  check_flat(out, "out", 1, ScalarType::Int);
  check(cuda::hopper_probe(static_cast<int32_t*>(out.mutable_data_ptr()), scope.stream), "hopper_probe");
}

#endif

// What this binary was built with, and what it found here, as JSON for `openllama info`.
std::string build_info() {
  std::string info = "{\"torch_target\": \"2.11\"";
#ifdef __x86_64__
  const char* names[] = {"base", "avx2", "avx512"};
  info += std::string(", \"cpu\": \"") + names[int(cpu::level())] + "\"";
#else
  info += ", \"cpu\": \"base\"";
#endif
#ifdef USE_CUDA
  info += ", \"cuda\": " + std::to_string(CUDART_VERSION) + ", \"arches\": \"" OPENLLAMA_ARCHES "\"";
  info += std::string(", \"stream_symbol\": ") + (aoti_torch_get_current_cuda_stream ? "true" : "false");
#else
  info += ", \"cuda\": 0, \"arches\": \"\", \"stream_symbol\": false";
#endif
  return info + "}";
}

}  // namespace
}  // namespace openllama

using namespace openllama;

STABLE_TORCH_LIBRARY(openllama, m) {
  m.def("build_info() -> str");
  m.def(
      "rms_norm_fwd(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor y, Tensor h, Tensor "
      "rstd)");
  m.def(
      "rms_norm_bwd(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor rstd, bool need_dx, bool "
      "need_dweight) "
      "-> (Tensor dx, Tensor dweight)");
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, Tensor positions, int rotated, bool inverse) -> Tensor");
  m.def("rotary_(Tensor(a!) x, Tensor cos, Tensor sin, Tensor positions, int rotated, bool inverse) -> ()");
  m.def("swiglu_fwd(Tensor gate_up) -> Tensor");
  m.def("swiglu_bwd(Tensor dact, Tensor gate_up) -> Tensor");
  m.def("cross_entropy_fwd(Tensor logits, Tensor labels, int ignore_index) -> (Tensor loss, Tensor lse)");
  m.def(
      "cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, int ignore_index) -> Tensor "
      "dlogits");
  m.def(
      "cross_entropy_bwd_(Tensor dloss, Tensor(a!) logits, Tensor labels, Tensor lse, int ignore_index) -> "
      "()");
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] masters, float lr, float beta1, float beta2, float eps, float weight_decay, int step, "
      "float grad_scale) -> ()");
  m.def("hopper_probe(Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(openllama, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}

STABLE_TORCH_LIBRARY_IMPL(openllama, CPU, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd_cpu));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd_cpu));
  m.impl("rotary", TORCH_BOX(&rotary_cpu));
  m.impl("rotary_", TORCH_BOX(&rotary_inplace_cpu));
  m.impl("swiglu_fwd", TORCH_BOX(&swiglu_fwd_cpu));
  m.impl("swiglu_bwd", TORCH_BOX(&swiglu_bwd_cpu));
  m.impl("cross_entropy_fwd", TORCH_BOX(&cross_entropy_fwd_cpu));
  m.impl("cross_entropy_bwd", TORCH_BOX(&cross_entropy_bwd_cpu));
  m.impl("cross_entropy_bwd_", TORCH_BOX(&cross_entropy_bwd_inplace_cpu));
  m.impl("adamw_", TORCH_BOX(&adamw_cpu));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(openllama, CUDA, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd_cuda));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd_cuda));
  m.impl("hopper_probe", TORCH_BOX(&hopper_probe_cuda));
}
#endif
