// Operators of domain "ddit" for ONNX Runtime's CUDA provider: a custom-op library without CUDA at compile time.
//
// It holds no kernels. `ddit_load` is given their code, compiled for the GPU that is there (kernels.cu), and the
// operators queue them through the driver on ONNX Runtime's own stream. What each operator computes stands in the model
// as a function of the same name, which ONNX Runtime runs where this library is not registered
// (exporter/graphs/operators.py).

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "library.h"
#include "products.h"
#include "third_party/onnxruntime_c_api.h"

#ifdef _WIN32
#define DDIT_EXPORT extern "C" __declspec(dllexport)
#else
#define DDIT_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

#ifndef DDIT_PROVIDER
#define DDIT_PROVIDER "CUDAExecutionProvider"  // tests run the operators on the CPU, where it is nullptr
#endif

constexpr char kDomain[] = "ddit";
constexpr int kVersion = 1;
constexpr uint32_t kApi = 21;  // ONNX Runtime 1.21 and newer
const OrtApi* ort = nullptr;

// ---- the driver, which the machine has or has not ----

using Code = struct CUlib_st*;
using Function = struct CUkern_st*;

struct Driver {
  int (*load)(Code*, const void*, void*, void*, unsigned, void*, void*, unsigned) = nullptr;
  int (*kernel)(Function*, Code, const char*) = nullptr;
  int (*launch)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                void**) = nullptr;
};

Driver driver;
Code code = nullptr;

bool open_driver() {
#ifdef _WIN32
  void* library = open_library({"nvcuda.dll"});
#else
  void* library = open_library({"libcuda.so.1"});
#endif
  return library && find(library, "cuLibraryLoadData", driver.load) &&
         find(library, "cuLibraryGetKernel", driver.kernel) && find(library, "cuLaunchKernel", driver.launch);
}

cublaslt::Library cublas;
cublaslt::Products products(cublas);

// ---- the operators ----

// An input by what it is: T or M is its type, see arguments.h.
enum class Role {
  x,
  y,
  bias,
  branch,
  gate,
  scale,
  shift,
  weight,
  text,
  text_bias,
  text_weight,
  cos,
  sin,
  first,
  h,
  rounded,  // a weight in FP8, by bytes
  scales    // of its rows, float32
};
enum class Kind { residual, heads, gelu, product };

struct Signature {
  const char* name;
  Kind kind;
  std::vector<Role> inputs;
  size_t outputs;
};

const Signature kSignatures[] = {
    {"ModulatedNorm", Kind::residual, {Role::x, Role::scale, Role::shift}, 1},
    {"Residual", Kind::residual, {Role::x, Role::y, Role::bias}, 1},
    {"ResidualNorm", Kind::residual, {Role::x, Role::y, Role::bias, Role::scale, Role::shift}, 2},
    {"GatedResidual", Kind::residual, {Role::x, Role::y, Role::bias, Role::gate}, 1},
    {"GatedResidualNorm", Kind::residual, {Role::x, Role::y, Role::bias, Role::gate, Role::scale, Role::shift}, 2},
    {"GatedResidualWithBranch", Kind::residual, {Role::x, Role::y, Role::bias, Role::branch, Role::gate}, 1},
    {"GatedResidualNormWithBranch",
     Kind::residual,
     {Role::x, Role::y, Role::bias, Role::branch, Role::gate, Role::scale, Role::shift},
     2},
    {"BiasNorm", Kind::heads, {Role::x, Role::bias, Role::weight}, 1},
    {"BiasNormRotary", Kind::heads, {Role::x, Role::bias, Role::weight, Role::cos, Role::sin}, 1},
    {"JoinedBiasNormRotary",
     Kind::heads,
     {Role::text, Role::text_bias, Role::text_weight, Role::x, Role::bias, Role::weight, Role::cos, Role::sin},
     1},
    {"JoinedBias", Kind::heads, {Role::text, Role::text_bias, Role::x, Role::bias}, 1},
    {"BiasGelu", Kind::gelu, {Role::h, Role::bias}, 1},
    {"BiasGeluWithBranch", Kind::gelu, {Role::h, Role::bias, Role::branch}, 1},
    {"JoinedBiasGelu", Kind::gelu, {Role::first, Role::h, Role::bias}, 1},
    {"JoinedBiasGeluWithBranch", Kind::gelu, {Role::first, Role::h, Role::bias, Role::branch}, 1},
    {"Float8MatMul", Kind::product, {Role::x, Role::rounded, Role::scales}, 1},
};

struct Types {
  const char* name;  // in the kernels' names
  ONNXTensorElementDataType graph, modulation;
};

const Types kTypes[] = {
    {"f32_f32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    {"f16_f16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},
    {"bf16_bf16", ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16},
    {"f16_f32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    {"bf16_f32", ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
};

bool is_modulation(Role role) {
  return role == Role::gate || role == Role::scale || role == Role::shift || role == Role::weight ||
         role == Role::text_weight;
}

OrtStatus* failure(const std::string& message) { return ort->CreateStatus(ORT_INVALID_ARGUMENT, message.c_str()); }

#define DDIT_RETURN_IF_ERROR(call)                 \
  do {                                             \
    if (OrtStatus* status = (call)) return status; \
  } while (false)

struct Tensor {
  const void* data = nullptr;
  std::vector<int64_t> shape;

  int64_t last() const { return shape.empty() ? 1 : shape.back(); }
  int64_t at(size_t place) const { return place < shape.size() ? shape[place] : 1; }
};

// A node of a session.
class Kernel {
 public:
  static OrtStatus* make(const Signature& of, const Types& types, const OrtKernelInfo* info, Kernel** made) {
    auto* kernel = new Kernel(of);
    if (OrtStatus* status = kernel->prepare(types, info)) {
      delete kernel;
      return status;
    }
    *made = kernel;
    return nullptr;
  }

  OrtStatus* run(OrtKernelContext* context) {
    std::vector<Tensor> given(signature_.inputs.size());
    for (size_t place = 0; place < given.size(); ++place) {
      DDIT_RETURN_IF_ERROR(read(context, place, given[place]));
    }
    const auto input = [&](Role role) -> const Tensor& {
      static const Tensor none;
      for (size_t place = 0; place < given.size(); ++place) {
        if (signature_.inputs[place] == role) return given[place];
      }
      return none;
    };
    void* stream = nullptr;
    DDIT_RETURN_IF_ERROR(ort->KernelContext_GetGPUComputeStream(context, &stream));
    switch (signature_.kind) {
      case Kind::residual:
        return residual(context, input, stream);
      case Kind::heads:
        return heads(context, input, stream);
      case Kind::product:
        return product(context, input, stream);
      default:
        return gelu(context, input, stream);
    }
  }

 private:
  explicit Kernel(const Signature& of) : signature_(of) {}

  OrtStatus* prepare(const Types& types, const OrtKernelInfo* info) {
    if (!code) return failure("the kernels of domain ddit are not loaded");
    const char* const kinds[] = {"residual_", "heads_", "gelu_", "quantise_"};
    std::string type = types.name;
    if (signature_.kind == Kind::gelu || signature_.kind == Kind::product) type.resize(type.rfind('_'));  // without M
    DDIT_RETURN_IF_ERROR(find_kernel(kinds[static_cast<int>(signature_.kind)] + type, function_));
    if (signature_.kind == Kind::product) DDIT_RETURN_IF_ERROR(find_kernel("rescale_" + type, rescale_));
    type_ = types.graph;
    number(info, "epsilon", epsilon_);
    number(info, "limit", limit_);
    number(info, "offset", offset_);
    whole(info, "num_heads", heads_);
    whole(info, "across", across_);
    return nullptr;
  }

  static OrtStatus* find_kernel(const std::string& name, Function& function) {
    if (driver.kernel(&function, code, name.c_str())) return failure("the kernel " + name + " is not there");
    return nullptr;
  }

  // Attributes that a node does not have keep their default.
  static void number(const OrtKernelInfo* info, const char* name, float& value) {
    if (OrtStatus* status = ort->KernelInfoGetAttribute_float(info, name, &value)) ort->ReleaseStatus(status);
  }
  static void whole(const OrtKernelInfo* info, const char* name, int64_t& value) {
    if (OrtStatus* status = ort->KernelInfoGetAttribute_int64(info, name, &value)) ort->ReleaseStatus(status);
  }

  static OrtStatus* read(OrtKernelContext* context, size_t place, Tensor& tensor) {
    const OrtValue* value = nullptr;
    DDIT_RETURN_IF_ERROR(ort->KernelContext_GetInput(context, place, &value));
    OrtTensorTypeAndShapeInfo* info = nullptr;
    DDIT_RETURN_IF_ERROR(ort->GetTensorTypeAndShape(value, &info));
    size_t rank = 0;
    OrtStatus* status = ort->GetDimensionsCount(info, &rank);
    if (!status) {
      tensor.shape.resize(rank);
      status = ort->GetDimensions(info, tensor.shape.data(), rank);
    }
    ort->ReleaseTensorTypeAndShapeInfo(info);
    if (status) return status;
    void* data = nullptr;
    DDIT_RETURN_IF_ERROR(ort->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    tensor.data = data;
    return nullptr;
  }

  static OrtStatus* output(OrtKernelContext* context, size_t place, const std::vector<int64_t>& shape, void*& data) {
    OrtValue* value = nullptr;
    DDIT_RETURN_IF_ERROR(ort->KernelContext_GetOutput(context, place, shape.data(), shape.size(), &value));
    return ort->GetTensorMutableData(value, &data);
  }

  template <typename Input>
  OrtStatus* residual(OrtKernelContext* context, const Input& input, void* stream) {
    const Tensor &x = input(Role::x), &y = input(Role::y), &branch = input(Role::branch), &gate = input(Role::gate);
    const Tensor &scale = input(Role::scale), &shift = input(Role::shift), &bias = input(Role::bias);
    ResidualArguments to{};
    DDIT_RETURN_IF_ERROR(check_tokens(x));
    const int64_t channels = x.last();
    for (const Tensor* same : {&y, &branch}) {
      if (same->data && same->shape != x.shape) return failure(says() + "tensors to add differ in shape");
    }
    if (bias.data && (bias.shape.size() != 1 || bias.last() != channels)) return failure(says() + "bias is not (C)");
    for (const Tensor* row : {&gate, &scale, &shift}) {
      const bool each = row->shape.size() == 3 && row->at(0) == x.at(0) && row->at(1) == 1;
      const bool one = row != &gate && row->shape.size() == 1 && row->shape == scale.shape;
      if (row->data && !((each || one) && row->last() == channels && (row == &gate || row->shape == scale.shape))) {
        return failure(says() + "gate, scale or shift is not (B, 1, C)");
      }
    }
    to.x = x.data, to.y = y.data, to.bias = bias.data, to.branch = branch.data;
    to.gate = gate.data, to.scale = scale.data, to.shift = shift.data;
    to.channels = static_cast<int>(channels), to.tokens = static_cast<int>(x.at(1));
    to.modulation_step = scale.shape.size() == 3 ? to.channels : 0;
    to.epsilon = epsilon_, to.offset = offset_, to.limit = limit_;
    size_t place = 0;
    if (y.data) DDIT_RETURN_IF_ERROR(output(context, place++, x.shape, to.sum));
    if (scale.data) DDIT_RETURN_IF_ERROR(output(context, place++, x.shape, to.normed));
    return launch(x.at(0) * x.at(1), row_threads(to.channels), to, stream);
  }

  template <typename Input>
  OrtStatus* heads(OrtKernelContext* context, const Input& input, void* stream) {
    const Tensor &x = input(Role::x), &text = input(Role::text), &weight = input(Role::weight);
    const Tensor &cos = input(Role::cos), &sin = input(Role::sin);
    HeadArguments to{};
    DDIT_RETURN_IF_ERROR(check_tokens(x));
    const int64_t channels = x.last(), head = heads_ > 0 && channels % heads_ == 0 ? channels / heads_ : channels;
    const int64_t lanes = head / kVector;
    const bool whole_groups = head % kVector == 0 && lanes <= 32 && (lanes & (lanes - 1)) == 0;
    if (weight.data && !across_ && !whole_groups) return failure(says() + "a head's size is not a power of two");
    if (head % kVector) return failure(says() + "a head's size is no multiple of 8");
    if (text.data) {
      DDIT_RETURN_IF_ERROR(check_tokens(text));
      if (text.at(0) != x.at(0) || text.last() != channels) return failure(says() + "text and x differ in shape");
    }
    for (const Tensor* bias : {&input(Role::bias), &input(Role::text_bias)}) {
      if (bias->data && (bias->shape.size() != 1 || bias->last() != channels))
        return failure(says() + "bias is not (C)");
    }
    for (const Tensor* one : {&weight, &input(Role::text_weight)}) {
      if (one->data && one->last() != (across_ ? channels : head)) return failure(says() + "weight has another size");
    }
    const int64_t text_tokens = text.data ? text.at(1) : 0, all = text_tokens + x.at(1);
    for (const Tensor* table : {&cos, &sin}) {
      const bool fits = table->shape.size() == 2 && table->at(0) == all && table->at(1) == head / 2;
      if (table->data && !fits) return failure(says() + "cos or sin is not (tokens, H/2)");
    }
    to.text = text.data, to.text_bias = input(Role::text_bias).data, to.text_weight = input(Role::text_weight).data;
    to.x = x.data, to.bias = input(Role::bias).data, to.weight = weight.data;
    to.cos = static_cast<const float*>(cos.data), to.sin = static_cast<const float*>(sin.data);
    to.channels = static_cast<int>(channels), to.head = static_cast<int>(head);
    to.text_tokens = static_cast<int>(text_tokens), to.tokens = static_cast<int>(x.at(1));
    to.across = across_ != 0, to.epsilon = epsilon_;
    DDIT_RETURN_IF_ERROR(output(context, 0, {x.at(0), all, channels}, to.out));
    return launch(x.at(0) * all, row_threads(to.channels), to, stream);
  }

  template <typename Input>
  OrtStatus* gelu(OrtKernelContext* context, const Input& input, void* stream) {
    const Tensor &first = input(Role::first), &h = input(Role::h), &bias = input(Role::bias);
    const Tensor& branch = input(Role::branch);
    GeluArguments to{};
    DDIT_RETURN_IF_ERROR(check_tokens(h));
    if (bias.shape.size() != 1 || bias.last() != h.last()) return failure(says() + "bias is not (M)");
    if (branch.data && branch.shape != h.shape) return failure(says() + "branch and h differ in shape");
    if (first.data) {
      DDIT_RETURN_IF_ERROR(check_tokens(first));
      if (first.at(0) != h.at(0) || first.at(1) != h.at(1)) return failure(says() + "first and h differ in tokens");
    }
    to.first = first.data, to.h = h.data, to.bias = bias.data, to.branch = branch.data;
    to.first_channels = first.data ? static_cast<int>(first.last()) : 0, to.channels = static_cast<int>(h.last());
    const int64_t channels = int64_t{to.first_channels} + to.channels;
    DDIT_RETURN_IF_ERROR(output(context, 0, {h.at(0), h.at(1), channels}, to.out));
    return launch(h.at(0) * h.at(1), 256, to, stream);
  }

  template <typename Input>
  OrtStatus* product(OrtKernelContext* context, const Input& input, void* stream) {
    const Tensor &x = input(Role::x), &weight = input(Role::rounded), &scales = input(Role::scales);
    DDIT_RETURN_IF_ERROR(check_tokens(x));
    if (weight.shape.size() != 2 || weight.at(1) != x.last()) return failure(says() + "weight is not (N, K)");
    if (scales.shape.size() != 1 || scales.last() != weight.at(0)) return failure(says() + "scale is not (N)");
    const int64_t rows = x.at(0) * x.at(1), columns = weight.at(0), inner = x.last();
    if (columns % 16 || inner % 16) return failure(says() + "the sizes of weight are no multiples of 16");
    void* out = nullptr;
    DDIT_RETURN_IF_ERROR(output(context, 0, {x.at(0), x.at(1), columns}, out));
    if (rows == 0) return nullptr;
    const int type = type_ == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT     ? cublaslt::CUDA_R_32F
                     : type_ == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? cublaslt::CUDA_R_16F
                                                                      : cublaslt::CUDA_R_16BF;
    const auto* const column_scales = static_cast<const float*>(scales.data);
    cublaslt::Plan* plan = nullptr;
    int status = products.plan({rows, columns, inner, type}, column_scales, plan);
    if (status) return failure(says() + "cuBLASLt has no way to compute it and answers " + std::to_string(status));
    // what one block of scratch memory holds: x in FP8, its scales, and cuBLASLt's own
    const int64_t scales_at = aligned(rows * inner), workspace_at = scales_at + aligned(rows * 4);
    Scratch scratch;
    DDIT_RETURN_IF_ERROR(scratch.open(context, workspace_at + static_cast<int64_t>(plan->chosen.workspace)));
    char* const quantised = scratch.data();
    auto* const row_scales = reinterpret_cast<float*>(quantised + scales_at);
    QuantiseArguments to{x.data, quantised, row_scales, static_cast<int>(inner)};
    DDIT_RETURN_IF_ERROR(launch(function_, rows, row_threads(to.channels), to, stream));
    status =
        products.run(*plan, weight.data, column_scales, quantised, row_scales, out, quantised + workspace_at, stream);
    if (status) return failure(says() + "cuBLASLt answers " + std::to_string(status));
    if (plan->scales) return nullptr;
    RescaleArguments then{out, row_scales, column_scales, static_cast<int>(columns), 1 / cublaslt::Products::kShare};
    return launch(rescale_, rows, 256, then, stream);
  }

  static int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

  // Memory beside a kernel's output, from ONNX Runtime's allocator, until the end of a call: whatever uses it
  // afterwards is queued on the same stream.
  class Scratch {
   public:
    ~Scratch() {
      if (block_) allocator_->Free(allocator_, block_);
      if (allocator_) ort->ReleaseAllocator(allocator_);
    }

    OrtStatus* open(OrtKernelContext* context, int64_t bytes) {
      const OrtValue* x = nullptr;
      const OrtMemoryInfo* where = nullptr;
      DDIT_RETURN_IF_ERROR(ort->KernelContext_GetInput(context, 0, &x));
      DDIT_RETURN_IF_ERROR(ort->GetTensorMemoryInfo(x, &where));
      DDIT_RETURN_IF_ERROR(ort->KernelContext_GetAllocator(context, where, &allocator_));
      block_ = allocator_->Alloc(allocator_, static_cast<size_t>(bytes) + 255);
      return block_ ? nullptr : failure("there is no memory for a product in FP8");
    }

    // Its first byte at a multiple of 256, as cudaMalloc gives it.
    char* data() const { return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(block_) + 255) / 256 * 256); }

   private:
    OrtAllocator* allocator_ = nullptr;
    void* block_ = nullptr;
  };

  OrtStatus* check_tokens(const Tensor& tokens) const {
    if (tokens.shape.size() != 3) return failure(says() + "a tensor of tokens is not (B, S, C)");
    const int64_t channels = tokens.last();
    if (channels % kVector || channels > int64_t{kVector} * kVectorsPerThread * kMostThreads) {
      // kernels of rows keep a row in registers; the others have no such bound, but no model is near it
      if (signature_.kind != Kind::gelu || channels % kVector) {
        return failure(says() + std::to_string(channels) + " channels do not fit");
      }
    }
    return nullptr;
  }

  std::string says() const { return std::string(signature_.name) + ": "; }

  static unsigned row_threads(int channels) {
    const int vectors = channels / kVector, each = vectors > 128 ? kVectorsPerThread : 1;
    return static_cast<unsigned>(((vectors + each - 1) / each + 31) / 32 * 32);
  }

  template <typename Arguments>
  OrtStatus* launch(int64_t blocks, unsigned threads, Arguments& arguments, void* stream) {
    return launch(function_, blocks, threads, arguments, stream);
  }

  template <typename Arguments>
  OrtStatus* launch(Function function, int64_t blocks, unsigned threads, Arguments& arguments, void* stream) {
    if (blocks == 0) return nullptr;
    void* parameters[] = {&arguments};
    const int status =
        driver.launch(function, static_cast<unsigned>(blocks), 1, 1, threads, 1, 1, 0, stream, parameters, nullptr);
    return status ? failure(says() + "CUDA answers " + std::to_string(status)) : nullptr;
  }

  const Signature& signature_;
  Function function_ = nullptr, rescale_ = nullptr;
  ONNXTensorElementDataType type_ = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;  // T
  float epsilon_ = 1e-6f, offset_ = 1.0f, limit_ = INFINITY;
  int64_t heads_ = 0, across_ = 0;
};

// An operator for one pair of types, as ONNX Runtime asks for it.
struct Operator : OrtCustomOp {
  const Signature* signature;
  const Types* types;

  Operator(const Signature& of, const Types& with) : OrtCustomOp{}, signature(&of), types(&with) {
    version = kApi;
    GetName = [](const OrtCustomOp* op) { return self(op).signature->name; };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return DDIT_PROVIDER; };
    GetInputTypeCount = [](const OrtCustomOp* op) { return self(op).signature->inputs.size(); };
    GetInputType = [](const OrtCustomOp* op, size_t place) { return self(op).type(place); };
    GetOutputTypeCount = [](const OrtCustomOp* op) { return self(op).signature->outputs; };
    GetOutputType = [](const OrtCustomOp* op, size_t) { return self(op).types->graph; };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    GetStartVersion = GetEndVersion = [](const OrtCustomOp*) { return kVersion; };
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** made) {
      return Kernel::make(*self(op).signature, *self(op).types, info, reinterpret_cast<Kernel**>(made));
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return static_cast<Kernel*>(kernel)->run(context);
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }

  static const Operator& self(const OrtCustomOp* op) { return *static_cast<const Operator*>(op); }

  ONNXTensorElementDataType type(size_t place) const {
    const Role role = signature->inputs[place];
    if (role == Role::cos || role == Role::sin || role == Role::scales) return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    if (role == Role::rounded) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    return is_modulation(role) ? types->modulation : types->graph;
  }

  // Whether this pair of types is another operator than a pair before: where nothing is of type M, T alone counts.
  bool counts() const {
    if (types->graph == types->modulation) return true;
    for (const Role role : signature->inputs) {
      if (is_modulation(role)) return true;
    }
    return false;
  }
};

// Whether this machine has products in FP8: the GPU's code holds their kernels, and cuBLASLt is there.
bool has_float8() {
  Function function = nullptr;
  return code && driver.kernel(&function, code, "quantise_f16") == 0 && cublas.open();
}

}  // namespace

// Load the kernels' code (a cubin). Returns 0, the driver's error, or -1 where there is no driver.
DDIT_EXPORT int ddit_load(const void* cubin) {
  if (code) return 0;
  if (!open_driver()) return -1;
  return driver.load(&code, cubin, nullptr, nullptr, 0, nullptr, nullptr, 0);
}

// Whether the kernels that were loaded compute products in FP8.
DDIT_EXPORT int ddit_float8() { return has_float8() ? 1 : 0; }

// What ONNX Runtime calls for every session that registers this library.
DDIT_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  ort = base->GetApi(kApi);
  if (!ort) return nullptr;                 // older than we know: the functions in the model do
  static std::vector<Operator*> operators;  // they must outlive every session
  static OrtCustomOpDomain* domain = nullptr;
  if (!domain) {
    OrtCustomOpDomain* made = nullptr;
    DDIT_RETURN_IF_ERROR(ort->CreateCustomOpDomain(kDomain, &made));
    for (const Signature& signature : kSignatures) {
      if (signature.kind == Kind::product && !has_float8()) continue;  // the function in the model does
      for (const Types& types : kTypes) {
        auto* made_operator = new Operator(signature, types);
        if (!made_operator->counts()) {
          delete made_operator;
          continue;
        }
        operators.push_back(made_operator);
        DDIT_RETURN_IF_ERROR(ort->CustomOpDomain_Add(made, made_operator));
      }
    }
    domain = made;
  }
  return ort->AddCustomOpDomain(options, domain);
}
