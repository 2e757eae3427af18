// The arguments of every op, shared by its CPU and its CUDA kernel. Nothing here knows torch.
//
// Pointers are to row 0; strides are in elements; a row is contiguous. A null pointer means "not asked for".
#pragma once

#include <cstdint>

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
};

// Turns the pairs (i, i + head_dim / 2) of the first `rotated` heads. The other heads are copied where out is
// another tensor than x.
struct Rotary {
  const void* x;             // (tokens, heads, head_dim)
  void* out;                 // the same shape; may be x
  const float *cos, *sin;    // (positions of the table, head_dim / 2)
  const int32_t* positions;  // (tokens)
  int64_t tokens, heads, head_dim, rotated, x_stride, out_stride, table_rows;
  bool inverse;
  Dtype dtype;
};

// act = gate * sigmoid(gate) * up, with [gate | up] packed in a row
struct Swiglu {
  const void* gate_up;  // (rows, 2 * intermediate)
  const void* dact;     // (rows, intermediate), backward only
  void* out;            // forward: act (rows, intermediate); backward: dgate_up (rows, 2 * intermediate)
  int64_t rows, intermediate, gate_up_stride, dact_stride;
  Dtype dtype;
};

// loss = logsumexp(logits) - logits[label], 0 where the label is ignored
// dlogits = (softmax(logits) - onehot(label)) * dloss
//
// The logsumexp is kept as two numbers, top and log(sum of exp(logit - top)):
// their sum would round small parts away.
struct CrossEntropy {
  const void* logits;     // (rows, vocab)
  const int64_t* labels;  // (rows)
  float* loss;            // (rows)
  float* lse;             // (rows, 2)
  const float* dloss;     // (rows), backward only
  void* dlogits;          // (rows, vocab), backward only; may be logits
  int64_t rows, vocab, logits_stride, dlogits_stride, ignore_index;
  Dtype dtype;
};

// One tensor of AdamW's list. `master` holds the fp32 weight where `param` is bf16, else null.
struct AdamWTensor {
  void* param;
  const void* grad;
  float *exp_avg, *exp_avg_sq, *master;
  int64_t size;
  Dtype param_dtype, grad_dtype;
};

// Decoupled weight decay (Loshchilov and Hutter, 2019). Worked out once, in double: what all elements share.
struct AdamWStep {
  float beta2, eps;
  float keep;        // 1 - lr weight_decay
  float new1, new2;  // 1 - beta1, 1 - beta2: from doubles, as 1 - float(0.999) is off by 1e-5 of itself
  float step_size;   // lr / (1 - beta1^t)
  float root_scale;  // 1 / sqrt(1 - beta2^t)
};

#ifdef USE_CUDA
namespace cuda {
cudaError_t rms_norm_fwd(const RmsNormFwd&, cudaStream_t);
cudaError_t rms_norm_bwd(const RmsNormBwd&, cudaStream_t);
cudaError_t hopper_probe(int32_t* out, cudaStream_t);
}  // namespace cuda
#endif

}  // namespace openllama
