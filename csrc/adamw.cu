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
#include <cfloat>
#include <climits>
#include <unordered_map>

#include "adamw.cuh"

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

// ---------------------------------------------------------------- forms
//
// What is read is kept as it lies in memory until all that a thread needs is on its way.

template <int E>
struct Gradient {
  Words32<E> words;  // those of 16 bits in the first half

  template <bool packs>
  __device__ __forceinline__ void read_from(const AdamWTensor& t, Span<E, packs> span) {
    if (t.grad_dtype == Dtype::f32) {
      words = read<uint32_t>(t.grad, span);
    } else {
      const auto half = read<uint16_t>(t.grad, span);
#pragma unroll
      for (int i = 0; i < E / 2; ++i) words.words[i] = half.words[i];
    }
  }

  __device__ __forceinline__ void unpack_to(float (&g)[E], Dtype dtype) const {
    unpack(g, words);
    if (dtype == Dtype::f32) return;  // a branch, as conversions that are predicated off take their slots
    Words16<E> half;
#pragma unroll
    for (int i = 0; i < E / 2; ++i) half.words[i] = words.words[i];
    if (dtype == Dtype::bf16)
      unpack<__nv_bfloat16>(g, half);
    else
      unpack<__half>(g, half);
  }
};

// The half of a word whose bytes `selector` names, as a signed number: a 9 or b there is the sign of byte 1
// or 3.
__device__ __forceinline__ uint32_t sign_extended(uint32_t word, uint32_t selector) {
  uint32_t to;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(to) : "r"(word), "r"(selector));
  return to;
}

template <Master form, int E>
struct Weight {
  Words32<E> exact;  // of fp32 params and masters
  Words16<E> param;  // of 16 bits
  Words16<E> remainder;

  template <bool packs>
  __device__ __forceinline__ void read_from(const AdamWTensor& t, Span<E, packs> span) {
    if constexpr (form == Master::param) exact = read<uint32_t>(t.param, span);
    if constexpr (form == Master::f32) exact = read<uint32_t>(t.master, span);
    if constexpr (form == Master::none || form == Master::remainder) param = read<uint16_t>(t.param, span);
    if constexpr (form == Master::remainder) remainder = read<uint16_t>(t.master, span);
  }

  __device__ __forceinline__ void unpack_to(float (&w)[E]) const {
    if constexpr (form == Master::param || form == Master::f32) unpack(w, exact);
    if constexpr (form == Master::none) unpack<__nv_bfloat16>(w, param);
    if constexpr (form == Master::remainder) {
      // A remainder of 0x8000 or more had the param rounded up: as a signed number it undoes that.
#pragma unroll
      for (int i = 0; i < E; i += 2) {
        const uint32_t upper = param.words[i / 2], lower = remainder.words[i / 2];
        w[i] = __uint_as_float((upper << 16) + sign_extended(lower, 0x9910));
        w[i + 1] = __uint_as_float((upper & 0xffff0000u) + sign_extended(lower, 0xbb32));
      }
    }
  }

  __device__ __forceinline__ void pack_from(const float (&w)[E], const RandomBits (&random)[E], Dtype dtype) {
    if constexpr (form == Master::param || form == Master::f32) exact = pack(w);
    if constexpr (form == Master::f32)
      param = dtype == Dtype::bf16 ? pack<__nv_bfloat16>(w) : pack<__half>(w);
    if constexpr (form == Master::none) param = pack(w, [&](int i) { return random[i].weight(); });
    if constexpr (form == Master::remainder) {
#pragma unroll
      for (int i = 0; i < E; i += 2) {
        // as whole numbers only the GPU's NaN is greater, 0x7fffffff, whose upper half would round up to -0
        const int a = min(__float_as_int(w[i]), 0x7fc00000), b = min(__float_as_int(w[i + 1]), 0x7fc00000);
        param.words[i / 2] = __byte_perm(a + 0x8000, b + 0x8000, 0x7632);
        remainder.words[i / 2] = __byte_perm(a, b, 0x5410);
      }
    }
  }

  template <bool packs>
  __device__ __forceinline__ void write_to(const AdamWTensor& t, Span<E, packs> span) const {
    if constexpr (form == Master::param) write(t.param, span, exact);
    if constexpr (form != Master::param) write(t.param, span, param);
    if constexpr (form == Master::f32) write(t.master, span, exact);
    if constexpr (form == Master::remainder) write(t.master, span, remainder);
  }
};

// The largest of a warp's numbers, none of which is negative: they are in order as whole numbers, too.
__device__ __forceinline__ float warp_max_of_positive(float v) {
  return __uint_as_float(__reduce_max_sync(0xffffffff, __float_as_uint(v)));
}

// Both moments. For u8 a warp has one block of them.
template <Moments form, int E>
struct MeanAndSquare {
  using T = std::conditional_t<form == Moments::f32, uint32_t,
                               std::conditional_t<form == Moments::bf16, uint16_t, uint8_t>>;
  Words<T, E> mean, square;
  float mean_scale, square_scale;  // of u8

  template <bool packs>
  __device__ __forceinline__ void read_from(const AdamWTensor& t, Span<E, packs> span) {
    mean = read<T>(t.exp_avg, span, form == Moments::u8 ? 128 : 0);
    square = read<T>(t.exp_avg_sq, span);
    if constexpr (form == Moments::u8) {
      const float* scale = t.scales + span.begin / kMomentBlock;
      mean_scale = *scale, square_scale = scale[blocks(t)];
    }
  }

  __device__ __forceinline__ void unpack_to(float (&m)[E], float (&v)[E]) const {
    if constexpr (form == Moments::f32) {
      unpack(m, mean);
      unpack(v, square);
    }
    if constexpr (form == Moments::bf16) {
      unpack<__nv_bfloat16>(m, mean);
      unpack<__nv_bfloat16>(v, square);
    }
    if constexpr (form == Moments::u8) {
      const float scale = mean_scale * kMeanScale;
#pragma unroll
      for (int i = 0; i < E; ++i) {
        m[i] = decode_mean(byte_by_2_to_133(mean.words[i / 4], i % 4), scale);
        v[i] = decode_square(byte_by_2_to_133(square.words[i / 4], i % 4), square_scale);
      }
    }
  }

  __device__ __forceinline__ void pack_from(const float (&m)[E], const float (&v)[E],
                                            const RandomBits (&random)[E]) {
    if constexpr (form == Moments::f32) {
      mean = pack(m);
      square = pack(v);
    }
    if constexpr (form == Moments::bf16) {
      mean = pack(m, [&](int i) { return random[i].mean(); });
      square = pack(v, [&](int i) { return random[i].square(); });
    }
    if constexpr (form == Moments::u8) {
      mean_scale = square_scale = 0;
#pragma unroll
      for (int i = 0; i < E; ++i) {
        mean_scale = fmaxf(mean_scale, fabsf(m[i]));
        square_scale = fmaxf(square_scale, v[i]);
      }
      mean_scale = warp_max_of_positive(mean_scale);
      square_scale = warp_max_of_positive(square_scale);
      const float of_mean = __fdividef(kMeanInverse, fmaxf(mean_scale, kTiny)),
                  of_square = __fdividef(1.0f, fmaxf(square_scale, kTiny));
      float m_codes[E], v_codes[E];
#pragma unroll
      for (int i = 0; i < E; ++i) {
        m_codes[i] = encode_mean(m[i], of_mean, random[i].mean());
        v_codes[i] = encode_square(v[i], of_square, random[i].square());
      }
      mean = pack_lowest_bytes(m_codes);
      square = pack_lowest_bytes(v_codes);
    }
  }

  template <bool packs>
  __device__ __forceinline__ void write_to(const AdamWTensor& t, Span<E, packs> span) const {
    write(t.exp_avg, span, mean);
    write(t.exp_avg_sq, span, square);
    if constexpr (form == Moments::u8) {
      float* scale = t.scales + span.begin / kMomentBlock;
      if (threadIdx.x % 32 == 0) *scale = mean_scale, scale[blocks(t)] = square_scale;
    }
  }

 private:
  static __device__ __forceinline__ int64_t blocks(const AdamWTensor& t) {
    return (t.size + kMomentBlock - 1) / kMomentBlock;
  }
};

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
      mix(mix(table.seed + kGolden) + static_cast<uint32_t>(static_cast<int64_t>(g.step)))};
}

// Of the elements first, first + 1, ...
template <int E>
__device__ __forceinline__ void draw(RandomBits (&to)[E], uint32_t key, int64_t first) {
  const auto low = static_cast<uint32_t>(first), high = static_cast<uint32_t>(first >> 32);
  const uint32_t x = low * kGolden + mix(key + high);
#pragma unroll
  for (int i = 0; i < E; ++i) to[i] = RandomBits::of(x + i * kGolden);
  if (low > UINT_MAX - (E - 1)) {
    const uint32_t beyond = low * kGolden + mix(key + high + 1);
#pragma unroll
    for (int i = 1; i < E; ++i)
      if (low + i < low) to[i] = RandomBits::of(beyond + i * kGolden);
  }
}

// m / (root of v + eps). With 8 bits the root of 0 is 1e-19, so that an eps of 0 divides nothing by 0.
template <Moments form>
__device__ __forceinline__ float direction(float m, float v, const AdamWStep& s) {
  if constexpr (form == Moments::u8)
    return m * fast_reciprocal(fast_sqrt_ftz(v + FLT_MIN) * s.root_scale + s.eps);
  else
    return __fdividef(m, fast_sqrt(v) * s.root_scale + s.eps);
}

template <Master master, Moments moments>
struct Elements {
  static constexpr int E = kEach<moments>;
  Gradient<E> gradient;
  MeanAndSquare<moments, E> both;
  Weight<master, E> weight;

  template <bool packs>
  __device__ __forceinline__ void read_from(const AdamWTensor& t, Span<E, packs> span) {
    both.read_from(t, span);
    weight.read_from(t, span);
    gradient.read_from(t, span);
  }

  __device__ __forceinline__ void step(const AdamWTensor& t, const Step& step, int64_t begin) {
    const AdamWStep& s = step.numbers;
    float g[E], m[E], v[E], w[E];
    gradient.unpack_to(g, t.grad_dtype);
    both.unpack_to(m, v);
    weight.unpack_to(w);
#pragma unroll
    for (int i = 0; i < E; ++i) {
      g[i] *= s.grad_scale;
      m[i] += (g[i] - m[i]) * s.new1;
      v[i] = s.beta2 * v[i] + s.new2 * g[i] * g[i];
      w[i] = w[i] * s.keep - s.step_size * direction<moments>(m[i], v[i], s);
    }
    RandomBits random[E];
    draw(random, step.key, t.first + begin);
    both.pack_from(m, v, random);
    weight.pack_from(w, random, t.param_dtype);
  }

  template <bool packs>
  __device__ __forceinline__ void write_to(const AdamWTensor& t, Span<E, packs> span) const {
    both.write_to(t, span);
    weight.write_to(t, span);
  }
};

template <Master master, Moments moments>
__global__ void __launch_bounds__(kThreads, moments == Moments::u8 ? 3 : 4)
    adamw_kernel(const __grid_constant__ Table table) {
  constexpr int E = kEach<moments>;
  __shared__ Step steps[kMaxGroups];
  if (threadIdx.x < table.group_count) steps[threadIdx.x] = step_of(table, threadIdx.x);
  __syncthreads();
  int at = 0;  // the chunk's tensor
  for (uint32_t chunk = blockIdx.x; chunk < table.first_chunk[table.tensor_count]; chunk += gridDim.x) {
    while (chunk >= table.first_chunk[at + 1]) ++at;
    const AdamWTensor& t = table.tensors[at];
    const int64_t begin = (static_cast<int64_t>(chunk - table.first_chunk[at]) * kThreads + threadIdx.x) * E;
    if (begin - threadIdx.x % 32 * E >= t.size) continue;  // by whole warps, which share a block of moments
    const int count = static_cast<int>(min(t.size - begin, int64_t{E}));
    const bool packs = t.packs && count == E;
    Elements<master, moments> elements;
    if (packs)
      elements.read_from(t, Span<E, true>{begin, E});
    else
      elements.read_from(t, Span<E, false>{begin, count});
    elements.step(t, steps[t.group], begin);
    if (packs)
      elements.write_to(t, Span<E, true>{begin, E});
    else
      elements.write_to(t, Span<E, false>{begin, count});
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
