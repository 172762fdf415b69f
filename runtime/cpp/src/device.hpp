// The GPU, through CUDA's runtime library: memory, a stream, and errors as one line.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

#include "ddit/errors.hpp"
#include "strings.hpp"

namespace ddit {

inline void checked(cudaError_t status, const std::string& what) {
  if (status != cudaSuccess) throw BackendError("CUDA could not " + what + ": " + cudaGetErrorString(status));
}

/// A GPU that is there, chosen for this thread.
struct Device {
  int number;
  std::string name, capability;  // as in `9.0`

  explicit Device(int chosen) : number(chosen) {
    int known = 0;
    const cudaError_t status = cudaGetDeviceCount(&known);
    if (status != cudaSuccess)
      throw BackendError(std::string("there is no GPU to run on: ") + cudaGetErrorString(status));
    if (chosen >= known)
      throw BackendError("there is no GPU " + std::to_string(chosen) + "; there are " + std::to_string(known));
    use();
    cudaDeviceProp properties;
    checked(cudaGetDeviceProperties(&properties, chosen), "ask for the GPU's name");
    name = properties.name;
    capability = std::to_string(properties.major) + "." + std::to_string(properties.minor);
  }
  /// Make it the calling thread's.
  void use() const { checked(cudaSetDevice(number), "choose GPU " + std::to_string(number)); }
};

class Stream {
 public:
  Stream() { checked(cudaStreamCreate(&stream_), "make a stream"); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(stream_); }
  cudaStream_t get() const { return stream_; }
  void synchronize(const std::string& what) const { checked(cudaStreamSynchronize(stream_), what); }

 private:
  cudaStream_t stream_ = nullptr;
};

/// Memory on the GPU that grows with what is asked for.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() { cudaFree(address_); }
  void* get() const { return address_; }

  /// At least so many bytes. Nothing may be using the memory that was there before, which is lost.
  void reserve(std::size_t bytes) {
    if (bytes <= bytes_) return;
    cudaFree(address_);
    address_ = nullptr;
    bytes_ = 0;
    const cudaError_t status = cudaMalloc(&address_, bytes);
    if (status != cudaSuccess)
      throw BackendError("the GPU's memory is too small: " + shortest(static_cast<double>(bytes) / 1e9) +
                         " GB more could not be had (" + cudaGetErrorString(status) +
                         "); stop other programs, or choose a smaller picture");
    bytes_ = bytes;
  }

 private:
  void* address_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace ddit
