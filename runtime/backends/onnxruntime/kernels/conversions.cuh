// Half-precision numbers, converted by one instruction each. Compiled after arguments.h and before kernels.cu.
#pragma once

struct Half {
  unsigned short bits;
};
struct Bfloat16 {
  unsigned short bits;
};

__device__ inline float to_float(Half value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}
__device__ inline float to_float(Bfloat16 value) { return __uint_as_float(unsigned(value.bits) << 16); }
__device__ inline float to_float(float value) { return value; }

__device__ inline void from_float(float value, Half& result) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
}
__device__ inline void from_float(float value, Bfloat16& result) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
}
__device__ inline void from_float(float value, float& result) { result = value; }

#if __CUDA_ARCH__ >= 890  // Ada, and all that came after it
#define DDIT_FLOAT8
// Two numbers in FP8 (E4M3), the first in the lower byte; what is larger than 448 becomes 448.
__device__ inline unsigned short to_float8(float first, float second) {
  unsigned short result;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(result) : "f"(second), "f"(first));
  return result;
}
#endif
