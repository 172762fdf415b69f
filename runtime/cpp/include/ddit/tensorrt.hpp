// TensorRT, with the engines that `ddit-export engines` built for this GPU and this release.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "ddit/engine.hpp"

namespace ddit {

/// Takes and gives arrays of the host, and copies them at every call. All engines run one after the other on one stream
/// and share one block of scratch memory.
class TensorRT : public Backend {
 public:
  /// Throws `BackendError` where there is no GPU, or where a graph has no engine that runs here.
  explicit TensorRT(const Bundle& bundle, int device = 0);
  ~TensorRT() override;
  std::string name() const override;
  void check(const Sizes& sizes) const override;

 protected:
  std::unique_ptr<Engine> open(const std::string& graph) override;

 private:
  struct Library;
  std::unique_ptr<Library> library_;
};

}  // namespace ddit
