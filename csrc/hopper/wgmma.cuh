// Hopper's warpgroup matrix products (PTX ISA, "Asynchronous warpgroup-level matrix instructions"): D += A B,
// 64 rows, 64, 128 or 256 columns, 16 deep, for 16-bit A and B and fp32 D. Four warps issue one together; it
// runs while they go on.
//
// Thread t of the warpgroup holds of D rows 16 (t / 32) + (t % 32) / 4 and 8 below, of each 8 columns the two
// at 2 (t % 4): element [4 j + 2 h + e] is row + 8 h, column 8 j + 2 (t % 4) + e. A out of registers lies
// like 16 neighbouring columns of D, two elements to a register.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace openllama::cuda::hopper {

// Shared memory as a product reads it: rows of 128 bytes (64 elements), swizzled by 128 bytes as TMA writes
// them, in panels; a panel starts at a multiple of 1024 bytes.
//
// K-major (the product's depth lies along a row): `panel` is not read; 16 deeper is 32 bytes further in the
// row. MN-major (depth goes down the rows): 64 columns more are a `panel` further; 16 deeper is 16 rows, 2048
// bytes.
__device__ __forceinline__ uint64_t matrix(uint32_t address, uint32_t panel = 16) {
  return uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(panel >> 4) << 16 |
         (address & 0x3ffff) >> 4;
}
constexpr uint64_t kDeeperInRow = 32 >> 4, kDeeperInRows = 2048 >> 4;

// Before the first product that reads registers that ordinary code wrote.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Ends a group of products.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most `pending` of the last groups run.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Keeps the compiler from moving an access to `d` across this line.
template <int n>
__device__ __forceinline__ void keep(float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// What the product's depth lies along.
enum class Major { k = 0, mn = 1 };

#define OPENLLAMA_D8(d, i)                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define OPENLLAMA_D32(d, i) \
  OPENLLAMA_D8(d, i), OPENLLAMA_D8(d, i + 8), OPENLLAMA_D8(d, i + 16), OPENLLAMA_D8(d, i + 24)
#define OPENLLAMA_D64(d, i) OPENLLAMA_D32(d, i), OPENLLAMA_D32(d, i + 32)
#define OPENLLAMA_D128(d, i) OPENLLAMA_D64(d, i), OPENLLAMA_D64(d, i + 64)
#define OPENLLAMA_R32                                     \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15" \
  ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define OPENLLAMA_R64                                                \
  OPENLLAMA_R32                                                      \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
  ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define OPENLLAMA_R128                                                           \
  OPENLLAMA_R64                                                                  \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"             \
  ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"             \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
  ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// A and B out of shared memory. The operands after D are numbered from its count of registers on.
#define OPENLLAMA_WGMMA(TYPE, COLUMNS, COUNT, A, B, A_MAJOR, B_MAJOR, ADD)                               \
  template <Major a_major, Major b_major>                                                                \
  __device__ __forceinline__ void wgmma_##TYPE(float (&d)[COUNT], uint64_t a, uint64_t b, bool add) {    \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " ADD ", 0; wgmma.mma_async.sync.aligned.m64n" #COLUMNS  \
                 "k16.f32." #TYPE "." #TYPE " {" OPENLLAMA_R##COUNT "}, " A ", " B ", p, 1, 1, " A_MAJOR \
                                                                    ", " B_MAJOR ";}"                    \
                 : OPENLLAMA_D##COUNT(d, 0)                                                              \
                 : "l"(a), "l"(b), "n"(int(a_major)), "n"(int(b_major)), "r"(int(add))                   \
                 : "memory");                                                                            \
  }
#define OPENLLAMA_WGMMAS(TYPE)                                      \
  OPENLLAMA_WGMMA(TYPE, 64, 32, "%32", "%33", "%34", "%35", "%36")  \
  OPENLLAMA_WGMMA(TYPE, 128, 64, "%64", "%65", "%66", "%67", "%68") \
  OPENLLAMA_WGMMA(TYPE, 256, 128, "%128", "%129", "%130", "%131", "%132")
OPENLLAMA_WGMMAS(bf16)
OPENLLAMA_WGMMAS(f16)
#undef OPENLLAMA_WGMMAS
#undef OPENLLAMA_WGMMA

// A out of registers.
#define OPENLLAMA_WGMMA(TYPE, COLUMNS, COUNT, A, B, B_MAJOR, ADD)                                        \
  template <Major b_major>                                                                               \
  __device__ __forceinline__ void wgmma_##TYPE(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b,    \
                                               bool add) {                                               \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " ADD ", 0; wgmma.mma_async.sync.aligned.m64n" #COLUMNS  \
                 "k16.f32." #TYPE "." #TYPE " {" OPENLLAMA_R##COUNT "}, " A ", " B ", p, 1, 1, " B_MAJOR \
                                                                    ";}"                                 \
                 : OPENLLAMA_D##COUNT(d, 0)                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(b_major)), "r"(int(add))  \
                 : "memory");                                                                            \
  }
#define OPENLLAMA_WGMMAS(TYPE)                                            \
  OPENLLAMA_WGMMA(TYPE, 64, 32, "{%32,%33,%34,%35}", "%36", "%37", "%38") \
  OPENLLAMA_WGMMA(TYPE, 128, 64, "{%64,%65,%66,%67}", "%68", "%69", "%70")
OPENLLAMA_WGMMAS(bf16)
OPENLLAMA_WGMMAS(f16)
#undef OPENLLAMA_WGMMAS
#undef OPENLLAMA_WGMMA

// A and B out of shared memory; the first of a sum (add: false) does not read d.
template <class T, Major a_major, Major b_major, int n>
__device__ __forceinline__ void wgmma(float (&d)[n], uint64_t a, uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    wgmma_bf16<a_major, b_major>(d, a, b, add);
  else
    wgmma_f16<a_major, b_major>(d, a, b, add);
}
// A out of registers.
template <class T, Major b_major, int n>
__device__ __forceinline__ void wgmma(float (&d)[n], const uint32_t (&a)[4], uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    wgmma_bf16<b_major>(d, a, b, add);
  else
    wgmma_f16<b_major>(d, a, b, add);
}

}  // namespace openllama::cuda::hopper
