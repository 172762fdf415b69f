// The kernels of the operators in domain "ddit": what lies between a level's matrix products, in one pass over the
// tokens each. They load and store the graph's type T and compute in float32. NVRTC compiles arguments.h,
// conversions.cuh and this for the GPU that is there; no header of CUDA is needed. tests/cpp/emulated_gpu.cpp runs them
// without one.

template <typename T>
struct alignas(16) Vector {
  T values[kVector];
};

template <typename T>
__device__ inline void load(const void* source, long long place, float (&values)[kVector]) {
  const Vector<T> vector = static_cast<const Vector<T>*>(source)[place];
#pragma unroll
  for (int k = 0; k < kVector; ++k) values[k] = to_float(vector.values[k]);
}

template <typename T>
__device__ inline void store(void* target, long long place, const float (&values)[kVector]) {
  Vector<T> vector;
#pragma unroll
  for (int k = 0; k < kVector; ++k) from_float(values[k], vector.values[k]);
  static_cast<Vector<T>*>(target)[place] = vector;
}

template <typename T>
__device__ inline void add(const void* source, long long place, float (&values)[kVector]) {
  float more[kVector];
  load<T>(source, place, more);
#pragma unroll
  for (int k = 0; k < kVector; ++k) values[k] += more[k];
}

// The sum over a group of neighbouring threads, in all of them; `size` is a power of two up to 32.
__device__ inline float group_sum(float value, int size) {
  for (int apart = size / 2; apart; apart /= 2) value += __shfl_xor_sync(~0u, value, apart);
  return value;
}

// The sum over the block, in all threads. `partial` has 32 places and is used once in a kernel.
__device__ inline float block_sum(float value, float* partial) {
  value = group_sum(value, 32);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  return group_sum(threadIdx.x % 32 < blockDim.x / 32 ? partial[threadIdx.x % 32] : 0.0f, 32);
}

// The largest over the block, in all threads; `partial` as in `block_sum`. Numbers are not negative.
__device__ inline float block_largest(float value, float* partial) {
  for (int half = 0; half < 2; ++half) {
    for (int apart = 16; apart; apart /= 2) {
      const float other = __shfl_xor_sync(~0u, value, apart);
      value = other > value ? other : value;
    }
    if (half) break;
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    value = threadIdx.x % 32 < blockDim.x / 32 ? partial[threadIdx.x % 32] : 0.0f;
  }
  return value;
}

template <typename T, typename M>
__device__ inline void residual(const ResidualArguments& of) {
  __shared__ float sums[32], squares[32];
  const int vectors = of.channels / kVector;
  const long long row = (long long)blockIdx.x * vectors;
  const int sample = blockIdx.x / of.tokens;
  float kept[kVectorsPerThread][kVector];
  float total = 0.0f;
#pragma unroll
  for (int slot = 0; slot < kVectorsPerThread; ++slot) {
    const int place = threadIdx.x + slot * blockDim.x;
    if (place >= vectors) continue;
    float (&values)[kVector] = kept[slot];
    load<T>(of.x, row + place, values);
    if (of.y) {
      float change[kVector];
      load<T>(of.y, row + place, change);
      if (of.bias) add<T>(of.bias, place, change);
      if (of.branch) add<T>(of.branch, row + place, change);
      if (of.gate) {
        float gate[kVector];
        load<M>(of.gate, (long long)sample * vectors + place, gate);
#pragma unroll
        for (int k = 0; k < kVector; ++k) change[k] *= gate[k];
      }
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        const float sum = values[k] + change[k];
        // unlike fminf and fmaxf this lets a NaN through
        const float cut = sum > of.limit ? of.limit : (sum < -of.limit ? -of.limit : sum);
        T rounded;  // the norm is of what is stored
        from_float(cut, rounded);
        values[k] = to_float(rounded);
      }
      store<T>(of.sum, row + place, values);
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) total += values[k];
  }
  if (!of.normed) return;
  const float mean = block_sum(total, sums) / of.channels;
  float square = 0.0f;
#pragma unroll
  for (int slot = 0; slot < kVectorsPerThread; ++slot) {
    const int place = threadIdx.x + slot * blockDim.x;
    if (place >= vectors) continue;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      kept[slot][k] -= mean;
      square += kept[slot][k] * kept[slot][k];
    }
  }
  const float factor = rsqrtf(block_sum(square, squares) / of.channels + of.epsilon);
  const long long modulation = (long long)sample * of.modulation_step / kVector;
#pragma unroll
  for (int slot = 0; slot < kVectorsPerThread; ++slot) {
    const int place = threadIdx.x + slot * blockDim.x;
    if (place >= vectors) continue;
    float scale[kVector], shift[kVector];
    load<M>(of.scale, modulation + place, scale);
    load<M>(of.shift, modulation + place, shift);
#pragma unroll
    for (int k = 0; k < kVector; ++k) kept[slot][k] = kept[slot][k] * factor * (of.offset + scale[k]) + shift[k];
    store<T>(of.normed, row + place, kept[slot]);
  }
}

template <typename T, typename M>
__device__ inline void heads(const HeadArguments& of) {
  __shared__ float squares[32];
  const int vectors = of.channels / kVector, lanes = of.head / kVector;
  const int all = of.text_tokens + of.tokens;
  const int sample = blockIdx.x / all, token = blockIdx.x % all;
  const bool is_text = token < of.text_tokens;
  const void* source = is_text ? of.text : of.x;
  const void* bias = is_text ? of.text_bias : of.bias;
  const void* weight = is_text ? of.text_weight : of.weight;
  const long long row =
      (is_text ? (long long)sample * of.text_tokens + token : (long long)sample * of.tokens + token - of.text_tokens) *
      vectors;
  float kept[kVectorsPerThread][kVector];
  float square[kVectorsPerThread];
#pragma unroll
  for (int slot = 0; slot < kVectorsPerThread; ++slot) {
    const int place = threadIdx.x + slot * blockDim.x;
    square[slot] = 0.0f;
    if (place >= vectors) continue;
    load<T>(source, row + place, kept[slot]);
    add<T>(bias, place, kept[slot]);
#pragma unroll
    for (int k = 0; k < kVector; ++k) square[slot] += kept[slot][k] * kept[slot][k];
  }
  if (weight) {
    float whole = 0.0f;
    if (of.across) {
#pragma unroll
      for (int slot = 0; slot < kVectorsPerThread; ++slot) whole += square[slot];
      whole = block_sum(whole, squares);
    }
#pragma unroll
    for (int slot = 0; slot < kVectorsPerThread; ++slot) {
      // all threads of a warp take part, also those that have no vector
      const float sum = of.across ? whole : group_sum(square[slot], lanes);
      const int place = threadIdx.x + slot * blockDim.x;
      if (place >= vectors) continue;
      const float factor = rsqrtf(sum / (of.across ? of.channels : of.head) + of.epsilon);
      float scale[kVector];
      load<M>(weight, of.across ? place : place % lanes, scale);
#pragma unroll
      for (int k = 0; k < kVector; ++k) kept[slot][k] *= factor * scale[k];
    }
  }
#pragma unroll
  for (int slot = 0; slot < kVectorsPerThread; ++slot) {
    const int place = threadIdx.x + slot * blockDim.x;
    if (place >= vectors) continue;
    float (&values)[kVector] = kept[slot];
    if (of.cos) {
      // four pairs of neighbours: the table's numbers of this place in a head
      const long long pairs = (long long)token * lanes + place % lanes;
      const float4 c = reinterpret_cast<const float4*>(of.cos)[pairs],
                   s = reinterpret_cast<const float4*>(of.sin)[pairs];
      const float cosines[] = {c.x, c.y, c.z, c.w}, sines[] = {s.x, s.y, s.z, s.w};
#pragma unroll
      for (int k = 0; k < kVector; k += 2) {
        const float a = values[k], b = values[k + 1];
        values[k] = a * cosines[k / 2] - b * sines[k / 2];
        values[k + 1] = b * cosines[k / 2] + a * sines[k / 2];
      }
    }
    store<T>(of.out, (long long)blockIdx.x * vectors + place, values);
  }
}

// 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))), where 0.5·(1 + tanh(u)) = 1 / (1 + exp(−2u))
__device__ inline float gelu(float x) {
  const float u = 0.7978845608f * (x + 0.044715f * x * x * x);
  return x / (1.0f + __expf(-2.0f * u));
}

template <typename T>
__device__ inline void join_gelu(const GeluArguments& of) {
  const int first = of.first_channels / kVector, second = of.channels / kVector;
  const long long row = blockIdx.x;
  for (int place = threadIdx.x; place < first + second; place += blockDim.x) {
    float values[kVector];
    if (place < first) {
      load<T>(of.first, row * first + place, values);
    } else {
      const int at = place - first;
      load<T>(of.h, row * second + at, values);
      add<T>(of.bias, at, values);
      if (of.branch) add<T>(of.branch, row * second + at, values);
#pragma unroll
      for (int k = 0; k < kVector; ++k) values[k] = gelu(values[k]);
    }
    store<T>(of.out, row * (first + second) + place, values);
  }
}

#ifdef DDIT_FLOAT8
struct alignas(8) Float8Vector {
  unsigned short pairs[kVector / 2];
};

template <typename T>
__device__ inline void quantise(const QuantiseArguments& of) {
  __shared__ float partial[32];
  const int vectors = of.channels / kVector;
  const long long row = (long long)blockIdx.x * vectors;
  float kept[kVectorsPerThread][kVector];
  float largest = 0.0f;
#pragma unroll
  for (int slot = 0; slot < kVectorsPerThread; ++slot) {
    const int place = threadIdx.x + slot * blockDim.x;
    if (place >= vectors) continue;
    load<T>(of.x, row + place, kept[slot]);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const float size = kept[slot][k] < 0.0f ? -kept[slot][k] : kept[slot][k];
      largest = size > largest ? size : largest;
    }
  }
  float scale = block_largest(largest, partial) / 448.0f;
  if (scale < 1.175494351e-38f) scale = 1.0f;  // a row of zeros, or of numbers that leave no reciprocal
  if (threadIdx.x == 0) of.scale[blockIdx.x] = scale;
  const float factor = 1.0f / scale;
#pragma unroll
  for (int slot = 0; slot < kVectorsPerThread; ++slot) {
    const int place = threadIdx.x + slot * blockDim.x;
    if (place >= vectors) continue;
    Float8Vector vector;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      // x / scale to the last bit (Markstein): the product with the reciprocal alone often lies beside a tie of FP8
      const float nearly = kept[slot][k] * factor;
      kept[slot][k] = fmaf(fmaf(-nearly, scale, kept[slot][k]), factor, nearly);
    }
#pragma unroll
    for (int k = 0; k < kVector; k += 2) vector.pairs[k / 2] = to_float8(kept[slot][k], kept[slot][k + 1]);
    static_cast<Float8Vector*>(of.quantised)[row + place] = vector;
  }
}

template <typename T>
__device__ inline void rescale(const RescaleArguments& of) {
  const int vectors = of.channels / kVector;
  const long long row = (long long)blockIdx.x * vectors;
  const float factor = of.rows[blockIdx.x] * of.factor;
  for (int place = threadIdx.x; place < vectors; place += blockDim.x) {
    float values[kVector], scales[kVector];
    load<T>(of.out, row + place, values);
    load<float>(of.columns, place, scales);
#pragma unroll
    for (int k = 0; k < kVector; ++k) values[k] *= factor * scales[k];
    store<T>(of.out, row + place, values);
  }
}

#define DDIT_FLOAT8_KERNELS(name, T)                                                    \
  extern "C" __global__ void quantise_##name(QuantiseArguments of) { quantise<T>(of); } \
  extern "C" __global__ void rescale_##name(RescaleArguments of) { rescale<T>(of); }

DDIT_FLOAT8_KERNELS(f32, float)
DDIT_FLOAT8_KERNELS(f16, Half)
DDIT_FLOAT8_KERNELS(bf16, Bfloat16)
#endif

#define DDIT_TWO_TYPES(name, T, M)                                                         \
  extern "C" __global__ void residual_##name(ResidualArguments of) { residual<T, M>(of); } \
  extern "C" __global__ void heads_##name(HeadArguments of) { heads<T, M>(of); }
#define DDIT_ONE_TYPE(name, T) \
  extern "C" __global__ void gelu_##name(GeluArguments of) { join_gelu<T>(of); }

DDIT_TWO_TYPES(f32_f32, float, float)
DDIT_TWO_TYPES(f16_f16, Half, Half)
DDIT_TWO_TYPES(f16_f32, Half, float)
DDIT_TWO_TYPES(bf16_bf16, Bfloat16, Bfloat16)
DDIT_TWO_TYPES(bf16_f32, Bfloat16, float)
DDIT_ONE_TYPE(f32, float)
DDIT_ONE_TYPE(f16, Half)
DDIT_ONE_TYPE(bf16, Bfloat16)
