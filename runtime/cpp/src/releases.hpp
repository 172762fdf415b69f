// What differs between TensorRT 8.6, 10 and 11. Every difference is found by asking for a feature, never for a version;
// the rest of TensorRT's interface that the host uses is the same in all three.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

namespace nvinfer1 {
enum class ExecutionContextAllocationStrategy : std::int32_t;  // TensorRT 10 and later define it
}

namespace ddit::releases {

template <typename Engine, typename Strategy = nvinfer1::ExecutionContextAllocationStrategy,
          auto kUserManaged = Strategy::kUSER_MANAGED>
nvinfer1::IExecutionContext* create_context(Engine& engine, int) {
  return engine.createExecutionContext(kUserManaged);
}
template <typename Engine>
nvinfer1::IExecutionContext* create_context(Engine& engine, long) {
  return engine.createExecutionContextWithoutDeviceMemory();
}
/// An execution context whose scratch memory the caller brings with `set_scratch`. Null where there is no memory.
inline nvinfer1::IExecutionContext* create_context(nvinfer1::ICudaEngine& engine) { return create_context(engine, 0); }

template <typename Engine>
auto scratch_bytes(const Engine& engine, int) -> decltype(engine.getDeviceMemorySizeV2()) {
  return engine.getDeviceMemorySizeV2();
}
template <typename Engine>
std::size_t scratch_bytes(const Engine& engine, long) {
  return engine.getDeviceMemorySize();
}
/// Bytes of scratch memory that one execution context needs, at the largest shapes of its profiles.
inline std::size_t scratch_bytes(const nvinfer1::ICudaEngine& engine) {
  return static_cast<std::size_t>(scratch_bytes(engine, 0));
}

template <typename Context>
auto set_scratch(Context& context, void* memory, std::size_t bytes, int)
    -> decltype(context.setDeviceMemoryV2(memory, std::int64_t{})) {
  context.setDeviceMemoryV2(memory, static_cast<std::int64_t>(bytes));
}
template <typename Context>
void set_scratch(Context& context, void* memory, std::size_t, long) {
  context.setDeviceMemory(memory);
}
/// Give a context its scratch memory, aligned to 256 bytes. Contexts that run one after another may share it.
inline void set_scratch(nvinfer1::IExecutionContext& context, void* memory, std::size_t bytes) {
  set_scratch(context, memory, bytes, 0);
}

template <typename Type, auto kInt64 = Type::kINT64>
bool is_int64(Type type, int) {
  return type == kInt64;
}
template <typename Type>
bool is_int64(Type, long) {
  return false;
}
/// TensorRT before 10 has no int64; its engines take token ids as int32.
inline bool is_int64(nvinfer1::DataType type) { return is_int64(type, 0); }

/// The library's own version, as Python's `tensorrt.__version__` begins: TensorRT 10 changed how it is counted.
inline std::string version() {
  const int number = getInferLibVersion(), base = number < 10'000 ? 1'000 : 10'000;
  return std::to_string(number / base) + "." + std::to_string(number % base / 100) + "." + std::to_string(number % 100);
}

}  // namespace ddit::releases
