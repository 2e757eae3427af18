// The arguments of every op, shared by its CPU and its CUDA kernel. Nothing here knows torch.
//
// Pointers are to row 0; strides are in elements; a row is contiguous. A null pointer means "not asked for".
#pragma once

#include <cstdint>
#include <vector>

#ifdef USE_CUDA
#include <cuda_runtime_api.h>
#endif

namespace openllama {

enum class Dtype { f32, bf16, f16 };

// y = h * rstd * weight, h = x + residual, rstd = 1 / sqrt(mean(h^2) + eps)
struct RmsNormFwd {
  const void* x;         // (rows, hidden)
  const void* residual;  // (rows, hidden) or null
  const void* weight;    // (hidden)
  void* y;               // (rows, hidden), contiguous
  void* h;               // (rows, hidden), contiguous; null without a residual
  float* rstd;           // (rows)
  int64_t rows, hidden, x_stride, residual_stride;
  float eps;
  Dtype dtype, weight_dtype;
};

// dx = rstd * (weight * dy - xhat * mean(weight * dy * xhat)) + dh, dweight = sum over rows of dy * xhat
struct RmsNormBwd {
  const void* dy;         // (rows, hidden)
  const void* dh;         // (rows, hidden) or null: the gradient that arrives at h itself
  const void* h;          // (rows, hidden)
  const void* weight;     // (hidden)
  const float* rstd;      // (rows)
  void* dx;               // (rows, hidden), contiguous, or null
  float* dweight_blocks;  // (blocks, hidden) partial sums, or null
  float* dweight;         // (hidden): their sum, or null
  int64_t rows, hidden, dy_stride, dh_stride, h_stride;
  int64_t blocks;
  Dtype dtype, weight_dtype;
  int stages;  // how many rows deep shared memory is; set by the launcher
};

// Turns the pairs of the first rotary_dim elements of each of the first `rotated` heads: (i, i + rotary_dim /
// 2), or (2 i, 2 i + 1) where interleaved. All else is copied where out is another tensor than x.
struct Rotary {
  const void* x;             // (tokens, heads, head_dim)
  void* out;                 // the same shape; may be x
  const float *cos, *sin;    // (table_rows, rotary_dim / 2)
  const int32_t* positions;  // (tokens), or null: 0, 1, ...
  int64_t offset;            // added to the positions
  int64_t tokens, heads, head_dim, rotary_dim, rotated, x_stride, out_stride, table_rows;
  bool interleaved, inverse;
  Dtype dtype;
  // CUDA: where q, k and v lie apart, x is q; the rotated heads are those of q, then k, and v is what follows
  const void *k = nullptr, *v = nullptr;
  int64_t q_heads = 0, k_stride = 0, v_stride = 0;
};

// The linear layers before it: out = x [weight 0 | weight 1 | weight 2]^T, of which the first `rotated`
// columns turn, head by head, half-split and over all of head_dim. On Hopper, in 16 bits; addresses are
// multiples of 16 bytes, hidden and strides of 8 elements, widths of 128.
struct LinearRotary {
  const void* x;             // (tokens, hidden)
  const void* weight[3];     // (width, hidden)
  void* out;                 // (tokens, columns), contiguous
  const float *cos, *sin;    // (table_rows, head_dim / 2)
  const int32_t* positions;  // (tokens)
  int64_t tokens, hidden, columns, rotated, head_dim, table_rows, x_stride, width[3], weight_stride[3];
  Dtype dtype;
};

// act = gate * sigmoid(gate) * up, with [gate | up] packed in a row
struct Swiglu {
  const void* gate_up;  // (rows, 2 * intermediate)
  const void* dact;     // (rows, intermediate), backward only
  void* out;            // forward: act (rows, intermediate); backward: dgate_up (rows, 2 * intermediate)
  void* act;  // backward: act once more (rows, intermediate), or null. out may be gate_up, act may be dact
  int64_t rows, intermediate, gate_up_stride, dact_stride, out_stride, act_stride;
  Dtype dtype;
};

// The linear layers beside it: [gate | up] = x [w_gate | w_up]^T and act in one, and dact = dout w_down and
// both gradients. On Hopper, in 16 bits; addresses are multiples of 16 bytes, widths and strides of 8
// elements.
struct LinearSwiglu {
  const void* x;       // (tokens, hidden): x, or dout
  const void* w_gate;  // (intermediate, hidden), forward
  const void* w_up;    // (intermediate, hidden), forward
  const void* w_down;  // (hidden, intermediate), backward
  void* gate_up;  // (tokens, 2 * intermediate), contiguous: forward writes it, backward makes it its gradient
  void* act;      // (tokens, intermediate), contiguous; null: backward does not make it again
  int64_t tokens, hidden, intermediate, x_stride, w_gate_stride, w_up_stride, w_down_stride;
  Dtype dtype;
};

// Of heads in (batch, seq, heads, head_dim), in elements; a head's are contiguous.
struct HeadStrides {
  int64_t batch, row, head;
};

constexpr int64_t kAttentionBlock = 64;  // queries that attention's backward takes at once

// Such blocks that it has room for, of a head: of a head_dim of 64 it takes two at a time.
constexpr int64_t attention_blocks(int64_t seq_q, int64_t head_dim) {
  const int64_t at_a_time = head_dim == 64 ? 2 : 1, queries = at_a_time * kAttentionBlock;
  return (seq_q + queries - 1) / queries * at_a_time;
}

// What both passes of attention are told: s = scale q k^T, and of query i, where it is causal, only up to key
// i + seq_k - seq_q. On Hopper, in 16 bits; addresses are multiples of 16 bytes, strides of 8 elements.
struct Attention {
  const void* q;       // (batch, seq_q, heads, head_dim)
  const void *k, *v;   // (batch, seq_k, kv_heads, head_dim)
  int32_t* next_tile;  // one number for the kernels' own use
  HeadStrides q_strides, k_strides, v_strides;
  int64_t batch, heads, kv_heads, seq_q, seq_k;
  int64_t head_dim;  // 64 or 128
  float scale;
  bool causal;
  Dtype dtype;
};

// out = softmax(s) v; 0 where a query sees no key
struct AttentionFwd : Attention {
  void* out;   // (batch, seq_q, heads, head_dim), contiguous
  float* lse;  // (batch, heads, seq_q): log(sum of exp(s)); -inf where a query sees no key
};

// With P = exp(s - lse), dP = dout v^T, dS = P (dP - sum(dout out)): dv = P^T dout, dk = scale dS^T q, dq =
// scale dS k
struct AttentionBwd : Attention {
  const void *out, *dout;  // like q; out is contiguous
  const float* lse;        // (batch, heads, seq_q)
  void *dq, *dk, *dv;      // like q, k and v
  // for the kernels' own use: (batch, heads, attention_blocks, kAttentionBlock, head_dim), (batch, heads,
  // attention_blocks, 2, kAttentionBlock), (batch, kv_heads)
  float *dq_sum, *stats;
  int32_t* set;
  HeadStrides dout_strides, dq_strides, dk_strides, dv_strides;
  // where rotary turned q, whose gradient is to be that before it; null elsewhere
  const float *cos, *sin;    // (table_rows, head_dim / 2)
  const int32_t* positions;  // (batch, seq_q)
  int64_t table_rows;
};

// With l = softcap tanh(logits / softcap), or the logits themselves where softcap is 0, and s = logsumexp(l):
//
//   loss = s - l[label] + z_loss s^2, and 0 where the label is ignored
//   dlogits = dloss ((1 + 2 z_loss s) softmax(l) - onehot(label)) (1 - (l / softcap)^2)
//
// s is kept as two numbers, top and log(sum of exp(l - top)): their sum would round small parts away.
struct CrossEntropy {
  const void* logits;     // (rows, vocab)
  const int64_t* labels;  // (rows)
  float* loss;            // (rows), forward
  float* lse;             // (rows, 2), written by forward and read by backward
  const float* dloss;     // (rows), backward; null: all 1
  void* dlogits;          // (rows, vocab), backward; may be logits
  int64_t rows, vocab, logits_stride, dlogits_stride, ignore_index;
  float softcap, z_loss;
  Dtype dtype;
};

// dweight[id] += sum of dy[order[i]] over the i with ids[i] == id. ids are sorted, order is their stable
// sort's.
struct EmbeddingBwd {
  void* dweight;       // (vocab, hidden), dy's dtype or f32
  const void* dy;      // (tokens, hidden)
  const int64_t* ids;  // (tokens)
  const int64_t* order;
  int64_t tokens, hidden, dy_stride, dweight_stride;
  bool packs;  // whether rows of dy lie on 16 bytes; set by the launcher
  Dtype dtype, dweight_dtype;
};

// x *= factor, where factor is not 1
struct Scale {
  void* x;  // (rows, columns)
  const float* factor;
  int64_t rows, columns, x_stride;
  Dtype dtype;
};

// ---------------------------------------------------------------- AdamW

// Where the exact weight is: in the param itself (fp32), in an fp32 master, in a bf16 param and the low 16
// bits of the fp32 number beside it, or nowhere (a bf16 param, rounded stochastically).
enum class Master { param, f32, remainder, none };

// fp32; bf16, rounded stochastically; or 8 bits with a scale for each kMomentBlock elements, likewise.
enum class Moments { f32, bf16, u8 };
constexpr int64_t kMomentBlock = 256;

// One tensor of AdamW's list.
struct AdamWTensor {
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq;
  void* master;   // fp32, int16 or null
  float* scales;  // (2, blocks): of exp_avg, of exp_avg_sq; or null
  int64_t size;
  int64_t first;  // number of its first element among all of the optimizer's, which keys its random bits
  int32_t group;  // of AdamWGroup
  Dtype param_dtype, grad_dtype;
  bool packs;  // whether all lie on 16 bytes; set by the launcher
};

// What tensors share.
struct AdamWGroup {
  double lr, beta1, beta2, eps, weight_decay, step;
};

// The same, worked out once in double: what all elements share. Loshchilov and Hutter, 2019.
struct AdamWStep {
  float beta2, eps;
  float keep;        // 1 - lr weight_decay
  float new1, new2;  // 1 - beta1, 1 - beta2: from doubles, as 1 - float(0.999) is off by 1e-5 of itself
  float step_size;   // lr / (1 - beta1^t)
  float root_scale;  // 1 / sqrt(1 - beta2^t)
  float grad_scale;  // gradients are multiplied by it first
};

struct GradNormTensor {
  const void* grad;
  int64_t size;
  Dtype dtype;
  bool packs;  // whether it lies on 16 bytes; set by the launcher
};

#ifdef USE_CUDA
namespace cuda {
cudaError_t rms_norm_fwd(const RmsNormFwd&, cudaStream_t);
int64_t rms_norm_bwd_blocks(RmsNormBwd);  // how many blocks, and rows of dweight_blocks, it will use
cudaError_t rms_norm_bwd(RmsNormBwd, cudaStream_t);
cudaError_t rotary(const Rotary&, cudaStream_t);
cudaError_t swiglu_fwd(const Swiglu&, cudaStream_t);
cudaError_t swiglu_bwd(const Swiglu&, cudaStream_t);
cudaError_t linear_rotary(const LinearRotary&, cudaStream_t);
cudaError_t linear_swiglu_fwd(const LinearSwiglu&, cudaStream_t);
cudaError_t linear_swiglu_bwd(const LinearSwiglu&, cudaStream_t);
cudaError_t attention_fwd(const AttentionFwd&, cudaStream_t);
cudaError_t attention_bwd(const AttentionBwd&, cudaStream_t);
cudaError_t cross_entropy_fwd(const CrossEntropy&, cudaStream_t);
cudaError_t cross_entropy_bwd(const CrossEntropy&, cudaStream_t);
cudaError_t cross_entropy_fwd_bwd(const CrossEntropy&, cudaStream_t);
cudaError_t scale(Scale, cudaStream_t);
cudaError_t embedding_bwd(EmbeddingBwd, cudaStream_t);
// lrs, steps (one a group) and grad_scale are read on the device; null: those of the groups, and 1.
cudaError_t adamw(const std::vector<AdamWTensor>&, const std::vector<AdamWGroup>&, Master, Moments,
                  const float* lrs, const float* steps, const float* grad_scale, uint32_t seed, cudaStream_t);
int64_t grad_norm_blocks();
// out: the norm, and min(1, max_norm / norm). `partial` holds grad_norm_blocks() floats.
cudaError_t grad_norm(const std::vector<GradNormTensor>&, float max_norm, float* partial, float* out,
                      cudaStream_t);
cudaError_t hopper_probe(int32_t* out, cudaStream_t);
}  // namespace cuda
#endif

}  // namespace openllama
