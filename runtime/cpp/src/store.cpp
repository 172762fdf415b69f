#include "store.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>

#include "ddit/errors.hpp"
#include "ddit/files.hpp"
#include "strings.hpp"

namespace ddit {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr std::size_t kLongestInfo = 1'000'000;  // bytes of an engine.json

/// The hash of a graph and its weights that engines carry: of the manifest's own hashes, one after the other.
std::string content_of(const Manifest& manifest, const std::string& graph) {
  const GraphInfo& info = manifest.graphs.at(graph);
  std::string hashes = manifest.files.at(info.file).sha256;
  for (const std::string& file : info.weights) hashes += manifest.files.at(file).sha256;
  return sha256_of_text(hashes);
}

/// The shapes of all inputs at one bound, `minimum` or `maximum`, of a profile's entry.
std::vector<Shape> shapes_at(const Manifest& manifest, const GraphInfo& info, const json& entry, const char* bound) {
  const auto size = [&](const std::string& name) {
    const auto found = entry.at(name).at(bound).get<std::int64_t>();
    if (found < 1 || found > 65'536) throw std::out_of_range(name);  // as profiles have it
    return found;
  };
  Sizes sizes = {{"B", size("batch")}, {"L", size("text")}};
  for (const Axis& axis : manifest.axes) sizes[axis.symbol] = axis.to_latent(size(axis.name));
  return input_shapes(info, sizes);
}

/// Whether a name is that of a file in the same folder.
bool plain_name(const std::string& name) {
  const auto fits = [](char one) {
    return std::isalnum(static_cast<unsigned char>(one)) || one == '_' || one == '-' || one == '.';
  };
  return !name.empty() && name[0] != '.' && std::all_of(name.begin(), name.end(), fits);
}

struct Found {
  StoredEngine engine;
  std::string graph, content;
  std::uintmax_t size = 0;
};

/// The engine of a folder. None where it is another backend's, of no graph that is there, a killed builder's, or
/// damaged.
std::optional<Found> read(const fs::path& folder, const Manifest& manifest, const std::string& backend) {
  try {
    const json info = json::parse(read_text(folder / "engine.json", kLongestInfo));
    if (info.at("backend") != backend) return std::nullopt;
    const auto name = info.at("file").get<std::string>();
    if (!plain_name(name)) return std::nullopt;
    Found found;
    found.graph = info.at("graph").get<std::string>();
    const GraphInfo& graph = manifest.graphs.at(found.graph);
    found.engine.file = folder / name;
    for (const json& entry : info.at("profile").at("entry"))
      found.engine.entries.push_back(
          {shapes_at(manifest, graph, entry, "minimum"), shapes_at(manifest, graph, entry, "maximum")});
    found.engine.needs = info.at("target").get<Needs>();
    found.engine.built_for = info.at("built_for").get<std::string>();
    found.engine.built = info.at("built").get<std::string>();
    found.content = info.at("content").get<std::string>();
    found.size = info.at("size").get<std::uintmax_t>();
    if (!fs::is_regular_file(found.engine.file)) return std::nullopt;
    return found;
  } catch (const json::exception&) {
  } catch (const std::out_of_range&) {
  } catch (const UsageError&) {
  } catch (const fs::filesystem_error&) {
  }
  return std::nullopt;
}

bool holds(const ShapeRange& range, const std::vector<Shape>& shapes) {
  for (std::size_t i = 0; i < shapes.size(); ++i)
    for (std::size_t axis = 0; axis < shapes[i].size(); ++axis)
      if (shapes[i][axis] < range.least[i][axis] || shapes[i][axis] > range.most[i][axis]) return false;
  return true;
}

/// Every whole engine of a backend, the newest first.
std::vector<Found> read_all(const Bundle& bundle, const std::string& backend) {
  std::vector<Found> known;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(bundle.path() / "engines", error)) {
    if (entry.path().filename().string()[0] == '.') continue;
    if (auto found = read(entry.path(), bundle.manifest(), backend)) known.push_back(std::move(*found));
  }
  std::sort(known.begin(), known.end(), [](const auto& a, const auto& b) { return a.engine.built > b.engine.built; });
  return known;
}

/// Those of a graph that run here.
std::vector<StoredEngine> fitting(const Bundle& bundle, const std::string& graph, const Target& target,
                                  const std::vector<Found>& all) {
  const std::string content = content_of(bundle.manifest(), graph), what = target.title + " engine of " + graph;
  const std::string rebuild = "; run: " + build_command(bundle);
  std::vector<StoredEngine> engines;
  std::set<std::string> others;
  bool known = false;
  std::error_code error;
  for (const Found& one : all) {
    if (one.graph != graph) continue;
    known = true;
    if (one.content != content) continue;
    if (!target.runs(one.engine.needs))
      others.insert(one.engine.built_for);
    else if (fs::file_size(one.engine.file, error) != one.size)
      throw BackendError(one.engine.file.string() + " is damaged: it has another size than recorded" + rebuild);
    else
      engines.push_back(one.engine);
  }
  if (!engines.empty()) return engines;
  if (!known) throw BackendError(bundle.path().string() + " has no " + what + " yet" + rebuild);
  if (others.empty()) throw BackendError("the " + what + " was built from another version of the graph" + rebuild);
  throw BackendError("the " + what + " was built for " +
                     join(std::vector<std::string>(others.begin(), others.end()), ", ") + "; this is " + target.words +
                     rebuild);
}

}  // namespace

std::string build_command(const Bundle& bundle) { return "ddit-export engines " + bundle.path().string(); }

std::vector<Shape> input_shapes(const GraphInfo& info, const Sizes& sizes) {
  std::vector<Shape> shapes;
  for (const TensorSpec& spec : info.inputs) shapes.push_back(spec.resolve(sizes));
  return shapes;
}

std::map<std::string, std::vector<StoredEngine>> find_engines(const Bundle& bundle, const Target& target) {
  const std::vector<Found> all = read_all(bundle, target.backend);
  std::map<std::string, std::vector<StoredEngine>> engines;
  for (const auto& [graph, info] : bundle.manifest().graphs) engines[graph] = fitting(bundle, graph, target, all);
  return engines;
}

std::optional<Choice> choose(const std::vector<StoredEngine>& engines, const std::vector<Shape>& shapes) {
  for (std::size_t engine = 0; engine < engines.size(); ++engine)
    for (std::size_t entry = 0; entry < engines[engine].entries.size(); ++entry)
      if (holds(engines[engine].entries[entry], shapes)) return Choice{engine, entry};
  return std::nullopt;
}

}  // namespace ddit
