// rotary: binding of its CPU kernel.
#include "common.h"

namespace openllama {
namespace {

Rotary arguments(const Tensor& x, const Tensor& out, const Tensor& cos, const Tensor& sin,
                 const Tensor& positions, int64_t rotated, bool inverse) {
  require(x.dim() == 3 && ((x.stride(2) == 1 && x.stride(1) == x.size(2)) || x.size(0) == 0),
          "openllama: x must be (tokens, heads, head_dim) with contiguous tokens");
  const int64_t tokens = x.size(0), heads = x.size(1), head_dim = x.size(2), table_rows = cos.size(0);
  require(head_dim % 2 == 0 && rotated >= 0 && rotated <= heads,
          "openllama: head_dim must be even and rotated at most heads");
  check_flat(cos, "cos", table_rows * head_dim / 2, ScalarType::Float, x);
  check_flat(sin, "sin", table_rows * head_dim / 2, ScalarType::Float, x);
  check_flat(positions, "positions", tokens, ScalarType::Int, x);
  return {x.const_data_ptr(),
          out.mutable_data_ptr(),
          floats(cos),
          floats(sin),
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

void run(const Rotary& args) {
  for (int64_t i = 0; i < args.tokens; ++i)  // first, or an in-place call would stop half-way
    require(args.positions[i] >= 0 && args.positions[i] < args.table_rows, "rotary: positions[", i, "] is ",
            args.positions[i], ", outside the table's ", args.table_rows,
            " rows; raise max_positions or shorten the input");
  for_rows(args.tokens, args.heads * args.head_dim * 4,
           [&](int64_t begin, int64_t end) { CPU_CALL(rotary, args, begin, end); });
}

Tensor rotary_cpu(Tensor x, Tensor cos, Tensor sin, Tensor positions, int64_t rotated, bool inverse) {
  Tensor out = new_like(x, {x.size(0), x.size(1), x.size(2)});
  run(arguments(x, out, cos, sin, positions, rotated, inverse));
  return out;
}

void inplace_cpu(Tensor x, Tensor cos, Tensor sin, Tensor positions, int64_t rotated, bool inverse) {
  run(arguments(x, x, cos, sin, positions, rotated, inverse));
}

}  // namespace
}  // namespace openllama

STABLE_TORCH_LIBRARY_FRAGMENT(openllama, m) {
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, Tensor positions, int rotated, bool inverse) -> Tensor");
  m.def("rotary_(Tensor(a!) x, Tensor cos, Tensor sin, Tensor positions, int rotated, bool inverse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(openllama, CPU, m) {
  m.impl("rotary", TORCH_BOX(&openllama::rotary_cpu));
  m.impl("rotary_", TORCH_BOX(&openllama::inplace_cpu));
}
