// SwiGLU (Shazeer, 2020) on a packed [gate | up] row, computed in fp32.
#include "vec.h"

namespace openllama::cpu::CPU_ARCH {

void swiglu_fwd(const Swiglu& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t i = begin; i < end; ++i) {
      const T* gate = row<T>(a.gate_up, i, a.gate_up_stride);
      const T* up = gate + a.intermediate;
      T* act = row<T>(a.out, i, a.out_stride);
      for (int64_t c = 0; c < a.intermediate; ++c) {
        const float g = to_float(gate[c]);
        act[c] = from_float<T>(g * sigmoid(g) * to_float(up[c]));
      }
    }
  });
}

void swiglu_bwd(const Swiglu& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t i = begin; i < end; ++i) {
      const T* gate = row<T>(a.gate_up, i, a.gate_up_stride);
      const T* up = gate + a.intermediate;
      const T* dact = row<T>(a.dact, i, a.dact_stride);
      T* dgate = row<T>(a.out, i, a.out_stride);
      T* dup = dgate + a.intermediate;
      T* act = a.act ? row<T>(a.act, i, a.act_stride) : nullptr;
#pragma GCC ivdep  // where out is gate_up or act is dact, an iteration writes only what it has read itself
      for (int64_t c = 0; c < a.intermediate; ++c) {
        const float g = to_float(gate[c]), u = to_float(up[c]), d = to_float(dact[c]), s = sigmoid(g);
        dgate[c] = from_float<T>(d * u * s * (1.0f + g * (1.0f - s)));
        dup[c] = from_float<T>(d * g * s);
        if (act) act[c] = from_float<T>(g * s * u);
      }
    }
  });
}

}  // namespace openllama::cpu::CPU_ARCH
