// Barriers in shared memory that count bytes, for exchanges between the blocks of a cluster (sm_90; PTX
// ISA 8.0).
#pragma once

#include <cstdint>

namespace openllama::cuda::hopper {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// The address of shared memory as PTX takes it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// One thread's call, before the blocks of the cluster meet for the first time: `arrivals` end a phase.
__device__ __forceinline__ void init(uint64_t& barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals)
               : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and lets the phase end only when `bytes` have come too.
__device__ __forceinline__ void arrive_expecting(uint64_t& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(bytes)
               : "memory");
}

// Writes 8 bytes to `to` as it is in the block of this rank, and counts them at that block's `barrier`.
// Unlike a cluster barrier it does not wait for the thread's own stores to global memory.
__device__ __forceinline__ void send(uint64_t& to, uint64_t value, uint64_t& barrier, uint32_t rank) {
  uint32_t remote, remote_barrier;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(&to)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(remote_barrier)
      : "r"(shared_address(&barrier)), "r"(rank));
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(remote),
               "l"(value), "r"(remote_barrier)
               : "memory");
}

// Waits for the end of the phase of this parity: 0 for the first.
__device__ __forceinline__ void wait(uint64_t& barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

#endif

}  // namespace openllama::cuda::hopper
