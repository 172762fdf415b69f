// A CUDA driver for tests, which runs the real kernels on the CPU: one block at a time, a thread for each of its
// threads. It stands in for libcuda.so.1 where the operators look for three of its functions.
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

struct Dimension {
  unsigned x;
};
struct float4 {
  float x, y, z, w;
};
static thread_local Dimension threadIdx, blockIdx;
static Dimension blockDim;
static std::unique_ptr<std::barrier<>> all_threads;
static float exchanged[1024];

static void __syncthreads() { all_threads->arrive_and_wait(); }
static float __shfl_xor_sync(unsigned, float value, int apart) {
  exchanged[threadIdx.x] = value;
  __syncthreads();
  const float other = exchanged[threadIdx.x ^ apart];
  __syncthreads();
  return other;
}
static float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
#define __expf std::exp

#define __device__
#define __global__
#define __shared__ static
#include "arguments.h"

struct Half {
  unsigned short bits;
};
struct Bfloat16 {
  unsigned short bits;
};
static float to_float(Half value) { return static_cast<float>(std::bit_cast<_Float16>(value.bits)); }
static float to_float(Bfloat16 value) { return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }
static float to_float(float value) { return value; }
static void from_float(float value, Half& result) {
  result.bits = std::bit_cast<unsigned short>(static_cast<_Float16>(value));
}
static void from_float(float value, Bfloat16& result) {
  const auto bits = std::bit_cast<uint32_t>(value);
  result.bits = static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to the nearest, ties to even
}
static void from_float(float value, float& result) { result = value; }

// To the nearest number of FP8 (E4M3), ties to even, within ±448.
static unsigned char to_float8(float value) {
  if (std::isnan(value)) return 0x7f;
  const unsigned sign = std::signbit(value) ? 0x80 : 0;
  const float size = std::fmin(std::fabs(value), 448.0f);
  int exponent;
  std::frexp(size, &exponent);
  exponent = size == 0.0f || exponent < -5 ? -5 : exponent;  // the smallest of normal numbers
  unsigned steps = static_cast<unsigned>(std::nearbyint(std::ldexp(size, 4 - exponent)));  // of an eighth of a power
  // 8 to 15 steps are a normal number; 16 are the next power of two, and fewer than 8 have no leading one
  return static_cast<unsigned char>(sign | (steps + 8u * static_cast<unsigned>(exponent + 5)));
}
static unsigned short to_float8(float first, float second) {
  return static_cast<unsigned short>(to_float8(first) | to_float8(second) << 8);
}
#define DDIT_FLOAT8

#include "kernels.cu"

namespace {

struct Named {
  const char* name;
  void (*run)(const void*);
};

#define DDIT_NAMED(kind, name, Arguments) \
  {#kind "_" #name, [](const void* of) { kind##_##name(*static_cast<const Arguments*>(of)); }}
#define DDIT_NAMED_ROWS(name) DDIT_NAMED(residual, name, ResidualArguments), DDIT_NAMED(heads, name, HeadArguments)

const Named kKernels[] = {
    DDIT_NAMED_ROWS(f32_f32),
    DDIT_NAMED_ROWS(f16_f16),
    DDIT_NAMED_ROWS(f16_f32),
    DDIT_NAMED_ROWS(bf16_bf16),
    DDIT_NAMED_ROWS(bf16_f32),
    DDIT_NAMED(gelu, f32, GeluArguments),
    DDIT_NAMED(gelu, f16, GeluArguments),
    DDIT_NAMED(gelu, bf16, GeluArguments),
    DDIT_NAMED(quantise, f32, QuantiseArguments),
    DDIT_NAMED(quantise, f16, QuantiseArguments),
    DDIT_NAMED(quantise, bf16, QuantiseArguments),
    DDIT_NAMED(rescale, f32, RescaleArguments),
    DDIT_NAMED(rescale, f16, RescaleArguments),
    DDIT_NAMED(rescale, bf16, RescaleArguments),
};

}  // namespace

extern "C" int cuLibraryLoadData(void** code, const void*, void*, void*, unsigned, void*, void*, unsigned) {
  *code = code;
  return 0;
}

extern "C" int cuLibraryGetKernel(const void** kernel, void*, const char* name) {
  for (const Named& one : kKernels) {
    if (std::strcmp(one.name, name) == 0) {
      *kernel = &one;
      return 0;
    }
  }
  return 500;  // CUDA_ERROR_NOT_FOUND
}

extern "C" int cuLaunchKernel(const void* kernel, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned,
                              unsigned, unsigned, void*, void** parameters, void**) {
  blockDim.x = threads;
  all_threads = std::make_unique<std::barrier<>>(threads);
  std::vector<std::thread> running;
  for (unsigned thread = 0; thread < threads; ++thread) {
    running.emplace_back([=] {
      threadIdx.x = thread;
      for (unsigned block = 0; block < blocks; ++block) {
        blockIdx.x = block;
        static_cast<const Named*>(kernel)->run(parameters[0]);
        __syncthreads();
      }
    });
  }
  for (auto& thread : running) thread.join();
  return 0;
}
