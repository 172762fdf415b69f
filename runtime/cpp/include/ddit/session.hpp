// From token ids and noise to a picture: encode, denoise, decode.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ddit/engine.hpp"
#include "ddit/errors.hpp"
#include "ddit/files.hpp"
#include "ddit/policy.hpp"

namespace ddit {

/// One picture or clip, as a caller asks for it. What is left out is the bundle's choice.
struct Request {
  std::map<std::string, std::vector<std::int64_t>> ids;  // by text encoder's graph; shorter rows are filled up
  // of the negative prompt, or of the empty text, where a model with two passes is guided
  std::optional<std::map<std::string, std::vector<std::int64_t>>> negative_ids;
  std::optional<Tensor> noise;   // the starting noise (C, [F,] H, W) of the full size
  std::optional<Tensor> latent;  // what the run starts from instead, (C, [F,] H, W) of one of the schedule's sizes
  int first_step = 0;            // number of the step at which `latent` is
  std::string schedule = "adaptive";
  std::optional<int> steps;
  std::optional<std::int64_t> height, width;  // pixels
  std::optional<std::int64_t> frames;         // of a clip
  std::optional<int> text_length;             // tokens
  std::optional<double> guidance;
  std::optional<double> carry;  // share of the last native step's detail that coarse steps take over
};

/// A request with every question answered.
struct Run {
  std::map<std::string, Ids> ids;           // by text encoder's graph, (1, tokens)
  std::map<std::string, Ids> negative_ids;  // the same; none where a step has one pass
  std::optional<Tensor> noise, latent;
  Sizes sizes;  // the symbols' values at the full size
  int first_step = 0;
  double guidance = 0, carry = 0;
  std::vector<float> sigmas;     // one more than there are steps
  std::vector<float> timesteps;  // that the model is told, before the latent grows
  std::shared_ptr<const Policy> policy;
  std::vector<std::pair<Fraction, Sizes>> scales;  // that the policy may run, rising
  Fraction start;
  double rho = 0;  // the quantile that the trace shows where the policy looks at none

  const Sizes& at(Fraction scale) const;
};

/// Answer what was left open. `backend` as calibrations name it. Throws `UsageError`.
Run resolve(const Request& request, const Manifest& manifest, const std::string& backend);

/// What one step did.
struct StepRecord {
  int step = 0;
  double sigma = 0;
  std::optional<int> level;  // none: the velocity was predicted
  double milliseconds = 0;
  std::map<int, double> statistic;  // σ_p by coarse patch; empty until three steps are done
  std::optional<double> error;      // root mean square of v − v̂ at a computed step that was predicted too
  std::string by;
  Figures figures;
  std::vector<double> prediction;  // weights of the kept velocities
  double correction = 0;
  Fraction scale;
  double gain = 1;
  std::int64_t height = 0, width = 0;  // pixels that the scale is
};

struct Trace {
  std::string schedule;
  std::vector<StepRecord> steps;
  double encode_milliseconds = 0, denoise_milliseconds = 0, decode_milliseconds = 0;
};

/// The trace as JSON, with the names of the Python runtime's.
std::string to_json(const Trace& trace);

/// One run in flight.
class Session {
 public:
  /// `conditions`: the levels' inputs by name that stay the same, with a first axis of 1.
  Session(Backend& backend, Run run, std::map<std::string, Tensor> conditions);
  bool done() const { return history_.step() == history_.steps(); }
  /// Do one step. Throws `BackendError` when an engine fails.
  const StepRecord& step();
  /// (1, C, [F,] H, W).
  const Tensor& latent() const { return buffers_.at("latent"); }
  const Trace& trace() const { return trace_; }

 private:
  struct Call {
    std::string graph;
    std::map<std::string, std::string> other;  // a tensor's buffer, where that has not the tensor's name
  };
  const Sizes& sizes() const { return run_.at(history_.scale); }
  void call(const Call& call, std::vector<std::string>& written);
  void finish(const std::vector<std::string>& written);
  void clear_state();
  void fill_row(const std::string& name, double value);
  void run_gate();
  double told() const;
  void run_level(const std::string& graph, std::vector<std::string>& written);
  void grow(const Decision& decision);
  void tell(const Decision& decision);
  std::optional<Tensor> estimate() const;
  std::string where() const;

  Backend& backend_;
  const Manifest& manifest_;
  Run run_;
  RunHistory history_;
  Trace trace_;
  std::map<std::string, Tensor> buffers_;
  std::map<int, std::map<std::string, Tensor>> tables_;  // by level, at the present size
  bool native_done_ = false;  // whether there is a native step's estimate, whose detail coarse steps carry on
};

struct Result {
  std::vector<Image> frames;  // of a picture one
  Tensor latent;              // (1, C, [F,] H, W), what was decoded
  Trace trace;

  const Image& image() const { return frames.front(); }
};

/// What the text encoders make of the ids: the levels' inputs by name, and with `negative_` before it that of the
/// negative prompt.
std::map<std::string, Tensor> encode(Backend& backend, const Run& run);

/// The picture of a latent (1, C, H, W), or the frames of a clip's (1, C, F, H, W).
std::vector<Image> decode(Backend& backend, const Tensor& latent, const Sizes& sizes);

/// All three. `on_step` is told of every step.
Result generate(
    Backend& backend, const Request& request,
    const std::function<void(const StepRecord&)>& on_step = [](const StepRecord&) {});

}  // namespace ddit
