// How AdamW's state is rounded, packed and moved: random bits, 8-bit codes, words. kernels/adamw_forms.py is
// their definition.
#pragma once

#include "common.cuh"

namespace openllama::cuda {

// ---------------------------------------------------------------- random bits

constexpr uint32_t kGolden = 0x9e3779b9u;  // 2^32 over the golden ratio

__device__ __forceinline__ uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

// Three times 16 random bits of an element, in the upper halves of words. They are keyed by (seed, step,
// element), so that they do not depend on how tensors are split.
struct RandomBits {
  uint32_t state;

  // x: the lower 32 bits of the element's number times kGolden, plus a key of the upper ones.
  static __device__ __forceinline__ RandomBits of(uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    return {x ^ x >> 15};
  }
  __device__ __forceinline__ uint32_t mean() const { return state * 0x846ca68bu; }
  __device__ __forceinline__ uint32_t square() const { return mean() * kGolden; }
  __device__ __forceinline__ uint32_t weight() const { return square() * kGolden; }
};

// The upper 16 bits of a float, one more with a chance of its lower 16 bits over 2^16. `random` has 16 bits.
__device__ __forceinline__ uint32_t round_to_bf16(float v, uint32_t random) {
  const uint32_t bits = __float_as_uint(v);
  if ((bits & 0x7f800000u) == 0x7f800000u)
    return __float_as_uint(to_float(from_float<__nv_bfloat16>(v))) >> 16;
  return (bits + random) >> 16;
}

// ---------------------------------------------------------------- fast arithmetic
//
// An element of the leanest form moves 14 or 16 bytes, in the time of some 100 instructions. Conversions
// between whole numbers and floats share the slow unit of square roots and logarithms: so a whole number
// becomes a float as a subnormal one times a power of two, and a float becomes whole by the addition of one
// whose spacing is 1. The approximations are off by 1 or 2 ulps of an update, which is itself rounded into a
// weight.

__device__ __forceinline__ float fast_sqrt(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Of numbers below 2^-126 it is 0: one instruction instead of five.
__device__ __forceinline__ float fast_sqrt_ftz(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Of numbers over 2^126 it is 0.
__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A whole number below 2^24 is, as the bits of a float, so many times 2^-149: a byte of a word in the place
// of its third one, 2^-133, the upper half in the middle 2^-141.
__device__ __forceinline__ float byte_by_2_to_133(uint32_t word, int i) {
  return __uint_as_float(__byte_perm(word, 0, 0x4044 | i << 8));
}
__device__ __forceinline__ float upper_half_by_2_to_141(uint32_t word) {
  return __uint_as_float(__byte_perm(word, 0, 0x4324));
}

// One more in the last place where `change` is negative.
__device__ __forceinline__ float next_if_negative(float x, float change) {
  return __uint_as_float(__float_as_uint(x) + (__float_as_uint(change) >> 31));
}

// ---------------------------------------------------------------- 8-bit codes
//
// Codes to be stored are in the lowest byte of a float, whose spacing is that of codes.

constexpr float kPerOctave = 6.375f;  // of exp_avg_sq: 255 codes over 40 octaves
constexpr float kTiny = 0x1p-112f;    // scales below count as it: their reciprocals would overflow

constexpr float kMeanScale = (64.0f / 127) * (64.0f / 127);
// Of |m| over its scale (127 / 16)^2, and a bit less, so that the greatest is below 127 after all rounding.
constexpr float kMeanInverse = 63.00390625f * (1 - 0x1p-20f);

// `code` is the code by 2^133, `scale` the block's times kMeanScale.
__device__ __forceinline__ float decode_mean(float code, float scale) {
  const float q = fmaf(code, 0x1p127f, -2.0f);  // over 64
  return q * scale * fabsf(q);
}

// `inverse` is kMeanInverse over the block's scale. All is in 16ths of a code, which floats have from 2^19
// on.
__device__ __forceinline__ float encode_mean(float m, float inverse, uint32_t random) {
  constexpr float k2To19 = 0x1p19f;
  const float square = fabsf(m) * inverse;
  const float above = __fadd_rd(fast_sqrt_ftz(square), k2To19), floor = above - k2To19;
  // whether `random` lies beyond the place of `square` between floor^2 and (floor + 1 / 16)^2, over 2^8
  const float beyond =
      fmaf(upper_half_by_2_to_141(random), fmaf(floor, 0x1p122f, 0x1p117f), fmaf(floor, floor, -square));
  return copysignf(next_if_negative(above, beyond) - k2To19, m) + (k2To19 + 8.0f);
}

__device__ __forceinline__ float decode_square(float code, float scale) {
  const float c = code * 0x1p127f;             // over 64
  const float not_0 = __saturatef(c * 64.0f);  // 0 or 1
  return scale * fast_exp2(c * (64.0f / kPerOctave) - 255.0f / kPerOctave) * not_0;
}

// `inverse` is 1 over the block's scale.
__device__ __forceinline__ float encode_square(float v, float inverse, uint32_t random) {
  constexpr float k2To23 = 0x1p23f, kBend = 0.0544f;
  const float least = __saturatef(v * 0x1p127f);  // 0 for 0, else 1: few are as small as 2^-127
  const float place = fmaxf(fmaf(kPerOctave, fast_log2(v * inverse), 255.0f), least);
  const float above = __fadd_rd(fminf(place, 254.0f), k2To23), rest = place - (above - k2To23);
  // how far v is between what two codes stand for, (2^(rest / 6.375) - 1) / (2^(1 / 6.375) - 1): fitted, to
  // 1e-4 of the whole
  const float share = rest * fmaf(rest, kBend, 1.0f - kBend);
  return next_if_negative(above, fmaf(upper_half_by_2_to_141(random), 0x1p125f, -share));
}

// ---------------------------------------------------------------- memory

// Elements begin, begin + 1, ... of a tensor that a thread has: E, moved in one access or few where `packs`;
// else one by one, the first `count`.
template <int E, bool packs>
struct Span {
  int64_t begin;
  int count;
};

// Elements of T, a whole number, as they lie in memory: one, two or four to a word.
template <class T, int E>
struct alignas(E * sizeof(T) > 16 ? 16 : E * sizeof(T)) Words {
  static constexpr int each = 4 / sizeof(T), bits = 8 * sizeof(T);
  uint32_t words[E / each];
};

// Elements beyond the span's are `fill`.
template <class T, int E, bool packs>
__device__ __forceinline__ Words<T, E> read(const void* base, Span<E, packs> span, T fill = 0) {
  using W = Words<T, E>;
  const T* from = static_cast<const T*>(base) + span.begin;
  if constexpr (packs) return *reinterpret_cast<const W*>(from);
  W w{};
#pragma unroll
  for (int i = 0; i < E; ++i)
    w.words[i / W::each] |= uint32_t{i < span.count ? from[i] : fill} << (i % W::each * W::bits);
  return w;
}

template <class T, int E, bool packs>
__device__ __forceinline__ void write(void* base, Span<E, packs> span, const Words<T, E>& w) {
  using W = Words<T, E>;
  T* to = static_cast<T*>(base) + span.begin;
  if constexpr (packs) {
    *reinterpret_cast<W*>(to) = w;
  } else {
#pragma unroll
    for (int i = 0; i < E; ++i)
      if (i < span.count) to[i] = static_cast<T>(w.words[i / W::each] >> (i % W::each * W::bits));
  }
}

template <int E>
using Words32 = Words<uint32_t, E>;
template <int E>
using Words16 = Words<uint16_t, E>;

template <int E>
__device__ __forceinline__ void unpack(float (&to)[E], const Words32<E>& w) {
#pragma unroll
  for (int i = 0; i < E; ++i) to[i] = __uint_as_float(w.words[i]);
}

template <class T, int E>
__device__ __forceinline__ void unpack(float (&to)[E], const Words16<E>& w) {
#pragma unroll
  for (int i = 0; i < E; ++i) to[i] = i % 2 ? Pair<T>::high(w.words[i / 2]) : Pair<T>::low(w.words[i / 2]);
}

template <int E>
__device__ __forceinline__ Words32<E> pack(const float (&from)[E]) {
  Words32<E> w;
#pragma unroll
  for (int i = 0; i < E; ++i) w.words[i] = __float_as_uint(from[i]);
  return w;
}

template <class T, int E>
__device__ __forceinline__ Words16<E> pack(const float (&from)[E]) {
  Words16<E> w;
#pragma unroll
  for (int i = 0; i < E; i += 2) w.words[i / 2] = Pair<T>::of(from[i], from[i + 1]);
  return w;
}

// bf16, rounded stochastically by the upper halves of `random(i)`.
template <int E, class F>
__device__ __forceinline__ Words16<E> pack(const float (&from)[E], F random) {
  Words16<E> w;
#pragma unroll
  for (int i = 0; i < E; i += 2)
    w.words[i / 2] = __byte_perm(round_to_bf16(from[i], random(i) >> 16),
                                 round_to_bf16(from[i + 1], random(i + 1) >> 16), 0x5410);
  return w;
}

template <int E>
__device__ __forceinline__ Words<uint8_t, E> pack_lowest_bytes(const float (&from)[E]) {
  Words<uint8_t, E> w;
#pragma unroll
  for (int i = 0; i < E; i += 4) {
    const uint32_t low = __byte_perm(__float_as_uint(from[i]), __float_as_uint(from[i + 1]), 0x0040),
                   high = __byte_perm(__float_as_uint(from[i + 2]), __float_as_uint(from[i + 3]), 0x0040);
    w.words[i / 4] = __byte_perm(low, high, 0x5410);
  }
  return w;
}

}  // namespace openllama::cuda
