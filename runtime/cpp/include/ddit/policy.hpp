// Policies: what decides what every denoising step does. They know nothing of the model or of where it runs.
// docs/spec/policies.md has their rules; ddit_host and the Python runtime decide alike.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ddit/bundle.hpp"
#include "ddit/tensor.hpp"

namespace ddit {

/// A share of the full latent's height and width, in lowest terms.
struct Fraction {
  int above = 1, below = 1;

  bool whole() const { return above == below; }
  double value() const { return static_cast<double>(above) / below; }
  bool operator==(const Fraction& other) const { return above == other.above && below == other.below; }
  bool operator<(const Fraction& other) const { return above * other.below < other.above * below; }
};

/// Figures by name, on what something was decided.
using Figures = std::map<std::string, double>;

/// What one denoising step does: run a level, or predict the velocity.
struct Decision {
  std::optional<int> level;        // the patch that it runs at; none: the velocity is predicted
  std::vector<double> prediction;  // weights of the kept velocities, the newest first; empty: none
  double correction = 0;           // Δσ: so much of v − v̂ moves the latent
  std::string by;                  // the policy that decided
  Figures figures;
  Fraction scale;   // of the full latent; one that the latent is not at grows first,
  double gain = 1;  // and this is κ: the step then starts at the noise level κσ
};

/// What the gate finds before a step: the relative L1 change of the first block's modulated input.
struct Change {
  double whole = 0, low = 0, high = 0;  // of all channels, of the first and of the second half
};

/// A run so far, as its policy sees it.
struct RunHistory {
  std::vector<float> sigmas;    // noise levels of all steps and 0 at the end
  int first = 0;                // number of the first step that this tells of
  std::vector<int> levels;      // of the steps that are done; a predicted one has that of the computed one before it
  std::vector<int> computed;    // numbers of the steps that ran a level
  std::optional<double> error;  // root mean square of v − v̂ at the last computed step, where one was predicted
  std::vector<Change> changes;  // of every step up to the one to decide on; empty without a gate
  std::map<int, Tensor> deviations;  // by coarse patch (H/p, W/p), after the last step; empty until three are done
  Fraction scale;                    // of the latent
  std::function<std::optional<Tensor>()> estimate = [] { return std::nullopt; };  // x̂ (C, H, W)

  int step() const { return first + static_cast<int>(levels.size()); }  // the one to decide on, from 0
  int steps() const { return static_cast<int>(sigmas.size()) - 1; }
  double sigma(int at) const { return static_cast<double>(sigmas[static_cast<std::size_t>(at)]); }
  /// The steps that were computed since the level last changed, the newest first.
  std::vector<int> computed_at_level() const;
  /// The history after the latent has grown: it starts anew, at κ times the noise level.
  RunHistory grown(Fraction to, double gain) const;
  /// Take a finished step, with what it measured.
  void record(const Decision& decision, double measured_error, std::map<int, Tensor> measured);
};

class Policy {
 public:
  Policy() = default;
  Policy(const Policy&) = delete;
  Policy& operator=(const Policy&) = delete;
  virtual ~Policy() = default;
  virtual Decision decide(const RunHistory& history) const = 0;
  /// The written form, which `parse_schedule` reads.
  virtual std::string text() const = 0;
  /// How many steps a run has. Throws `UsageError` where `asked` does not fit.
  virtual int steps(std::optional<int> asked, int standard) const { return asked.value_or(standard); }
  /// Whether it needs what the gate finds before every step.
  virtual bool gate() const { return false; }
  /// The quantile ρ of the deviations that it looks at.
  virtual std::optional<double> quantile() const { return std::nullopt; }
  /// The scales that it decides among, the one to start at first and 1 at the end.
  virtual std::vector<Fraction> scales() const { return {Fraction{}}; }
};

/// A policy from its written form; the bundle gives what it leaves unsaid. `sigmas` are those of `run.steps` steps.
/// Throws `UsageError`.
std::unique_ptr<const Policy> parse_schedule(const std::string& text, const Manifest& manifest,
                                             const std::vector<float>& sigmas, const RunSize& run,
                                             const std::string& backend);

/// σ_p: the ρ quantile of the patches' deviations, interpolated linearly, in float32.
double statistic(const Tensor& deviation, double rho);

double root_mean_square(const Tensor& values);

/// The sizes at a share of the latent's height and width, the nearest that all patches divide. Throws `UsageError`.
Sizes scaled(const Manifest& manifest, const Sizes& sizes, Fraction scale);

}  // namespace ddit
