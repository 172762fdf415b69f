// What opens a bundle's graphs and runs them. An engine library comes in as a subclass of `Backend`.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "ddit/bundle.hpp"
#include "ddit/tensor.hpp"

namespace ddit {

using Input = std::variant<const Tensor*, const Ids*>;

/// A graph that can be run, from one thread at a time.
class Engine {
 public:
  Engine() = default;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  virtual ~Engine() = default;
  /// Inputs and outputs are in the manifest's order. An output comes with the shape that it will have; its values are
  /// overwritten. Throws `BackendError`.
  virtual void run(const std::vector<Input>& inputs, const std::vector<Tensor*>& outputs) = 0;
};

/// Opens a bundle's graphs, each once and only when it is first asked for.
class Backend {
 public:
  explicit Backend(const Bundle& bundle) : bundle_(bundle) {}
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
  virtual ~Backend() = default;

  const Bundle& bundle() const { return bundle_; }
  /// As the bundle's calibrations name it: `cpu`, `cuda`, `tensorrt`.
  virtual std::string name() const = 0;
  /// Throws `UsageError` where the engines were built for other sizes, before anything is run.
  virtual void check(const Sizes&) const {}
  Engine& engine(const std::string& graph);

 protected:
  virtual std::unique_ptr<Engine> open(const std::string& graph) = 0;
  /// Let go of the engines, for a library that has to outlive them.
  void close() { engines_.clear(); }

 private:
  const Bundle& bundle_;
  std::map<std::string, std::unique_ptr<Engine>> engines_;
};

}  // namespace ddit
