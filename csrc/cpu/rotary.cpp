// Rotary position embedding (Su et al., 2021), half-split or interleaved.
#include "vec.h"

namespace openllama::cpu::CPU_ARCH {
namespace {

// Pairs lie rotary_dim / 2 apart, or side by side.
template <bool interleaved, class T>
void turn(const T* in, T* to, const float* cos, const float* sin, float sign, int64_t half) {
#pragma GCC ivdep  // in and to are the same row or disjoint ones; no iteration reads what another writes
  for (int64_t c = 0; c < half; ++c) {
    const int64_t i = interleaved ? 2 * c : c, j = interleaved ? 2 * c + 1 : c + half;
    const float first = to_float(in[i]), second = to_float(in[j]), s = sign * sin[c];
    to[i] = from_float<T>(first * cos[c] - second * s);
    to[j] = from_float<T>(second * cos[c] + first * s);
  }
}

template <class T>
void rotate(const Rotary& a, int64_t begin, int64_t end) {
  const int64_t half = a.rotary_dim / 2;
  const float sign = a.inverse ? -1.0f : 1.0f;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t position = (a.positions ? a.positions[i] : i) + a.offset;
    const float* cos = a.cos + position * half;
    const float* sin = a.sin + position * half;
    const T* x = row<T>(a.x, i, a.x_stride);
    T* out = row<T>(a.out, i, a.out_stride);
    for (int64_t head = 0; head < a.rotated; ++head) {
      const T* in = x + head * a.head_dim;
      T* to = out + head * a.head_dim;
      if (a.interleaved)
        turn<true>(in, to, cos, sin, sign, half);
      else
        turn<false>(in, to, cos, sin, sign, half);
      if (a.out != a.x)
        for (int64_t c = a.rotary_dim; c < a.head_dim; ++c) to[c] = in[c];
    }
    if (a.out != a.x)
      for (int64_t c = a.rotated * a.head_dim; c < a.heads * a.head_dim; ++c) out[c] = x[c];
  }
}

}  // namespace

// Positions must lie within the tables.
void rotary(const Rotary& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto t) { rotate<decltype(t)>(a, begin, end); });
}

}  // namespace openllama::cpu::CPU_ARCH
