#include "ddit/session.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>

#include "ddit/errors.hpp"
#include "ddit/sampling.hpp"
#include "names.hpp"
#include "strings.hpp"

namespace ddit {
namespace {

using Clock = std::chrono::steady_clock;

// buffers: what the model is told of the noise level, which the sampler's step graph has as it is
constexpr const char* kGateTimestep = "gate_timestep";
constexpr const char* kModelTimestep = "model_timestep";

double milliseconds_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

/// A row without its batch as a batch of one, and back.
Tensor batch_of(Tensor row) {
  row.shape.insert(row.shape.begin(), 1);
  return row;
}
Tensor row_of(Tensor batch) {
  batch.shape.erase(batch.shape.begin());
  return batch;
}

[[noreturn]] void not_finite(const std::string& graph, const std::string& where) {
  throw BackendError(graph + " gave NaN or infinity at " + where + "; check the bundle with ddit-run verify");
}

}  // namespace

Session::Session(Backend& backend, Run run, std::map<std::string, Tensor> conditions)
    : backend_(backend), manifest_(backend.bundle().manifest()), run_(std::move(run)), buffers_(std::move(conditions)) {
  trace_.schedule = run_.policy->text();
  history_.sigmas = run_.sigmas;
  history_.first = run_.first_step;
  history_.scale = run_.start;
  history_.estimate = [this] { return estimate(); };
  fill_row(names::kGuidance, run_.guidance);
  clear_state();
  if (run_.latent)
    buffers_[names::kLatent] = batch_of(*run_.latent);
  else if (run_.start.whole())
    buffers_[names::kLatent] = batch_of(*run_.noise);
  else {  // what the full size's noise looks like from afar
    const Shape& shape = buffers_[names::kLatent].shape;
    const Tensor small = lowest(dct_coefficients(*run_.noise), height_of(shape), width_of(shape));
    buffers_[names::kLatent] = batch_of(inverse_dct(small));
  }
}

const StepRecord& Session::step() {
  if (run_.policy->gate() && history_.changes.size() == history_.levels.size()) run_gate();
  const Decision decision = run_.policy->decide(history_);
  const auto begin = Clock::now();
  if (!(decision.scale == history_.scale)) grow(decision);
  tell(decision);
  std::vector<std::string> written;
  if (decision.level)
    run_level(manifest_.level(*decision.level), written);
  else
    call({names::kPredict, {}}, written);
  call({names::kUpdate, {}}, written);
  finish(written);
  const double milliseconds = milliseconds_since(begin);

  // whatever is not finite in the latent or the velocity is not in these
  std::map<int, Tensor> deviations;
  for (const int patch : manifest_.coarse()) deviations[patch] = buffers_.at(names::kDeviation + std::to_string(patch));
  const Tensor& missed = buffers_.at(names::kPredictionError);
  bool finite = missed.finite();
  for (const auto& [patch, values] : deviations) finite = finite && values.finite();
  if (!finite) not_finite(decision.level ? manifest_.level(*decision.level) : names::kPredict, where());

  StepRecord record;
  record.step = history_.step();
  record.sigma = history_.sigma(record.step);
  history_.record(decision, root_mean_square(missed), std::move(deviations));
  native_done_ = native_done_ || decision.level == manifest_.native;
  record.level = decision.level;
  record.milliseconds = milliseconds;
  const double rho = run_.policy->quantile().value_or(run_.rho);
  for (const auto& [patch, values] : history_.deviations) record.statistic[patch] = statistic(values, rho);
  if (decision.level) record.error = history_.error;
  record.by = decision.by;
  record.figures = decision.figures;
  record.prediction = decision.prediction;
  record.correction = decision.correction;
  record.gain = decision.gain;
  record.scale = history_.scale;
  const RunSize size = manifest_.size_of(sizes());
  record.height = size.height;
  record.width = size.width;
  trace_.steps.push_back(std::move(record));
  return trace_.steps.back();
}

/// One pass, or one for the prompt and one for the negative prompt.
void Session::run_level(const std::string& graph, std::vector<std::string>& written) {
  const std::map<std::string, std::string> told = {{names::kTimestep, kModelTimestep}};
  if (run_.negative_ids.empty()) return call({graph, told}, written);
  Call conditional{graph, told}, unconditional{graph, told};
  conditional.other[names::kVelocity] = names::kPasses[0];
  unconditional.other[names::kVelocity] = names::kPasses[1];
  for (const EncoderInfo& encoder : manifest_.encoders)
    for (const auto& [output, input] : encoder.feeds) unconditional.other[input] = names::kNegative + input;
  call(conditional, written);
  call(unconditional, written);
  call({names::kGuide, {}}, written);
}

/// What the model is told of the next step's noise level.
double Session::told() const {
  const int step = history_.step();
  const auto at = static_cast<std::size_t>(step);
  // where the latent has just grown, the step starts at a noise level of its own
  if (history_.sigmas[at] == run_.sigmas[at]) return static_cast<double>(run_.timesteps[at]);
  return model_timestep(manifest_.sampler, history_.sigma(step));
}

/// Run a graph on the buffers that have its tensors' names.
void Session::call(const Call& call, std::vector<std::string>& written) {
  const GraphInfo& info = manifest_.graphs.at(call.graph);
  const auto buffer = [&](const std::string& tensor) {
    const auto found = call.other.find(tensor);
    return found == call.other.end() ? tensor : found->second;
  };
  const std::map<std::string, Tensor>* tables = nullptr;
  for (const LevelInfo& level : manifest_.levels) {
    if (level.graph != call.graph) continue;
    auto& made = tables_[level.patch];
    if (made.empty()) made = rotary_tables(manifest_, level.patch, sizes());
    tables = &made;
  }
  std::vector<Input> inputs;
  for (const TensorSpec& spec : info.inputs) {
    const bool table = tables != nullptr && tables->count(spec.name) > 0;
    inputs.emplace_back(table ? &tables->at(spec.name) : &buffers_.at(buffer(spec.name)));
  }
  std::vector<Tensor*> outputs;
  for (const TensorSpec& spec : info.outputs) {
    Tensor& output = buffers_[buffer(spec.name)];
    const Shape shape = spec.resolve(sizes());
    if (output.shape != shape) output = Tensor(shape);
    outputs.push_back(&output);
    written.push_back(buffer(spec.name));
  }
  backend_.engine(call.graph).run(inputs, outputs);
}

/// Whatever has a `next_` twin takes its value.
void Session::finish(const std::vector<std::string>& written) {
  for (const std::string& name : written)
    if (begins(name, names::kNext)) std::swap(buffers_[name], buffers_[name.substr(std::string(names::kNext).size())]);
}

/// Zeros for everything that a step changes for the next one.
void Session::clear_state() {
  const auto clear = [&](const std::string& graph) {
    const GraphInfo& info = manifest_.graphs.at(graph);
    for (const TensorSpec& spec : info.outputs)
      if (begins(spec.name, names::kNext))
        buffers_[spec.name.substr(std::string(names::kNext).size())] = Tensor(spec.resolve(sizes()));
  };
  clear(names::kUpdate);
  if (run_.policy->gate()) clear(manifest_.gate->graph);
}

void Session::fill_row(const std::string& name, double value) {
  buffers_[name] = Tensor({1}, {static_cast<float>(value)});
}

/// Find how much the next step will differ from the one before.
void Session::run_gate() {
  fill_row(kGateTimestep, told());
  std::vector<std::string> written;
  call({manifest_.gate->graph, {{names::kTimestep, kGateTimestep}}}, written);
  finish(written);
  double found[3];
  for (std::size_t i = 0; i < 3; ++i) {
    const Tensor& change = buffers_.at(names::kGateChanges[i]);
    if (!change.finite()) not_finite(manifest_.gate->graph, where());
    found[i] = static_cast<double>(change.values[0]);
  }
  history_.changes.push_back({found[0], found[1], found[2]});
}

/// Make the latent as large as the next step needs it.
void Session::grow(const Decision& decision) {
  const double sigma = history_.sigma(history_.step());
  const Tensor small = row_of(std::move(buffers_[names::kLatent]));
  history_ = history_.grown(decision.scale, decision.gain);
  tables_.clear();
  clear_state();
  const Shape shape = buffers_[names::kLatent].shape;
  const std::int64_t height = height_of(shape), width = width_of(shape);
  std::map<std::string, Tensor> given = growing_tables(height_of(small.shape), width_of(small.shape), height, width);
  given[names::kLatent] = batch_of(in_corner(small, height, width));
  given[names::kNoise] = batch_of(lowest(dct_coefficients(*run_.noise), height, width));
  given[names::kTimestep] = Tensor({1}, {static_cast<float>(sigma)});
  given[names::kGain] = Tensor({1}, {static_cast<float>(decision.gain)});
  std::vector<Input> inputs;
  for (const TensorSpec& spec : manifest_.graphs.at(names::kGrow).inputs) inputs.emplace_back(&given.at(spec.name));
  backend_.engine(names::kGrow).run(inputs, {&buffers_[names::kLatent]});
  if (!buffers_[names::kLatent].finite()) not_finite(names::kGrow, where());
  native_done_ = false;
  if (run_.policy->gate()) run_gate();  // the step's own, so that the next one has something to compare with
}

/// What is new at every step.
void Session::tell(const Decision& decision) {
  const auto at = static_cast<std::size_t>(history_.step());
  const float sigma = history_.sigmas[at], after = history_.sigmas[at + 1];
  fill_row(names::kTimestep, static_cast<double>(sigma));
  fill_row(kModelTimestep, told());
  if (const int order = manifest_.sampler.order; order == 0) {
    fill_row(names::kDt, static_cast<double>(after - sigma));
  } else {
    const auto weights = solver_weights(history_.sigmas, history_.step(), history_.first, order);
    buffers_[names::kSolver] = Tensor({1, order + 1}, std::vector<float>(weights.begin(), weights.end()));
  }
  fill_row(names::kKeepEstimate, decision.level == manifest_.native ? 1 : 0);
  fill_row(names::kKeepVelocity, decision.level ? 1 : 0);
  fill_row(names::kCorrection, decision.correction);
  Tensor prediction({1, buffers_.at(names::kVelocities).shape[1]});
  if (decision.prediction.size() > prediction.values.size())
    throw UsageError("the bundle keeps too few velocities for this schedule; choose a lower order");
  std::transform(decision.prediction.begin(), decision.prediction.end(), prediction.values.begin(),
                 [](double weight) { return static_cast<float>(weight); });
  buffers_[names::kPrediction] = std::move(prediction);
  const std::vector<int> coarse = manifest_.coarse();
  if (coarse.empty()) return;
  Tensor carry({1, static_cast<std::int64_t>(coarse.size())});
  for (std::size_t i = 0; i < coarse.size(); ++i)
    if (decision.level == coarse[i] && native_done_) carry.values[i] = static_cast<float>(run_.carry);
  buffers_[names::kCarry] = std::move(carry);
}

/// x̂ = z − σ·v: what the last computed velocity leads to from the latent as it is now.
std::optional<Tensor> Session::estimate() const {
  if (history_.computed.empty()) return std::nullopt;
  Tensor clean = row_of(latent());
  const float sigma = history_.sigmas[static_cast<std::size_t>(history_.step())];
  const auto& velocities = buffers_.at(names::kVelocities).values;
  for (std::size_t i = 0; i < clean.values.size(); ++i) clean.values[i] -= sigma * velocities[i];
  return clean;
}

std::string Session::where() const {
  return "step " + std::to_string(history_.step() + 1) + " of " + std::to_string(history_.steps());
}

namespace {

/// What the encoders make of one text's ids; `before` stands before the names of the levels' inputs.
void encode_text(Backend& backend, const Run& run, const std::map<std::string, Ids>& ids, const std::string& before,
                 std::map<std::string, Tensor>& conditions) {
  const Manifest& manifest = backend.bundle().manifest();
  for (const EncoderInfo& encoder : manifest.encoders) {
    const GraphInfo& info = manifest.graphs.at(encoder.graph);
    std::vector<Tensor> results;
    for (const TensorSpec& spec : info.outputs) results.emplace_back(spec.resolve(run.sizes));
    std::vector<Tensor*> outputs;
    for (Tensor& result : results) outputs.push_back(&result);
    backend.engine(encoder.graph).run({&ids.at(encoder.graph)}, outputs);
    for (std::size_t i = 0; i < results.size(); ++i) {
      if (!results[i].finite()) not_finite(encoder.graph, "the prompt");
      conditions[before + encoder.feeds.at(info.outputs[i].name)] = std::move(results[i]);
    }
  }
}

/// Frames (1, 3, N, H, W), or a picture (1, 3, H, W), as bytes.
void add_images(const Tensor& frames, std::vector<Image>& images) {
  const std::int64_t height = height_of(frames.shape), width = width_of(frames.shape);
  const auto pixels = static_cast<std::size_t>(height * width), number = frames.values.size() / 3 / pixels;
  for (std::size_t frame = 0; frame < number; ++frame) {
    Image image{height, width, std::vector<std::uint8_t>(3 * pixels)};
    for (std::size_t channel = 0; channel < 3; ++channel)
      for (std::size_t i = 0; i < pixels; ++i) {
        const float value = frames.values[(channel * number + frame) * pixels + i];
        const float scaled = (std::clamp(value, -1.0F, 1.0F) + 1.0F) * 127.5F;
        image.pixels[3 * i + channel] = static_cast<std::uint8_t>(std::nearbyint(scaled));
      }
    images.push_back(std::move(image));
  }
}

/// One frame (1, C, 1, H, W) of a clip's latent (1, C, F, H, W).
Tensor frame_of(const Tensor& latent, std::int64_t number) {
  const Shape& whole = latent.shape;
  Tensor frame({whole[0], whole[1], 1, whole[3], whole[4]});
  const std::int64_t plane = whole[3] * whole[4];
  for (std::int64_t channel = 0; channel < whole[1]; ++channel) {
    const auto from = latent.values.begin() + (channel * whole[2] + number) * plane;
    std::copy(from, from + plane, frame.values.begin() + channel * plane);
  }
  return frame;
}

}  // namespace

std::map<std::string, Tensor> encode(Backend& backend, const Run& run) {
  std::map<std::string, Tensor> conditions;
  encode_text(backend, run, run.ids, "", conditions);
  if (!run.negative_ids.empty()) encode_text(backend, run, run.negative_ids, names::kNegative, conditions);
  return conditions;
}

std::vector<Image> decode(Backend& backend, const Tensor& latent, const Sizes& sizes) {
  const Manifest& manifest = backend.bundle().manifest();
  const std::int64_t calls = manifest.has_frames() ? latent.shape[2] : 1;
  std::map<std::string, Tensor> state;  // what later frames need of earlier ones
  std::vector<Image> images;
  for (std::int64_t number = 0; number < calls; ++number) {
    const std::string& graph = number == 0 ? manifest.decoder.graph : manifest.decoder.following;
    const GraphInfo& info = manifest.graphs.at(graph);
    const Tensor part = manifest.has_frames() ? frame_of(latent, number) : latent;
    std::vector<Input> inputs;
    for (const TensorSpec& spec : info.inputs)
      inputs.emplace_back(spec.name == names::kLatent || spec.name == names::kLatentFrame ? &part
                                                                                          : &state.at(spec.name));
    std::map<std::string, Tensor> given;
    std::vector<Tensor*> outputs;
    for (const TensorSpec& spec : info.outputs) outputs.push_back(&(given[spec.name] = Tensor(spec.resolve(sizes))));
    backend.engine(graph).run(inputs, outputs);
    state.clear();
    for (auto& [name, tensor] : given) {
      if (begins(name, names::kNext)) {
        state[name.substr(std::string(names::kNext).size())] = std::move(tensor);
        continue;
      }
      if (!tensor.finite()) not_finite(graph, "the end");
      add_images(tensor, images);
    }
  }
  return images;
}

Result generate(Backend& backend, const Request& request, const std::function<void(const StepRecord&)>& on_step) {
  Run run = resolve(request, backend.bundle().manifest(), backend.name());
  const Sizes sizes = run.sizes;
  for (auto scale = run.scales.rbegin(); scale != run.scales.rend(); ++scale) backend.check(scale->second);
  const auto begin = Clock::now();
  auto conditions = encode(backend, run);
  const double encoded = milliseconds_since(begin);
  Session session(backend, std::move(run), std::move(conditions));
  while (!session.done()) on_step(session.step());
  const double denoised = milliseconds_since(begin);
  Result result{decode(backend, session.latent(), sizes), session.latent(), session.trace()};
  result.trace.encode_milliseconds = encoded;
  result.trace.denoise_milliseconds = denoised - encoded;
  result.trace.decode_milliseconds = milliseconds_since(begin) - denoised;
  return result;
}

std::string to_json(const Trace& trace) {
  using nlohmann::json;
  json steps = json::array();
  for (const StepRecord& record : trace.steps) {
    json statistic = json::object();
    for (const auto& [patch, value] : record.statistic) statistic[std::to_string(patch)] = value;
    steps.push_back({{"step", record.step},
                     {"sigma", record.sigma},
                     {"level", record.level ? json(*record.level) : json()},
                     {"milliseconds", record.milliseconds},
                     {"statistic", statistic},
                     {"error", record.error ? json(*record.error) : json()},
                     {"by", record.by},
                     {"figures", record.figures},
                     {"scale", record.scale.value()},
                     {"size", {record.height, record.width}}});
  }
  const json content = {{"schedule", {{"text", trace.schedule}}},
                        {"steps", steps},
                        {"encode_milliseconds", trace.encode_milliseconds},
                        {"denoise_milliseconds", trace.denoise_milliseconds},
                        {"decode_milliseconds", trace.decode_milliseconds}};
  return content.dump(2) + "\n";
}

}  // namespace ddit
