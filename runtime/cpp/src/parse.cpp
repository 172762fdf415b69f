// Policies in writing, as `--schedule` takes them.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "ddit/errors.hpp"
#include "policies.hpp"
#include "strings.hpp"

namespace ddit {
namespace {

constexpr int kMaxSteps = 10'000;
constexpr int kLargestPart = 64;  // a smaller share of a picture's sides is no picture
constexpr const char* kForms =
    "native, fixed:8x10,4x20,2x20 or dynamic[:tau=0.001,rho=0.4,warmup=3,hold=3,coarsest=8,absolute=0], and after a + "
    "or alone adaptive[:0.04], taylorseer[:interval=4,order=2,first=3], teacache[:threshold=0.4], "
    "spectralcache[:threshold=0.6,low=0.8,high=1.5,least=0.5,most=1.5,longest=2], dpcache, adams "
    "or progressive[:delta=0.05,scales=1/2,adaptive]";

std::string stripped(const std::string& text) {
  const auto begin = text.find_first_not_of(" \t\n\r");
  return begin == std::string::npos ? "" : text.substr(begin, text.find_last_not_of(" \t\n\r") - begin + 1);
}

[[noreturn]] void unreadable(const std::string& part) {
  throw UsageError("cannot read '" + part + "' in the schedule; write " + kForms);
}

/// `tau=0.002,warmup=3` by name; a value alone is the first name's.
std::map<std::string, std::string> assignments(const std::string& text, const std::vector<std::string>& names) {
  std::map<std::string, std::string> found;
  for (const std::string& part : split(text, ',')) {
    if (part.empty()) continue;
    const auto equals = part.find('=');
    const std::string name = equals == std::string::npos ? names.front() : stripped(part.substr(0, equals));
    if (std::find(names.begin(), names.end(), name) == names.end()) unreadable(part);
    found[name] = stripped(equals == std::string::npos ? part : part.substr(equals + 1));
  }
  return found;
}

/// Settings of one policy, taken by name.
class Settings {
 public:
  Settings(const std::string& text, const std::vector<std::string>& names) : found_(assignments(text, names)) {}

  bool has(const std::string& name) const { return found_.count(name) > 0; }
  const std::string& at(const std::string& name) const { return found_.at(name); }

  double decimal(const std::string& name, double standard) const {
    if (!has(name)) return standard;
    const auto number = decimal_number(at(name));
    if (!number) unreadable(name + "=" + at(name));
    return *number;
  }

  int whole(const std::string& name, int standard) const {
    if (!has(name)) return standard;
    const bool negative = at(name).front() == '-';
    const auto number = whole_number(std::string_view(at(name)).substr(negative ? 1 : 0));
    if (!number) unreadable(name + "=" + at(name));
    const auto most = std::min<std::int64_t>(*number, std::numeric_limits<int>::max());
    return static_cast<int>(negative ? -most : most);
  }

 private:
  std::map<std::string, std::string> found_;
};

/// What a bundle gives to a written policy.
struct Choices {
  const Manifest& manifest;
  const std::vector<float>& sigmas;
  const RunSize& run;
  const std::string& backend;
};

void no_settings(const std::string& kind, const std::string& text) {
  if (!text.empty()) throw UsageError(kind + " has no settings, as in " + kind + ":" + text + "; write " + kForms);
}

/// 0 or more, and finite.
void check_least_zero(const std::string& name, double value) {
  if (!(value >= 0) || !std::isfinite(value))
    throw UsageError(name + " must be at least 0, and finite, not " + shortest(value));
}

void check_order(int order) {
  if (order < 0 || order >= kKeptVelocities)
    throw UsageError("order must lie between 0 and " + std::to_string(kKeptVelocities - 1) + ", not " +
                     std::to_string(order));
}

std::unique_ptr<const Policy> fixed(const std::string& text, const Choices& choices) {
  std::vector<int> levels;
  for (const std::string& part : split(text, ',')) {
    const auto cross = part.find('x');
    const auto patch = whole_number(part.substr(0, cross));
    const auto number =
        cross == std::string::npos ? std::optional<std::int64_t>(1) : whole_number(part.substr(cross + 1));
    if (!patch || !number || part.size() > 20)
      throw UsageError("cannot read '" + part + "' in the schedule; write LEVELxSTEPS, as in fixed:4x20,2x30");
    const std::vector<int> known = choices.manifest.patches();
    if (std::find(known.begin(), known.end(), *patch) == known.end())
      throw UsageError("the schedule asks for level " + std::to_string(*patch) + "; the bundle has " +
                       join(known, ", "));
    if (*number > kMaxSteps - static_cast<std::int64_t>(levels.size()))
      throw UsageError("the schedule has more than " + std::to_string(kMaxSteps) + " steps");
    levels.insert(levels.end(), static_cast<std::size_t>(*number), static_cast<int>(*patch));
  }
  return std::make_unique<Fixed>(std::move(levels));
}

std::unique_ptr<const Policy> dynamic(const std::string& text, const Choices& choices) {
  const Manifest& manifest = choices.manifest;
  const DynamicInfo& info = manifest.dynamic_for(choices.run, choices.backend);
  const Settings settings(text, {"tau", "rho", "warmup", "hold", "coarsest", "absolute"});
  int coarsest = info.coarsest.value_or(std::numeric_limits<int>::max());
  if (settings.has("coarsest")) {
    coarsest = settings.whole("coarsest", 0);
    if (coarsest < manifest.native)
      throw UsageError("coarsest must be at least the native level " + std::to_string(manifest.native) + ", not " +
                       std::to_string(coarsest));
  }
  const bool absolute = settings.whole("absolute", 0) != 0;
  if (absolute && !info.smooth.empty() && !settings.has("tau"))
    throw UsageError("an absolute tau must be given, as in dynamic:absolute=1,tau=0.001: the bundle's is relative");
  DynamicSettings chosen;
  chosen.native = manifest.native;
  for (const int patch : manifest.coarse())
    if (patch <= coarsest) chosen.coarse.push_back(patch);
  chosen.tau = settings.decimal("tau", info.tau);
  chosen.rho = settings.decimal("rho", info.rho);
  chosen.warmup = settings.whole("warmup", info.warmup);
  chosen.hold = settings.whole("hold", info.hold);
  if (!absolute && !info.smooth.empty()) chosen.smooth = smooth_at(info.smooth, choices.sigmas);
  if (!(chosen.tau > 0) || !std::isfinite(chosen.tau))
    throw UsageError("tau must be above 0, and finite, not " + shortest(chosen.tau));
  if (!(chosen.rho > 0 && chosen.rho < 1))
    throw UsageError("rho must lie between 0 and 1, not " + shortest(chosen.rho));
  if (chosen.warmup < kDifferenceOrder)
    throw UsageError("warmup must be at least " + std::to_string(kDifferenceOrder) +
                     ": the third difference needs that many steps");
  if (chosen.hold < 1) throw UsageError("hold must be at least 1 step, not " + std::to_string(chosen.hold));
  return std::make_unique<Dynamic>(std::move(chosen));
}

std::unique_ptr<const Reuse> adaptive(const std::string& text, const Choices& choices) {
  const Settings settings(text, {"tolerance", "order"});
  AdaptiveInfo info = choices.manifest.adaptive_for(choices.run, choices.backend);
  info.tolerance = settings.decimal("tolerance", info.tolerance);
  info.order = settings.whole("order", info.order);
  check_least_zero("tolerance", info.tolerance);
  check_order(info.order);
  return std::make_unique<Adaptive>(info);
}

std::unique_ptr<const Reuse> taylorseer(const std::string& text) {
  const Settings settings(text, {"interval", "order", "first"});
  TaylorSeerSettings chosen;
  chosen.interval = settings.whole("interval", chosen.interval);
  chosen.order = settings.whole("order", chosen.order);
  chosen.first = settings.whole("first", chosen.first);
  if (chosen.interval < 1)
    throw UsageError("interval must be at least 1 step, not " + std::to_string(chosen.interval) +
                     "; write taylorseer:interval=4");
  check_order(chosen.order);
  if (chosen.first < 1)
    throw UsageError("first must be at least 1 step, not " + std::to_string(chosen.first) +
                     ": nothing can be predicted before");
  return std::make_unique<TaylorSeer>(chosen);
}

const std::vector<double>& polynomial(const std::string& reuse, const Choices& choices) {
  if (!choices.manifest.gate)
    throw UsageError(reuse +
                     " needs a gate graph, which the bundle lacks; export it again, or choose adaptive or taylorseer");
  return choices.manifest.gate->coefficients;
}

std::unique_ptr<const Reuse> teacache(const std::string& text, const Choices& choices) {
  const double threshold = Settings(text, {"threshold"}).decimal("threshold", 0.4);
  check_least_zero("threshold", threshold);
  return std::make_unique<TeaCache>(polynomial("teacache", choices), threshold);
}

std::unique_ptr<const Reuse> spectralcache(const std::string& text, const Choices& choices) {
  const Settings settings(text, {"threshold", "low", "high", "least", "most", "longest"});
  SpectralCacheSettings chosen;
  for (const auto& [name, value] : {std::pair<const char*, double*>{"threshold", &chosen.threshold},
                                    {"low", &chosen.low},
                                    {"high", &chosen.high},
                                    {"least", &chosen.least},
                                    {"most", &chosen.most}}) {
    *value = settings.decimal(name, *value);
    check_least_zero(name, *value);
  }
  chosen.longest = settings.whole("longest", chosen.longest);
  check_least_zero("longest", chosen.longest);
  return std::make_unique<SpectralCache>(polynomial("spectralcache", choices), chosen);
}

std::unique_ptr<const Reuse> dpcache(const Choices& choices) {
  const StepPath* path = choices.manifest.path_for(choices.run);
  if (path == nullptr)
    throw UsageError(
        "the bundle has no path of dpcache for this number of steps and size; find one with ddit-run calibrate --reuse "
        "dpcache");
  return std::make_unique<DPCache>(path->size.steps, path->computed);
}

/// `1/4-1/2` as fractions that rise.
std::vector<Fraction> read_scales(const std::string& text) {
  std::vector<Fraction> scales;
  for (const std::string& part : split(text, '-')) {
    const auto slash = part.find('/');
    const auto above = whole_number(part.substr(0, slash));
    const auto below = slash == std::string::npos ? std::nullopt : whole_number(part.substr(slash + 1));
    if (!above || !below || *above < 1 || *above >= *below || *below > kLargestPart || scales.size() == 8)
      unreadable("scales=" + text);
    const std::int64_t common = std::gcd(*above, *below);
    const Fraction scale{static_cast<int>(*above / common), static_cast<int>(*below / common)};
    if (!scales.empty() && !(scales.back() < scale)) unreadable("scales=" + text);
    scales.push_back(scale);
  }
  return scales;
}

std::unique_ptr<const Policy> progressive(const std::string& text, const Choices& choices,
                                          std::unique_ptr<const Policy> policy) {
  ProgressiveSettings chosen;
  std::vector<std::string> parts;
  for (const std::string& part : split(text, ','))
    if (stripped(part) == "adaptive")
      chosen.own = true;
    else
      parts.push_back(part);
  const Settings settings(join(parts, ","), {"delta", "scales"});
  chosen.delta = settings.decimal("delta", chosen.delta);
  if (settings.has("scales")) chosen.scales = read_scales(settings.at("scales"));
  if (!(chosen.delta > 0 && chosen.delta < 1))
    throw UsageError("delta must lie between 0 and 1, not " + shortest(chosen.delta));
  const Manifest& manifest = choices.manifest;
  if (!manifest.spectrum)
    throw UsageError(
        "the bundle does not know the spectrum of its model's latents, which progressive needs; measure it with "
        "ddit-run spectrum");
  Sizes sizes;
  for (const Axis& axis : manifest.axes) sizes[axis.symbol] = axis.to_latent(choices.run.along(axis.name));
  auto stages = growing_stages(manifest, sizes, chosen.scales);
  return std::make_unique<Progressive>(std::move(policy), std::move(stages), std::move(chosen), *manifest.spectrum);
}

/// Parts between plus signs that a letter follows: `tau=1e+2` is one part.
std::vector<std::string> joined_parts(const std::string& text) {
  std::vector<std::string> parts(1);
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '+' && i + 1 < text.size() && text[i + 1] >= 'a' && text[i + 1] <= 'z')
      parts.emplace_back();
    else
      parts.back() += text[i];
  }
  return parts;
}

}  // namespace

std::unique_ptr<const Policy> parse_schedule(const std::string& text, const Manifest& manifest,
                                             const std::vector<float>& sigmas, const RunSize& run,
                                             const std::string& backend) {
  const Choices choices{manifest, sigmas, run, backend};
  std::unique_ptr<const Policy> levels;
  std::unique_ptr<const Reuse> reuse;
  std::optional<std::string> growing;
  const auto once = [&](bool taken) {
    if (taken) throw UsageError("'" + text + "' decides twice on the same thing; join at most one policy of each kind");
  };
  for (const std::string& part : joined_parts(stripped(text))) {
    const auto colon = part.find(':');
    const std::string kind = part.substr(0, colon);
    const std::string settings = colon == std::string::npos ? "" : part.substr(colon + 1);
    const bool is_level = kind == "native" || kind == "fixed" || kind == "dynamic";
    const bool is_reuse = kind == "adams" || kind == "adaptive" || kind == "taylorseer" || kind == "teacache" ||
                          kind == "spectralcache" || kind == "dpcache";
    if ((!is_level && !is_reuse && kind != "progressive") || (colon != std::string::npos && settings.empty()))
      throw UsageError("unknown schedule '" + text + "'; write " + kForms);
    if (kind == "native" || kind == "adams" || kind == "dpcache") no_settings(kind, settings);
    once((is_level && levels) || (is_reuse && reuse) || (kind == "progressive" && growing));
    if (kind == "native") levels = std::make_unique<Native>(manifest.native);
    if (kind == "fixed") levels = fixed(settings, choices);
    if (kind == "dynamic") levels = dynamic(settings, choices);
    if (kind == "adams") reuse = std::make_unique<Adams>();
    if (kind == "adaptive") reuse = adaptive(settings, choices);
    if (kind == "taylorseer") reuse = taylorseer(settings);
    if (kind == "teacache") reuse = teacache(settings, choices);
    if (kind == "spectralcache") reuse = spectralcache(settings, choices);
    if (kind == "dpcache") reuse = dpcache(choices);
    if (kind == "progressive") growing = settings;
  }
  std::unique_ptr<const Policy> chosen = levels ? std::move(levels) : std::make_unique<Native>(manifest.native);
  if (reuse) chosen = std::make_unique<Reusing>(std::move(chosen), std::move(reuse));
  return growing ? progressive(*growing, choices, std::move(chosen)) : std::move(chosen);
}

}  // namespace ddit
