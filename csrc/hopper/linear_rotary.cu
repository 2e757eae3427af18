// Rotary inside the matrix product before it, which hides it: q and k are turned on their way to memory.
#include "product.cuh"

namespace openllama::cuda {
namespace {

using namespace hopper;

// A lane takes 16 bytes of each half of a head, and the angles of these pairs; a warp two rows.
template <class T, int head_dim>
struct Turn {
  using Element = T;
  using Arguments = LinearRotary;
  using Eight = Vec<T, kPart>;
  struct Maps {
    CUtensorMap x, weight[3];
  };
  struct Room {};
  static constexpr Major major = Major::k;
  static constexpr int step = kColumns, half = head_dim / 2, lanes = kColumns / 2 / kPart,
                       together = 32 / lanes;
  static constexpr int kBatch = 2;  // rows that a lane takes at once: it waits for their angles together

  Memory<Turn>& m;
  const Maps& maps;
  const Arguments& a;

  static __host__ __device__ int64_t columns(const Arguments& a) { return a.columns; }
  static __device__ __forceinline__ void clear(Room&) {}

  static __device__ __forceinline__ void load_half(T* to, const Maps& maps, const Arguments& a,
                                                   uint64_t* full, int which, int column, int k) {
    int64_t from = column + which * (kColumns / 2);
    int i = 0;
    for (; i < 2 && from >= a.width[i] && a.width[i + 1]; ++i) from -= a.width[i];
    load_box_for(kBoth, to, &maps.weight[i], full, k, static_cast<int>(from));
  }

  template <class F>
  __device__ __forceinline__ void tile(int row, int column, const F& wait_for_tile) {
    const int warp = threadIdx.x / 32 - 1, lane = threadIdx.x % lanes, beside = threadIdx.x % 32 / lanes;
    const int angle = lane * kPart % half, low = lane * kPart / half * head_dim + angle;
    const int rows = min(kRows, static_cast<int>(a.tokens) - row);
    const bool turns = column + low < a.rotated;
    wait_for_tile();
    if (column + low >= a.columns) return;
    T* const out = static_cast<T*>(a.out) + row * a.columns + column + low;
#pragma unroll 1
    for (int first = warp * together + beside; first < rows; first += kBatch * kWarps * together) {
      Vec<float, kPart> cos[kBatch], sin[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
        if (const int r = first + b * kWarps * together; r < rows && turns) {
          const int64_t position = a.positions[row + r];
          // no message: a call anywhere in the kernel makes ptxas wait for each product
          if (position < 0 || position >= a.table_rows) __trap();
          cos[b] = load<kPart>(a.cos + position * half + angle);
          sin[b] = load<kPart>(a.sin + position * half + angle);
        }
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
        if (const int r = first + b * kWarps * together; r < rows) {
          auto x = load<kPart>(m.part(r, low)), y = load<kPart>(m.part(r, low + half));
          if (turns) turn(x, y, cos[b], sin[b]);
          store(out + r * a.columns, x);
          store(out + r * a.columns + half, y);
        }
    }
  }

  static __device__ __forceinline__ void turn(Eight& x, Eight& y, const Vec<float, kPart>& cos,
                                              const Vec<float, kPart>& sin) {
    float left[kPart], right[kPart];
#pragma unroll
    for (int n = 0; n < kPart; ++n) {
      left[n] = x[n] * cos[n] - y[n] * sin[n];
      right[n] = y[n] * cos[n] + x[n] * sin[n];
    }
    x = Eight::of(left), y = Eight::of(right);
  }
};

template <class Finisher>
cudaError_t run(const LinearRotary& a, cudaStream_t stream) {
  typename Finisher::Maps maps{};
  cudaError_t error = describe(maps.x, a.dtype, a.x, a.hidden, {{a.tokens, a.x_stride}}, kRows);
  for (int i = 0; i < 3 && a.width[i] && error == cudaSuccess; ++i)
    error = describe(maps.weight[i], a.dtype, a.weight[i], a.hidden, {{a.width[i], a.weight_stride[i]}},
                     kColumns / 2);
  return error == cudaSuccess ? launch<Finisher>(maps, a, stream) : error;
}

}  // namespace

cudaError_t linear_rotary(const LinearRotary& a, cudaStream_t stream) {
  return with_half(a.dtype, [&](auto t) {
    using T = decltype(t);
    return a.head_dim == 128 ? run<Turn<T, 128>>(a, stream) : run<Turn<T, 64>>(a, stream);
  });
}

}  // namespace openllama::cuda
