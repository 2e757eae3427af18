// RMSNorm (Zhang and Sennrich, 2019) with the residual add fused in: one read and one write of each row; the
// second pass over a row finds it in cache.
#include <algorithm>
#include <cmath>

#include "vec.h"

namespace openllama::cpu::CPU_ARCH {
namespace {

// The sum of part(begin, end) over pieces of 0 .. n - 1. As one sum in fp32 it would be off by more, the
// longer it is.
template <class F>
float sum_pieces(int64_t n, F part) {
  constexpr int64_t kPiece = 512;
  float sum = 0;
  for (int64_t begin = 0; begin < n; begin += kPiece) sum += part(begin, std::min(n, begin + kPiece));
  return sum;
}

template <class T, class W>
void fwd(const RmsNormFwd& a, int64_t begin, int64_t end) {
  const W* weight = static_cast<const W*>(a.weight);
  for (int64_t i = begin; i < end; ++i) {
    const T* x = row<T>(a.x, i, a.x_stride);
    T* y = row<T>(a.y, i, a.hidden);
    float sum = 0;
    if (a.residual) {
      const T* residual = row<T>(a.residual, i, a.residual_stride);
      T* h = row<T>(a.h, i, a.hidden);
      sum = sum_pieces(a.hidden, [&](int64_t first, int64_t last) {
        float part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t c = first; c < last; ++c) {
          h[c] = from_float<T>(to_float(x[c]) + to_float(residual[c]));
          part += to_float(h[c]) * to_float(h[c]);
        }
        return part;
      });
      x = h;
    } else {
      sum = sum_pieces(a.hidden, [&](int64_t first, int64_t last) {
        float part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t c = first; c < last; ++c) part += to_float(x[c]) * to_float(x[c]);
        return part;
      });
    }
    const float rstd = 1.0f / std::sqrt(sum / float(a.hidden) + a.eps);
    for (int64_t c = 0; c < a.hidden; ++c) y[c] = from_float<T>(to_float(x[c]) * rstd * to_float(weight[c]));
    a.rstd[i] = rstd;
  }
}

template <class T, class W>
void bwd_row(const RmsNormBwd& a, int64_t i, float* dweight) {
  const T* dy = row<T>(a.dy, i, a.dy_stride);
  const T* h = row<T>(a.h, i, a.h_stride);
  const W* weight = static_cast<const W*>(a.weight);
  const float rstd = a.rstd[i];
  if (dweight)
    for (int64_t c = 0; c < a.hidden; ++c) dweight[c] += to_float(dy[c]) * to_float(h[c]) * rstd;
  if (!a.dx) return;
  T* dx = row<T>(a.dx, i, a.hidden);
  const float dot = sum_pieces(a.hidden, [&](int64_t first, int64_t last) {
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t c = first; c < last; ++c) part += to_float(dy[c]) * to_float(weight[c]) * to_float(h[c]);
    return part;
  });
  const float scale = dot * rstd * rstd * rstd / float(a.hidden);
  if (a.dh) {
    const T* dh = row<T>(a.dh, i, a.dh_stride);
    for (int64_t c = 0; c < a.hidden; ++c)
      dx[c] = from_float<T>(to_float(dy[c]) * to_float(weight[c]) * rstd - to_float(h[c]) * scale +
                            to_float(dh[c]));
  } else {
    for (int64_t c = 0; c < a.hidden; ++c)
      dx[c] = from_float<T>(to_float(dy[c]) * to_float(weight[c]) * rstd - to_float(h[c]) * scale);
  }
}

template <class F>
void with_dtypes(Dtype dtype, Dtype weight_dtype, F body) {
  with_dtype(dtype, [&](auto t) { with_dtype(weight_dtype, [&](auto w) { body(t, w); }); });
}

}  // namespace

void rms_norm_fwd(const RmsNormFwd& a, int64_t begin, int64_t end) {
  with_dtypes(a.dtype, a.weight_dtype, [&](auto t, auto w) { fwd<decltype(t), decltype(w)>(a, begin, end); });
}

// Block b owns rows [b, b + 1) * rows / blocks and its own partial sum of dweight, so that the result does
// not depend on how many threads there are.
void rms_norm_bwd(const RmsNormBwd& a, int64_t block) {
  float* dweight = a.dweight_blocks ? a.dweight_blocks + block * a.hidden : nullptr;
  if (dweight)
    for (int64_t c = 0; c < a.hidden; ++c) dweight[c] = 0;
  with_dtypes(a.dtype, a.weight_dtype, [&](auto t, auto w) {
    for (int64_t i = block * a.rows / a.blocks; i < (block + 1) * a.rows / a.blocks; ++i)
      bwd_row<decltype(t), decltype(w)>(a, i, dweight);
  });
}

void rms_norm_bwd_reduce(const RmsNormBwd& a, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) a.dweight[c] = 0;
  for (int64_t block = 0; block < a.blocks; ++block)
    for (int64_t c = begin; c < end; ++c) a.dweight[c] += a.dweight_blocks[block * a.hidden + c];
}

}  // namespace openllama::cpu::CPU_ARCH
