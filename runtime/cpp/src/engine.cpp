#include "ddit/engine.hpp"

namespace ddit {

Engine& Backend::engine(const std::string& graph) {
  auto& engine = engines_[graph];
  if (!engine) engine = open(graph);
  return *engine;
}

}  // namespace ddit
