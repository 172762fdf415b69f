// ONNX Runtime, on the CPU or with its CUDA provider.
#pragma once

#include <memory>
#include <string>

#include "ddit/engine.hpp"

namespace ddit {

struct OnnxRuntimeOptions {
  bool cuda = false;
  int device = 0;   // with CUDA
  int threads = 0;  // of one graph on the CPU; 0: all cores
};

/// Takes and gives arrays of the host; with CUDA the provider copies them at every call.
class OnnxRuntime : public Backend {
 public:
  /// Throws `BackendError` where ONNX Runtime has no such provider or no GPU.
  explicit OnnxRuntime(const Bundle& bundle, OnnxRuntimeOptions options = {});
  ~OnnxRuntime() override;
  std::string name() const override;

 protected:
  std::unique_ptr<Engine> open(const std::string& graph) override;

 private:
  struct Library;
  std::unique_ptr<Library> library_;
  OnnxRuntimeOptions options_;
};

}  // namespace ddit
