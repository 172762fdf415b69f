#include "policies.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "ddit/errors.hpp"
#include "ddit/sampling.hpp"
#include "strings.hpp"

namespace ddit {
namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr double kLongest = 1.6;  // by which the picture's share of the latent may grow within a predicted stretch
constexpr int kPathOrder = 2;     // of the expansion by which DPCache predicts
constexpr double kEdge = 0.9;     // the band's edge: frequencies from this share of the highest one on
constexpr double kLeast = 1e-30;  // a picture without any third difference has a logarithm too

/// The estimated relative changes of the model's output since the last computed step, added up.
double accumulated_change(const RunHistory& history, const std::vector<double>& coefficients) {
  double sum = 0;
  for (auto i = static_cast<std::size_t>(history.computed.back() + 1 - history.first); i < history.changes.size();
       ++i) {
    double value = 0;
    for (const double coefficient : coefficients) value = value * history.changes[i].whole + coefficient;
    sum += value;
  }
  return sum;
}

/// The mean length in σ of the steps that a third difference spans, by the last of them.
std::vector<double> step_lengths(const std::vector<float>& sigmas) {
  std::vector<double> lengths, means;
  for (std::size_t i = 0; i + 1 < sigmas.size(); ++i)
    lengths.push_back(-(static_cast<double>(sigmas[i + 1]) - static_cast<double>(sigmas[i])));
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    const std::size_t from = i + 1 < kDifferenceOrder ? 0 : i + 1 - kDifferenceOrder;
    double sum = 0;
    for (std::size_t j = from; j <= i; ++j) sum += lengths[j];
    means.push_back(sum / static_cast<double>(i + 1 - from));
  }
  return means;
}

/// Linear interpolation between points of rising x; outside them the first and the last value.
double interpolate(double x, const std::vector<double>& xs, const std::vector<double>& ys) {
  if (!(x > xs.front())) return ys.front();
  if (!(x < xs.back())) return ys.back();
  const auto after = static_cast<std::size_t>(std::upper_bound(xs.begin(), xs.end(), x) - xs.begin());
  const std::size_t before = after - 1;
  return (ys[after] - ys[before]) / (xs[after] - xs[before]) * (x - xs[before]) + ys[before];
}

/// t*: the noise level at which a frequency of this power is activated.
double activation(double power, double delta) {
  const double odds = power * (1 + power - delta);
  return odds > 0 ? 1 / (1 + std::sqrt(delta / odds)) : 0.0;
}

/// The mean power of a latent (C, [F,] H, W) in orthonormal DCT-II coefficients at the edge of its band.
double edge_power(const Tensor& latent) {
  const std::int64_t height = height_of(latent.shape), width = width_of(latent.shape);
  const Tensor spectrum = dct_coefficients(latent);
  double sum = 0;
  std::int64_t number = 0;
  for (std::size_t at = 0; at < spectrum.values.size();)  // height and width lie innermost
    for (std::int64_t i = 0; i < height; ++i)
      for (std::int64_t j = 0; j < width; ++j, ++at) {
        const double frequency = std::hypot(static_cast<double>(i) / static_cast<double>(height),
                                            static_cast<double>(j) / static_cast<double>(width));
        if (frequency < kEdge || frequency >= 1) continue;
        sum += static_cast<double>(spectrum.values[at]) * static_cast<double>(spectrum.values[at]);
        ++number;
      }
  return sum / static_cast<double>(number);
}

/// A quotient, rounded to the nearest whole number, a half to the even one.
std::int64_t rounded(std::int64_t above, std::int64_t below) {
  const std::int64_t floor = above / below, twice = 2 * (above - floor * below);
  return twice > below || (twice == below && floor % 2 != 0) ? floor + 1 : floor;
}

std::string written(Fraction fraction) { return std::to_string(fraction.above) + "/" + std::to_string(fraction.below); }

}  // namespace

std::vector<int> RunHistory::computed_at_level() const {
  std::vector<int> found;
  for (auto step = computed.rbegin(); step != computed.rend(); ++step) {
    if (levels[static_cast<std::size_t>(*step - first)] != levels.back()) break;
    found.push_back(*step);
  }
  return found;
}

RunHistory RunHistory::grown(Fraction to, double gain) const {
  RunHistory anew;
  anew.sigmas = sigmas;
  anew.sigmas[static_cast<std::size_t>(step())] *= static_cast<float>(gain);
  anew.first = step();
  anew.scale = to;
  anew.estimate = estimate;
  return anew;
}

void RunHistory::record(const Decision& decision, double measured_error, std::map<int, Tensor> measured) {
  if (!decision.level) {
    levels.push_back(levels.back());
  } else {
    computed.push_back(step());
    levels.push_back(*decision.level);
    error = decision.prediction.empty() ? std::nullopt : std::optional<double>(measured_error);
  }
  if (levels.size() >= kDifferenceOrder) deviations = std::move(measured);
}

double root_mean_square(const Tensor& values) {
  double sum = 0;
  for (const float value : values.values) sum += static_cast<double>(value) * static_cast<double>(value);
  return std::sqrt(sum / static_cast<double>(values.values.size()));
}

double statistic(const Tensor& deviation, double rho) {
  std::vector<float> sorted = deviation.values;
  std::sort(sorted.begin(), sorted.end());
  const float place = static_cast<float>(sorted.size() - 1) * static_cast<float>(rho);
  const auto below = static_cast<std::size_t>(std::floor(place));
  const std::size_t above = std::min(below + 1, sorted.size() - 1);
  const float share = place - static_cast<float>(below), between = sorted[above] - sorted[below];
  const float value = share < 0.5F ? sorted[below] + between * share : sorted[above] - between * (1 - share);
  return static_cast<double>(value);
}

std::vector<double> lagrange_weights(const std::vector<double>& nodes, double sigma) {
  std::vector<double> weights;
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    double weight = 1;
    for (std::size_t j = 0; j < nodes.size(); ++j)
      if (j != i) weight *= (sigma - nodes[j]) / (nodes[i] - nodes[j]);
    weights.push_back(weight);
  }
  return weights;
}

std::vector<double> taylor_weights(const std::vector<int>& steps, int step, int order) {
  const std::size_t known = std::min(steps.size(), static_cast<std::size_t>(order) + 1);
  // derivatives of the present order at every value that has one, as weights of the values
  std::vector<std::vector<double>> derivatives(known, std::vector<double>(known, 0.0));
  for (std::size_t i = 0; i < known; ++i) derivatives[i][i] = 1;
  std::vector<double> weights(known, 0.0);
  double factorial = 1;
  for (std::size_t power = 0; power < known; ++power) {
    if (power > 1) factorial *= static_cast<double>(power);
    const double factor = std::pow(step - steps[0], static_cast<double>(power));
    for (std::size_t k = 0; k < known; ++k) weights[k] += derivatives[0][k] * factor / factorial;
    for (std::size_t i = 0; i + 1 < derivatives.size(); ++i)
      for (std::size_t k = 0; k < known; ++k)
        derivatives[i][k] = (derivatives[i][k] - derivatives[i + 1][k]) / (steps[i] - steps[i + 1]);
    derivatives.pop_back();
  }
  return weights;
}

double newton_product(const std::vector<double>& nodes, double sigma) {
  double product = 1;
  for (const double node : nodes) product *= sigma - node;
  return product;
}

Decision Native::decide(const RunHistory& /*history*/) const {
  Decision decision;
  decision.level = native_;
  decision.by = "native";
  return decision;
}

Decision Fixed::decide(const RunHistory& history) const {
  Decision decision;
  decision.level = levels_[static_cast<std::size_t>(history.step())];
  decision.by = "fixed";
  return decision;
}

int Fixed::steps(std::optional<int> asked, int /*standard*/) const {
  const int listed = static_cast<int>(levels_.size());
  if (asked && *asked != listed)
    throw UsageError("the fixed schedule has " + std::to_string(listed) + " steps, not " + std::to_string(*asked));
  return listed;
}

std::string Fixed::text() const {
  std::vector<std::string> runs;
  for (std::size_t i = 0; i < levels_.size();) {
    std::size_t end = i;
    while (end < levels_.size() && levels_[end] == levels_[i]) ++end;
    runs.push_back(std::to_string(levels_[i]) + "x" + std::to_string(end - i));
    i = end;
  }
  return "fixed:" + join(runs, ",");
}

Decision Dynamic::decide(const RunHistory& history) const {
  Decision decision;
  decision.by = "dynamic";
  if (!judges(history)) {
    const bool warm = !history.levels.empty() && history.step() >= settings_.warmup;
    decision.level = warm ? history.levels.back() : settings_.native;
    return decision;
  }
  decision.level = settings_.native;
  for (const int patch : settings_.coarse) {
    const double smooth =
        settings_.smooth.empty() ? 1.0 : settings_.smooth.at(patch)[static_cast<std::size_t>(history.step() - 1)];
    if (statistic(history.deviations.at(patch), settings_.rho) < settings_.tau * smooth)
      decision.level = std::max(*decision.level, patch);
  }
  return decision;
}

bool Dynamic::judges(const RunHistory& history) const {
  const auto& levels = history.levels;
  if (history.step() < settings_.warmup || levels.size() < kDifferenceOrder) return false;
  const std::size_t held = std::min(levels.size(), static_cast<std::size_t>(settings_.hold));
  return std::all_of(levels.end() - static_cast<std::ptrdiff_t>(held), levels.end(),
                     [&](int patch) { return patch == levels.back(); });
}

std::string Dynamic::text() const {
  char tau[32];
  std::snprintf(tau, sizeof tau, "%.4g", settings_.tau);
  const int coarsest = settings_.coarse.empty() ? settings_.native : settings_.coarse.back();
  return std::string("dynamic:tau=") + tau + ",rho=" + shortest(settings_.rho) +
         ",warmup=" + std::to_string(settings_.warmup) + ",hold=" + std::to_string(settings_.hold) +
         ",coarsest=" + std::to_string(coarsest) + (settings_.smooth.empty() ? ",absolute=1" : "");
}

std::map<int, std::vector<double>> smooth_at(const std::vector<SmoothPoint>& points, const std::vector<float>& sigmas) {
  std::vector<SmoothPoint> rising = points;
  std::stable_sort(rising.begin(), rising.end(),
                   [](const auto& one, const auto& other) { return one.sigma < other.sigma; });
  std::vector<double> known;
  for (const SmoothPoint& point : rising) known.push_back(point.sigma);
  const std::vector<double> lengths = step_lengths(sigmas);
  std::map<int, std::vector<double>> curves;
  for (const auto& [patch, unused] : rising.front().statistic) {
    std::vector<double> logarithms, curve;
    for (const SmoothPoint& point : rising) logarithms.push_back(std::log(std::max(point.statistic.at(patch), kLeast)));
    for (std::size_t i = 0; i < lengths.size(); ++i)
      curve.push_back(std::exp(interpolate(static_cast<double>(sigmas[i]), known, logarithms)) *
                      std::pow(lengths[i], kDifferenceOrder));
    curves[patch] = std::move(curve);
  }
  return curves;
}

std::optional<Prediction> Adaptive::predict(const RunHistory& history) const {
  const int step = history.step();
  const std::vector<int> computed = history.computed_at_level();
  const std::size_t needed = static_cast<std::size_t>(info_.order) + 1;
  if (computed.size() < needed) return std::nullopt;
  std::vector<double> nodes;
  for (std::size_t i = 0; i < needed; ++i) nodes.push_back(history.sigma(computed[i]));
  std::vector<double> products;
  for (int j = computed[0] + 1; j <= step; ++j)
    products.push_back((history.sigma(j + 1) - history.sigma(j)) * newton_product(nodes, history.sigma(j)));
  Prediction prediction;
  prediction.weights = lagrange_weights(nodes, history.sigma(step));
  prediction.correction =
      std::accumulate(products.begin(), products.end() - 1, 0.0) / newton_product(nodes, history.sigma(step));
  if (!history.error || computed.size() < needed + 1) return prediction;
  std::vector<double> before;
  for (std::size_t i = 1; i < needed + 1; ++i) before.push_back(history.sigma(computed[i]));
  const double difference = *history.error / std::abs(newton_product(before, nodes[0]));
  double moved = 0;
  for (const double product : products) moved += std::abs(product);
  const double share = 1 - history.sigma(step + 1), share_before = 1 - history.sigma(computed[0]);
  const double expected = difference * moved / share;
  prediction.enough = expected < info_.tolerance && share <= kLongest * share_before;
  prediction.figures["expected_error"] = expected;
  return prediction;
}

std::string Adaptive::text() const {
  return "adaptive:tolerance=" + shortest(info_.tolerance) + ",order=" + std::to_string(info_.order);
}

std::optional<Prediction> Adams::predict(const RunHistory& history) const {
  if (history.levels.empty()) return std::nullopt;
  const int step = history.step();
  const double before = history.sigma(step - 1), now = history.sigma(step), after = history.sigma(step + 1);
  Prediction prediction;
  prediction.weights = {1.0};
  prediction.correction = (after - now) * (after - now) / (now - before) / 2;
  return prediction;
}

std::optional<Prediction> TaylorSeer::predict(const RunHistory& history) const {
  const std::vector<int> computed = history.computed_at_level();
  if (computed.empty()) return std::nullopt;
  Prediction prediction;
  prediction.weights = taylor_weights(computed, history.step(), settings_.order);
  prediction.enough =
      history.step() - computed[0] < settings_.interval && static_cast<int>(history.computed.size()) >= settings_.first;
  return prediction;
}

std::string TaylorSeer::text() const {
  return "taylorseer:interval=" + std::to_string(settings_.interval) + ",order=" + std::to_string(settings_.order) +
         ",first=" + std::to_string(settings_.first);
}

std::optional<Prediction> DPCache::predict(const RunHistory& history) const {
  const std::vector<int> known = history.computed_at_level();
  if (known.empty()) return std::nullopt;
  Prediction prediction;
  prediction.weights = taylor_weights(known, history.step(), kPathOrder);
  prediction.enough = !std::binary_search(computed_.begin(), computed_.end(), history.step());
  return prediction;
}

void DPCache::check(int steps) const {
  if (steps != steps_)
    throw UsageError("dpcache's path is for " + std::to_string(steps_) + " steps, not " + std::to_string(steps) +
                     "; give --steps " + std::to_string(steps) + " too");
}

std::optional<Prediction> TeaCache::predict(const RunHistory& history) const {
  if (history.computed.empty()) return std::nullopt;
  const double accumulated = accumulated_change(history, coefficients_);
  Prediction prediction;
  prediction.weights = {1.0};
  prediction.enough = accumulated < threshold_ && threshold_ > 0 && history.step() < history.steps() - 1;
  prediction.figures = {{"change", history.changes.back().whole}, {"accumulated", accumulated}};
  return prediction;
}

std::string TeaCache::text() const { return "teacache:threshold=" + shortest(threshold_); }

std::optional<Prediction> SpectralCache::predict(const RunHistory& history) const {
  if (history.computed.empty()) return std::nullopt;
  const SpectralCacheSettings& own = settings_;
  const Change& change = history.changes.back();
  const double accumulated = accumulated_change(history, coefficients_);
  const double place = 2 * kPi * history.step() / history.steps();
  const double threshold = own.threshold * (own.least + (own.most - own.least) * (1 - std::cos(place)) / 2);
  Prediction prediction;
  prediction.weights = {1.0};
  prediction.enough = threshold > 0 && accumulated < threshold && change.low <= own.low * threshold &&
                      change.high <= own.high * threshold &&
                      history.step() - 1 - history.computed.back() < own.longest &&
                      history.step() < history.steps() - 1;
  prediction.figures = {
      {"low", change.low}, {"high", change.high}, {"accumulated", accumulated}, {"threshold", threshold}};
  return prediction;
}

std::string SpectralCache::text() const {
  const SpectralCacheSettings& own = settings_;
  return "spectralcache:threshold=" + shortest(own.threshold) + ",low=" + shortest(own.low) +
         ",high=" + shortest(own.high) + ",least=" + shortest(own.least) + ",most=" + shortest(own.most) +
         ",longest=" + std::to_string(own.longest);
}

Decision Reusing::decide(const RunHistory& history) const {
  std::optional<Prediction> found = reuse_->predict(history);
  if (found && found->enough) {
    Decision decision;
    decision.prediction = std::move(found->weights);
    decision.by = reuse_->name();
    decision.figures = std::move(found->figures);
    return decision;
  }
  Decision decision = levels_->decide(history);
  if (!found) return decision;
  decision.prediction = std::move(found->weights);
  decision.correction = found->correction;
  for (const auto& [name, value] : found->figures) decision.figures[name] = value;
  return decision;
}

int Reusing::steps(std::optional<int> asked, int standard) const {
  const int steps = levels_->steps(asked, standard);
  reuse_->check(steps);
  return steps;
}

Sizes scaled(const Manifest& manifest, const Sizes& sizes, Fraction scale) {
  Sizes small = sizes;
  if (scale.whole()) return small;
  const std::int64_t unit = manifest.unit();
  for (const Axis& axis : manifest.sides()) {
    const std::int64_t whole = sizes.at(axis.symbol), value = rounded(whole * scale.above, scale.below);
    const std::int64_t below = value / unit;
    const std::int64_t chosen = value - below * unit <= (below + 1) * unit - value ? below : below + 1;
    small[axis.symbol] = std::max<std::int64_t>(chosen, 1) * unit;
    if (small[axis.symbol] >= whole)
      throw UsageError("a " + axis.name + " of " + std::to_string(whole * axis.downscale) +
                       " has no smaller size at the scale " + written(scale) +
                       ": the levels' patches ask for multiples of " + std::to_string(unit * axis.downscale) +
                       " pixels; choose a larger picture or another schedule");
  }
  return small;
}

std::vector<Stage> growing_stages(const Manifest& manifest, const Sizes& sizes, const std::vector<Fraction>& scales) {
  std::vector<Fraction> rising = scales;
  rising.push_back({});
  std::vector<Sizes> each;
  for (const Fraction scale : rising) each.push_back(scaled(manifest, sizes, scale));
  for (std::size_t i = 0; i + 1 < each.size(); ++i)
    for (const Axis& axis : manifest.sides())
      if (each[i].at(axis.symbol) >= each[i + 1].at(axis.symbol))
        throw UsageError("the scales " + written(rising[i]) + " and " +
                         (rising[i + 1].whole() ? "1" : written(rising[i + 1])) + " have the same " + axis.name +
                         " here; leave one out");
  std::vector<Stage> stages;
  for (std::size_t i = 0; i < each.size(); ++i) {
    double share = 1;
    std::int64_t shorter = sizes.at(manifest.axes.back().symbol), pixels = 1;
    for (const Axis& axis : manifest.sides()) {
      const std::int64_t full = sizes.at(axis.symbol);
      share = std::min(share, static_cast<double>(each[i].at(axis.symbol)) / static_cast<double>(full));
      shorter = std::min(shorter, full);
      pixels *= each[i].at(axis.symbol);
    }
    stages.push_back({rising[i], share * static_cast<double>(shorter) / 2, pixels});
  }
  return stages;
}

Decision Progressive::decide(const RunHistory& history) const {
  std::size_t number = 0;
  while (!(stages_[number].scale == history.scale)) ++number;
  const std::size_t first = number;
  const double sigma = history.sigma(history.step());
  Figures figures;
  for (; number + 1 < stages_.size(); ++number) {
    const double edge = power(stages_[number], number == first ? &history : nullptr);
    const double until = activation(edge, settings_.delta);
    figures = {{"edge_power", edge}, {"grows_at", until}};
    if (sigma > until && history.step() < history.steps() - 1) break;
  }
  const Stage &before = stages_[first], &stage = stages_[number];
  const double ratio = std::sqrt(static_cast<double>(stage.pixels) / static_cast<double>(before.pixels));
  const double gain = ratio / (1 + (ratio - 1) * sigma);
  Decision decision = number == first ? policy_->decide(history) : policy_->decide(history.grown(stage.scale, gain));
  decision.scale = stage.scale;
  decision.gain = gain;
  for (const auto& [name, value] : figures) decision.figures[name] = value;
  return decision;
}

double Progressive::power(const Stage& stage, const RunHistory* history) const {
  if (settings_.own && history != nullptr)
    if (const auto estimate = history->estimate())
      return static_cast<double>(stages_.back().pixels) / static_cast<double>(stage.pixels) * edge_power(*estimate);
  return spectrum_.amplitude / std::pow(stage.frequency, spectrum_.exponent);
}

std::vector<Fraction> Progressive::scales() const {
  std::vector<Fraction> scales;
  for (const Stage& stage : stages_) scales.push_back(stage.scale);
  return scales;
}

std::string Progressive::text() const {
  std::vector<std::string> scales;
  for (std::size_t i = 0; i + 1 < stages_.size(); ++i) scales.push_back(written(stages_[i].scale));
  return policy_->text() + "+progressive:" + (settings_.own ? "adaptive," : "") + "delta=" + shortest(settings_.delta) +
         ",scales=" + join(scales, "-");
}

}  // namespace ddit
