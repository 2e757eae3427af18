// attention: binding of its CUDA kernels, for Hopper.
#include <cmath>

#include "hopper.h"

namespace openllama {
namespace {

#ifdef USE_CUDA

constexpr int64_t kLargestStride = int64_t{1} << 39;  // elements: TMA takes less than 2^40 bytes
constexpr int64_t kMostRows = int64_t{1} << 30;       // of all heads, padded: kernels number tiles in 32 bits

// (batch, seq, heads, q's head_dim), of the dtype and on the device of its partner q.
void check_heads(const Tensor& t, const char* name, int64_t batch, int64_t seq, int64_t heads,
                 const Tensor& q) {
  const int64_t head_dim = q.size(3);
  require(
      t.dim() == 4 && t.size(0) == batch && t.size(1) == seq && t.size(2) == heads && t.size(3) == head_dim,
      "openllama: ", name, " must be (", batch, ", ", seq, ", ", heads, ", ", head_dim, ")");
  require(t.scalar_type() == q.scalar_type(), "openllama: ", name, " must have its partner's dtype");
  check_device(t, name, q);
  bool readable = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.stride(3) == 1;
  for (int i = 0; i < 3; ++i)
    readable &=
        t.size(i) == 1 || (t.stride(i) > 0 && t.stride(i) < kLargestStride && t.stride(i) % kMultiple == 0);
  require(readable, "openllama: attention takes ", name,
          " with a contiguous last dimension, strides of a multiple of ", kMultiple,
          " above 0, on an address of one of 16 bytes");
}

HeadStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

void set_arguments(Attention& a, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& next_tile,
                   double scale, bool causal) {
  a.batch = q.size(0), a.seq_q = q.size(1), a.heads = q.size(2);
  a.seq_k = k.size(1), a.kv_heads = k.size(2), a.head_dim = q.size(3);
  a.q = q.const_data_ptr(), a.q_strides = strides_of(q);
  a.k = k.const_data_ptr(), a.k_strides = strides_of(k);
  a.v = v.const_data_ptr(), a.v_strides = strides_of(v);
  a.next_tile = static_cast<int32_t*>(next_tile.mutable_data_ptr());
  a.scale = static_cast<float>(scale);
  a.causal = causal;
  a.dtype = dtype_of(q);
}

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  require(dtype_of(q) != Dtype::f32, "openllama: attention takes bfloat16 or float16");
  require(q.dim() == 4 && k.dim() == 4,
          "openllama: attention takes q and k of (batch, seq, heads, head_dim)");
  const int64_t batch = q.size(0), seq_q = q.size(1), heads = q.size(2), seq_k = k.size(1),
                kv_heads = k.size(2);
  require(batch > 0 && seq_q > 0 && seq_k > 0 && kv_heads > 0 && heads > 0 && heads % kv_heads == 0,
          "openllama: attention takes sizes of at least 1, and heads that are a multiple of kv_heads");
  require(q.size(3) == 64 || q.size(3) == 128, "openllama: attention takes a head_dim of 64 or 128");
  require(std::max(seq_q, seq_k) + 2 * kAttentionBlock <= kMostRows / batch / heads,
          "openllama: attention takes up to 2^30 rows of all heads");
  require(std::isfinite(scale) && scale > 0, "openllama: attention takes a finite scale above 0");
  check_heads(q, "q", batch, seq_q, heads, q);
  check_heads(k, "k", batch, seq_k, kv_heads, q);
  check_heads(v, "v", batch, seq_k, kv_heads, q);
}

// Rotary's, by which q and k are turned, or none.
void set_angles(AttentionBwd& a, const Tensor& q, const OptionalTensor& cos, const OptionalTensor& sin,
                const OptionalTensor& positions) {
  require(cos.has_value() == sin.has_value() && cos.has_value() == positions.has_value(),
          "openllama: attention takes cos, sin and positions together");
  if (!cos) return;
  require(cos->dim() == 2 && a.seq_q == a.seq_k,
          "openllama: cos must be (positions, head_dim / 2), and q as long as k");
  a.table_rows = cos->size(0);
  check_flat(*cos, "cos", a.table_rows * a.head_dim / 2, ScalarType::Float, q);
  check_flat(*sin, "sin", a.table_rows * a.head_dim / 2, ScalarType::Float, q);
  check_flat(*positions, "positions", a.batch * a.seq_q, ScalarType::Int, q);
  require(a.batch == 1 || a.dk_strides.batch == a.seq_k * a.dk_strides.row,
          "openllama: dk must have its sequences one after the other to be turned back");
  require(a.kv_heads == 1 || a.dk_strides.head == a.head_dim,
          "openllama: dk must have its heads side by side to be turned back");
  a.cos = floats(*cos), a.sin = floats(*sin);
  a.positions = static_cast<const int32_t*>(positions->const_data_ptr());
}

// What turns dk back, in place.
Rotary of_keys(const AttentionBwd& a) {
  return {.x = a.dk,
          .out = a.dk,
          .cos = a.cos,
          .sin = a.sin,
          .positions = a.positions,
          .offset = 0,
          .tokens = a.batch * a.seq_k,
          .heads = a.kv_heads,
          .head_dim = a.head_dim,
          .rotary_dim = a.head_dim,
          .rotated = a.kv_heads,
          .x_stride = a.dk_strides.row,
          .out_stride = a.dk_strides.row,
          .table_rows = a.table_rows,
          .interleaved = false,
          .inverse = true,
          .dtype = a.dtype};
}

Tensor new_tile_number(const Tensor& q) { return torch::stable::new_empty(q, {1}, ScalarType::Int); }

std::tuple<Tensor, Tensor> fwd_cuda(Tensor q, Tensor k, Tensor v, double scale, bool causal) {
  const CudaScope scope(q);
  check_inputs(q, k, v, scale);
  Tensor out = new_like(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
  Tensor lse = new_f32(q, {q.size(0), q.size(2), q.size(1)});
  const Tensor next_tile = new_tile_number(q);
  AttentionFwd a{};
  set_arguments(a, q, k, v, next_tile, scale, causal);
  a.out = out.mutable_data_ptr(), a.lse = mutable_floats(lse);
  check(cuda::attention_fwd(a, scope.stream), "attention_fwd");
  return {out, lse};
}

void bwd_cuda(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor dq, Tensor dk,
              Tensor dv, double scale, bool causal, OptionalTensor cos, OptionalTensor sin,
              OptionalTensor positions) {
  const CudaScope scope(q);
  check_inputs(q, k, v, scale);
  const int64_t batch = q.size(0), seq_q = q.size(1), heads = q.size(2), seq_k = k.size(1),
                kv_heads = k.size(2);
  check_heads(dout, "dout", batch, seq_q, heads, q);
  check_heads(out, "out", batch, seq_q, heads, q);
  check_heads(dq, "dq", batch, seq_q, heads, q);
  check_heads(dk, "dk", batch, seq_k, kv_heads, q);
  check_heads(dv, "dv", batch, seq_k, kv_heads, q);
  require(out.is_contiguous(), "openllama: attention takes a contiguous out");
  check_flat(lse, "lse", batch * heads * seq_q, ScalarType::Float, q);
  const int64_t blocks = batch * heads * attention_blocks(seq_q, q.size(3));
  const Tensor dq_sum = new_f32(q, {blocks, kAttentionBlock, q.size(3)});
  const Tensor stats = new_f32(q, {blocks, 2, kAttentionBlock}), next_tile = new_tile_number(q);
  const Tensor set = torch::stable::new_empty(q, {batch * kv_heads}, ScalarType::Int);
  AttentionBwd a{};
  set_arguments(a, q, k, v, next_tile, scale, causal);
  a.out = out.const_data_ptr(), a.lse = floats(lse);
  a.dout = dout.const_data_ptr(), a.dout_strides = strides_of(dout);
  a.dq = dq.mutable_data_ptr(), a.dq_strides = strides_of(dq);
  a.dk = dk.mutable_data_ptr(), a.dk_strides = strides_of(dk);
  a.dv = dv.mutable_data_ptr(), a.dv_strides = strides_of(dv);
  a.dq_sum = mutable_floats(dq_sum), a.stats = mutable_floats(stats);
  a.set = static_cast<int32_t*>(set.mutable_data_ptr());
  set_angles(a, q, cos, sin, positions);
  check(cuda::attention_bwd(a, scope.stream), "attention_bwd");
  if (cos) check(cuda::rotary(of_keys(a), scope.stream), "rotary_");
}

#endif

}  // namespace
}  // namespace openllama

STABLE_TORCH_LIBRARY_FRAGMENT(openllama, m) {
  m.def("attention_fwd(Tensor q, Tensor k, Tensor v, float scale, bool causal) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor(a!) dq, "
      "Tensor(b!) dk, Tensor(c!) dv, float scale, bool causal, Tensor? cos, Tensor? sin, Tensor? positions)"
      " -> ()");
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(openllama, CUDA, m) {
  m.impl("attention_fwd", TORCH_BOX(&openllama::fwd_cuda));
  m.impl("attention_bwd", TORCH_BOX(&openllama::bwd_cuda));
}
#endif
