// rotary: binding of its CPU and CUDA kernels.
#include "common.h"

namespace openllama {
namespace {

Rotary arguments(const Tensor& x, const Tensor& out, const Tensor& cos, const Tensor& sin,
                 const OptionalTensor& positions, int64_t offset, int64_t rotated, bool interleaved,
                 bool inverse) {
  require(x.dim() == 3 && ((x.stride(2) == 1 && x.stride(1) == x.size(2)) || x.size(0) == 0),
          "openllama: x must be (tokens, heads, head_dim) with contiguous tokens");
  require(cos.dim() == 2, "openllama: cos must be (positions, rotary_dim / 2)");
  const int64_t tokens = x.size(0), heads = x.size(1), head_dim = x.size(2);
  const int64_t table_rows = cos.size(0), rotary_dim = 2 * cos.size(1);
  require(rotary_dim <= head_dim && rotated >= 0 && rotated <= heads,
          "openllama: rotary_dim must be at most head_dim, and rotated at most heads");
  check_flat(cos, "cos", table_rows * rotary_dim / 2, ScalarType::Float, x);
  check_flat(sin, "sin", table_rows * rotary_dim / 2, ScalarType::Float, x);
  if (positions) check_flat(*positions, "positions", tokens, ScalarType::Int, x);
  return {x.const_data_ptr(),
          out.mutable_data_ptr(),
          floats(cos),
          floats(sin),
          static_cast<const int32_t*>(data(positions)),
          offset,
          tokens,
          heads,
          head_dim,
          rotary_dim,
          rotated,
          x.stride(0),
          out.stride(0),
          table_rows,
          interleaved,
          inverse,
          dtype_of(x)};
}

void run_cpu(const Rotary& a) {
  const auto position = [&](int64_t i) { return (a.positions ? a.positions[i] : i) + a.offset; };
  for (int64_t i = 0; i < a.tokens; ++i)  // first, or an in-place call would stop half-way
    require(position(i) >= 0 && position(i) < a.table_rows, "rotary: positions[", i, "] is ", position(i),
            ", outside the table's ", a.table_rows, " rows; raise max_positions or shorten the input");
  for_rows(a.tokens, a.heads * a.head_dim * 4,
           [&](int64_t begin, int64_t end) { CPU_CALL(rotary, a, begin, end); });
}

Tensor rotary_cpu(Tensor x, Tensor cos, Tensor sin, OptionalTensor positions, int64_t offset, int64_t rotated,
                  bool interleaved, bool inverse) {
  cpu_dtype_of(x);
  Tensor out = new_like(x, {x.size(0), x.size(1), x.size(2)});
  run_cpu(arguments(x, out, cos, sin, positions, offset, rotated, interleaved, inverse));
  return out;
}

void inplace_cpu(Tensor x, Tensor cos, Tensor sin, OptionalTensor positions, int64_t offset, int64_t rotated,
                 bool interleaved, bool inverse) {
  cpu_dtype_of(x);
  run_cpu(arguments(x, x, cos, sin, positions, offset, rotated, interleaved, inverse));
}

struct Parts {
  Tensor q, k, v;
};

// (tokens, heads of q, k and v, head_dim), for q, k and v to be packed into.
Tensor packed(const Parts& p) {
  for (const Tensor* t : {&p.q, &p.k, &p.v}) {
    require(t->dim() == 3 && t->size(0) == p.q.size(0) && t->size(2) == p.q.size(2) &&
                ((t->stride(2) == 1 && t->stride(1) == t->size(2)) || t->size(0) == 0) &&
                t->scalar_type() == p.q.scalar_type(),
            "openllama: q, k and v must be (tokens, heads, head_dim) of one dtype with contiguous tokens");
    check_device(*t, "q, k and v", p.q);
  }
  return new_like(p.q, {p.q.size(0), p.q.size(1) + p.k.size(1) + p.v.size(1), p.q.size(2)});
}

Tensor pack_cpu(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor positions, bool inverse) {
  cpu_dtype_of(q);
  Tensor out = packed({q, k, v});
  int64_t head = 0;
  for (const Tensor* t : {&q, &k, &v}) {
    Tensor to = torch::stable::narrow(out, 1, head, t->size(1));
    run_cpu(arguments(*t, to, cos, sin, positions, 0, t == &v ? 0 : t->size(1), false, inverse));
    head += t->size(1);
  }
  return out;
}

#ifdef USE_CUDA

Tensor rotary_cuda(Tensor x, Tensor cos, Tensor sin, OptionalTensor positions, int64_t offset,
                   int64_t rotated, bool interleaved, bool inverse) {
  const CudaScope scope(x);
  Tensor out = new_like(x, {x.size(0), x.size(1), x.size(2)});
  check(cuda::rotary(arguments(x, out, cos, sin, positions, offset, rotated, interleaved, inverse),
                     scope.stream),
        "rotary");
  return out;
}

void inplace_cuda(Tensor x, Tensor cos, Tensor sin, OptionalTensor positions, int64_t offset, int64_t rotated,
                  bool interleaved, bool inverse) {
  const CudaScope scope(x);
  check(
      cuda::rotary(arguments(x, x, cos, sin, positions, offset, rotated, interleaved, inverse), scope.stream),
      "rotary_");
}

Tensor pack_cuda(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor positions, bool inverse) {
  const CudaScope scope(q);
  Tensor out = packed({q, k, v});
  Rotary args = arguments(q, out, cos, sin, positions, 0, q.size(1), false, inverse);
  args.heads = out.size(1), args.rotated = q.size(1) + k.size(1), args.q_heads = q.size(1);
  args.k = k.const_data_ptr(), args.k_stride = k.stride(0);
  args.v = v.const_data_ptr(), args.v_stride = v.stride(0);
  check(cuda::rotary(args, scope.stream), "rotary_pack");
  return out;
}

#endif

}  // namespace
}  // namespace openllama

STABLE_TORCH_LIBRARY_FRAGMENT(openllama, m) {
  m.def(
      "rotary(Tensor x, Tensor cos, Tensor sin, Tensor? positions, int offset, int rotated, bool interleaved,"
      " bool inverse) -> Tensor");
  m.def(
      "rotary_(Tensor(a!) x, Tensor cos, Tensor sin, Tensor? positions, int offset, int rotated,"
      " bool interleaved, bool inverse) -> ()");
  m.def(
      "rotary_pack(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor positions, bool inverse)"
      " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(openllama, CPU, m) {
  m.impl("rotary", TORCH_BOX(&openllama::rotary_cpu));
  m.impl("rotary_", TORCH_BOX(&openllama::inplace_cpu));
  m.impl("rotary_pack", TORCH_BOX(&openllama::pack_cpu));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(openllama, CUDA, m) {
  m.impl("rotary", TORCH_BOX(&openllama::rotary_cuda));
  m.impl("rotary_", TORCH_BOX(&openllama::inplace_cuda));
  m.impl("rotary_pack", TORCH_BOX(&openllama::pack_cuda));
}
#endif
