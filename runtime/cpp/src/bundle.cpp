#include "ddit/bundle.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "ddit/errors.hpp"
#include "ddit/files.hpp"
#include "fit.hpp"
#include "strings.hpp"

namespace ddit {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kLongestManifest = 64'000'000;  // bytes
constexpr std::uint64_t kSmall = 64'000'000;          // bytes of a file that is read in a moment
constexpr std::int64_t kLargestUnit = 65'536;         // latent pixels: no profile has a larger picture

const Calibration* calibration_for(const std::vector<Calibration>& all, bool dynamic, const RunSize& run,
                                   const std::string& backend) {
  const Calibration* found = nullptr;
  for (const Calibration& one : all) {
    if (one.dynamic.has_value() != dynamic || !(one.size == run)) continue;
    if (one.backend == backend) return &one;
    found = &one;
  }
  return found;
}

}  // namespace

std::size_t count(const Shape& shape) {
  std::size_t product = 1;
  for (const std::int64_t side : shape) {
    const auto factor = static_cast<std::size_t>(side);
    if (side < 0 || (factor != 0 && product > std::numeric_limits<std::size_t>::max() / 16 / factor))
      throw UsageError("a tensor of shape " + text(shape) + " is larger than any memory");
    product *= factor;
  }
  return product;
}

std::string text(const Shape& shape) {
  std::string joined;
  for (const std::int64_t side : shape) joined += (joined.empty() ? "" : ", ") + std::to_string(side);
  return "(" + joined + (shape.size() == 1 ? ",)" : ")");
}

bool Tensor::finite() const {
  return std::all_of(values.begin(), values.end(), [](float value) { return std::isfinite(value); });
}

Shape TensorSpec::resolve(const Sizes& sizes) const {
  Shape resolved;
  for (const Dimension& dim : shape) {
    if (dim.symbol.empty()) {
      resolved.push_back(dim.number);
      continue;
    }
    const std::int64_t value = sizes.at(dim.symbol);
    resolved.push_back(dim.op == '*' ? value * dim.number : value / dim.number);
  }
  return resolved;
}

std::vector<int> Manifest::patches() const {
  std::vector<int> found;
  for (const LevelInfo& level : levels) found.push_back(level.patch);
  std::sort(found.begin(), found.end());
  return found;
}

std::vector<int> Manifest::coarse() const {
  std::vector<int> found = patches();
  found.erase(std::remove(found.begin(), found.end(), native), found.end());
  return found;
}

const std::string& Manifest::level(int patch) const {
  for (const LevelInfo& level : levels)
    if (level.patch == patch) return level.graph;
  throw UsageError("the bundle has no level " + std::to_string(patch) + "; it has " + join(patches(), ", "));
}

SymbolicShape Manifest::latent() const {
  SymbolicShape shape = {{"B", 0, 1}, {"", 0, channels}};
  for (const Axis& axis : axes) shape.push_back({axis.symbol, 0, 1});
  return shape;
}

std::int64_t Manifest::unit() const {
  std::int64_t multiple = 1;
  for (const LevelInfo& level : levels) {
    multiple = std::lcm(multiple, static_cast<std::int64_t>(level.patch));
    if (multiple > kLargestUnit) throw Misfit("the levels' patches have no common multiple that a picture could have");
  }
  return multiple;
}

int Manifest::text_length() const {
  int longest = 0;
  for (const EncoderInfo& encoder : encoders)
    if (encoder.free_length) longest = std::max(longest, encoder.tokenizer.length);
  return longest == 0 ? 1 : longest;
}

std::vector<Axis> Manifest::sides() const { return {axes.end() - 2, axes.end()}; }

RunSize Manifest::size_of(const Sizes& sizes) const {
  RunSize size;
  for (const Axis& axis : axes)
    (axis.is_frames()        ? size.frames
     : axis.name == "height" ? size.height
                             : size.width) = axis.from_latent(sizes.at(axis.symbol));
  return size;
}

bool Manifest::contains(const RunSize& size, std::int64_t text) const {
  return std::any_of(entries.begin(), entries.end(), [&](const ProfileEntry& entry) {
    return entry.height.contains(size.height) && entry.width.contains(size.width) && entry.text.contains(text) &&
           entry.batch.contains(1) && (!entry.frames || entry.frames->contains(size.frames));
  });
}

const DynamicInfo& Manifest::dynamic_for(const RunSize& run, const std::string& backend) const {
  const Calibration* found = calibration_for(calibrations, true, run, backend);
  return found == nullptr ? schedule : *found->dynamic;
}

const AdaptiveInfo& Manifest::adaptive_for(const RunSize& run, const std::string& backend) const {
  const Calibration* found = calibration_for(calibrations, false, run, backend);
  return found == nullptr ? adaptive : *found->adaptive;
}

const StepPath* Manifest::path_for(const RunSize& run) const {
  for (const StepPath& path : paths)
    if (path.size == run) return &path;
  return nullptr;
}

Bundle Bundle::open(const fs::path& path) {
  const fs::path file = path / "bundle.json";
  std::error_code error;
  if (!fs::exists(file, error)) {
    const std::string what = fs::is_directory(path, error) ? "has no bundle.json"
                             : fs::exists(path, error)     ? "is a file"
                                                           : "does not exist";
    throw BundleError(path.string() + " is not a bundle: it " + what + "; make one with ddit-export");
  }
  std::string content;
  try {
    content = read_text(file, kLongestManifest);
  } catch (const UsageError& problem) {
    throw BundleError(std::string(problem.what()) + "; export it again");
  }
  Bundle bundle(path, parse_manifest(content, file.string()));
  for (const auto& [name, info] : bundle.manifest_.files) {
    const fs::path one = bundle.file(name);
    if (!fs::is_regular_file(one, error))
      throw BundleError(path.string() + " is incomplete: " + name + " is missing; export it again");
    const auto size = fs::file_size(one, error);
    if (error || size != info.size)
      throw BundleError(path.string() + " is damaged: " + name + " has another size than recorded; export it again");
  }
  return bundle;
}

fs::path Bundle::file(const std::string& name) const { return path_ / fs::u8path(name); }

void Bundle::verify(const std::string& name) const {
  const FileInfo& info = manifest_.files.at(name);
  if (info.size <= kSmall && sha256_of(file(name)) != info.sha256)
    throw BundleError(path_.string() + " is damaged: could not load " + name +
                      ", it has a wrong hash; export it again");
}

}  // namespace ddit
