#include "fit.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "ddit/sampling.hpp"
#include "names.hpp"
#include "strings.hpp"

namespace ddit {
namespace {

using Known = std::map<std::string, SymbolicShape>;

constexpr double kSteepest = 30;  // |μ| of the sampler's shift e^μ: noise levels are all 1 or all 0 long before

Dimension fixed(std::int64_t number) { return {"", 0, number}; }
Dimension free(const std::string& symbol) { return {symbol, 0, 1}; }
Dimension over(const std::string& symbol, std::int64_t number) { return {symbol, number == 1 ? char{0} : '/', number}; }
Dimension times(const std::string& symbol, std::int64_t number) {
  return {symbol, number == 1 ? char{0} : '*', number};
}
const SymbolicShape kRow = {free("B")};

template <typename Names>
void check_unique(const std::string& what, const Names& names) {
  std::set<std::string> seen;
  for (const std::string& name : names)
    if (!seen.insert(name).second) throw Misfit(what + " " + name + " stands twice");
}

const TensorSpec* find(const std::vector<TensorSpec>& specs, const std::string& name) {
  const auto found = std::find_if(specs.begin(), specs.end(), [&](const auto& spec) { return spec.name == name; });
  return found == specs.end() ? nullptr : &*found;
}

/// Every tensor is a known one in its shape, and none that is needed is missing.
void check_tensors(const std::string& graph, const std::vector<TensorSpec>& specs, const Known& known,
                   const std::vector<std::string>& needed, Dtype dtype = Dtype::float32) {
  for (const std::string& name : needed)
    if (find(specs, name) == nullptr) throw Misfit(graph + " has no tensor '" + name + "'");
  for (const TensorSpec& spec : specs) {
    const auto found = known.find(spec.name);
    if (found == known.end()) throw Misfit(graph + ": nobody knows the tensor '" + spec.name + "'");
    if (spec.shape != found->second || spec.dtype != dtype)
      throw Misfit(graph + ": " + spec.name + " has another type or shape than it has to");
  }
}

void check_all(const std::string& graph, const std::vector<TensorSpec>& specs, const Known& known) {
  std::vector<std::string> needed;
  for (const auto& [name, shape] : known) needed.push_back(name);
  check_tensors(graph, specs, known, needed);
}

void check_rows(const std::string& graph, const std::vector<TensorSpec>& specs) {
  for (const TensorSpec& spec : specs)
    if (spec.shape.front() != free("B") || spec.dtype != Dtype::float32)
      throw Misfit(graph + ": " + spec.name + " has to be float32, with a row for every sample");
}

Known shapes_of(const std::vector<TensorSpec>& specs) {
  Known shapes;
  for (const TensorSpec& spec : specs) shapes[spec.name] = spec.shape;
  return shapes;
}

/// A patch's place along every axis; frames are not cut into patches.
SymbolicShape sides_over(const Manifest& manifest, std::int64_t patch) {
  SymbolicShape shape;
  for (const Axis& axis : manifest.axes) shape.push_back(over(axis.symbol, axis.is_frames() ? 1 : patch));
  return shape;
}

SymbolicShape row_of_sides(const Manifest& manifest, std::int64_t patch) {
  SymbolicShape shape = sides_over(manifest, patch);
  shape.insert(shape.begin(), free("B"));
  return shape;
}

void check_levels(const Manifest& manifest) {
  std::vector<std::string> patches, axes;
  bool native = false;
  for (const LevelInfo& level : manifest.levels) {
    patches.push_back(std::to_string(level.patch));
    native = native || level.patch == manifest.native;
    if (level.patch % manifest.native != 0)
      throw Misfit("level " + patches.back() + " is not a multiple of the native level");
  }
  check_unique("level", patches);
  if (!native) throw Misfit("the native level is not among the levels");
  for (const Axis& axis : manifest.axes) axes.push_back(axis.name);
  check_unique("axis", axes);
  if (axes != std::vector<std::string>{"height", "width"} &&
      axes != std::vector<std::string>{"frames", "height", "width"})
    throw Misfit("a latent has a height and a width, and a clip's has frames before them");
  for (const ProfileEntry& entry : manifest.entries)
    if (entry.frames.has_value() != manifest.has_frames())
      throw Misfit("the profile has frames and the latent has none, or the other way round");
}

void check_names(const Manifest& manifest) {
  std::vector<std::string> named;
  for (const LevelInfo& level : manifest.levels) named.push_back(level.graph);
  for (const EncoderInfo& encoder : manifest.encoders) named.push_back(encoder.graph);
  if (manifest.gate) named.push_back(manifest.gate->graph);
  named.insert(named.end(), {manifest.decoder.graph, names::kUpdate, names::kPredict, names::kGrow});
  if (manifest.has_frames()) named.push_back(manifest.decoder.following);
  if (manifest.guidance.two_passes) named.emplace_back(names::kGuide);
  for (const std::string& graph : named)
    if (manifest.graphs.count(graph) == 0) throw Misfit("there is no graph '" + graph + "'");
  check_unique("graph", named);
  std::vector<std::string> own, files;
  for (const auto& [name, graph] : manifest.graphs) {
    own.push_back(graph.file);
    for (const auto& [backend, file] : graph.twins) own.push_back(file);
    files.insert(files.end(), graph.weights.begin(), graph.weights.end());
    for (const auto& [backend, weights] : graph.twin_weights) {
      if (graph.twins.count(backend) == 0)
        throw Misfit(name + ": there are weights of a twin for " + backend + ", and no twin");
      files.insert(files.end(), weights.begin(), weights.end());
    }
  }
  check_unique("the graph's file", own);
  files.insert(files.end(), own.begin(), own.end());
  for (const EncoderInfo& encoder : manifest.encoders) files.push_back(encoder.tokenizer.file);
  for (const std::string& file : files)
    if (manifest.files.count(file) == 0) throw Misfit("file '" + file + "' has no entry in files");
  const std::int64_t unit = manifest.unit();
  for (const auto& [name, graph] : manifest.graphs) {
    std::vector<std::string> tensors;
    for (const auto* specs : {&graph.inputs, &graph.outputs})
      for (const TensorSpec& spec : *specs) {
        tensors.push_back(spec.name);
        for (const Dimension& dim : spec.shape) {
          if (dim.symbol.empty()) continue;
          const bool side = dim.symbol == "H" || dim.symbol == "W";
          if (!side && dim.symbol != "B" && dim.symbol != "L" && !(manifest.has_frames() && dim.symbol == "F"))
            throw Misfit(name + ": nobody knows the dimension '" + dim.symbol + "'");
          if (dim.op == '/' && (side ? unit : 1) % dim.number != 0)
            throw Misfit(name + ": " + dim.symbol + " is not always a multiple of " + std::to_string(dim.number));
        }
      }
    check_unique(name + ": tensor", tensors);
  }
}

void check_encoders(const Manifest& manifest) {
  std::set<std::string> taken;
  for (const LevelInfo& level : manifest.levels)
    for (const TensorSpec& spec : manifest.graphs.at(level.graph).inputs) taken.insert(spec.name);
  std::vector<std::string> fed;
  for (const EncoderInfo& encoder : manifest.encoders)
    for (const auto& [output, input] : encoder.feeds) fed.push_back(input);
  check_unique("input", fed);
  if (manifest.guidance.embedded) fed.emplace_back(names::kGuidance);
  for (const std::string& input : fed)
    if (taken.count(input) == 0) throw Misfit("no level takes the input '" + input + "'");
  for (const EncoderInfo& encoder : manifest.encoders) {
    const GraphInfo& info = manifest.graphs.at(encoder.graph);
    const Dimension tokens = encoder.free_length ? free("L") : fixed(encoder.tokenizer.length);
    check_tensors(encoder.graph, info.inputs, {{names::kIds, {free("B"), tokens}}}, {names::kIds}, Dtype::int64);
    bool same = encoder.feeds.size() == info.outputs.size();
    for (const TensorSpec& spec : info.outputs) same = same && encoder.feeds.count(spec.name) > 0;
    if (!same) throw Misfit(encoder.graph + ": feeds and outputs are not the same");
    check_rows(encoder.graph, info.outputs);
  }
}

/// What a graph of the model may take at every size: the latent, the noise level and the conditions.
Known model_inputs(const Manifest& manifest) {
  Known inputs = {{names::kLatent, manifest.latent()}, {names::kTimestep, kRow}};
  for (const EncoderInfo& encoder : manifest.encoders)
    for (const TensorSpec& spec : manifest.graphs.at(encoder.graph).outputs)
      inputs[encoder.feeds.at(spec.name)] = spec.shape;
  if (manifest.guidance.embedded) inputs[names::kGuidance] = kRow;
  return inputs;
}

void check_level(const Manifest& manifest, const LevelInfo& level) {
  const GraphInfo& info = manifest.graphs.at(level.graph);
  std::int64_t rotated = 0;
  for (const RotaryAxis& axis : manifest.positions.axes) rotated += axis.dimensions;
  SymbolicShape table = sides_over(manifest, level.patch);
  table.push_back(fixed(rotated));
  Known inputs = model_inputs(manifest);
  for (const char* name : names::kTables) inputs[name] = table;
  check_tensors(level.graph, info.inputs, inputs, {names::kLatent, names::kTimestep});
  check_rows(level.graph, info.outputs);
  for (const TensorSpec& spec : info.outputs)
    if (begins(spec.name, names::kNext) || begins(spec.name, names::kDeviation))
      throw Misfit(level.graph + ": " + spec.name + " is an output of step only");
}

/// How many velocities are kept: what the prediction graph takes.
std::int64_t kept_velocities(const Manifest& manifest) {
  const TensorSpec* spec = find(manifest.graphs.at(names::kPredict).inputs, names::kPrediction);
  if (spec == nullptr || spec->shape.size() != 2 || !spec->shape[1].symbol.empty())
    throw Misfit("predict: prediction has to have the shape (B, number of velocities)");
  return spec->shape[1].number;
}

void check_update(const Manifest& manifest) {
  const GraphInfo& info = manifest.graphs.at(names::kUpdate);
  const std::int64_t kept = kept_velocities(manifest);
  SymbolicShape velocities = manifest.latent();
  velocities.insert(velocities.begin() + 1, fixed(kept));
  Known known = {{names::kTimestep, kRow},
                 {names::kCorrection, kRow},
                 {names::kKeepEstimate, kRow},
                 {names::kKeepVelocity, kRow},
                 {names::kVelocities, velocities},
                 {names::kLatent, manifest.latent()},
                 {names::kPrediction, {free("B"), fixed(kept)}}};
  if (const int order = manifest.sampler.order; order == 0) {
    known[names::kDt] = kRow;
  } else {
    known[names::kSolver] = {free("B"), fixed(order + 1)};
    known[names::kEstimates] = manifest.latent();
    known[names::kEstimates].insert(known[names::kEstimates].begin() + 1, fixed(order));
  }
  const auto coarse = manifest.coarse();
  if (!coarse.empty()) known[names::kCarry] = {free("B"), fixed(static_cast<std::int64_t>(coarse.size()))};
  Known state;
  for (const TensorSpec& spec : info.inputs) {
    if (find(info.outputs, names::kNext + spec.name) == nullptr) continue;
    known.emplace(spec.name, spec.shape);
    state[names::kNext + spec.name] = spec.shape;
  }
  const Known given = shapes_of(manifest.graphs.at(manifest.levels.front().graph).outputs);
  for (const auto& [name, shape] : given) {
    for (const LevelInfo& level : manifest.levels) {
      const TensorSpec* spec = find(manifest.graphs.at(level.graph).outputs, name);
      if (spec == nullptr || spec->shape != shape) throw Misfit("the levels' outputs differ in " + name);
    }
    known[name] = shape;
  }
  check_tensors(names::kUpdate, info.inputs, known, {names::kLatent, names::kVelocities, names::kPrediction});
  check_rows(names::kUpdate, info.inputs);
  Known results = {{std::string(names::kNext) + names::kLatent, manifest.latent()},
                   {std::string(names::kNext) + names::kVelocities, velocities},
                   {names::kPredictionError, row_of_sides(manifest, manifest.native)}};
  for (const auto& [name, shape] : state) results[name] = shape;
  for (const int patch : coarse) results[names::kDeviation + std::to_string(patch)] = row_of_sides(manifest, patch);
  check_all(names::kUpdate, info.outputs, results);
  const GraphInfo& predict = manifest.graphs.at(names::kPredict);
  check_all(names::kPredict, predict.inputs,
            {{names::kVelocities, velocities}, {names::kPrediction, known.at(names::kPrediction)}});
  check_all(names::kPredict, predict.outputs, given);
  // a buffer has one shape in all graphs of a step
  for (const LevelInfo& level : manifest.levels)
    for (const auto* specs : {&info.inputs, &info.outputs})
      for (const TensorSpec& spec : *specs)
        for (const auto* others : {&manifest.graphs.at(level.graph).inputs, &manifest.graphs.at(level.graph).outputs})
          if (const TensorSpec* other = find(*others, spec.name); other != nullptr && other->shape != spec.shape)
            throw Misfit("step: " + spec.name + " has another shape in the levels");
}

/// The gate graph takes what a level takes and its own output of the step before, which no other graph knows.
void check_gate(const Manifest& manifest) {
  if (!manifest.gate) return;
  const std::string& graph = manifest.gate->graph;
  const GraphInfo& info = manifest.graphs.at(graph);
  const TensorSpec* state = find(info.inputs, names::kGateInput);
  const SymbolicShape grid = row_of_sides(manifest, manifest.native);
  SymbolicShape front;
  if (state != nullptr) front.assign(state->shape.begin(), state->shape.end() - 1);
  if (state == nullptr || !state->shape.back().symbol.empty() || (front != grid && front != kRow))
    throw Misfit(graph + ": gate_input has to have a row for every sample, the native patches or none, and a width");
  Known inputs = model_inputs(manifest);
  inputs[names::kGateInput] = state->shape;
  check_tensors(graph, info.inputs, inputs, {names::kTimestep, names::kGateInput});
  Known outputs = {{std::string(names::kNext) + names::kGateInput, state->shape}};
  for (const char* name : names::kGateChanges) outputs[name] = kRow;
  check_all(graph, info.outputs, outputs);
  outputs[names::kGateInput] = state->shape;
  std::vector<std::string> others = {names::kUpdate};
  for (const LevelInfo& level : manifest.levels) others.push_back(level.graph);
  for (const std::string& other : others)
    for (const auto* specs : {&manifest.graphs.at(other).inputs, &manifest.graphs.at(other).outputs})
      for (const TensorSpec& spec : *specs)
        if (outputs.count(spec.name) > 0) throw Misfit(other + ": " + spec.name + " is a tensor of " + graph + " only");
}

/// The grow graph takes two latents, two numbers a sample, and tables that are squares along the latent's sides.
void check_grow(const Manifest& manifest) {
  const SymbolicShape latent = manifest.latent();
  const Dimension height = latent[latent.size() - 2], width = latent.back();
  const GraphInfo& info = manifest.graphs.at(names::kGrow);
  check_all(names::kGrow, info.inputs,
            {{names::kLatent, latent},
             {names::kNoise, latent},
             {names::kTimestep, kRow},
             {names::kGain, kRow},
             {names::kGrowingTables[0], {height, height}},
             {names::kGrowingTables[1], {width, width}},
             {names::kGrowingTables[2], {height, height}},
             {names::kGrowingTables[3], {width, width}},
             {names::kGrowingTables[4], {height, width}}});
  check_all(names::kGrow, info.outputs, {{std::string(names::kNext) + names::kLatent, latent}});
}

/// The graph of two passes takes both velocities, and gives what a level gives.
void check_guide(const Manifest& manifest) {
  if (!manifest.guidance.two_passes) return;
  const Known given = shapes_of(manifest.graphs.at(manifest.levels.front().graph).outputs);
  if (given.size() != 1 || given.count(names::kVelocity) == 0)
    throw Misfit("a level of two passes gives a velocity and nothing else");
  const GraphInfo& info = manifest.graphs.at(names::kGuide);
  Known inputs = {{names::kGuidance, kRow}};
  for (const char* name : names::kPasses) inputs[name] = given.at(names::kVelocity);
  check_all(names::kGuide, info.inputs, inputs);
  check_all(names::kGuide, info.outputs, given);
}

void check_decoder(const Manifest& manifest) {
  const DecoderInfo& decoder = manifest.decoder;
  if (decoder.following.empty() == manifest.has_frames())
    throw Misfit("clips have a decoder of the kind video, and pictures one of the kind image");
  const GraphInfo& info = manifest.graphs.at(decoder.graph);
  SymbolicShape image = {free("B"), fixed(3)}, frame = {free("B"), fixed(manifest.channels), fixed(1)};
  for (const Axis& axis : manifest.sides()) {
    image.push_back(times(axis.symbol, axis.downscale));
    frame.push_back(free(axis.symbol));
  }
  if (!manifest.has_frames()) {
    check_all(decoder.graph, info.inputs, {{names::kLatent, manifest.latent()}});
    check_all(decoder.graph, info.outputs, {{names::kImage, image}});
    return;
  }
  const GraphInfo& following = manifest.graphs.at(decoder.following);
  check_rows(decoder.following, following.inputs);
  const Known state = shapes_of(following.inputs);
  check_all(decoder.graph, info.inputs, {{names::kLatentFrame, frame}});
  if (state.count(names::kLatentFrame) == 0 || state.at(names::kLatentFrame) != frame)
    throw Misfit(decoder.following + ": latent_frame is missing or has another shape than it has to");
  for (const auto& [graph, count] :
       {std::pair<std::string, int>{decoder.graph, 1}, {decoder.following, manifest.axes.front().downscale}}) {
    SymbolicShape frames = image;
    frames.insert(frames.begin() + 2, fixed(count));
    Known given = {{names::kFrames, frames}};
    for (const auto& [name, shape] : state)
      if (name != names::kLatentFrame) given[names::kNext + name] = shape;
    check_all(graph, manifest.graphs.at(graph).outputs, given);
  }
}

void check_sampler(const Manifest& manifest) {
  if (!manifest.sampler.use_dynamic_shifting) return;
  for (const ProfileEntry& entry : manifest.entries)
    for (const bool largest : {false, true}) {
      Sizes sizes;
      for (const Axis& axis : manifest.axes) {
        const Range& range = axis.is_frames() ? *entry.frames : axis.name == "height" ? entry.height : entry.width;
        sizes[axis.symbol] = axis.to_latent(largest ? range.maximum : range.minimum);
      }
      const double tokens = image_tokens(manifest, sizes);
      if (!(std::abs(flow_shift(manifest.sampler, tokens)) <= kSteepest))
        throw Misfit("the sampler's shift leaves no noise levels between 0 and 1 at the profile's sizes");
    }
}

void check_schedule(const Manifest& manifest, const DynamicInfo& schedule) {
  if (schedule.smooth.empty()) return;
  for (const int patch : manifest.coarse())
    if (schedule.smooth.front().statistic.count(patch) == 0)
      throw Misfit("smooth lacks the statistic of a coarse level");
}

void check_paths(const Manifest& manifest) {
  std::vector<std::string> sizes;
  for (const StepPath& path : manifest.paths)
    sizes.push_back(std::to_string(path.size.steps) + "," + std::to_string(path.size.height) + "," +
                    std::to_string(path.size.width) + "," + std::to_string(path.size.frames));
  check_unique("the path for steps, height, width and frames", sizes);
}

}  // namespace

void check_fit(const Manifest& manifest) {
  check_levels(manifest);
  check_names(manifest);
  check_encoders(manifest);
  for (const LevelInfo& level : manifest.levels) check_level(manifest, level);
  check_update(manifest);
  check_gate(manifest);
  check_grow(manifest);
  check_guide(manifest);
  check_decoder(manifest);
  check_sampler(manifest);
  check_schedule(manifest, manifest.schedule);
  check_paths(manifest);
  for (const Calibration& calibration : manifest.calibrations)
    if (calibration.dynamic) check_schedule(manifest, *calibration.dynamic);
}

}  // namespace ddit
