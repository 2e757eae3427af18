// What the library says of itself: what it was built with, and what it finds on this machine.
#include <string>

#include "common.h"

namespace openllama {
namespace {

// As JSON, for kernels/library.py and `openllama info`.
std::string build_info() {
  std::string info = "{\"torch_target\": \"2.11\"";
#ifdef __x86_64__
  const char* names[] = {"base", "avx2", "avx512"};
  info += std::string(", \"cpu\": \"") + names[int(cpu::level())] + "\"";
#else
  info += ", \"cpu\": \"base\"";
#endif
#ifdef USE_CUDA
  info += ", \"cuda\": " + std::to_string(CUDART_VERSION) + ", \"arches\": \"" OPENLLAMA_ARCHES "\"";
  info += std::string(", \"stream_symbol\": ") + (aoti_torch_get_current_cuda_stream ? "true" : "false");
#else
  info += ", \"cuda\": 0, \"arches\": \"\", \"stream_symbol\": false";
#endif
  return info + "}";
}

// The CUDA that the driver here takes, 1000 major + 10 minor; 0: no driver. It is no part of build_info,
// which is read at import: asking starts the driver, and a process forked after that can't use the GPU.
int64_t driver_version() {
  int version = 0;
#ifdef USE_CUDA
  cudaDriverGetVersion(&version);
#endif
  return version;
}

#ifdef USE_CUDA

void hopper_probe_cuda(Tensor out) {
  const CudaScope scope(out);
  check_flat(out, "out", 1, ScalarType::Int, out);
  check(cuda::hopper_probe(static_cast<int32_t*>(out.mutable_data_ptr()), scope.stream), "hopper_probe");
}

#endif

}  // namespace
}  // namespace openllama

STABLE_TORCH_LIBRARY_FRAGMENT(openllama, m) {
  m.def("build_info() -> str");
  m.def("driver_version() -> int");
  m.def("hopper_probe(Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(openllama, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&openllama::build_info));
  m.impl("driver_version", TORCH_BOX(&openllama::driver_version));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(openllama, CUDA, m) {
  m.impl("hopper_probe", TORCH_BOX(&openllama::hopper_probe_cuda));
}
#endif
