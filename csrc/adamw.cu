// AdamW (Loshchilov and Hutter, 2019) over a list of tensors in one launch. Bound by memory: 28 bytes a
// parameter for fp32 states, 12 and the gradient's for the leanest exact form.
//
// The list travels in the kernel's parameters, so that nothing is copied to the device first and a CUDA graph
// keeps it. Blocks walk over chunks, an access or two a thread, which belong to one tensor each. What may
// change from step to step (learning rate, step number, the gradients' scale) can be read on the device.
//
// Exact 16-bit remainder: weight = (bits + 0x8000) >> 16 can be undone with the low 16 bits at hand; rounding
// ties to even could not. Moments of 16 and 8 bits are rounded stochastically: an exponential average's steps
// are smaller than their spacing, and would be lost. exp_avg has 8 bits on a quadratic scale, exp_avg_sq on a
// logarithmic one, as it is its relative error that counts.
#include <climits>
#include <unordered_map>

#include "common.cuh"

namespace openllama::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxTensors = 360;  // of a launch: with the groups, under the 32,764 bytes of parameters
constexpr int kMaxGroups = 24;

// Neighbouring elements of a thread: one access of fp32; for 8-bit moments a warp's share of a block of them.
template <Moments moments>
constexpr int kEach = moments == Moments::u8 ? kMomentBlock / 32 : 4;

struct Table {
  AdamWTensor tensors[kMaxTensors];
  uint32_t first_chunk[kMaxTensors + 1];
  AdamWGroup groups[kMaxGroups];
  int32_t group_numbers[kMaxGroups];  // among all groups: where lrs and steps have theirs
  const float *lrs, *steps, *grad_scale;
  int32_t tensor_count, group_count;
  uint32_t seed;
};
static_assert(sizeof(Table) <= 32'764);

// ---------------------------------------------------------------- random bits

__device__ __forceinline__ uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

// Keyed by (seed, step, element), so that they do not depend on how tensors are split.
__device__ __forceinline__ uint32_t random_bits(uint32_t key, int64_t element) {
  return mix(mix(static_cast<uint32_t>(element) ^ key) + static_cast<uint32_t>(element >> 32) + key);
}

// The upper 16 bits of a float, one more with a chance of its lower 16 bits over 2^16. `random` has 16 bits.
__device__ __forceinline__ uint32_t round_to_bf16(float v, uint32_t random) {
  const uint32_t bits = __float_as_uint(v);
  if ((bits & 0x7f800000u) == 0x7f800000u)
    return __float_as_uint(to_float(from_float<__nv_bfloat16>(v))) >> 16;
  return (bits + random) >> 16;
}

// ---------------------------------------------------------------- fast arithmetic
//
// The lean forms have some 170 instructions an element before they are slower than memory. Conversions
// between whole numbers and floats share the slow unit of square roots and logarithms, so they are done by
// adding 2^23, at which a float's spacing is 1. The approximations are off by 1 or 2 ulps of an update, which
// is itself rounded into a weight.

__device__ __forceinline__ float fast_sqrt(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr float k2To23 = 8388608.0f;

// A whole number below 2^23 as a float.
__device__ __forceinline__ float whole_to_float(uint32_t x) {
  return __uint_as_float(x | 0x4b000000u) - k2To23;
}
// floor of a float in 0 .. 2^22, with the bits of the whole number in the lower half of it.
__device__ __forceinline__ float floor_above_2_to_23(float x) { return __fadd_rd(x, k2To23); }

// ---------------------------------------------------------------- 8-bit codes

constexpr float kPerOctave = 6.375f;      // of exp_avg_sq: 255 codes over 40 octaves
constexpr float kSpacing = 0.114863549f;  // 2^(1 / kPerOctave) - 1

__device__ __forceinline__ float decode_mean(uint32_t code, float scale) {
  const float q = whole_to_float(code) - 128.0f;
  return scale * (1.0f / 16129.0f) * q * fabsf(q);
}

// `random` is in [0, 1), `inverse` is 1 / scale.
__device__ __forceinline__ uint32_t encode_mean(float m, float inverse, float random) {
  const float square = fabsf(m) * inverse * 16129.0f;  // of |q|
  const float above = floor_above_2_to_23(fminf(fast_sqrt(square), 126.0f)), floor = above - k2To23;
  // between floor^2 and (floor + 1)^2
  const uint32_t q =
      (__float_as_uint(above) & 0xff) + (random * (2.0f * floor + 1.0f) < square - floor * floor);
  return m < 0.0f ? 128 - q : 128 + q;
}

__device__ __forceinline__ float decode_square(uint32_t code, float scale) {
  return code ? scale * fast_exp2((whole_to_float(code) - 255.0f) * (1.0f / kPerOctave)) : 0.0f;
}

__device__ __forceinline__ uint32_t encode_square(float v, float inverse, float random) {
  const float place = 255.0f + kPerOctave * __log2f(v * inverse);
  const float above = floor_above_2_to_23(fminf(fmaxf(place, 1.0f), 254.0f)), floor = above - k2To23;
  // between the values of floor and floor + 1, relative to the first
  const float share = fast_exp2((place - floor) * (1.0f / kPerOctave)) - 1.0f;
  const uint32_t code = (__float_as_uint(above) & 0xff) + (random * kSpacing < share);
  return v > 0.0f ? code : 0;
}

// ---------------------------------------------------------------- memory

// Elements begin, begin + 1, ... of a tensor that a thread has: E, moved in one access or few where `packs`;
// else one by one, the first `count`.
template <int E>
struct Span {
  int64_t begin;
  int count;
  bool packs;
};

template <class T, int E>
__device__ __forceinline__ void read(float (&to)[E], const void* base, Span<E> span) {
  constexpr int N = kPack<T> < E ? kPack<T> : E;
  const T* from = static_cast<const T*>(base) + span.begin;
#pragma unroll
  for (int i = 0; i < E; i += N) {
    if (span.packs) {
      const auto v = load<N>(from + i);
#pragma unroll
      for (int n = 0; n < N; ++n) to[i + n] = v[n];
    } else {
#pragma unroll
      for (int n = 0; n < N; ++n) to[i + n] = i + n < span.count ? to_float(from[i + n]) : 0.0f;
    }
  }
}

template <class T, int E>
__device__ __forceinline__ void write(void* base, Span<E> span, const float (&values)[E]) {
  constexpr int N = kPack<T> < E ? kPack<T> : E;
  T* to = static_cast<T*>(base) + span.begin;
#pragma unroll
  for (int i = 0; i < E; i += N) {
    float part[N];
#pragma unroll
    for (int n = 0; n < N; ++n) part[n] = values[i + n];
    if (span.packs) {
      store(to + i, Vec<T, N>::of(part));
    } else {
#pragma unroll
      for (int n = 0; n < N; ++n)
        if (i + n < span.count) to[i + n] = from_float<T>(part[n]);
    }
  }
}

// Whole numbers of 8 or 16 bits.
template <class T, int E>
__device__ __forceinline__ void read_bits(uint32_t (&to)[E], const void* base, Span<E> span) {
  struct alignas(E * sizeof(T)) Pack {
    T data[E];
  };
  const T* from = static_cast<const T*>(base) + span.begin;
  if (span.packs) {
    const Pack pack = *reinterpret_cast<const Pack*>(from);
#pragma unroll
    for (int i = 0; i < E; ++i) to[i] = pack.data[i];
  } else {
#pragma unroll
    for (int i = 0; i < E; ++i) to[i] = i < span.count ? from[i] : 0;
  }
}

template <class T, int E>
__device__ __forceinline__ void write_bits(void* base, Span<E> span, const uint32_t (&values)[E]) {
  struct alignas(E * sizeof(T)) Pack {
    T data[E];
  } pack;
  T* to = static_cast<T*>(base) + span.begin;
#pragma unroll
  for (int i = 0; i < E; ++i) pack.data[i] = static_cast<T>(values[i]);
  if (span.packs) {
    *reinterpret_cast<Pack*>(to) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < E; ++i)
      if (i < span.count) to[i] = pack.data[i];
  }
}

template <int E>
__device__ __forceinline__ void read_gradient(float (&to)[E], const AdamWTensor& t, Span<E> span) {
  if (t.grad_dtype == Dtype::f32)
    read<float>(to, t.grad, span);
  else if (t.grad_dtype == Dtype::bf16)
    read<__nv_bfloat16>(to, t.grad, span);
  else
    read<__half>(to, t.grad, span);
}

// ---------------------------------------------------------------- forms

template <Master form, int E>
__device__ __forceinline__ void read_weight(float (&to)[E], const AdamWTensor& t, Span<E> span) {
  if constexpr (form == Master::param) read<float>(to, t.param, span);
  if constexpr (form == Master::f32) read<float>(to, t.master, span);
  if constexpr (form == Master::none) read<__nv_bfloat16>(to, t.param, span);
  if constexpr (form == Master::remainder) {
    uint32_t upper[E], lower[E];
    read_bits<uint16_t>(upper, t.param, span);
    read_bits<uint16_t>(lower, t.master, span);
#pragma unroll
    for (int i = 0; i < E; ++i) to[i] = __uint_as_float((upper[i] - (lower[i] >> 15)) << 16 | lower[i]);
  }
}

template <Master form, int E>
__device__ __forceinline__ void write_weight(const float (&w)[E], const AdamWTensor& t, Span<E> span,
                                             const uint32_t (&random)[E]) {
  if constexpr (form == Master::param) write<float>(t.param, span, w);
  if constexpr (form == Master::f32) {
    write<float>(t.master, span, w);
    if (t.param_dtype == Dtype::bf16)
      write<__nv_bfloat16>(t.param, span, w);
    else
      write<__half>(t.param, span, w);
  }
  if constexpr (form == Master::none || form == Master::remainder) {
    uint32_t upper[E], lower[E];
#pragma unroll
    for (int i = 0; i < E; ++i) {
      // the GPU's NaN is 0x7fffffff, whose upper half would round up to -0
      const uint32_t bits = isnan(w[i]) ? 0x7fc00000u : __float_as_uint(w[i]);
      upper[i] = form == Master::none ? round_to_bf16(w[i], random[i] & 0xffff) : (bits + 0x8000u) >> 16;
      lower[i] = bits & 0xffff;
    }
    write_bits<uint16_t>(t.param, span, upper);
    if constexpr (form == Master::remainder) write_bits<uint16_t>(t.master, span, lower);
  }
}

template <Moments form, int E>
__device__ __forceinline__ void read_moments(float (&m)[E], float (&v)[E], const AdamWTensor& t,
                                             Span<E> span) {
  if constexpr (form == Moments::f32) {
    read<float>(m, t.exp_avg, span);
    read<float>(v, t.exp_avg_sq, span);
  }
  if constexpr (form == Moments::bf16) {
    read<__nv_bfloat16>(m, t.exp_avg, span);
    read<__nv_bfloat16>(v, t.exp_avg_sq, span);
  }
  if constexpr (form == Moments::u8) {
    const int64_t blocks = (t.size + kMomentBlock - 1) / kMomentBlock, block = span.begin / kMomentBlock;
    const bool here = span.count > 0;
    const float m_scale = here ? t.scales[block] : 0.0f, v_scale = here ? t.scales[blocks + block] : 0.0f;
    uint32_t m_codes[E], v_codes[E];
    read_bits<uint8_t>(m_codes, t.exp_avg, span);
    read_bits<uint8_t>(v_codes, t.exp_avg_sq, span);
#pragma unroll
    for (int i = 0; i < E; ++i) {
      m[i] = i < span.count ? decode_mean(m_codes[i], m_scale) : 0.0f;
      v[i] = decode_square(v_codes[i], v_scale);
    }
  }
}

// For u8 called by whole warps, each of which has one block of moments.
template <Moments form, int E>
__device__ __forceinline__ void write_moments(const float (&m)[E], const float (&v)[E], const AdamWTensor& t,
                                              Span<E> span, const uint32_t (&random)[E]) {
  if constexpr (form == Moments::f32) {
    write<float>(t.exp_avg, span, m);
    write<float>(t.exp_avg_sq, span, v);
  }
  if constexpr (form != Moments::f32) {
    uint32_t m_bits[E], v_bits[E];
    float m_scale = 0, v_scale = 0;
    if constexpr (form == Moments::u8) {
#pragma unroll
      for (int i = 0; i < E; ++i) {
        if (i >= span.count) continue;
        m_scale = fmaxf(m_scale, fabsf(m[i]));
        v_scale = fmaxf(v_scale, v[i]);
      }
      m_scale = warp_max(m_scale);
      v_scale = warp_max(v_scale);
    }
    const float m_inverse = m_scale > 0.0f ? 1.0f / m_scale : 0.0f,
                v_inverse = v_scale > 0.0f ? 1.0f / v_scale : 0.0f;
#pragma unroll
    for (int i = 0; i < E; ++i) {
      const uint32_t m_random = random[i] >> 16, v_random = mix(random[i] + 0x9e3779b9u) & 0xffff;
      if constexpr (form == Moments::bf16) {
        m_bits[i] = round_to_bf16(m[i], m_random);
        v_bits[i] = round_to_bf16(v[i], v_random);
      } else {
        m_bits[i] = encode_mean(m[i], m_inverse, whole_to_float(m_random) * 0x1p-16f);
        v_bits[i] = encode_square(v[i], v_inverse, whole_to_float(v_random) * 0x1p-16f);
      }
    }
    if constexpr (form == Moments::bf16) {
      write_bits<uint16_t>(t.exp_avg, span, m_bits);
      write_bits<uint16_t>(t.exp_avg_sq, span, v_bits);
    } else {
      write_bits<uint8_t>(t.exp_avg, span, m_bits);
      write_bits<uint8_t>(t.exp_avg_sq, span, v_bits);
      const int64_t blocks = (t.size + kMomentBlock - 1) / kMomentBlock, block = span.begin / kMomentBlock;
      if (threadIdx.x % 32 == 0 && span.count > 0)
        t.scales[block] = m_scale, t.scales[blocks + block] = v_scale;
    }
  }
}

// ---------------------------------------------------------------- kernels

// What a group's elements share: see AdamWStep. In double, once a block.
struct Step {
  AdamWStep numbers;
  uint32_t key;
};

__device__ Step step_of(const Table& table, int group) {
  AdamWGroup g = table.groups[group];
  if (table.lrs) g.lr = table.lrs[table.group_numbers[group]];
  if (table.steps) g.step = table.steps[table.group_numbers[group]];
  return {
      {static_cast<float>(g.beta2), static_cast<float>(g.eps), static_cast<float>(1 - g.lr * g.weight_decay),
       static_cast<float>(1 - g.beta1), static_cast<float>(1 - g.beta2),
       static_cast<float>(g.lr / (1 - pow(g.beta1, g.step))),
       static_cast<float>(1 / sqrt(1 - pow(g.beta2, g.step))), table.grad_scale ? *table.grad_scale : 1.0f},
      mix(mix(table.seed + 0x9e3779b9u) + static_cast<uint32_t>(static_cast<int64_t>(g.step)))};
}

template <Master master, Moments moments, int E>
__device__ __forceinline__ void step_span(const AdamWTensor& t, const Step& step, Span<E> span) {
  const AdamWStep& s = step.numbers;
  float g[E], m[E], v[E], w[E];
  read_gradient(g, t, span);
  read_moments<moments>(m, v, t, span);
  read_weight<master>(w, t, span);
  uint32_t random[E];
#pragma unroll
  for (int i = 0; i < E; ++i) {
    g[i] *= s.grad_scale;
    m[i] += (g[i] - m[i]) * s.new1;
    v[i] = s.beta2 * v[i] + s.new2 * g[i] * g[i];
    w[i] = w[i] * s.keep - s.step_size * __fdividef(m[i], fast_sqrt(v[i]) * s.root_scale + s.eps);
    random[i] = random_bits(step.key, t.first + span.begin + i);
  }
  write_moments<moments>(m, v, t, span, random);
  write_weight<master>(w, t, span, random);
}

template <Master master, Moments moments>
__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ Table table) {
  constexpr int E = kEach<moments>;
  __shared__ Step steps[kMaxGroups];
  if (threadIdx.x < table.group_count) steps[threadIdx.x] = step_of(table, threadIdx.x);
  __syncthreads();
  int at = 0;  // the chunk's tensor
  for (uint32_t chunk = blockIdx.x; chunk < table.first_chunk[table.tensor_count]; chunk += gridDim.x) {
    while (chunk >= table.first_chunk[at + 1]) ++at;
    const AdamWTensor& t = table.tensors[at];
    const int64_t begin = (static_cast<int64_t>(chunk - table.first_chunk[at]) * kThreads + threadIdx.x) * E;
    const int count = static_cast<int>(min(max(t.size - begin, int64_t{0}), int64_t{E}));
    step_span<master, moments>(t, steps[t.group], Span<E>{begin, count, t.packs && count == E});
  }
}

// ---------------------------------------------------------------- launcher

bool on_16_bytes(const AdamWTensor& t) {
  return aligned(t.param) && aligned(t.grad) && aligned(t.exp_avg) && aligned(t.exp_avg_sq) &&
         aligned(t.master);
}

template <Master master, Moments moments>
cudaError_t launch(const Table& table, cudaStream_t stream) {
  const auto kernel = adamw_kernel<master, moments>;
  const int64_t chunks = table.first_chunk[table.tensor_count];
  if (chunks == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(std::min(chunks, resident_blocks(kernel, kThreads)));
  kernel<<<blocks, kThreads, 0, stream>>>(table);
  return cudaGetLastError();
}

template <Moments moments>
cudaError_t launch(const Table& table, Master master, cudaStream_t stream) {
  switch (master) {
    case Master::param:
      return launch<Master::param, moments>(table, stream);
    case Master::f32:
      return launch<Master::f32, moments>(table, stream);
    case Master::remainder:
      return launch<Master::remainder, moments>(table, stream);
    case Master::none:
      return launch<Master::none, moments>(table, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch(const Table& table, Master master, Moments moments, cudaStream_t stream) {
  switch (moments) {
    case Moments::f32:
      return launch<Moments::f32>(table, master, stream);
    case Moments::bf16:
      return launch<Moments::bf16>(table, master, stream);
    case Moments::u8:
      return launch<Moments::u8>(table, master, stream);
  }
  return cudaErrorInvalidValue;
}

// Fills the table with tensors from `next` on, as many as it holds, and moves `next` behind them.
void fill(Table& table, const std::vector<AdamWTensor>& tensors, const std::vector<AdamWGroup>& groups,
          int64_t chunk, size_t& next) {
  std::unordered_map<int32_t, int32_t> places;  // of groups in this table
  table.tensor_count = table.group_count = 0;
  table.first_chunk[0] = 0;
  for (; next < tensors.size() && table.tensor_count < kMaxTensors; ++next) {
    AdamWTensor t = tensors[next];
    const int64_t chunks = table.first_chunk[table.tensor_count] + ceil_div(t.size, chunk);
    const auto [place, fresh] = places.try_emplace(t.group, table.group_count);
    if ((fresh && table.group_count == kMaxGroups) || (chunks > INT_MAX && table.tensor_count)) return;
    if (fresh) {
      table.group_numbers[table.group_count] = t.group;
      table.groups[table.group_count++] = groups[t.group];
    }
    t.group = place->second;
    t.packs = on_16_bytes(t);
    table.tensors[table.tensor_count++] = t;
    table.first_chunk[table.tensor_count] = static_cast<uint32_t>(chunks);
  }
}

}  // namespace

cudaError_t adamw(const std::vector<AdamWTensor>& tensors, const std::vector<AdamWGroup>& groups,
                  Master master, Moments moments, const float* lrs, const float* steps,
                  const float* grad_scale, uint32_t seed, cudaStream_t stream) {
  const int64_t chunk = kThreads * (moments == Moments::u8 ? kEach<Moments::u8> : kEach<Moments::f32>);
  Table table;
  table.lrs = lrs, table.steps = steps, table.grad_scale = grad_scale, table.seed = seed;
  cudaError_t error = cudaSuccess;
  for (size_t next = 0; next < tensors.size() && error == cudaSuccess;) {
    fill(table, tensors, groups, chunk, next);
    error = launch(table, master, moments, stream);
  }
  return error;
}

}  // namespace openllama::cuda
