// The engines that `ddit-export engines` built of a bundle's graphs, in its folder `engines/`.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "ddit/bundle.hpp"

namespace ddit {

/// What an engine needs of the machine and its libraries, by name.
using Needs = std::map<std::string, std::string>;

/// The shapes of a graph's inputs, in the manifest's order, that one of the engine's profiles holds.
struct ShapeRange {
  std::vector<Shape> least, most;
};

struct StoredEngine {
  std::filesystem::path file;       // the library's own
  std::vector<ShapeRange> entries;  // an optimisation profile each
  Needs needs;
  std::string built_for;  // the needs, for people
  std::string built;      // when, ISO 8601
};

/// What a library calls itself and this machine, and which engines run here.
struct Target {
  std::string backend;  // as in the file: `tensorrt`
  std::string title;
  std::string words;  // this machine, for people
  std::function<bool(const Needs&)> runs;
};

/// The engines that run here, by graph and the newest first. Throws `BackendError` that says why a graph has none.
std::map<std::string, std::vector<StoredEngine>> find_engines(const Bundle& bundle, const Target& target);

/// The command that builds a bundle's engines.
std::string build_command(const Bundle& bundle);

/// The shapes of a graph's inputs, in the manifest's order.
std::vector<Shape> input_shapes(const GraphInfo& info, const Sizes& sizes);

/// An engine's number in a list, and that of the entry which holds these shapes of the inputs.
struct Choice {
  std::size_t engine = 0, entry = 0;
};
std::optional<Choice> choose(const std::vector<StoredEngine>& engines, const std::vector<Shape>& shapes);

}  // namespace ddit
