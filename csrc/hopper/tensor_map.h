// Describes tensors to TMA, the unit that copies boxes of them to and from shared memory.
#pragma once

#include <cuda.h>
#include <dlfcn.h>

#include <initializer_list>

#include "../ops.h"

namespace openllama::cuda::hopper {

constexpr int kPanel = 64;  // columns of a box: 128 bytes, swizzled

struct Dimension {
  int64_t size, stride;  // in elements
};

// A 16-bit tensor of `columns` contiguous elements by the others, the innermost first, in boxes of kPanel
// columns by `rows` of the first of them. Addresses and strides are multiples of 16 bytes. The driver's
// function is found at run time, so that the library loads where there is no driver.
inline cudaError_t describe(CUtensorMap& map, Dtype dtype, const void* data, int64_t columns,
                            std::initializer_list<Dimension> others, int rows) {
  static const auto encode = [] {
    void* driver = dlopen("libcuda.so.1", RTLD_LAZY);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(
        driver ? dlsym(driver, "cuTensorMapEncodeTiled") : nullptr);
  }();
  if (!encode) return cudaErrorSharedObjectSymbolNotFound;
  // a call of the driver needs a context; a thread of autograd's may not have used the runtime, which makes
  // it one, yet
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  cuuint64_t sizes[5] = {static_cast<cuuint64_t>(columns)}, bytes[4];
  cuuint32_t box[5] = {kPanel, static_cast<cuuint32_t>(rows), 1, 1, 1}, steps[5] = {1, 1, 1, 1, 1};
  cuuint32_t rank = 1;
  for (const auto& [size, stride] : others) {
    sizes[rank] = static_cast<cuuint64_t>(size);
    bytes[rank - 1] = static_cast<cuuint64_t>(stride * 2);
    ++rank;
  }
  const auto type = dtype == Dtype::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result = encode(&map, type, rank, const_cast<void*>(data), sizes, bytes, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace openllama::cuda::hopper
