#include <NvInferRuntime.h>

#include <onnxruntime_cxx_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "emulated.h"

namespace {

using nlohmann::json;
using nvinfer1::DataType;

#if TENSORRT_RELEASE == 8
constexpr std::int32_t kVersion = 8600;
constexpr const char* kName = "8.6.0";
constexpr DataType kIds = DataType::kINT32;
#elif TENSORRT_RELEASE == 10
constexpr std::int32_t kVersion = 100900;
constexpr const char* kName = "10.9.0.34";
constexpr DataType kIds = DataType::kINT64;
#else
constexpr std::int32_t kVersion = 110400;
constexpr const char* kName = "11.4.0.106";
constexpr DataType kIds = DataType::kINT64;
#endif

void demand(bool fine, const std::string& what) {
  if (fine) return;
  std::fprintf(stderr, "emulated TensorRT: %s\n", what.c_str());
  std::abort();
}

std::string decoded(const std::string& base64) {
  std::string bytes;
  unsigned held = 0;
  int bits = 0;
  for (const char one : base64) {
    if (one == '=') break;
    const auto digit = std::string("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/").find(one);
    held = held << 6 | static_cast<unsigned>(digit);
    bits += 6;
    if (bits < 8) continue;
    bits -= 8;
    bytes += static_cast<char>(held >> bits & 0xff);
  }
  return bytes;
}

struct Model {
  json plan;
  Ort::Env env{ORT_LOGGING_LEVEL_FATAL, "emulated"};
  Ort::Session session{nullptr};
  std::vector<std::string> inputs, outputs, names;
  std::map<std::string, DataType> types;

  explicit Model(const std::string& content) : plan(json::parse(content)) {
    const std::string model = decoded(plan.at("model"));
    Ort::SessionOptions options;
    session = Ort::Session(env, model.data(), model.size(), options);
    Ort::AllocatorWithDefaultOptions allocator;
    const auto add = [&](std::string name, const Ort::TypeInfo& type) {
      const bool ids = type.GetTensorTypeAndShapeInfo().GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
      types[name] = ids ? kIds : DataType::kFLOAT;
      names.push_back(std::move(name));
    };
    for (std::size_t i = 0; i < session.GetInputCount(); ++i) {
      inputs.emplace_back(session.GetInputNameAllocated(i, allocator).get());
      add(inputs.back(), session.GetInputTypeInfo(i));
    }
    for (std::size_t i = 0; i < session.GetOutputCount(); ++i) {
      outputs.emplace_back(session.GetOutputNameAllocated(i, allocator).get());
      add(outputs.back(), session.GetOutputTypeInfo(i));
    }
  }
  std::size_t scratch() const { return 4096; }
};

class Context : public nvinfer1::IExecutionContext {
 public:
  explicit Context(Model& model) : model_(model) {}

  bool setOptimizationProfileAsync(std::int32_t index, cudaStream_t) noexcept override {
    profile_ = index;
    return index < static_cast<std::int32_t>(model_.plan.at("profiles").size());
  }
  bool setInputShape(char const* name, nvinfer1::Dims const& dims) noexcept override {
    demand(profile_ >= 0, "no profile was chosen");
    const json& bounds = model_.plan.at("profiles").at(static_cast<std::size_t>(profile_)).at(name);
    auto& shape = shapes_[name];
    shape.assign(dims.d, dims.d + dims.nbDims);
    bool inside = bounds.at(0).size() == shape.size();
    for (std::size_t i = 0; inside && i < shape.size(); ++i)
      inside = bounds[0][i].get<std::int64_t>() <= shape[i] && shape[i] <= bounds[2][i].get<std::int64_t>();
    return inside;
  }
  bool setTensorAddress(char const* name, void* data) noexcept override {
    addresses_[name] = data;
    return model_.types.count(name) == 1;
  }
  bool enqueueV3(cudaStream_t stream) noexcept override {
    demand(scratch_ != nullptr && emulated_bytes_behind(scratch_) >= model_.scratch(), "too little scratch memory");
    for (const std::string& name : model_.names) demand(addresses_.count(name) == 1, "no address of " + name);
    const auto work = [](void* self) { static_cast<Context*>(self)->run(); };
    return cudaLaunchHostFunc(stream, work, this) == cudaSuccess;
  }
#if TENSORRT_RELEASE <= 10
  void setDeviceMemory(void* memory) noexcept override { scratch_ = memory; }
#endif
#if TENSORRT_RELEASE >= 10
  void setDeviceMemoryV2(void* memory, std::int64_t size) noexcept override {
    demand(size >= static_cast<std::int64_t>(model_.scratch()), "too little scratch memory");
    scratch_ = memory;
  }
#endif

 private:
  void run() {
    std::memset(scratch_, 0xff, model_.scratch());  // the engine uses all of it
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    std::vector<Ort::Value> given;
    std::vector<std::vector<std::int64_t>> widened;
    widened.reserve(model_.inputs.size());
    std::vector<const char*> inputs, outputs;
    for (const std::string& name : model_.inputs) {
      const auto& shape = shapes_.at(name);
      std::size_t count = 1;
      for (const std::int64_t side : shape) count *= static_cast<std::size_t>(side);
      void* const at = addresses_.at(name);
      inputs.push_back(name.c_str());
      const DataType type = model_.types.at(name);
      const std::size_t bytes = count * (type == DataType::kFLOAT || type == DataType::kINT32 ? 4 : 8);
      demand(emulated_bytes_behind(at) >= bytes, "too little memory of " + name);
      if (type == DataType::kFLOAT) {
        given.push_back(Ort::Value::CreateTensor(memory, static_cast<float*>(at), count, shape.data(), shape.size()));
      } else if (type == DataType::kINT32) {
        auto& ids = widened.emplace_back(static_cast<std::int32_t*>(at), static_cast<std::int32_t*>(at) + count);
        given.push_back(Ort::Value::CreateTensor(memory, ids.data(), count, shape.data(), shape.size()));
      } else {
        given.push_back(
            Ort::Value::CreateTensor(memory, static_cast<std::int64_t*>(at), count, shape.data(), shape.size()));
      }
    }
    for (const std::string& name : model_.outputs) outputs.push_back(name.c_str());
    const auto results = model_.session.Run(Ort::RunOptions{nullptr}, inputs.data(), given.data(), given.size(),
                                            outputs.data(), outputs.size());
    for (std::size_t i = 0; i < results.size(); ++i) {
      const std::size_t bytes = results[i].GetTensorTypeAndShapeInfo().GetElementCount() * sizeof(float);
      void* const at = addresses_.at(model_.outputs[i]);
      demand(emulated_bytes_behind(at) >= bytes, "too little memory of " + model_.outputs[i]);
      std::memcpy(at, results[i].GetTensorData<float>(), bytes);
    }
  }

  Model& model_;
  std::int32_t profile_ = -1;
  std::map<std::string, std::vector<std::int64_t>> shapes_;
  std::map<std::string, void*> addresses_;
  void* scratch_ = nullptr;
};

class Engine : public nvinfer1::ICudaEngine {
 public:
  explicit Engine(const std::string& content) : model_(content) {}
  std::int32_t getNbIOTensors() const noexcept override { return static_cast<std::int32_t>(model_.names.size()); }
  char const* getIOTensorName(std::int32_t index) const noexcept override {
    return model_.names.at(static_cast<std::size_t>(index)).c_str();
  }
  DataType getTensorDataType(char const* name) const noexcept override {
    const auto found = model_.types.find(name);
    return found == model_.types.end() ? DataType::kFLOAT : found->second;
  }
#if TENSORRT_RELEASE == 8
  nvinfer1::IExecutionContext* createExecutionContext() noexcept override { return nullptr; }
#else
  nvinfer1::IExecutionContext* createExecutionContext(
      nvinfer1::ExecutionContextAllocationStrategy strategy) noexcept override {
    demand(strategy == nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED, "scratch memory of its own");
    return new Context(model_);
  }
  std::int64_t getDeviceMemorySizeV2() const noexcept override { return static_cast<std::int64_t>(model_.scratch()); }
#endif
#if TENSORRT_RELEASE <= 10
  nvinfer1::IExecutionContext* createExecutionContextWithoutDeviceMemory() noexcept override {
    return new Context(model_);
  }
  std::size_t getDeviceMemorySize() const noexcept override { return model_.scratch(); }
#endif

 private:
  mutable Model model_;
};

class Runtime : public nvinfer1::IRuntime {
 public:
  explicit Runtime(nvinfer1::ILogger& logger) : logger_(logger) {}
  nvinfer1::ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override {
    try {
      auto engine = std::make_unique<Engine>(std::string(static_cast<const char*>(blob), size));
      const json plan = json::parse(static_cast<const char*>(blob), static_cast<const char*>(blob) + size);
      if (plan.at("version") == kName) return engine.release();
    } catch (const json::exception&) {
    }
    logger_.log(nvinfer1::ILogger::Severity::kERROR, "the serialized engine is not valid");
    return nullptr;
  }

 private:
  nvinfer1::ILogger& logger_;
};

}  // namespace

nvinfer1::IRuntime* nvinfer1::createInferRuntime(ILogger& logger) noexcept { return new Runtime(logger); }

std::int32_t getInferLibVersion() noexcept { return kVersion; }
