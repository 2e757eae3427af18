// What the binding of every op shares: argument checks, allocation, and the CUDA stream.
//
// The binding is written on torch's stable ABI: one binary for every torch from 2.11 on. Each file of this
// folder holds one op: its schema, the allocation of its outputs, and the calls of its CPU and CUDA kernels.
// Arguments are checked with good messages in Python (kernels/<op>.py); the checks here only keep a direct
// call of a raw op from touching memory it must not.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "../cpu/kernels.h"
#include "../ops.h"

#ifdef USE_CUDA
// Weak: a CPU build of torch has no such symbol, and this library loads there all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);
#endif

namespace openllama {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Raises RuntimeError. STD_TORCH_CHECK would put the function, the file and the line before the message.
template <class... Parts>
void require(bool condition, const Parts&... message) {
  if (condition) [[likely]]
    return;
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

// ---------------------------------------------------------------- checks

inline Dtype dtype_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
          "openllama: takes float32, bfloat16 or float16");
  return type == ScalarType::Float ? Dtype::f32 : type == ScalarType::BFloat16 ? Dtype::bf16 : Dtype::f16;
}

inline Dtype cpu_dtype_of(const Tensor& t) {
  const Dtype dtype = dtype_of(t);
  require(dtype != Dtype::f16, "openllama: the CPU kernels take float32 or bfloat16");
  return dtype;
}

inline void check_device(const Tensor& t, const char* name, const Tensor& x) {
  require(t.device() == x.device(), "openllama: ", name, " must be on its partner's device");
}

// `x` is the op's main tensor, whose device all others share; it is its own partner.

inline void check_rows(const Tensor& t, const char* name, int64_t rows, int64_t columns, const Tensor& x) {
  require(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns &&
              (t.stride(1) == 1 || columns <= 1 || rows == 0),
          "openllama: ", name, " must be (", rows, ", ", columns, ") with contiguous rows");
  require(t.scalar_type() == x.scalar_type(), "openllama: ", name, " must have its partner's dtype");
  check_device(t, name, x);
}

inline void check_like(const Tensor& t, const char* name, const Tensor& x) {
  check_rows(t, name, x.size(0), x.size(1), x);
}

inline void check_flat(const Tensor& t, const char* name, int64_t size, ScalarType dtype, const Tensor& x) {
  require(t.is_contiguous() && t.numel() == size && t.scalar_type() == dtype, "openllama: ", name,
          " must hold ", size, " contiguous elements of the right dtype");
  check_device(t, name, x);
}

// ---------------------------------------------------------------- tensors

inline const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }
inline int64_t row_stride(const OptionalTensor& t) { return t ? t->stride(0) : 0; }
inline const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
inline float* mutable_floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

inline Tensor new_f32(const Tensor& like, std::vector<int64_t> size) {
  return torch::stable::new_empty(like, size, ScalarType::Float);
}

inline Tensor new_like(const Tensor& like, std::vector<int64_t> size) {
  return torch::stable::new_empty(like, size);
}

// ---------------------------------------------------------------- CPU

// Rows of at least this many bytes a thread, so that small inputs are not split for nothing.
constexpr int64_t kGrainBytes = 32 * 1024;

template <class F>
void for_rows(int64_t rows, int64_t row_bytes, const F& body) {
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row_bytes));
  torch::stable::parallel_for(0, rows, grain, body);
}

// ---------------------------------------------------------------- CUDA

#ifdef USE_CUDA

inline void check(cudaError_t error, const char* op) {
  require(error == cudaSuccess, "openllama: ", op, ": ", cudaGetErrorName(error), ": ",
          cudaGetErrorString(error));
}

inline int32_t cuda_index(const Tensor& t) {
  require(t.is_cuda(), "openllama: a CUDA kernel takes tensors on a GPU only");
  return t.get_device_index();
}

// Sets the tensor's device for the scope and finds torch's current stream on it.
struct CudaScope {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;

  explicit CudaScope(const Tensor& t) : guard(cuda_index(t)) {
    require(aoti_torch_get_current_cuda_stream != nullptr,
            "openllama: torch's current-stream symbol is missing; rebuild the library against this torch");
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

#endif

}  // namespace openllama
