// CPU kernels, each a function over a range of rows, so that torch's own thread pool can split the work.
//
// Every file in this folder is compiled once per instruction set, into a namespace of that name (CPU_ARCH),
// and CPU_CALL picks one at run time. Nothing inline from outside may be called here: the linker keeps a
// single copy of an inline function, and the one it keeps might use instructions that the machine lacks.
#pragma once

#include <cstdlib>
#include <cstring>

#include "../ops.h"

#define OPENLLAMA_CPU_KERNELS(arch)                                             \
  namespace openllama::cpu::arch {                                              \
  void rms_norm_fwd(const RmsNormFwd&, int64_t begin, int64_t end);             \
  void rms_norm_bwd(const RmsNormBwd&, int64_t block);                          \
  void rms_norm_bwd_reduce(const RmsNormBwd&, int64_t begin, int64_t end);      \
  void rotary(const Rotary&, int64_t begin, int64_t end);                       \
  void swiglu_fwd(const Swiglu&, int64_t begin, int64_t end);                   \
  void swiglu_bwd(const Swiglu&, int64_t begin, int64_t end);                   \
  int64_t cross_entropy_fwd(const CrossEntropy&, int64_t begin, int64_t end);   \
  int64_t cross_entropy_bwd(const CrossEntropy&, int64_t begin, int64_t end);   \
  void adamw(const AdamWTensor&, const AdamWStep&, int64_t begin, int64_t end); \
  }

OPENLLAMA_CPU_KERNELS(base)

#ifdef __x86_64__
OPENLLAMA_CPU_KERNELS(avx2)
OPENLLAMA_CPU_KERNELS(avx512)

namespace openllama::cpu {
enum class Level { base, avx2, avx512 };

// The best that the machine has. For tests, OPENLLAMA_CPU=base or avx2 in the environment (read once) holds
// it down.
inline Level level() {
  static const Level value = [] {
    const char* most = std::getenv("OPENLLAMA_CPU");
    const Level best = [] {
      __builtin_cpu_init();
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return Level::avx512;
      if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Level::avx2;
      return Level::base;
    }();
    if (most && !std::strcmp(most, "base")) return Level::base;
    if (most && !std::strcmp(most, "avx2") && best != Level::base) return Level::avx2;
    return best;
  }();
  return value;
}
}  // namespace openllama::cpu

#define CPU_CALL(kernel, ...)                                   \
  (::openllama::cpu::level() == ::openllama::cpu::Level::avx512 \
       ? ::openllama::cpu::avx512::kernel(__VA_ARGS__)          \
   : ::openllama::cpu::level() == ::openllama::cpu::Level::avx2 \
       ? ::openllama::cpu::avx2::kernel(__VA_ARGS__)            \
       : ::openllama::cpu::base::kernel(__VA_ARGS__))
#else
#define CPU_CALL(kernel, ...) ::openllama::cpu::base::kernel(__VA_ARGS__)
#endif
