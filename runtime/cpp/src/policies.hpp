// The policies themselves.
#pragma once

#include "ddit/policy.hpp"

namespace ddit {

constexpr int kKeptVelocities = 3;   // that every bundle keeps: enough for a parabola
constexpr int kDifferenceOrder = 3;  // a third difference needs three finished steps

/// The weights of the values at `nodes` in their interpolating polynomial's value at `sigma` (Lagrange).
std::vector<double> lagrange_weights(const std::vector<double>& nodes, double sigma);

/// The weights of the values at `steps`, the newest first, in their Taylor expansion at `step` (TaylorSeer).
std::vector<double> taylor_weights(const std::vector<int>& steps, int step, int order);

/// ∏ (σ − node).
double newton_product(const std::vector<double>& nodes, double sigma);

class Native : public Policy {
 public:
  explicit Native(int native) : native_(native) {}
  Decision decide(const RunHistory& history) const override;
  std::string text() const override { return "native"; }

 private:
  int native_;
};

/// The level of every step, in order.
class Fixed : public Policy {
 public:
  explicit Fixed(std::vector<int> levels) : levels_(std::move(levels)) {}
  Decision decide(const RunHistory& history) const override;
  std::string text() const override;
  int steps(std::optional<int> asked, int standard) const override;

 private:
  std::vector<int> levels_;
};

/// DDiT's policy: as coarse as the latent's third difference is smooth.
struct DynamicSettings {
  int native = 0;
  std::vector<int> coarse;
  double tau = 0, rho = 0;
  int warmup = 0, hold = kDifferenceOrder;
  std::map<int, std::vector<double>> smooth;  // by patch, after every step; empty: τ is absolute
};

class Dynamic : public Policy {
 public:
  explicit Dynamic(DynamicSettings settings) : settings_(std::move(settings)) {}
  Decision decide(const RunHistory& history) const override;
  std::string text() const override;
  std::optional<double> quantile() const override { return settings_.rho; }

 private:
  bool judges(const RunHistory& history) const;
  DynamicSettings settings_;
};

/// By coarse patch the statistic of a smooth picture after every step at these noise levels.
std::map<int, std::vector<double>> smooth_at(const std::vector<SmoothPoint>& points, const std::vector<float>& sigmas);

/// What a method of reuse makes of the kept velocities for the next step.
struct Prediction {
  std::vector<double> weights;  // the newest first
  bool enough = false;          // whether the step needs no level
  double correction = 0;        // Δσ, if the step runs a level all the same
  Figures figures;
};

/// Decides which steps run no level.
class Reuse {
 public:
  Reuse() = default;
  Reuse(const Reuse&) = delete;
  Reuse& operator=(const Reuse&) = delete;
  virtual ~Reuse() = default;
  /// What there is for the next step; nothing where nothing can be predicted yet.
  virtual std::optional<Prediction> predict(const RunHistory& history) const = 0;
  virtual std::string name() const = 0;
  virtual std::string text() const = 0;
  virtual bool gate() const { return false; }
  /// Throws `UsageError` where it cannot be used in a run of so many steps.
  virtual void check(int /*steps*/) const {}
};

/// Prediction with error control: one tolerance decides which steps are computed.
class Adaptive : public Reuse {
 public:
  explicit Adaptive(AdaptiveInfo info) : info_(info) {}
  std::optional<Prediction> predict(const RunHistory& history) const override;
  std::string name() const override { return "adaptive"; }
  std::string text() const override;

 private:
  AdaptiveInfo info_;
};

/// Adams-Bashforth of order 2 in place of Euler's method; every step is computed.
class Adams : public Reuse {
 public:
  std::optional<Prediction> predict(const RunHistory& history) const override;
  std::string name() const override { return "adams"; }
  std::string text() const override { return "adams"; }
};

struct TaylorSeerSettings {
  int interval = 4, order = 2, first = 3;
};

/// Every `interval`-th step is computed, those between are predicted from finite differences.
class TaylorSeer : public Reuse {
 public:
  explicit TaylorSeer(TaylorSeerSettings settings) : settings_(settings) {}
  std::optional<Prediction> predict(const RunHistory& history) const override;
  std::string name() const override { return "taylorseer"; }
  std::string text() const override;

 private:
  TaylorSeerSettings settings_;
};

/// The steps to compute were chosen beforehand.
class DPCache : public Reuse {
 public:
  DPCache(int steps, std::vector<int> computed) : steps_(steps), computed_(std::move(computed)) {}
  std::optional<Prediction> predict(const RunHistory& history) const override;
  std::string name() const override { return "dpcache"; }
  std::string text() const override { return "dpcache"; }
  void check(int steps) const override;

 private:
  int steps_;
  std::vector<int> computed_;
};

/// A step repeats the last computed velocity while the model's input has changed little.
class TeaCache : public Reuse {
 public:
  TeaCache(std::vector<double> coefficients, double threshold)
      : coefficients_(std::move(coefficients)), threshold_(threshold) {}
  std::optional<Prediction> predict(const RunHistory& history) const override;
  std::string name() const override { return "teacache"; }
  std::string text() const override;
  bool gate() const override { return true; }

 private:
  std::vector<double> coefficients_;  // the highest power first
  double threshold_;
};

struct SpectralCacheSettings {
  double threshold = 0.6, low = 0.8, high = 1.5, least = 0.5, most = 1.5;
  int longest = 2;
};

/// TeaCache with a threshold that follows the run, and a test of each half of the channels.
class SpectralCache : public Reuse {
 public:
  SpectralCache(std::vector<double> coefficients, SpectralCacheSettings settings)
      : coefficients_(std::move(coefficients)), settings_(settings) {}
  std::optional<Prediction> predict(const RunHistory& history) const override;
  std::string name() const override { return "spectralcache"; }
  std::string text() const override;
  bool gate() const override { return true; }

 private:
  std::vector<double> coefficients_;
  SpectralCacheSettings settings_;
};

/// A policy whose steps run no level where a method of reuse has enough.
class Reusing : public Policy {
 public:
  Reusing(std::unique_ptr<const Policy> levels, std::unique_ptr<const Reuse> reuse)
      : levels_(std::move(levels)), reuse_(std::move(reuse)) {}
  Decision decide(const RunHistory& history) const override;
  std::string text() const override { return levels_->text() + "+" + reuse_->text(); }
  int steps(std::optional<int> asked, int standard) const override;
  bool gate() const override { return reuse_->gate() || levels_->gate(); }
  std::optional<double> quantile() const override { return levels_->quantile(); }

 private:
  std::unique_ptr<const Policy> levels_;
  std::unique_ptr<const Reuse> reuse_;
};

/// A size of the latent.
struct Stage {
  Fraction scale;
  double frequency = 0;  // it holds all frequencies below, in periods along the shorter side
  std::int64_t pixels = 0;
};

struct ProgressiveSettings {
  double delta = 0.05;
  std::vector<Fraction> scales = {{1, 2}};
  bool own = false;  // P(ω) is the picture's, not the model's
};

/// The stages of rising scales and the full size after them. Throws `UsageError`.
std::vector<Stage> growing_stages(const Manifest& manifest, const Sizes& sizes, const std::vector<Fraction>& scales);

/// Another policy's steps, the first of them on a smaller latent.
class Progressive : public Policy {
 public:
  Progressive(std::unique_ptr<const Policy> policy, std::vector<Stage> stages, ProgressiveSettings settings,
              Spectrum spectrum)
      : policy_(std::move(policy)), stages_(std::move(stages)), settings_(std::move(settings)), spectrum_(spectrum) {}
  Decision decide(const RunHistory& history) const override;
  std::string text() const override;
  int steps(std::optional<int> asked, int standard) const override { return policy_->steps(asked, standard); }
  bool gate() const override { return policy_->gate(); }
  std::optional<double> quantile() const override { return policy_->quantile(); }
  std::vector<Fraction> scales() const override;

 private:
  double power(const Stage& stage, const RunHistory* history) const;
  std::unique_ptr<const Policy> policy_;
  std::vector<Stage> stages_;
  ProgressiveSettings settings_;
  Spectrum spectrum_;
};

}  // namespace ddit
