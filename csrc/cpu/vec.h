// Scalar helpers that the compiler turns into vector code inside a loop: bf16 conversion and exp.
#pragma once

#include "kernels.h"

#ifndef CPU_ARCH
#error "compile with -DCPU_ARCH=<base|avx2|avx512>"
#endif

// Anonymous namespaces keep each instruction set's copy to itself (see kernels.h).
namespace openllama::cpu::CPU_ARCH {
namespace {

struct bf16 {
  uint16_t bits;
};

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return __builtin_bit_cast(float, uint32_t(v.bits) << 16); }

template <class T>
T from_float(float v);
template <>
inline float from_float<float>(float v) {
  return v;
}
template <>
inline bf16 from_float<bf16>(float v) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, v);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  return {uint16_t(v != v ? 0x7fc0 : rounded)};
}

// exp to about 1 ulp: x = n ln2 + r with |r| <= ln2 / 2, the polynomial of Cephes' expf for exp(r), and 2^n
// in two factors, so that results near both ends of the range are right. NaN stays NaN, -inf gives 0.
inline float exp(float x) {
  const float raised = x < -104.0f ? -104.0f : x;
  const float clamped = raised > 89.0f ? 89.0f : raised;
  const float scaled = clamped * 1.44269504f;
  const int n = int(scaled + __builtin_copysignf(0.5f, scaled));
  const float r = (clamped - float(n) * 0.693359375f) - float(n) * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int low = n >> 1, high = n - low;
  return p * __builtin_bit_cast(float, uint32_t(low + 127) << 23) *
         __builtin_bit_cast(float, uint32_t(high + 127) << 23);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }

template <class T>
inline T* row(void* base, int64_t i, int64_t stride) {
  return static_cast<T*>(base) + i * stride;
}
template <class T>
inline const T* row(const void* base, int64_t i, int64_t stride) {
  return static_cast<const T*>(base) + i * stride;
}

// Calls body(T{}) for the element type; the binding lets only f32 and bf16 come here.
template <class F>
inline void with_dtype(Dtype dtype, F body) {
  if (dtype == Dtype::f32)
    body(float{});
  else
    body(bf16{});
}

}  // namespace
}  // namespace openllama::cpu::CPU_ARCH
