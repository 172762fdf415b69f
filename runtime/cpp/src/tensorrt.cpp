#include "ddit/tensorrt.hpp"

#include <NvInferRuntime.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <utility>

#include "ddit/errors.hpp"
#include "device.hpp"
#include "releases.hpp"
#include "store.hpp"
#include "strings.hpp"

namespace ddit {
namespace {

/// Keeps the last error that TensorRT reported, from whichever of its threads.
class Logger : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity != Severity::kERROR && severity != Severity::kINTERNAL_ERROR) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    try {
      last_ = split(message, '\n').front();
    } catch (...) {  // no memory for the message
    }
  }
  std::string last() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return last_.empty() ? "no reason given" : last_;
  }

 private:
  mutable std::mutex mutex_;
  std::string last_;
};

/// A file in memory, of which only what is read takes any.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path) : bytes_(std::filesystem::file_size(path)) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file >= 0) {
      address_ = ::mmap(nullptr, bytes_, PROT_READ, MAP_PRIVATE, file, 0);
      ::close(file);
    }
    if (address_ == MAP_FAILED) throw BackendError(path.string() + " cannot be read");
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile() { ::munmap(address_, bytes_); }
  const void* data() const { return address_; }
  std::size_t size() const { return bytes_; }

 private:
  std::size_t bytes_;
  void* address_ = MAP_FAILED;
};

nvinfer1::Dims dims_of(const Shape& shape) {
  nvinfer1::Dims dims{};
  using Side = std::remove_reference_t<decltype(dims.d[0])>;
  dims.nbDims = static_cast<std::int32_t>(shape.size());
  for (std::size_t axis = 0; axis < shape.size(); ++axis) dims.d[axis] = static_cast<Side>(shape[axis]);
  return dims;
}

/// An array's memory.
struct Bytes {
  const void* data = nullptr;
  std::size_t size = 0;
};

template <typename Value>
Bytes bytes_of(const std::vector<Value>& values) {
  return {values.data(), values.size() * sizeof(Value)};
}

/// What all engines share.
struct Shared {
  Device device;  // first of all: TensorRT crashes without a GPU
  Stream stream;
  DeviceMemory scratch;
  Logger logger;
  std::unique_ptr<nvinfer1::IRuntime> runtime;

  explicit Shared(int number) : device(number) {}
};

/// One graph's engines of several profiles, of which those are loaded whose shapes are asked for.
class TensorRTEngine : public Engine {
 public:
  TensorRTEngine(Shared& shared, const Bundle& bundle, const GraphInfo& info, const std::vector<StoredEngine>& stored)
      : shared_(shared), bundle_(bundle), info_(info), stored_(stored), loaded_(stored.size()) {}

  void run(const std::vector<Input>& inputs, const std::vector<Tensor*>& outputs) override {
    shared_.device.use();
    std::vector<Shape> shapes;
    for (const Input& input : inputs) shapes.push_back(std::visit([](const auto* one) { return one->shape; }, input));
    const auto choice = choose(stored_, shapes);
    if (!choice) throw UsageError("no engine of " + info_.file + " was built for these sizes");
    const nvinfer1::ICudaEngine& engine = load(choice->engine);
    nvinfer1::IExecutionContext& context = this->context(*choice);
    std::vector<std::vector<std::int32_t>> narrowed;
    narrowed.reserve(inputs.size());  // what is copied to the GPU stays where it is
    std::vector<Bytes> given;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      if (const auto* const tensor = std::get_if<const Tensor*>(&inputs[i])) {
        given.push_back(bytes_of((*tensor)->values));
        continue;
      }
      const auto& ids = std::get<const Ids*>(inputs[i])->values;
      const bool wide = releases::is_int64(engine.getTensorDataType(info_.inputs[i].name.c_str()));
      given.push_back(wide ? bytes_of(ids) : bytes_of(narrowed.emplace_back(ids.begin(), ids.end())));
    }
    // memory first: what is queued may use what would be freed
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      const std::string& name = info_.inputs[i].name;
      if (!context.setInputShape(name.c_str(), dims_of(shapes[i]))) fail("take the shape of " + name);
      place(context, name, given[i].size);
    }
    for (std::size_t i = 0; i < outputs.size(); ++i)
      place(context, info_.outputs[i].name, outputs[i]->values.size() * sizeof(float));
    shared_.scratch.reserve(releases::scratch_bytes(engine));
    releases::set_scratch(context, shared_.scratch.get(), releases::scratch_bytes(engine));

    for (std::size_t i = 0; i < inputs.size(); ++i)
      checked(cudaMemcpyAsync(memory_.at(info_.inputs[i].name).get(), given[i].data, given[i].size,
                              cudaMemcpyHostToDevice, shared_.stream.get()),
              "copy inputs");
    if (!context.enqueueV3(shared_.stream.get())) fail("run");
    for (std::size_t i = 0; i < outputs.size(); ++i)
      checked(cudaMemcpyAsync(outputs[i]->values.data(), memory_.at(info_.outputs[i].name).get(),
                              outputs[i]->values.size() * sizeof(float), cudaMemcpyDeviceToHost, shared_.stream.get()),
              "copy results");
    shared_.stream.synchronize("run " + info_.file);
  }

 private:
  struct Loaded {
    std::unique_ptr<nvinfer1::ICudaEngine> engine;
    std::map<std::size_t, std::unique_ptr<nvinfer1::IExecutionContext>> contexts;  // by the profile's entry
  };

  nvinfer1::ICudaEngine& load(std::size_t number) {
    auto& engine = loaded_[number].engine;
    if (engine) return *engine;
    const std::filesystem::path& file = stored_[number].file;
    const MappedFile plan(file);
    std::unique_ptr<nvinfer1::ICudaEngine> made(shared_.runtime->deserializeCudaEngine(plan.data(), plan.size()));
    if (!made)
      throw BackendError("TensorRT could not load " + file.string() + ": " + shared_.logger.last() +
                         "; run: " + build_command(bundle_));
    check_tensors(*made);
    engine = std::move(made);
    return *engine;
  }

  /// The engine has the manifest's tensors, in its types.
  void check_tensors(const nvinfer1::ICudaEngine& engine) const {
    std::vector<std::string> found, wanted;
    for (std::int32_t i = 0; i < engine.getNbIOTensors(); ++i) found.emplace_back(engine.getIOTensorName(i));
    bool same = true;
    for (const auto* specs : {&info_.inputs, &info_.outputs})
      for (const TensorSpec& spec : *specs) {
        wanted.push_back(spec.name);
        const nvinfer1::DataType type = engine.getTensorDataType(spec.name.c_str());
        same = same && (spec.dtype == Dtype::float32 ? type == nvinfer1::DataType::kFLOAT
                                                     : type == nvinfer1::DataType::kINT32 || releases::is_int64(type));
      }
    std::sort(found.begin(), found.end());
    std::sort(wanted.begin(), wanted.end());
    if (found != wanted || !same)
      throw BackendError("the engine of " + info_.file + " has other tensors than the manifest says; delete " +
                         (bundle_.path() / "engines").string() + " and run: " + build_command(bundle_));
  }

  nvinfer1::IExecutionContext& context(Choice choice) {
    auto& context = loaded_[choice.engine].contexts[choice.entry];
    if (context) return *context;
    std::unique_ptr<nvinfer1::IExecutionContext> made(releases::create_context(*loaded_[choice.engine].engine));
    if (!made) throw BackendError("TensorRT could not create an execution context; is the GPU's memory full?");
    if (!made->setOptimizationProfileAsync(static_cast<std::int32_t>(choice.entry), shared_.stream.get()))
      fail("choose profile " + std::to_string(choice.entry));
    shared_.stream.synchronize("choose a profile");
    context = std::move(made);
    return *context;
  }

  /// Memory for a tensor, which the context is told of.
  void place(nvinfer1::IExecutionContext& context, const std::string& name, std::size_t bytes) {
    DeviceMemory& memory = memory_[name];
    memory.reserve(std::max(bytes, std::size_t{1}));
    if (!context.setTensorAddress(name.c_str(), memory.get())) fail("take the memory of " + name);
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw BackendError("TensorRT could not " + what + " for " + info_.file + ": " + shared_.logger.last());
  }

  Shared& shared_;
  const Bundle& bundle_;
  const GraphInfo& info_;
  const std::vector<StoredEngine>& stored_;
  std::map<std::string, DeviceMemory> memory_;
  std::vector<Loaded> loaded_;
};

}  // namespace

struct TensorRT::Library {
  Shared shared;
  std::map<std::string, std::vector<StoredEngine>> stored;  // by graph

  explicit Library(int device) : shared(device) {}
};

TensorRT::TensorRT(const Bundle& bundle, int device) : Backend(bundle), library_(std::make_unique<Library>(device)) {
  const std::string version = releases::version();
  const Device& gpu = library_->shared.device;
  Target target;
  target.backend = name();
  target.title = "TensorRT";
  target.words = gpu.name + " (compute capability " + gpu.capability + "), TensorRT " + version;
  target.runs = [&](const Needs& needs) {
    const auto has = [&](const char* what) { return needs.count(what) ? needs.at(what) : std::string(); };
    const std::string built_with = has("tensorrt") + ".";  // Python knows the build's number too
    return has("gpu") == gpu.name && has("compute_capability") == gpu.capability &&
           built_with.compare(0, version.size() + 1, version + ".") == 0;
  };
  library_->stored = find_engines(bundle, target);
  library_->shared.runtime.reset(nvinfer1::createInferRuntime(library_->shared.logger));
  if (!library_->shared.runtime) throw BackendError("TensorRT could not start: " + library_->shared.logger.last());
}

TensorRT::~TensorRT() { close(); }

std::string TensorRT::name() const { return "tensorrt"; }

void TensorRT::check(const Sizes& sizes) const {
  for (const auto& [graph, stored] : library_->stored) {
    if (choose(stored, input_shapes(bundle().manifest().graphs.at(graph), sizes))) continue;
    std::string asked;
    for (const Axis& axis : bundle().manifest().axes)
      asked += axis.name + " " + std::to_string(axis.from_latent(sizes.at(axis.symbol))) + ", ";
    throw UsageError(asked + "text " + std::to_string(sizes.at("L")) + " is outside what the TensorRT engine of " +
                     graph + " was built for; build another: " + build_command(bundle()) + " --profile PROFILE");
  }
}

std::unique_ptr<Engine> TensorRT::open(const std::string& graph) {
  return std::make_unique<TensorRTEngine>(library_->shared, bundle(), bundle().manifest().graphs.at(graph),
                                          library_->stored.at(graph));
}

}  // namespace ddit
