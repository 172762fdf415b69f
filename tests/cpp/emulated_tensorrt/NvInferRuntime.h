// TensorRT's runtime for tests, as far as the host in C++ uses it: what one release declares, TENSORRT_RELEASE (8, 10
// or 11), with the names and types of its public headers. A name that the release lacks does not compile, and one that
// it calls deprecated does not either, as warnings are errors. Plans hold the ONNX model that they were built from
// (tests/fake_tensorrt.py), and ONNX Runtime runs it on the emulated GPU's memory (nvinfer.cpp).
#pragma once

#ifndef TENSORRT_RELEASE
#error "which release?"
#endif

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace nvinfer1 {

using AsciiChar = char;

enum class DataType : std::int32_t {
  kFLOAT = 0,
  kHALF = 1,
  kINT8 = 2,
  kINT32 = 3,
  kBOOL = 4,
  kUINT8 = 5,
  kFP8 = 6,
#if TENSORRT_RELEASE >= 10
  kBF16 = 7,
  kINT64 = 8,
  kINT4 = 9,
#endif
};

#if TENSORRT_RELEASE == 8
using Side = std::int32_t;
#else
using Side = std::int64_t;
enum class ExecutionContextAllocationStrategy : std::int32_t { kSTATIC = 0, kON_PROFILE_CHANGE = 1, kUSER_MANAGED = 2 };
#endif
class Dims {
 public:
  static constexpr std::int32_t MAX_DIMS{8};
  std::int32_t nbDims;
  Side d[MAX_DIMS];
};

class ILogger {
 public:
  enum class Severity : std::int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
  virtual void log(Severity severity, AsciiChar const* message) noexcept = 0;
  virtual ~ILogger() = default;
};

class IExecutionContext {
 public:
  virtual ~IExecutionContext() noexcept = default;
  virtual bool setOptimizationProfileAsync(std::int32_t index, cudaStream_t stream) noexcept = 0;
  virtual bool setInputShape(char const* name, Dims const& dims) noexcept = 0;
  virtual bool setTensorAddress(char const* name, void* data) noexcept = 0;
  virtual bool enqueueV3(cudaStream_t stream) noexcept = 0;
#if TENSORRT_RELEASE == 8
  virtual void setDeviceMemory(void* memory) noexcept = 0;
#elif TENSORRT_RELEASE == 10
  [[deprecated]] virtual void setDeviceMemory(void* memory) noexcept = 0;
#endif
#if TENSORRT_RELEASE >= 10
  virtual void setDeviceMemoryV2(void* memory, std::int64_t size) noexcept = 0;
#endif
};

class ICudaEngine {
 public:
  virtual ~ICudaEngine() noexcept = default;
  virtual std::int32_t getNbIOTensors() const noexcept = 0;
  virtual char const* getIOTensorName(std::int32_t index) const noexcept = 0;
  virtual DataType getTensorDataType(char const* name) const noexcept = 0;
#if TENSORRT_RELEASE == 8
  virtual IExecutionContext* createExecutionContext() noexcept = 0;
  virtual IExecutionContext* createExecutionContextWithoutDeviceMemory() noexcept = 0;
  virtual std::size_t getDeviceMemorySize() const noexcept = 0;
#else
  virtual IExecutionContext* createExecutionContext(
      ExecutionContextAllocationStrategy strategy = ExecutionContextAllocationStrategy::kSTATIC) noexcept = 0;
  virtual std::int64_t getDeviceMemorySizeV2() const noexcept = 0;
#endif
#if TENSORRT_RELEASE == 10
  [[deprecated]] virtual IExecutionContext* createExecutionContextWithoutDeviceMemory() noexcept = 0;
  [[deprecated]] virtual std::size_t getDeviceMemorySize() const noexcept = 0;
#endif
};

class IRuntime {
 public:
  virtual ~IRuntime() noexcept = default;
  virtual ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept = 0;
};

IRuntime* createInferRuntime(ILogger& logger) noexcept;

}  // namespace nvinfer1

extern "C" std::int32_t getInferLibVersion() noexcept;
