// CUDA's runtime library for tests: device memory is host memory, and a stream runs its work when somebody waits for
// it, so that a result that is read too early is an old one. Stricter than a GPU: every copy has to lie inside one
// allocation.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#include "emulated.h"

namespace {

std::map<char*, std::size_t> memory;
std::vector<std::function<void()>> queue;
int stream_object;
const cudaStream_t kStream = reinterpret_cast<cudaStream_t>(&stream_object);

std::size_t total() {
  const char* chosen = std::getenv("EMULATED_GPU_BYTES");
  return chosen == nullptr ? 1'000'000'000 : std::strtoull(chosen, nullptr, 10);
}

std::size_t used() {
  std::size_t bytes = 0;
  for (const auto& [address, size] : memory) bytes += size;
  return bytes;
}

void demand(bool fine, const char* what) {
  if (fine) return;
  std::fprintf(stderr, "emulated GPU: %s\n", what);
  std::abort();
}

}  // namespace

std::size_t emulated_bytes_behind(const void* address) {
  auto* const wanted = static_cast<char*>(const_cast<void*>(address));
  auto found = memory.upper_bound(wanted);
  if (found == memory.begin()) return 0;
  --found;
  return wanted < found->first + found->second ? static_cast<std::size_t>(found->first + found->second - wanted) : 0;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "Fake GPU");
  properties->major = 9;
  properties->minor = 0;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t status) { return status == cudaSuccess ? "no error" : "out of memory"; }
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = kStream;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  demand(stream == kStream && queue.empty(), "a stream ends with work in it");
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  demand(stream == kStream, "an unknown stream");
  for (const auto& work : queue) work();
  queue.clear();
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** address, std::size_t bytes) {
  if (used() + bytes > total()) return cudaErrorMemoryAllocation;
  auto* const made = static_cast<char*>(std::malloc(bytes));
  std::memset(made, 0xff, bytes);  // NaN where nothing was written
  memory[made] = bytes;
  *address = made;
  return cudaSuccess;
}
cudaError_t cudaFree(void* address) {
  if (address == nullptr) return cudaSuccess;
  demand(queue.empty(), "memory is freed while work may use it");
  demand(memory.erase(static_cast<char*>(address)) == 1, "what is freed was not allocated");
  std::free(address);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  demand(stream == kStream, "an unknown stream");
  demand(kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToHost, "an unknown way to copy");
  demand(emulated_bytes_behind(kind == cudaMemcpyHostToDevice ? to : from) >= bytes, "a copy beyond an allocation");
  queue.push_back([=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t work, void* data) {
  demand(stream == kStream, "an unknown stream");
  queue.push_back([=] { work(data); });
  return cudaSuccess;
}
