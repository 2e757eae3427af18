// Cross-entropy over rows of logits. Forward keeps only the logsumexp of a row, as its largest logit and the
// log of the sum above that; backward recomputes the softmax from it, so that nothing of the logits' size is
// stored in between.
#include <cmath>
#include <type_traits>

#include "vec.h"

namespace openllama::cpu::CPU_ARCH {
namespace {

// tanh to about 1 ulp: Cephes' polynomial near 0, where 1 - 2 / (exp(2 x) + 1) keeps no digits, else that.
// Chosen by bits, because GCC makes a branch of `?:` here, and a loop with one stays scalar.
inline float tanh(float x) {
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float near = p * z * x + x, far = 1.0f - 2.0f / (exp(2.0f * std::fabs(x)) + 1.0f);
  const uint32_t take_near = std::fabs(x) < 0.625f ? 0xffffffff : 0;
  const uint32_t chosen = (__builtin_bit_cast(uint32_t, near) & take_near) |
                          (__builtin_bit_cast(uint32_t, __builtin_copysignf(far, x)) & ~take_near);
  return __builtin_bit_cast(float, chosen);
}

// l = softcap tanh(logit / softcap) and its slope, or the logit itself.
template <bool capped>
struct Cap {
  float cap;
  float operator()(float logit) const { return capped ? cap * tanh(logit / cap) : logit; }
  float slope(float l) const { return capped ? 1.0f - (l / cap) * (l / cap) : 1.0f; }
};

// Calls body(T{}, std::bool_constant<whether the logits are capped>).
template <class F>
void with_logits(const CrossEntropy& a, F body) {
  with_dtype(a.dtype, [&](auto t) {
    if (a.softcap != 0.0f)
      body(t, std::true_type{});
    else
      body(t, std::false_type{});
  });
}

// Lanes, because a plain running maximum has to keep NaN's place and the compiler then leaves it scalar.
template <class T>
float maximum(const T* logits, int64_t vocab) {
  constexpr int64_t kLanes = 64;
  float lanes[kLanes];
  for (int64_t k = 0; k < kLanes; ++k) lanes[k] = to_float(logits[k < vocab ? k : 0]);
  int64_t c = kLanes;
  for (; c + kLanes <= vocab; c += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) {
      const float v = to_float(logits[c + k]);
      lanes[k] = v > lanes[k] ? v : lanes[k];
    }
  float top = lanes[0];
  for (int64_t k = 1; k < kLanes; ++k) top = lanes[k] > top ? lanes[k] : top;
  for (; c < vocab; ++c) top = to_float(logits[c]) > top ? to_float(logits[c]) : top;
  return top;
}

bool outside(const CrossEntropy& a, int64_t label) { return label < 0 || label >= a.vocab; }

struct LogSumExp {
  float top, log_sum;
};

// Sums of 1,024, then their sum: the rounding of one long sum would grow with the vocabulary.
template <class T, class C>
LogSumExp logsumexp(const T* logits, int64_t vocab, C cap) {
  float top = cap(maximum(logits, vocab));
  if (std::isinf(top)) top = top > 0 ? 0.0f : top;  // +inf: let exp overflow to inf, as it should
  if (std::isinf(top)) return {top, 0.0f};          // all -inf
  float sum = 0;
  for (int64_t begin = 0; begin < vocab; begin += 1024) {
    const int64_t end = begin + 1024 < vocab ? begin + 1024 : vocab;
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t c = begin; c < end; ++c) part += exp(cap(to_float(logits[c])) - top);
    sum += part;
  }
  return {top, std::log(sum)};
}

}  // namespace

// Both return the first row whose label is neither ignored nor in the vocabulary, or -1.
int64_t cross_entropy_fwd(const CrossEntropy& a, int64_t begin, int64_t end) {
  int64_t bad = -1;
  with_logits(a, [&](auto t, auto capped) {
    using T = decltype(t);
    const Cap<capped> cap{a.softcap};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t label = a.labels[i];
      a.loss[i] = a.lse[2 * i] = a.lse[2 * i + 1] = 0;
      if (label == a.ignore_index) continue;
      if (outside(a, label)) {
        bad = i;
        return;
      }
      const T* logits = row<T>(a.logits, i, a.logits_stride);
      const LogSumExp lse = logsumexp(logits, a.vocab, cap);
      const float s = lse.top + lse.log_sum;
      a.lse[2 * i] = lse.top, a.lse[2 * i + 1] = lse.log_sum;
      a.loss[i] = lse.log_sum - (cap(to_float(logits[label])) - lse.top);
      if (a.z_loss != 0.0f) a.loss[i] += a.z_loss * s * s;
    }
  });
  return bad;
}

int64_t cross_entropy_bwd(const CrossEntropy& a, int64_t begin, int64_t end) {
  int64_t bad = -1;
  with_logits(a, [&](auto t, auto capped) {
    using T = decltype(t);
    const Cap<capped> cap{a.softcap};
    for (int64_t i = begin; i < end; ++i) {
      T* dlogits = row<T>(a.dlogits, i, a.dlogits_stride);
      const int64_t label = a.labels[i];
      if (label == a.ignore_index) {
        for (int64_t c = 0; c < a.vocab; ++c) dlogits[c] = from_float<T>(0.0f);
        continue;
      }
      if (outside(a, label)) {
        bad = i;
        return;
      }
      const T* logits = row<T>(a.logits, i, a.logits_stride);
      const float top = a.lse[2 * i], log_sum = a.lse[2 * i + 1], dloss = a.dloss ? a.dloss[i] : 1.0f;
      const float z = a.z_loss != 0.0f ? 2.0f * a.z_loss * (top + log_sum) : 0.0f;
      const auto gradient = [&](int64_t c, float onehot) {
        const float l = cap(to_float(logits[c])), p = exp((l - top) - log_sum);
        return ((p - onehot) + z * p) * dloss * cap.slope(l);
      };
      const T at_label = from_float<T>(gradient(label, 1.0f));  // before dlogits, which may be logits
#pragma omp simd
      for (int64_t c = 0; c < a.vocab; ++c) dlogits[c] = from_float<T>(gradient(c, 0.0f));
      dlogits[label] = at_label;
    }
  });
  return bad;
}

}  // namespace openllama::cpu::CPU_ARCH
