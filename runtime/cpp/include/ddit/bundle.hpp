// A bundle on disk and its manifest, `bundle.json`, as docs/spec/bundle.md describes it field by field.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "ddit/tensor.hpp"

namespace ddit {

/// The symbols' values: `B` pictures or clips, `F` latent frames, `H` and `W` latent pixels, `L` text tokens.
using Sizes = std::map<std::string, std::int64_t>;

/// A tensor's dimension: a number (no symbol), a symbol, or a symbol over (`/`) or times (`*`) a number.
struct Dimension {
  std::string symbol;
  char op = 0;
  std::int64_t number = 1;

  bool operator==(const Dimension& other) const {
    return symbol == other.symbol && op == other.op && number == other.number;
  }
  bool operator!=(const Dimension& other) const { return !(*this == other); }
};

using SymbolicShape = std::vector<Dimension>;

enum class Dtype { float32, int64 };

struct TensorSpec {
  std::string name;
  Dtype dtype = Dtype::float32;
  SymbolicShape shape;

  /// The shape in numbers.
  Shape resolve(const Sizes& sizes) const;
};

struct GraphInfo {
  std::string file;
  std::vector<TensorSpec> inputs, outputs;
  std::vector<std::string> weights;
  std::string dtype;
  std::map<std::string, std::string> twins;  // by backend: a file that computes the same, faster there
  std::map<std::string, std::vector<std::string>> twin_weights;  // by backend: what only its twin points into
};

struct LevelInfo {
  int patch = 0;  // side of a patch in latent pixels
  std::string graph;
  bool trained = false;
};

/// An axis of the latent after batch and channels. A clip has frames before height and width.
struct Axis {
  std::string name;    // frames, height or width
  std::string symbol;  // F, H or W
  int downscale = 1;   // pixels along one latent pixel; frames that every latent frame but the first stands for

  bool is_frames() const { return name == "frames"; }
  /// Latent pixels of so many pixels, latent frames of so many frames; rounded down.
  std::int64_t to_latent(std::int64_t size) const {
    return is_frames() ? (size - 1) / downscale + 1 : size / downscale;
  }
  std::int64_t from_latent(std::int64_t size) const {
    return is_frames() ? (size - 1) * downscale + 1 : size * downscale;
  }
};

struct TokenizerInfo {
  std::string file;
  int length = 0;
  std::int64_t pad_id = 0;
};

struct EncoderInfo {
  std::string graph;
  TokenizerInfo tokenizer;
  bool free_length = false;
  std::map<std::string, std::string> feeds;  // the graph's output → the levels' input
};

/// Steps along a flow: Euler's, `flow_match_euler`, or UniPC's, `flow_unipc`.
struct SamplerInfo {
  int order = 0;                 // of UniPC; 0: Euler
  std::int64_t train_steps = 0;  // of UniPC: the model is told whole ones
  bool use_dynamic_shifting = false;
  double shift = 1, base_shift = 0, max_shift = 0;
  std::int64_t base_image_seq_len = 0, max_image_seq_len = 0;
  std::optional<double> smallest;  // the last noise level before the shift; none: 1 / steps
  int steps = 0;
};

struct RotaryAxis {
  std::string axis;  // frames, height, width, or empty: a coordinate that is always 0
  int dimensions = 0;
};

struct RotaryInfo {
  std::vector<RotaryAxis> axes;
  double theta = 0;
};

struct GuidanceInfo {
  bool embedded = false;    // the levels take the scale
  bool two_passes = false;  // a step runs its level for the prompt and for the negative one
  double standard = 0;
};

/// The graph that makes a picture, or the two that make a clip, a latent frame a call.
struct DecoderInfo {
  std::string graph, following;  // of a clip its first frame's and the others'; of a picture only the first
  double frames_per_second = 0;  // of a clip, for players
};

struct GateInfo {
  std::string graph;
  std::vector<double> coefficients;  // the highest power first
};

struct SmoothPoint {
  double sigma = 0;
  std::map<int, double> statistic;  // by coarse patch
};

/// Defaults of the dynamic schedule.
struct DynamicInfo {
  double tau = 0, rho = 0;
  int warmup = 0, hold = 3;
  std::optional<int> coarsest;
  std::vector<SmoothPoint> smooth;
};

/// Defaults of prediction with error control.
struct AdaptiveInfo {
  double tolerance = 0.04;
  int order = 1;
};

/// For which runs something was found.
struct RunSize {
  int steps = 0;
  std::int64_t height = 0, width = 0;  // pixels
  std::int64_t frames = 0;             // of a clip

  bool operator==(const RunSize& other) const {
    return steps == other.steps && height == other.height && width == other.width && frames == other.frames;
  }
  /// Of an axis by name.
  std::int64_t along(const std::string& axis) const {
    return axis == "frames" ? frames : axis == "height" ? height : width;
  }
};

struct Calibration {
  RunSize size;
  std::string backend;
  std::optional<DynamicInfo> dynamic;  // one of the two
  std::optional<AdaptiveInfo> adaptive;
};

struct StepPath {
  RunSize size;
  std::vector<int> computed;
};

struct Spectrum {
  double amplitude = 0, exponent = 0;
};

struct Range {
  std::int64_t minimum = 0, optimum = 0, maximum = 0;
  bool contains(std::int64_t value) const { return minimum <= value && value <= maximum; }
};

struct ProfileEntry {
  Range height, width, text, batch;
  std::optional<Range> frames;  // of clips
};

struct FileInfo {
  std::string sha256;
  std::uint64_t size = 0;
};

struct Manifest {
  std::string dtype;
  int native = 0;
  std::vector<LevelInfo> levels;
  std::map<std::string, GraphInfo> graphs;
  std::string profile;
  std::vector<ProfileEntry> entries;
  int channels = 0;
  std::vector<Axis> axes;
  std::vector<EncoderInfo> encoders;
  SamplerInfo sampler;
  RotaryInfo positions;
  GuidanceInfo guidance;
  DecoderInfo decoder;
  std::optional<GateInfo> gate;
  double carry = 0;
  DynamicInfo schedule;
  AdaptiveInfo adaptive;
  std::optional<Spectrum> spectrum;
  std::vector<Calibration> calibrations;
  std::vector<StepPath> paths;
  std::map<std::string, FileInfo> files;

  /// Patches of all levels, the finest first; of all but the native one.
  std::vector<int> patches() const;
  std::vector<int> coarse() const;
  /// The graph of a level. Throws `UsageError` where there is no such level.
  const std::string& level(int patch) const;
  SymbolicShape latent() const;
  bool has_frames() const { return axes.size() == 3; }
  /// The axes that levels cut into patches, height and width; frames stay whole.
  std::vector<Axis> sides() const;
  /// The least common multiple of all patches: what the latent's sides are multiples of.
  std::int64_t unit() const;
  /// Tokens of a prompt unless a run chooses otherwise.
  int text_length() const;
  /// Pixels and frames of a latent's sizes.
  RunSize size_of(const Sizes& sizes) const;
  /// Whether one of the profile's entries holds a size of one picture or clip.
  bool contains(const RunSize& size, std::int64_t text) const;

  /// The settings for a run: its calibration, that of the same backend first, or the bundle's defaults.
  const DynamicInfo& dynamic_for(const RunSize& run, const std::string& backend) const;
  const AdaptiveInfo& adaptive_for(const RunSize& run, const std::string& backend) const;
  const StepPath* path_for(const RunSize& run) const;
};

/// Read and check a manifest's text. `where` stands in messages. Throws `BundleError`.
Manifest parse_manifest(std::string_view text, const std::string& where);

class Bundle {
 public:
  /// Read and check `bundle.json`, and see that every file is there in its size. Throws `BundleError`.
  static Bundle open(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return path_; }
  const Manifest& manifest() const { return manifest_; }
  std::filesystem::path file(const std::string& name) const;

  /// Compare a graph's file with its hash, before a library reads it. Throws `BundleError`.
  void verify(const std::string& name) const;

 private:
  Bundle(std::filesystem::path path, Manifest manifest) : path_(std::move(path)), manifest_(std::move(manifest)) {}
  std::filesystem::path path_;
  Manifest manifest_;
};

}  // namespace ddit
