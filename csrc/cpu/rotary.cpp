// Rotary position embedding (Su et al., 2021), in the half-split layout of HuggingFace's Llama.
#include "vec.h"

namespace openllama::cpu::CPU_ARCH {
namespace {

template <class T>
void rotate(const Rotary& a, int64_t begin, int64_t end) {
  const int64_t half = a.head_dim / 2;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t position = a.positions[i];
    const float* cos = a.cos + position * half;
    const float* sin = a.sin + position * half;
    const float sign = a.inverse ? -1.0f : 1.0f;
    const T* x = row<T>(a.x, i, a.x_stride);
    T* out = row<T>(a.out, i, a.out_stride);
    for (int64_t head = 0; head < a.rotated; ++head) {
      const T* in = x + head * a.head_dim;
      T* to = out + head * a.head_dim;
#pragma GCC ivdep  // in and to are the same row or disjoint ones; no iteration reads what another writes
      for (int64_t c = 0; c < half; ++c) {
        const float first = to_float(in[c]), second = to_float(in[c + half]), s = sign * sin[c];
        to[c] = from_float<T>(first * cos[c] - second * s);
        to[c + half] = from_float<T>(second * cos[c] + first * s);
      }
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
