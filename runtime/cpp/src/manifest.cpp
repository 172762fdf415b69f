// `bundle.json` to a `Manifest`. A bundle may come from anywhere: unknown fields, names that stand twice, numbers out
// of bounds and text that cannot be shown on one line are errors.
#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "ddit/bundle.hpp"
#include "ddit/errors.hpp"
#include "fit.hpp"
#include "strings.hpp"

namespace ddit {
namespace {

using nlohmann::json;

constexpr int kFormat = 2;
constexpr int kDeepest = 64;  // of nested objects and lists
constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t kLargest = 1'000'000;  // of a tensor's fixed dimensions, and of pixels
constexpr std::int64_t kLargestProfile = 65'536;
constexpr std::int64_t kMaxSteps = 10'000;
constexpr std::int64_t kMaxPatch = 256;
constexpr double kMaxGuidance = 1'000;
constexpr double kLargestCoefficient = 1e9;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

[[noreturn]] void fail(const std::string& where, const std::string& what) { throw Misfit(where + ": " + what); }

std::int64_t integer(const json& value, const std::string& where, std::int64_t least, std::int64_t most = kMost) {
  if (!value.is_number_integer()) fail(where, "it has to be a whole number");
  if (value.is_number_unsigned() && value.get<std::uint64_t>() > static_cast<std::uint64_t>(most))
    fail(where, "it has to be at most " + std::to_string(most));
  const auto number = value.get<std::int64_t>();
  if (number < least || number > most)
    fail(where, "it has to lie between " + std::to_string(least) + " and " + std::to_string(most));
  return number;
}

int small_integer(const json& value, const std::string& where, std::int64_t least, std::int64_t most) {
  return static_cast<int>(integer(value, where, least, most));
}

double number(const json& value, const std::string& where, double least = -kInfinity, double most = kInfinity) {
  if (!value.is_number()) fail(where, "it has to be a number");
  const auto found = value.get<double>();
  if (!std::isfinite(found)) fail(where, "it has to be finite");
  if (found < least || found > most) fail(where, "it has to lie between " + shortest(least) + " and " + shortest(most));
  return found;
}

double above_zero(const json& value, const std::string& where, double most = kInfinity) {
  const double found = number(value, where, 0, most);
  if (found <= 0) fail(where, "it has to be above 0");
  return found;
}

bool boolean(const json& value, const std::string& where) {
  if (!value.is_boolean()) fail(where, "it has to be true or false");
  return value.get<bool>();
}

std::string plain_text(const json& value, const std::string& where) {
  if (!value.is_string()) fail(where, "it has to be a text");
  const auto& found = value.get_ref<const std::string&>();
  if (!printable(found)) fail(where, "the text has a line break or another character that cannot be shown");
  if (characters(found) > 2000) fail(where, "the text is longer than 2000 characters");
  return found;
}

std::string checked_name(const std::string& found, const std::string& where) {
  if (found.empty() || characters(found) > 200) fail(where, "a name has 1 to 200 characters");
  if (!printable(found)) fail(where, "the name has a character that cannot be shown");
  return found;
}

std::string name(const json& value, const std::string& where) { return checked_name(plain_text(value, where), where); }

std::string inside(const std::string& found, const std::string& where) {
  bool leaves = found[0] == '/' || found.find_first_of("\\:") != std::string::npos;
  for (const std::string& part : split(found, '/')) leaves = leaves || part == "..";
  if (leaves) fail(where, "file name '" + found + "' leaves the bundle");
  return found;
}

std::string file_name(const json& value, const std::string& where) { return inside(name(value, where), where); }

template <typename Read>
auto list(const json& value, const std::string& where, Read read, std::size_t least = 0,
          std::size_t most = std::numeric_limits<std::size_t>::max()) {
  if (!value.is_array()) fail(where, "it has to be a list");
  if (value.size() < least || value.size() > most) fail(where, "the list has too few or too many entries");
  std::vector<decltype(read(value, where))> found;
  for (std::size_t i = 0; i < value.size(); ++i) found.push_back(read(value[i], where + "." + std::to_string(i)));
  return found;
}

/// An object's fields: each is asked for once, and at the end none is left.
class Fields {
 public:
  Fields(const json& value, std::string where) : value_(value), where_(std::move(where)) {
    if (!value.is_object()) fail(where_, "it has to be an object");
  }
  const json* find(const std::string& field) {
    asked_.insert(field);
    const auto found = value_.find(field);
    return found == value_.end() ? nullptr : &*found;
  }
  const json& at(const std::string& field) {
    const json* found = find(field);
    if (found == nullptr) fail(path(field), "the field is missing");
    return *found;
  }
  std::string path(const std::string& field) const { return where_.empty() ? field : where_ + "." + field; }
  void done() const {
    for (const auto& item : value_.items())
      if (asked_.count(item.key()) == 0) fail(path(item.key()), "nobody knows this field");
  }

 private:
  const json& value_;
  std::string where_;
  std::set<std::string> asked_;
};

/// A patch that is an object's key: digits.
int patch_key(const std::string& key, const std::string& where) {
  const auto found = whole_number(key);
  if (!found || *found < 1 || *found > kMaxPatch) fail(where, "'" + key + "' is no patch");
  return static_cast<int>(*found);
}

template <typename Read>
std::map<int, double> by_patch(const json& value, const std::string& where, Read read) {
  if (!value.is_object()) fail(where, "it has to be an object");
  std::map<int, double> found;
  for (const auto& item : value.items()) {
    const int patch = patch_key(item.key(), where);
    if (!found.emplace(patch, read(item.value(), where + "." + item.key())).second) fail(where, "a patch stands twice");
  }
  return found;
}

Dimension dimension(const json& value, const std::string& where) {
  if (value.is_number_integer()) return {"", 0, integer(value, where, 1, kLargest)};
  const std::string found = value.is_string() ? value.get<std::string>() : "";
  std::size_t end = 0;
  while (end < found.size() && (std::isalnum(static_cast<unsigned char>(found[end])) != 0 || found[end] == '_')) ++end;
  Dimension read{found.substr(0, end), 0, 1};
  if (end < found.size()) {
    read.op = found[end];
    const auto factor = whole_number(found.substr(end + 1));
    if ((read.op != '*' && read.op != '/') || !factor) fail(where, "the dimension cannot be read");
    read.number = *factor;
  }
  if (read.symbol.empty() || read.number < 1 || read.number > kLargest) fail(where, "the dimension cannot be read");
  if (read.number == 1) read.op = 0;  // one form for shapes that are the same
  return read;
}

TensorSpec tensor(const json& value, const std::string& where) {
  Fields fields(value, where);
  TensorSpec spec;
  spec.name = name(fields.at("name"), fields.path("name"));
  const std::string dtype = plain_text(fields.at("dtype"), fields.path("dtype"));
  if (dtype != "float32" && dtype != "int64") fail(fields.path("dtype"), "it has to be float32 or int64");
  spec.dtype = dtype == "float32" ? Dtype::float32 : Dtype::int64;
  spec.shape = list(fields.at("shape"), fields.path("shape"), dimension, 1, 8);
  fields.done();
  return spec;
}

std::string graph_dtype(const json& value, const std::string& where) {
  const std::string found = plain_text(value, where);
  if (found != "fp32" && found != "fp16" && found != "bf16") fail(where, "it has to be fp32, fp16 or bf16");
  return found;
}

GraphInfo graph(const json& value, const std::string& where) {
  Fields fields(value, where);
  GraphInfo info;
  info.file = file_name(fields.at("file"), fields.path("file"));
  info.inputs = list(fields.at("inputs"), fields.path("inputs"), tensor);
  info.outputs = list(fields.at("outputs"), fields.path("outputs"), tensor);
  if (const json* weights = fields.find("weights")) info.weights = list(*weights, fields.path("weights"), file_name);
  info.dtype = graph_dtype(fields.at("dtype"), fields.path("dtype"));
  if (const json* twins = fields.find("twins")) {
    if (!twins->is_object()) fail(fields.path("twins"), "it has to be an object");
    for (const auto& item : twins->items())
      info.twins[checked_name(item.key(), fields.path("twins"))] = file_name(item.value(), fields.path("twins"));
  }
  if (const json* weights = fields.find("twin_weights")) {
    if (!weights->is_object()) fail(fields.path("twin_weights"), "it has to be an object");
    for (const auto& item : weights->items())
      info.twin_weights[checked_name(item.key(), fields.path("twin_weights"))] =
          list(item.value(), fields.path("twin_weights"), file_name);
  }
  fields.done();
  return info;
}

void optional_text(Fields& fields, const std::string& field) {
  const json* found = fields.find(field);
  if (found != nullptr && !found->is_null()) plain_text(*found, fields.path(field));
}

LevelInfo level(const json& value, const std::string& where) {
  Fields fields(value, where);
  LevelInfo info;
  info.patch = small_integer(fields.at("patch"), fields.path("patch"), 1, kMaxPatch);
  info.graph = name(fields.at("graph"), fields.path("graph"));
  info.trained = boolean(fields.at("trained"), fields.path("trained"));
  optional_text(fields, "adapter_sha256");
  fields.done();
  return info;
}

void check_axis(const std::string& name, const std::string& where) {
  if (name != "frames" && name != "height" && name != "width")
    fail(where, "this host knows the axes frames, height and width, not '" + name + "'");
}

Axis axis(const json& value, const std::string& where) {
  Fields fields(value, where);
  Axis found;
  found.name = plain_text(fields.at("name"), fields.path("name"));
  check_axis(found.name, fields.path("name"));
  found.symbol = found.name == "frames" ? "F" : found.name == "height" ? "H" : "W";
  found.downscale = small_integer(fields.at("downscale"), fields.path("downscale"), 1, 256);
  fields.done();
  return found;
}

EncoderInfo encoder(const json& value, const std::string& where) {
  Fields fields(value, where);
  EncoderInfo info;
  info.graph = name(fields.at("graph"), fields.path("graph"));
  Fields tokenizer(fields.at("tokenizer"), fields.path("tokenizer"));
  info.tokenizer.file = file_name(tokenizer.at("file"), tokenizer.path("file"));
  info.tokenizer.length = small_integer(tokenizer.at("length"), tokenizer.path("length"), 1, 100'000);
  info.tokenizer.pad_id = integer(tokenizer.at("pad_id"), tokenizer.path("pad_id"), 0, 10'000'000);
  tokenizer.done();
  info.free_length = boolean(fields.at("free_length"), fields.path("free_length"));
  const json& feeds = fields.at("feeds");
  if (!feeds.is_object()) fail(fields.path("feeds"), "it has to be an object");
  for (const auto& item : feeds.items())
    info.feeds[checked_name(item.key(), fields.path("feeds"))] = name(item.value(), fields.path("feeds"));
  fields.done();
  return info;
}

/// The tag of a part that comes in kinds, the first of those that are known where there is none; a host refuses one
/// that it does not know.
std::string kind_of(Fields& fields, const std::string& what, const std::vector<std::string>& known,
                    bool needed = true) {
  const json* found = needed ? &fields.at("kind") : fields.find("kind");
  if (found == nullptr) return known.front();
  const std::string kind = plain_text(*found, fields.path("kind"));
  if (std::find(known.begin(), known.end(), kind) == known.end())
    fail(fields.path("kind"), "this host knows the " + what + " '" + join(known, "' and '") + "', not '" + kind + "'");
  return kind;
}

SamplerInfo sampler(const json& value, const std::string& where) {
  Fields fields(value, where);
  SamplerInfo info;
  if (kind_of(fields, "sampler", {"flow_match_euler", "flow_unipc"}) == "flow_unipc") {
    info.shift = above_zero(fields.at("shift"), fields.path("shift"), 1e6);
    info.order = small_integer(fields.at("order"), fields.path("order"), 1, 2);
    info.train_steps = integer(fields.at("train_steps"), fields.path("train_steps"), 1, 1'000'000);
    info.steps = small_integer(fields.at("steps"), fields.path("steps"), 1, kMaxSteps);
    fields.done();
    return info;
  }
  info.use_dynamic_shifting = boolean(fields.at("use_dynamic_shifting"), fields.path("use_dynamic_shifting"));
  info.shift = above_zero(fields.at("shift"), fields.path("shift"), 1e6);
  info.base_shift = number(fields.at("base_shift"), fields.path("base_shift"), -1e6, 1e6);
  info.max_shift = number(fields.at("max_shift"), fields.path("max_shift"), -1e6, 1e6);
  info.base_image_seq_len = integer(fields.at("base_image_seq_len"), fields.path("base_image_seq_len"), 1);
  info.max_image_seq_len = integer(fields.at("max_image_seq_len"), fields.path("max_image_seq_len"), 1);
  if (info.base_image_seq_len == info.max_image_seq_len)
    fail(where, "base_image_seq_len and max_image_seq_len are the same: the shift has no slope");
  if (const json* smallest = fields.find("smallest"); smallest != nullptr && !smallest->is_null())
    info.smallest = above_zero(*smallest, fields.path("smallest"), 1);
  info.steps = small_integer(fields.at("steps"), fields.path("steps"), 1, kMaxSteps);
  fields.done();
  return info;
}

RotaryInfo positions(const json& value, const std::string& where) {
  Fields fields(value, where);
  kind_of(fields, "positions", {"rotary"}, false);
  RotaryInfo info;
  const auto axis_of = [](const json& one, const std::string& path) {
    Fields inner(one, path);
    RotaryAxis found;
    const json& named = inner.at("axis");
    if (!named.is_null()) {
      found.axis = plain_text(named, inner.path("axis"));
      check_axis(found.axis, inner.path("axis"));
    }
    found.dimensions = small_integer(inner.at("dimensions"), inner.path("dimensions"), 2, 4096);
    if (found.dimensions % 2 != 0) fail(inner.path("dimensions"), "it has to be even");
    inner.done();
    return found;
  };
  info.axes = list(fields.at("axes"), fields.path("axes"), axis_of, 1);
  info.theta = number(fields.at("theta"), fields.path("theta"), 1, 1e12);
  fields.done();
  return info;
}

GuidanceInfo guidance(const json& value, const std::string& where) {
  Fields fields(value, where);
  GuidanceInfo info;
  const std::string kind = kind_of(fields, "guidance", {"embedded", "two_passes", "none"});
  info.embedded = kind == "embedded";
  info.two_passes = kind == "two_passes";
  info.standard = number(fields.at("default"), fields.path("default"), -kMaxGuidance, kMaxGuidance);
  fields.done();
  return info;
}

DecoderInfo decoder(const json& value, const std::string& where) {
  Fields fields(value, where);
  DecoderInfo info;
  if (kind_of(fields, "decoder", {"image", "video"}) == "image") {
    info.graph = name(fields.at("graph"), fields.path("graph"));
  } else {
    info.graph = name(fields.at("first"), fields.path("first"));
    info.following = name(fields.at("following"), fields.path("following"));
    info.frames_per_second = above_zero(fields.at("frames_per_second"), fields.path("frames_per_second"), 1000);
  }
  fields.done();
  return info;
}

GateInfo gate(const json& value, const std::string& where) {
  Fields fields(value, where);
  GateInfo info;
  info.graph = name(fields.at("graph"), fields.path("graph"));
  const auto coefficient = [](const json& one, const std::string& path) {
    return number(one, path, -kLargestCoefficient, kLargestCoefficient);
  };
  info.coefficients = list(fields.at("coefficients"), fields.path("coefficients"), coefficient, 1, 8);
  plain_text(fields.at("source"), fields.path("source"));
  fields.done();
  return info;
}

SmoothPoint smooth_point(const json& value, const std::string& where) {
  Fields fields(value, where);
  SmoothPoint point;
  point.sigma = number(fields.at("sigma"), fields.path("sigma"), 0, 1);
  point.statistic = by_patch(fields.at("statistic"), fields.path("statistic"),
                             [](const json& one, const std::string& path) { return number(one, path, 0); });
  fields.done();
  return point;
}

/// The dynamic schedule's settings; a calibration has fields beside them.
DynamicInfo dynamic(Fields& fields) {
  DynamicInfo info;
  info.tau = above_zero(fields.at("tau"), fields.path("tau"));
  info.rho = above_zero(fields.at("rho"), fields.path("rho"));
  if (info.rho >= 1) fail(fields.path("rho"), "it has to be below 1");
  info.warmup = small_integer(fields.at("warmup"), fields.path("warmup"), 3, kMaxSteps);
  if (const json* hold = fields.find("hold")) info.hold = small_integer(*hold, fields.path("hold"), 1, kMaxSteps);
  const json* coarsest = fields.find("coarsest");
  if (coarsest != nullptr && !coarsest->is_null())
    info.coarsest = small_integer(*coarsest, fields.path("coarsest"), 1, kMaxPatch);
  if (const json* smooth = fields.find("smooth")) info.smooth = list(*smooth, fields.path("smooth"), smooth_point);
  for (const SmoothPoint& point : info.smooth) {
    const auto same = [](const auto& one, const auto& other) { return one.first == other.first; };
    const auto& first = info.smooth.front().statistic;
    if (!std::equal(first.begin(), first.end(), point.statistic.begin(), point.statistic.end(), same))
      fail(fields.path("smooth"), "it has other patches at one noise level than at another");
  }
  return info;
}

AdaptiveInfo adaptive(Fields& fields) {
  AdaptiveInfo info;
  if (const json* found = fields.find("tolerance")) info.tolerance = number(*found, fields.path("tolerance"), 0);
  if (const json* found = fields.find("order")) info.order = small_integer(*found, fields.path("order"), 0, 2);
  return info;
}

RunSize run_size(Fields& fields) {
  const json* frames = fields.find("frames");
  const bool clip = frames != nullptr && !frames->is_null();
  return {small_integer(fields.at("steps"), fields.path("steps"), 1, kMaxSteps),
          integer(fields.at("height"), fields.path("height"), 1, kLargest),
          integer(fields.at("width"), fields.path("width"), 1, kLargest),
          clip ? integer(*frames, fields.path("frames"), 1, kLargest) : 0};
}

/// What a calibration tells readers and budgets; only the patches matter here.
void check_costs(Fields& fields, const std::set<int>& levels) {
  Fields costs(fields.at("costs"), fields.path("costs"));
  const auto positive = [](const json& one, const std::string& path) { return above_zero(one, path); };
  const auto known = by_patch(costs.at("levels"), costs.path("levels"), positive);
  for (const char* field : {"predicted", "encode", "decode"}) number(costs.at(field), costs.path(field), 0);
  costs.done();
  for (const int patch : levels)
    if (known.count(patch) == 0) throw Misfit("a calibration lacks the costs of a level");
  list(fields.at("curve"), fields.path("curve"), [&](const json& one, const std::string& path) {
    Fields point(one, path);
    above_zero(point.at("value"), point.path("value"));
    const auto share = [](const json& value, const std::string& where) { return number(value, where, 0, 1); };
    for (const auto& [patch, unused] : by_patch(point.at("shares"), point.path("shares"), share))
      if (known.count(patch) == 0) throw Misfit("a calibration's curve names a level whose costs it lacks");
    point.done();
    return 0;
  });
}

Calibration calibration(const json& value, const std::string& where, const std::set<int>& levels) {
  Fields fields(value, where);
  Calibration found;
  const std::string kind = plain_text(fields.at("kind"), fields.path("kind"));
  if (kind == "dynamic")
    found.dynamic = dynamic(fields);
  else if (kind == "adaptive")
    found.adaptive = adaptive(fields);
  else
    fail(fields.path("kind"), "this host knows the calibrations 'dynamic' and 'adaptive', not '" + kind + "'");
  found.size = run_size(fields);
  above_zero(fields.at("speedup"), fields.path("speedup"));
  number(fields.at("similarity"), fields.path("similarity"));
  integer(fields.at("prompts"), fields.path("prompts"), 2);
  found.backend = plain_text(fields.at("backend"), fields.path("backend"));
  check_costs(fields, levels);
  fields.done();
  return found;
}

StepPath step_path(const json& value, const std::string& where) {
  Fields fields(value, where);
  StepPath path;
  path.size = run_size(fields);
  path.computed = list(
      fields.at("computed"), fields.path("computed"),
      [](const json& one, const std::string& place) { return small_integer(one, place, 0, kMaxSteps - 1); }, 1);
  for (std::size_t i = 1; i < path.computed.size(); ++i)
    if (path.computed[i] <= path.computed[i - 1]) fail(where, "the computed steps have to rise");
  if (path.computed.front() != 0 || path.computed.back() >= path.size.steps)
    fail(where, "the computed steps have to rise from 0 and to stay below their number");
  number(fields.at("error"), fields.path("error"), 0);
  integer(fields.at("prompts"), fields.path("prompts"), 1);
  fields.done();
  return path;
}

Range range(const json& value, const std::string& where) {
  Range found;
  if (value.is_array()) {
    if (value.size() != 3) fail(where, "give three numbers: minimum, optimum, maximum");
    found = {integer(value[0], where, 1), integer(value[1], where, 1), integer(value[2], where, 1, kLargestProfile)};
  } else {
    Fields fields(value, where);
    found.minimum = integer(fields.at("minimum"), fields.path("minimum"), 1);
    found.optimum = integer(fields.at("optimum"), fields.path("optimum"), 1);
    found.maximum = integer(fields.at("maximum"), fields.path("maximum"), 1, kLargestProfile);
    fields.done();
  }
  if (found.minimum > found.optimum || found.optimum > found.maximum) fail(where, "the range is not ordered");
  return found;
}

ProfileEntry profile_entry(const json& value, const std::string& where) {
  Fields fields(value, where);
  ProfileEntry entry;
  entry.height = range(fields.at("height"), fields.path("height"));
  entry.width = range(fields.at("width"), fields.path("width"));
  entry.text = range(fields.at("text"), fields.path("text"));
  entry.batch = range(fields.at("batch"), fields.path("batch"));
  if (const json* frames = fields.find("frames"); frames != nullptr && !frames->is_null())
    entry.frames = range(*frames, fields.path("frames"));
  fields.done();
  return entry;
}

int parity_result(const json& value, const std::string& where) {
  Fields fields(value, where);
  for (const char* field : {"graph", "tensor"}) name(fields.at(field), fields.path(field));
  integer(fields.at("case"), fields.path("case"), std::numeric_limits<std::int64_t>::min());
  const json& sizes = fields.at("sizes");
  if (!sizes.is_object()) fail(fields.path("sizes"), "it has to be an object");
  for (const auto& item : sizes.items()) {
    checked_name(item.key(), fields.path("sizes"));
    integer(item.value(), fields.path("sizes"), std::numeric_limits<std::int64_t>::min());
  }
  number(fields.at("error"), fields.path("error"), 0);
  above_zero(fields.at("tolerance"), fields.path("tolerance"));
  plain_text(fields.at("checked"), fields.path("checked"));
  if (const json* twin = fields.find("twin"); twin != nullptr && !twin->is_null()) name(*twin, fields.path("twin"));
  if (const json* note = fields.find("note")) plain_text(*note, fields.path("note"));
  fields.done();
  return 0;
}

void check_version(const json& content) {
  if (!content.is_object()) throw Misfit("it has to be an object");
  const auto found = content.find("format_version");
  if (found == content.end() || !found->is_number_integer()) return;
  const auto version = found->get<std::int64_t>();
  if (version != kFormat)
    throw Misfit("it has format " + std::to_string(version) + ", this host reads format " + std::to_string(kFormat));
}

Manifest read(const json& content) {
  check_version(content);
  Fields fields(content, "");
  Manifest manifest;
  // first of all: a bundle of an unknown kind is refused by what it is, and not by the first shape that nobody knows
  manifest.sampler = sampler(fields.at("sampler"), "sampler");
  manifest.decoder = decoder(fields.at("decoder"), "decoder");
  manifest.guidance = guidance(fields.at("guidance"), "guidance");
  if (const json* version = fields.find("format_version")) integer(*version, "format_version", kFormat, kFormat);
  plain_text(fields.at("family"), "family");
  Fields model(fields.at("model"), "model");
  plain_text(model.at("id"), "model.id");
  optional_text(model, "revision");
  model.done();
  manifest.dtype = graph_dtype(fields.at("dtype"), "dtype");
  integer(fields.at("opset"), "opset", 1, 1000);
  manifest.native = small_integer(fields.at("native"), "native", 1, kMaxPatch);
  manifest.levels = list(fields.at("levels"), "levels", level, 1);
  const json& graphs = fields.at("graphs");
  if (!graphs.is_object()) fail("graphs", "it has to be an object");
  for (const auto& item : graphs.items())
    manifest.graphs[checked_name(item.key(), "graphs")] = graph(item.value(), "graphs." + item.key());
  Fields profile(fields.at("profile"), "profile");
  manifest.profile = plain_text(profile.at("name"), "profile.name");
  if (const json* description = profile.find("description")) plain_text(*description, "profile.description");
  manifest.entries = list(profile.at("entry"), "profile.entry", profile_entry, 1);
  profile.done();
  Fields latent(fields.at("latent"), "latent");
  manifest.channels = small_integer(latent.at("channels"), "latent.channels", 1, 4096);
  manifest.axes = list(latent.at("axes"), "latent.axes", axis, 1);
  latent.done();
  manifest.encoders = list(fields.at("encoders"), "encoders", encoder);
  manifest.positions = positions(fields.at("positions"), "positions");
  if (const json* found = fields.find("gate"); found != nullptr && !found->is_null())
    manifest.gate = gate(*found, "gate");
  manifest.carry = number(fields.at("carry"), "carry", 0, 1);
  Fields schedule(fields.at("schedule"), "schedule");
  manifest.schedule = dynamic(schedule);
  schedule.done();
  Fields prediction(fields.at("adaptive"), "adaptive");
  manifest.adaptive = adaptive(prediction);
  prediction.done();
  if (const json* found = fields.find("spectrum"); found != nullptr && !found->is_null()) {
    Fields spectrum(*found, "spectrum");
    const double amplitude = above_zero(spectrum.at("amplitude"), "spectrum.amplitude", 1e12);
    manifest.spectrum = Spectrum{amplitude, number(spectrum.at("exponent"), "spectrum.exponent", 0, 20)};
    spectrum.done();
  }
  std::set<int> levels;
  for (const LevelInfo& one : manifest.levels) levels.insert(one.patch);
  if (const json* found = fields.find("calibrations"))
    manifest.calibrations = list(*found, "calibrations", [&](const json& one, const std::string& where) {
      return calibration(one, where, levels);
    });
  if (const json* found = fields.find("paths")) manifest.paths = list(*found, "paths", step_path);
  list(fields.at("parity"), "parity", parity_result);
  const json& files = fields.at("files");
  if (!files.is_object()) fail("files", "it has to be an object");
  for (const auto& item : files.items()) {
    Fields info(item.value(), "files." + item.key());
    const std::string& key = inside(checked_name(item.key(), "files"), "files");
    manifest.files[key] = {plain_text(info.at("sha256"), info.path("sha256")),
                           static_cast<std::uint64_t>(integer(info.at("size"), info.path("size"), 0))};
    info.done();
  }
  const json& made_with = fields.at("made_with");
  if (!made_with.is_object()) fail("made_with", "it has to be an object");
  for (const auto& item : made_with.items()) {
    checked_name(item.key(), "made_with");
    plain_text(item.value(), "made_with." + item.key());
  }
  fields.done();
  check_fit(manifest);
  return manifest;
}

/// JSON as the standard has it, no name twice, nested no deeper than anybody needs.
json strict_json(std::string_view text) {
  std::vector<std::set<std::string>> names;
  const json::parser_callback_t check = [&](int depth, json::parse_event_t event, json& value) {
    if (depth > kDeepest) throw Misfit("it is nested too deeply");
    if (event == json::parse_event_t::object_start) names.emplace_back();
    if (event == json::parse_event_t::object_end) names.pop_back();
    if (event == json::parse_event_t::key && !names.back().insert(value.get<std::string>()).second)
      throw Misfit("'" + value.get<std::string>() + "' stands twice");
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), check);
  } catch (const json::exception&) {
    throw Misfit("it is no JSON");
  }
}

}  // namespace

Manifest parse_manifest(std::string_view text, const std::string& where) {
  try {
    return read(strict_json(text));
  } catch (const Misfit& error) {
    throw BundleError(where + " is not valid: " + error.what() + "; export it again");
  }
}

}  // namespace ddit
