// What the matrix products use of cuBLASLt, found in the process at run time.
//
// torch has the library loaded; nothing here links it or needs its header, so that one binary serves torch's
// builds for CUDA 12 and 13. Types and numbers are those of NVIDIA's documented C API, the same in both.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>

namespace openllama::cublaslt {

enum : int32_t { kOpN = 0, kOpT = 1 };              // cublasOperation_t
enum : int32_t { kF32 = 0, kF16 = 2, kBF16 = 14 };  // cudaDataType_t
enum : int32_t { kComputeF32 = 68 };                // cublasComputeType_t
enum : int32_t { kTransA = 3, kTransB = 4 };        // cublasLtMatmulDescAttributes_t
// cublasLtMatmulPreferenceAttributes_t; kMinAlignmentA is followed by those of B, C and D
enum : int32_t { kMaxWorkspaceBytes = 1, kReductionSchemes = 3, kMinAlignmentA = 5 };

struct Algorithm {
  uint64_t data[8];
};

struct Proposal {  // cublasLtMatmulHeuristicResult_t
  Algorithm algorithm;
  size_t workspace_bytes;
  int32_t status;
  float waves;
  int32_t reserved[4];
};

using Handle = void*;
using Object = void*;  // a descriptor, a layout, a preference

struct Library {
  int32_t (*create)(Handle*);
  int32_t (*desc_create)(Object*, int32_t compute, int32_t scale);
  int32_t (*desc_destroy)(Object);
  int32_t (*desc_set)(Object, int32_t attribute, const void*, size_t);
  int32_t (*layout_create)(Object*, int32_t type, uint64_t rows, uint64_t columns, int64_t ld);
  int32_t (*layout_destroy)(Object);
  int32_t (*preference_create)(Object*);
  int32_t (*preference_set)(Object, int32_t attribute, const void*, size_t);
  int32_t (*preference_destroy)(Object);
  int32_t (*propose)(Handle, Object desc, Object a, Object b, Object c, Object d, Object preference,
                     int32_t wanted, Proposal*, int32_t* found);
  int32_t (*matmul)(Handle, Object desc, const void* alpha, const void* a, Object, const void* b, Object,
                    const void* beta, const void* c, Object, void* d, Object, const Algorithm*,
                    void* workspace, size_t workspace_bytes, void* stream);
  bool loaded = false;
};

// The library that torch has loaded; `loaded` is false where there is none.
inline const Library& library() {
  static const Library found = [] {
    Library l{};
    void* file = nullptr;
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"})
      if (!file) file = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
    if (!file) return l;
    const auto find = [&](auto& to, const char* name) {
      to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(dlsym(file, name));
      return to != nullptr;
    };
    l.loaded = find(l.create, "cublasLtCreate") && find(l.desc_create, "cublasLtMatmulDescCreate") &&
               find(l.desc_destroy, "cublasLtMatmulDescDestroy") &&
               find(l.layout_destroy, "cublasLtMatrixLayoutDestroy") &&
               find(l.desc_set, "cublasLtMatmulDescSetAttribute") &&
               find(l.layout_create, "cublasLtMatrixLayoutCreate") &&
               find(l.preference_create, "cublasLtMatmulPreferenceCreate") &&
               find(l.preference_set, "cublasLtMatmulPreferenceSetAttribute") &&
               find(l.preference_destroy, "cublasLtMatmulPreferenceDestroy") &&
               find(l.propose, "cublasLtMatmulAlgoGetHeuristic") && find(l.matmul, "cublasLtMatmul");
    return l;
  }();
  return found;
}

}  // namespace openllama::cublaslt
