// Cross-entropy's arithmetic, and what it writes of a row.
#pragma once

#include "common.cuh"

namespace openllama::cuda {

constexpr float kLog2e = 1.44269504f;

// l(x) = softcap tanh(x / softcap), or x itself. For 16-bit logits with the fast exp and division, whose
// errors of 2 ulps of fp32 rounding hides.
template <class T, bool capped>
struct Cap {
  float cap;

  __device__ __forceinline__ float operator()(float x) const {
    if constexpr (!capped) return x;
    if constexpr (sizeof(T) == 4) return cap * tanhf(x / cap);
    const float t = __fdividef(x, cap), square = t * t;
    // For small t by a polynomial (Cephes' tanhf), as 1 - 2 / (exp(2 t) + 1) would cancel.
    float small = fmaf(square, -5.70498873e-3f, 2.06390888e-2f);
    small = fmaf(small, square, -5.37397156e-2f);
    small = fmaf(small, square, 1.33314422e-1f);
    small = fmaf(small, square, -3.33332819e-1f);
    const float large = 1.0f - __fdividef(2.0f, fast_exp2(2.0f * kLog2e * t) + 1.0f);
    return cap * (square < 0.39f ? fmaf(small * square, t, t) : large);
  }
  __device__ __forceinline__ float slope(float l) const {
    return capped ? 1.0f - (l / cap) * (l / cap) : 1.0f;
  }
};

// exp(l - top). The rounding of top * log2(e) is the same for all of a row, and cancels in the softmax.
template <class T>
__device__ __forceinline__ float exp_above(float l, float top) {
  return sizeof(T) == 4 ? expf(l - top) : fast_exp2(fmaf(l, kLog2e, -top * kLog2e));
}

// The largest of some numbers, and the sum of exp(number - largest). NaN stays in the sum.
struct LogSumExp {
  float top = -INFINITY, sum = 0;

  // What exp is taken relative to; where all are -inf so far, anything finite.
  __device__ __forceinline__ float base() const { return top == -INFINITY ? 0.0f : top; }

  // Before numbers of which `most` is the largest are added.
  template <class T>
  __device__ __forceinline__ void raise(float most) {
    if (most > top) {
      sum *= exp_above<T>(top, most);
      top = most;
    }
  }
  template <class T, int N, class Numbers>
  __device__ __forceinline__ void add(const Numbers& numbers) {
    const float to = base();
    float sum_of_these = 0;  // by itself: so few terms follow each other that rounding stays small
#pragma unroll
    for (int n = 0; n < N; ++n) sum_of_these += exp_above<T>(numbers[n], to);
    sum += sum_of_these;
  }

  __device__ __forceinline__ void merge(LogSumExp other) {
    const float most = fmaxf(top, other.top), to = most == -INFINITY ? 0.0f : most;
    sum = sum * expf(top - to) + other.sum * expf(other.top - to);
    top = most;
  }
};

__device__ __forceinline__ void write_loss(const CrossEntropy& a, int64_t i, float top, float log_sum,
                                           float at_label) {
  const float s = top + log_sum;
  a.loss[i] = log_sum - (at_label - top) + (a.z_loss != 0.0f ? a.z_loss * s * s : 0.0f);
  a.lse[2 * i] = top, a.lse[2 * i + 1] = log_sum;
}

__device__ __forceinline__ void write_ignored(const CrossEntropy& a, int64_t i) {
  a.loss[i] = a.lse[2 * i] = a.lse[2 * i + 1] = 0;
}

__device__ __forceinline__ void check_label(const CrossEntropy& a, int64_t label) {
  require(label >= 0 && label < a.vocab, "cross_entropy: a label lies outside the vocabulary");
}

}  // namespace openllama::cuda
