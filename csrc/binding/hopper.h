// What the bindings of products on Hopper share.
#pragma once

#include "common.h"

namespace openllama {

constexpr int64_t kMultiple =
    8;  // elements of 16 bytes, which TMA wants addresses and strides to be multiples of

// A 16-bit matrix as TMA reads it.
inline void check_matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns, const Tensor& x) {
  check_rows(t, name, rows, columns, x);
  require(t.scalar_type() != ScalarType::Float, "openllama: ", name, " must be bfloat16 or float16");
  require(rows > 0 && columns > 0 && rows <= INT32_MAX / 2 && columns <= INT32_MAX / 2, "openllama: ", name,
          " must have from 1 to 2^30 - 1 rows and columns");
  require(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && columns % kMultiple == 0 &&
              t.stride(0) % kMultiple == 0,
          "openllama: ", name, " must have a width and a stride of a multiple of ", kMultiple,
          ", on an address of one of 16 bytes");
}

}  // namespace openllama
