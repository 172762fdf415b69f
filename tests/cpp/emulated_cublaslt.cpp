// A cuBLASLt for tests, which computes on the CPU: products of FP8 matrices in plain loops, column by column as
// cuBLASLt stores them. DDIT_EMULATED_SCALES=0 makes it refuse scales for every row, as it does on GPUs that have none;
// DDIT_EMULATED_FAST=0 refuses fast sums with scales. It stands in for libcublasLt.so.13.
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>

namespace {

constexpr int kInvalid = 7, kNotSupported = 15;  // CUBLAS_STATUS_…
constexpr int kFloat = 0, kHalf = 2, kBfloat16 = 14, kFloat8 = 28;

struct Description {
  int compute, scale_type;
  int32_t transposed_a = 0, transposed_b = 0;
  int32_t mode_a = 0, mode_b = 0;
  int8_t fast = 0;
  const float *scale_a = nullptr, *scale_b = nullptr;
};
struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t leading;
};
struct Preference {
  uint64_t workspace = 0;
};
struct Heuristic {
  uint64_t algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

bool is_off(const char* name) {
  const char* value = std::getenv(name);
  return value && std::strcmp(value, "0") == 0;
}

float from_float8(uint8_t bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  if (exponent == 15 && fraction == 7) return std::numeric_limits<float>::quiet_NaN();
  const float size = exponent ? std::ldexp(8.0f + fraction, exponent - 10) : std::ldexp(float(fraction), -9);
  return bits & 128 ? -size : size;
}

template <typename T>
bool take(T& field, const void* value, size_t size) {
  if (size != sizeof(T)) return false;
  std::memcpy(&field, value, size);
  return true;
}

}  // namespace

extern "C" {

int cublasLtCreate(void** handle) {
  static int made;
  *handle = &made;
  return 0;
}

int cublasLtMatmulDescCreate(Description** made, int compute, int scale_type) {
  *made = new Description{compute, scale_type};
  return 0;
}

int cublasLtMatmulDescDestroy(Description* description) {
  delete description;
  return 0;
}

int cublasLtMatmulDescSetAttribute(Description* of, int attribute, const void* value, size_t size) {
  const auto taken = [&](auto& field) { return take(field, value, size) ? 0 : kInvalid; };
  switch (attribute) {
    case 3:
      return taken(of->transposed_a);
    case 4:
      return taken(of->transposed_b);
    case 17:
      return taken(of->scale_a);
    case 18:
      return taken(of->scale_b);
    case 25:
      return taken(of->fast);
    case 31:
      return taken(of->mode_a);
    case 32:
      return taken(of->mode_b);
  }
  return kInvalid;
}

int cublasLtMatrixLayoutCreate(Layout** made, int type, uint64_t rows, uint64_t columns, int64_t leading) {
  *made = new Layout{type, rows, columns, leading};
  return 0;
}

int cublasLtMatmulPreferenceCreate(Preference** made) {
  *made = new Preference;
  return 0;
}

int cublasLtMatmulPreferenceSetAttribute(Preference* of, int attribute, const void* value, size_t size) {
  return attribute == 1 && take(of->workspace, value, size) ? 0 : kInvalid;
}

int cublasLtMatmulAlgoGetHeuristic(void*, const Description* of, const Layout* a, const Layout* b, const Layout* c,
                                   const Layout* d, const Preference* preference, int, Heuristic* result, int* given) {
  *given = 0;
  if (a->type != kFloat8 || b->type != kFloat8 || c != d || of->compute != 68 || of->scale_type != kFloat) {
    return kNotSupported;
  }
  if (!of->transposed_a || of->transposed_b || a->rows != b->rows || a->columns != d->rows || b->columns != d->columns)
    return kInvalid;
  if (a->rows % 16 || d->rows % 16 || a->leading % 16 || b->leading % 16) return kNotSupported;  // TN, 16 bytes
  if (of->mode_a != of->mode_b || (of->mode_a && of->mode_a != 3)) return kInvalid;
  if (of->mode_a && (!of->scale_a || !of->scale_b)) return kInvalid;
  if (of->mode_a && (is_off("DDIT_EMULATED_SCALES") || (of->fast && is_off("DDIT_EMULATED_FAST")))) {
    return kNotSupported;
  }
  *result = Heuristic{};
  result->algorithm[0] = 42;
  result->workspace = preference->workspace / 1024;
  *given = 1;
  return 0;
}

int cublasLtMatmul(void*, const Description* of, const float* alpha, const uint8_t* a, const Layout* at,
                   const uint8_t* b, const Layout* bt, const float* beta, const void* c, const Layout*, void* d,
                   const Layout* dt, const uint64_t* algorithm, void* workspace, size_t size, void*) {
  for (const void* place : {static_cast<const void*>(a), static_cast<const void*>(b), static_cast<const void*>(d)}) {
    if (reinterpret_cast<uintptr_t>(place) % 16) return kInvalid;
  }
  if (c != d || *beta != 0.0f || algorithm[0] != 42) return kInvalid;
  std::memset(workspace, 0xff, size);  // it must be there, and apart from the matrices
  for (uint64_t column = 0; column < dt->columns; ++column) {
    for (uint64_t row = 0; row < dt->rows; ++row) {
      float sum = 0.0f;
      for (uint64_t k = 0; k < at->rows; ++k)
        sum += from_float8(a[k + row * at->leading]) * from_float8(b[k + column * bt->leading]);
      sum *= *alpha;
      if (of->mode_a) sum *= of->scale_a[row] * of->scale_b[column];
      const uint64_t place = row + column * dt->leading;
      if (dt->type == kFloat) {
        static_cast<float*>(d)[place] = sum;
      } else if (dt->type == kHalf) {
        static_cast<_Float16*>(d)[place] = static_cast<_Float16>(sum);
      } else {
        const auto bits = std::bit_cast<uint32_t>(sum);
        static_cast<uint16_t*>(d)[place] = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
      }
    }
  }
  return dt->type == kFloat || dt->type == kHalf || dt->type == kBfloat16 ? 0 : kInvalid;
}

}  // extern "C"
