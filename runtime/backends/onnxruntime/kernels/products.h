// Matrix products of FP8 numbers by cuBLASLt, which ONNX Runtime's CUDA provider brings into the process.
//
// What is used of cublasLt.h is declared here, so that CUDA is not needed to compile this: functions, and values of the
// enumerations by their names in the cuBLAS documentation (https://docs.nvidia.com/cuda/cublas/, "cuBLASLt Datatypes
// Reference"), which are the same in CUDA 12 and 13. Scales for every row and column came with 12.9; an older library
// refuses them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>

#include "library.h"

namespace cublaslt {

using Handle = struct cublasLtContext*;
using Description = struct cublasLtMatmulDescOpaque_t*;
using Layout = struct cublasLtMatrixLayoutOpaque_t*;
using Preference = struct cublasLtMatmulPreferenceOpaque_t*;

struct Algorithm {  // cublasLtMatmulAlgo_t
  uint64_t data[8];
};
struct Heuristic {  // cublasLtMatmulHeuristicResult_t
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
static_assert(sizeof(Heuristic) == 96, "cublasLtMatmulHeuristicResult_t has 96 bytes");

enum : int {
  CUDA_R_32F = 0,
  CUDA_R_16F = 2,
  CUDA_R_16BF = 14,
  CUDA_R_8F_E4M3 = 28,
  CUBLAS_COMPUTE_32F = 68,
  CUBLAS_STATUS_NOT_SUPPORTED = 15,
  CUBLAS_OP_T = 1,
  CUBLASLT_MATMUL_DESC_TRANSA = 3,
  CUBLASLT_MATMUL_DESC_A_SCALE_POINTER = 17,
  CUBLASLT_MATMUL_DESC_B_SCALE_POINTER = 18,
  CUBLASLT_MATMUL_DESC_FAST_ACCUM = 25,
  CUBLASLT_MATMUL_DESC_A_SCALE_MODE = 31,
  CUBLASLT_MATMUL_DESC_B_SCALE_MODE = 32,
  CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F = 3,
  CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
};

constexpr uint64_t kWorkspace = 32 << 20;  // bytes, as much as torch gives it on Hopper

// The library, with all that is used of it.
class Library {
 public:
  // Whether it is there.
  bool open() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!opened_) {
#ifdef _WIN32
      void* library = open_library({"cublasLt64_13.dll", "cublasLt64_12.dll"});
#else
      void* library = open_library({"libcublasLt.so.13", "libcublasLt.so.12"});
#endif
      opened_ =
          library && find(library, "cublasLtCreate", create) && find(library, "cublasLtMatmulDescCreate", describe) &&
          find(library, "cublasLtMatmulDescDestroy", forget) && find(library, "cublasLtMatmulDescSetAttribute", set) &&
          find(library, "cublasLtMatrixLayoutCreate", lay_out) &&
          find(library, "cublasLtMatmulPreferenceCreate", prefer) &&
          find(library, "cublasLtMatmulPreferenceSetAttribute", set_preference) &&
          find(library, "cublasLtMatmulAlgoGetHeuristic", choose) && find(library, "cublasLtMatmul", multiply);
    }
    return opened_;
  }

  int (*create)(Handle*) = nullptr;
  int (*describe)(Description*, int, int) = nullptr;
  int (*forget)(Description) = nullptr;
  int (*set)(Description, int, const void*, size_t) = nullptr;
  int (*lay_out)(Layout*, int, uint64_t, uint64_t, int64_t) = nullptr;
  int (*prefer)(Preference*) = nullptr;
  int (*set_preference)(Preference, int, const void*, size_t) = nullptr;
  int (*choose)(Handle, Description, Layout, Layout, Layout, Layout, Preference, int, Heuristic*, int*) = nullptr;
  int (*multiply)(Handle, Description, const void*, const void*, Layout, const void*, Layout, const void*, const void*,
                  Layout, void*, Layout, const Algorithm*, void*, size_t, void*) = nullptr;

 private:
  std::mutex mutex_;
  bool opened_ = false;
};

// out (M, N) = x (M, K) · weightᵀ, with weight (N, K). Row by row in memory that is, column by column, the product
// outᵀ = weight · xᵀ with both factors' K side by side: A is the weight, transposed, and B is x.
struct Sizes {
  int64_t rows, columns, inner;  // M, N, K
  int type;                      // of out: CUDA_R_16F, CUDA_R_16BF or CUDA_R_32F

  bool operator<(const Sizes& other) const {
    return std::tie(rows, columns, inner, type) < std::tie(other.rows, other.columns, other.inner, other.type);
  }
};

// How cuBLASLt computes products of certain sizes.
struct Plan {
  Description description = nullptr;
  Layout weight = nullptr, x = nullptr, out = nullptr;
  Heuristic chosen{};
  bool scales = false;  // whether it applies the scales; otherwise what it gives is to be multiplied by them
};

class Products {
 public:
  // What of the unscaled sum is given where the scales are left out: 1 / 448², so that float16 can hold it.
  static constexpr float kShare = 1.0f / (448.0f * 448.0f);

  static constexpr int64_t kFewRows = 2048;

  explicit Products(Library& library) : library_(library) {}

  // The plan for a product. Returns cuBLAS's error. Plans are kept until the process ends: all sessions use them.
  int plan(const Sizes& sizes, const float* weight_scale, Plan*& found) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known = plans_.find(sizes);
    if (known != plans_.end()) {
      found = &known->second;
      return 0;
    }
    Plan made;
    if (const int status = prepare(sizes, made)) return status;
    // cuBLASLt's kernels that apply scales are slower where there is little to scale. Measured on an H200 with rows of
    // 768, 3072 columns and an inner size of 15360: 0.095 ms, without scales and with a pass of our own 0.063.
    const bool first = sizes.rows > kFewRows || sizes.columns > sizes.inner;
    int status = 0;
    // Sums in the tensor cores' own precision, as torchao takes them, before those that are moved to float32 now and
    // then, which take longer. Only an address that is not null matters to the choice.
    for (const auto& [scales, fast] : {std::pair(first, true), {!first, true}, {first, false}, {!first, false}}) {
      status = choose(scales, fast, weight_scale, made);
      if (!status) break;
    }
    if (status) return status;
    found = &plans_.emplace(sizes, made).first->second;
    return 0;
  }

  // Queue a product. Returns cuBLAS's error.
  int run(const Plan& plan, const void* weight, const float* weight_scale, const void* x, const float* x_scale,
          void* out, void* workspace, void* stream) {
    const std::lock_guard<std::mutex> lock(mutex_);  // a plan's description holds the scales' places
    if (plan.scales) {
      if (const int status = set_scales(plan.description, weight_scale, x_scale)) return status;
    }
    const float alpha = plan.scales ? 1.0f : kShare, beta = 0.0f;
    return library_.multiply(handle_, plan.description, &alpha, weight, plan.weight, x, plan.x, &beta, out, plan.out,
                             out, plan.out, &plan.chosen.algorithm, workspace, plan.chosen.workspace, stream);
  }

 private:
  // Create what all plans use, and the layouts of one.
  int prepare(const Sizes& sizes, Plan& plan) {
    int status = handle_ ? 0 : library_.create(&handle_);
    if (!status && !preference_) {
      const uint64_t most = kWorkspace;
      status = library_.prefer(&preference_);
      if (!status)
        status = library_.set_preference(preference_, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &most, sizeof(most));
    }
    const auto rows = static_cast<uint64_t>(sizes.rows), columns = static_cast<uint64_t>(sizes.columns);
    const auto inner = static_cast<uint64_t>(sizes.inner);
    if (!status) status = library_.lay_out(&plan.weight, CUDA_R_8F_E4M3, inner, columns, sizes.inner);
    if (!status) status = library_.lay_out(&plan.x, CUDA_R_8F_E4M3, inner, rows, sizes.inner);
    if (!status) status = library_.lay_out(&plan.out, sizes.type, columns, rows, sizes.columns);
    return status;
  }

  int choose(bool scales, bool fast, const float* any_scale, Plan& plan) {
    const int32_t transposed = CUBLAS_OP_T, mode = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    const int8_t fast_sums = fast;
    plan.scales = scales;
    int status = library_.describe(&plan.description, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (status) return status;
    status = set(plan.description, CUBLASLT_MATMUL_DESC_TRANSA, transposed);
    if (!status) status = set(plan.description, CUBLASLT_MATMUL_DESC_FAST_ACCUM, fast_sums);
    if (!status && scales) status = set(plan.description, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, mode);
    if (!status && scales) status = set(plan.description, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, mode);
    if (!status && scales) status = set_scales(plan.description, any_scale, any_scale);
    int given = 0;
    if (!status)
      status = library_.choose(handle_, plan.description, plan.weight, plan.x, plan.out, plan.out, preference_, 1,
                               &plan.chosen, &given);
    if (!status) status = given ? plan.chosen.state : CUBLAS_STATUS_NOT_SUPPORTED;
    if (status) library_.forget(plan.description);
    return status;
  }

  template <typename T>
  int set(Description description, int attribute, const T& value) {
    return library_.set(description, attribute, &value, sizeof(value));
  }

  int set_scales(Description description, const float* weight_scale, const float* x_scale) {
    const int status = set(description, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, weight_scale);
    return status ? status : set(description, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, x_scale);
  }

  Library& library_;
  std::mutex mutex_;
  Handle handle_ = nullptr;
  Preference preference_ = nullptr;
  std::map<Sizes, Plan> plans_;
};

}  // namespace cublaslt
