#include "ddit/onnxruntime.hpp"

#include <onnxruntime_cxx_api.h>

#include <algorithm>

#include "ddit/errors.hpp"
#include "strings.hpp"

namespace ddit {
namespace {

/// Weights of the levels, in bytes, up to which the CPU's sessions get copies of their own, in the order that products
/// read fastest. Larger ones stay memory-mapped from the bundle's files, and the levels share one copy.
constexpr std::uint64_t kPrepackLimit = 500'000'000;

/// Calls ONNX Runtime; its exceptions become one line.
template <typename Call>
auto checked(const std::string& what, Call call) {
  try {
    return call();
  } catch (const Ort::Exception& error) {
    throw BackendError("ONNX Runtime could not " + what + ": " + split(error.what(), '\n').front());
  }
}

class OnnxRuntimeEngine : public Engine {
 public:
  OnnxRuntimeEngine(Ort::Session session, const GraphInfo& info)
      : session_(std::move(session)),
        info_(info),
        memory_(Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault)) {
    for (const TensorSpec& spec : info.inputs) inputs_.push_back(spec.name.c_str());
    for (const TensorSpec& spec : info.outputs) outputs_.push_back(spec.name.c_str());
    Ort::AllocatorWithDefaultOptions allocator;
    std::vector<std::string> found;
    for (std::size_t i = 0; i < session_.GetInputCount(); ++i) {
      found.emplace_back(session_.GetInputNameAllocated(i, allocator).get());
      check(found.back(), info.inputs, session_.GetInputTypeInfo(i));
    }
    check_names(found, info.inputs, "inputs");
    found.clear();
    for (std::size_t i = 0; i < session_.GetOutputCount(); ++i) {
      found.emplace_back(session_.GetOutputNameAllocated(i, allocator).get());
      check(found.back(), info.outputs, session_.GetOutputTypeInfo(i));
    }
    check_names(found, info.outputs, "outputs");
  }

  void run(const std::vector<Input>& inputs, const std::vector<Tensor*>& outputs) override {
    checked("run " + info_.file, [&] {
      std::vector<Ort::Value> given, taken;
      for (const Input& input : inputs)
        std::visit(
            [&](const auto* tensor) {
              given.push_back(view(const_cast<std::remove_const_t<std::remove_pointer_t<decltype(tensor)>>&>(*tensor)));
            },
            input);
      for (Tensor* output : outputs) taken.push_back(view(*output));
      session_.Run(Ort::RunOptions{nullptr}, inputs_.data(), given.data(), given.size(), outputs_.data(), taken.data(),
                   taken.size());
    });
  }

 private:
  /// A tensor's own memory as a value of ONNX Runtime, which does not write into inputs.
  template <typename Values>
  Ort::Value view(Values& tensor) {
    return Ort::Value::CreateTensor(memory_, tensor.values.data(), tensor.values.size(), tensor.shape.data(),
                                    tensor.shape.size());
  }

  void check(const std::string& name, const std::vector<TensorSpec>& specs, const Ort::TypeInfo& type) const {
    for (const TensorSpec& spec : specs) {
      if (spec.name != name) continue;
      const auto wanted =
          spec.dtype == Dtype::float32 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
      const bool same = type.GetONNXType() == ONNX_TYPE_TENSOR &&
                        type.GetTensorTypeAndShapeInfo().GetElementType() == wanted &&
                        type.GetTensorTypeAndShapeInfo().GetDimensionsCount() == spec.shape.size();
      if (!same)
        throw BackendError(info_.file + " has another type of " + name + " than the manifest says; export it again");
    }
  }

  void check_names(std::vector<std::string> found, const std::vector<TensorSpec>& specs,
                   const std::string& what) const {
    std::vector<std::string> wanted;
    for (const TensorSpec& spec : specs) wanted.push_back(spec.name);
    std::sort(found.begin(), found.end());
    std::sort(wanted.begin(), wanted.end());
    if (found != wanted)
      throw BackendError(info_.file + " has the " + what + " " + join(found, ", ") + ", the manifest says " +
                         join(wanted, ", ") + "; export it again");
  }

  Ort::Session session_;
  const GraphInfo& info_;
  Ort::MemoryInfo memory_;
  std::vector<const char*> inputs_, outputs_;
};

}  // namespace

struct OnnxRuntime::Library {
  Ort::Env env{ORT_LOGGING_LEVEL_FATAL, "ddit"};  // what it throws says all that its errors log
  Ort::SessionOptions options;
};

OnnxRuntime::OnnxRuntime(const Bundle& bundle, OnnxRuntimeOptions options)
    : Backend(bundle), library_(checked("start", [] { return std::make_unique<Library>(); })), options_(options) {
  Ort::SessionOptions& chosen = library_->options;
  chosen.SetLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);
  if (options.threads > 0) chosen.SetIntraOpNumThreads(options.threads);
  const Manifest& manifest = bundle.manifest();
  std::uint64_t bytes = 0;
  for (const LevelInfo& level : manifest.levels)
    for (const std::string& file : manifest.graphs.at(level.graph).weights) bytes += manifest.files.at(file).size;
  if (bytes > kPrepackLimit) chosen.AddConfigEntry("session.disable_prepacking", "1");
  if (!options.cuda) return;
  const auto known = Ort::GetAvailableProviders();
  if (std::find(known.begin(), known.end(), "CUDAExecutionProvider") == known.end())
    throw BackendError("this ONNX Runtime has no CUDA provider; it has: " + join(known, ", "));
  checked("use the CUDA provider", [&] {
    OrtCUDAProviderOptionsV2* made = nullptr;
    Ort::ThrowOnError(Ort::GetApi().CreateCUDAProviderOptions(&made));
    const std::unique_ptr<OrtCUDAProviderOptionsV2, void (*)(OrtCUDAProviderOptionsV2*)> owner(
        made, [](OrtCUDAProviderOptionsV2* one) { Ort::GetApi().ReleaseCUDAProviderOptions(one); });
    const std::string device = std::to_string(options.device);
    const char *key = "device_id", *value = device.c_str();
    Ort::ThrowOnError(Ort::GetApi().UpdateCUDAProviderOptions(made, &key, &value, 1));
    chosen.AppendExecutionProvider_CUDA_V2(*made);
  });
}

OnnxRuntime::~OnnxRuntime() { close(); }

std::string OnnxRuntime::name() const { return options_.cuda ? "cuda" : "cpu"; }

std::unique_ptr<Engine> OnnxRuntime::open(const std::string& graph) {
  const GraphInfo& info = bundle().manifest().graphs.at(graph);
  const auto twin = info.twins.find(name());
  const std::string& file = twin == info.twins.end() ? info.file : twin->second;
  bundle().verify(file);
  return checked("load " + file, [&] {
    Ort::SessionOptions chosen = library_->options.Clone();
    // a plan of all buffers as one block lies beside what the first run took, and a decoder takes more than all others
    const DecoderInfo& decoder = bundle().manifest().decoder;
    if (options_.cuda || graph == decoder.graph || graph == decoder.following) chosen.DisableMemPattern();
    Ort::Session session(library_->env, bundle().file(file).c_str(), chosen);
    return std::make_unique<OnnxRuntimeEngine>(std::move(session), info);
  });
}

}  // namespace ddit
