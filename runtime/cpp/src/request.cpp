// What is asked for to what is run, before anything is loaded.
#include <algorithm>
#include <cmath>

#include "ddit/errors.hpp"
#include "ddit/sampling.hpp"
#include "ddit/session.hpp"
#include "strings.hpp"

namespace ddit {
namespace {

constexpr int kMaxSteps = 10'000;
constexpr double kMaxGuidance = 1'000;
constexpr std::int64_t kLargestSide = 1'000'000;  // pixels

/// `256×256 pixels`, of a clip with its frames.
std::string written(const RunSize& size) {
  return (size.frames > 0 ? std::to_string(size.frames) + " frames of " : "") + std::to_string(size.height) + "×" +
         std::to_string(size.width) + " pixels";
}

void check_frames(const Axis& axis, std::int64_t frames) {
  if (frames < 1 || frames > kLargestSide) throw UsageError("the number of frames must be at least 1");
  const std::int64_t below = axis.from_latent(axis.to_latent(frames));
  if (below == frames) return;
  throw UsageError(std::to_string(frames) +
                   " frames cannot be made: the latent has one for the first frame and one for every " +
                   std::to_string(axis.downscale) + " more; nearest: " + std::to_string(below) + " or " +
                   std::to_string(below + axis.downscale));
}

void check_pixels(const Axis& axis, std::int64_t pixels, std::int64_t unit) {
  if (pixels < unit || pixels % unit != 0 || pixels > kLargestSide)
    throw UsageError(axis.name + " " + std::to_string(pixels) + " is not a multiple of " + std::to_string(unit) +
                     ", which the levels' patches ask for in pixels");
}

/// The symbols' values of a picture or clip. Throws `UsageError` where no level or no profile has that size.
Sizes sizes_of(const Manifest& manifest, const RunSize& size, std::int64_t text) {
  Sizes sizes = {{"B", 1}, {"L", text}};
  for (const Axis& axis : manifest.axes) {
    const std::int64_t along = size.along(axis.name);
    if (axis.is_frames())
      check_frames(axis, along);
    else
      check_pixels(axis, along, manifest.unit() * axis.downscale);
    sizes[axis.symbol] = axis.to_latent(along);
  }
  if (!manifest.contains(size, text))
    throw UsageError(written(size) + " with " + std::to_string(text) +
                     " text tokens are outside the bundle's profile '" + manifest.profile +
                     "'; export again with --profile");
  return sizes;
}

/// The sizes at every scale of a policy, which the profile has to hold too.
std::vector<std::pair<Fraction, Sizes>> scales_of(const Manifest& manifest, const Sizes& sizes, const Policy& policy) {
  std::vector<std::pair<Fraction, Sizes>> found;
  for (const Fraction scale : policy.scales()) {
    const Sizes small = scaled(manifest, sizes, scale);
    const RunSize size = manifest.size_of(small);
    if (!manifest.contains(size, small.at("L")))
      throw UsageError("the schedule's smaller picture of " + written(size) + " is outside the bundle's profile '" +
                       manifest.profile + "'; choose a larger picture");
    found.emplace_back(scale, small);
  }
  return found;
}

Shape latent_shape(const Manifest& manifest, const Sizes& sizes) {
  Shape shape = {manifest.channels};
  for (const Axis& axis : manifest.axes) shape.push_back(sizes.at(axis.symbol));
  return shape;
}

void check_array(const std::string& what, const Tensor& tensor, const Shape& wanted) {
  if (tensor.shape != wanted)
    throw UsageError(what + " has shape " + text(tensor.shape) + ", the picture needs " + text(wanted));
  if (!tensor.finite()) throw UsageError(what + " holds NaN or infinity");
}

/// An encoder's row of ids, filled up with its padding.
Ids padded(const EncoderInfo& encoder, const std::map<std::string, std::vector<std::int64_t>>& ids,
           std::int64_t length) {
  const auto found = ids.find(encoder.graph);
  if (found == ids.end()) throw UsageError("there are no token ids for the text encoder '" + encoder.graph + "'");
  std::vector<std::int64_t> row = found->second;
  if (static_cast<std::int64_t>(row.size()) > length)
    throw UsageError("'" + encoder.graph + "' takes " + std::to_string(length) + " tokens, not " +
                     std::to_string(row.size()) + "; truncate the prompt with its tokenizer");
  row.resize(static_cast<std::size_t>(length), encoder.tokenizer.pad_id);
  return {{1, length}, std::move(row)};
}

/// All encoders' rows of ids.
std::map<std::string, Ids> all_padded(const Manifest& manifest,
                                      const std::map<std::string, std::vector<std::int64_t>>& ids,
                                      std::int64_t tokens) {
  std::map<std::string, Ids> rows;
  for (const EncoderInfo& encoder : manifest.encoders)
    rows[encoder.graph] = padded(encoder, ids, encoder.free_length ? tokens : encoder.tokenizer.length);
  for (const auto& [graph, row] : ids)
    if (rows.count(graph) == 0) throw UsageError("the bundle has no text encoder '" + graph + "'");
  return rows;
}

/// Where the run starts: at the smallest scale, or at the one whose size a given latent has.
Fraction start_of(const Run& run, const Manifest& manifest) {
  if (!run.latent) return run.scales.front().first;
  for (const auto& [scale, sizes] : run.scales)
    if (run.latent->shape == latent_shape(manifest, sizes)) {
      check_array("the latent", *run.latent, latent_shape(manifest, sizes));
      return scale;
    }
  check_array("the latent", *run.latent, latent_shape(manifest, run.sizes));
  return {};
}

}  // namespace

const Sizes& Run::at(Fraction scale) const {
  const auto found = std::find_if(scales.begin(), scales.end(), [&](const auto& one) { return one.first == scale; });
  return found->second;
}

Run resolve(const Request& request, const Manifest& manifest, const std::string& backend) {
  Run run;
  const ProfileEntry& usual = manifest.entries.front();
  RunSize size;
  size.height = request.height.value_or(usual.height.optimum);
  size.width = request.width.value_or(usual.width.optimum);
  if (request.frames && !usual.frames)
    throw UsageError("this model makes pictures, which have no frames; leave them out");
  if (usual.frames) size.frames = request.frames.value_or(usual.frames->optimum);
  const std::int64_t tokens = request.text_length.value_or(manifest.text_length());
  run.sizes = sizes_of(manifest, size, tokens);
  run.ids = all_padded(manifest, request.ids, tokens);
  const GuidanceInfo& guidance = manifest.guidance;
  run.guidance = request.guidance.value_or(guidance.standard);
  if (!guidance.embedded && !guidance.two_passes && run.guidance != guidance.standard)
    throw UsageError("this model takes no guidance scale (it was not distilled for one); leave it out");
  if (!(std::abs(run.guidance) <= kMaxGuidance))
    throw UsageError("guidance must lie between -1000 and 1000, not " + shortest(run.guidance));
  if (request.negative_ids && !guidance.two_passes)
    throw UsageError("this model takes no negative prompt; leave its token ids out");
  if (guidance.two_passes && run.guidance > 1) {
    if (!request.negative_ids)
      throw UsageError(
          "guidance above 1 needs the token ids of a negative prompt, those of the empty text where there "
          "is none; give --negative-ids, or --guidance 1");
    run.negative_ids = all_padded(manifest, *request.negative_ids, tokens);
  }
  run.carry = request.carry.value_or(manifest.carry);
  if (!(run.carry >= 0 && run.carry <= 1))
    throw UsageError("carry must lie between 0 and 1, not " + shortest(run.carry));
  const int asked = request.steps.value_or(manifest.sampler.steps);
  if (asked < 1 || asked > kMaxSteps)
    throw UsageError("the number of steps must be between 1 and " + std::to_string(kMaxSteps) + ", not " +
                     std::to_string(asked));
  size.steps = asked;
  run.policy = parse_schedule(request.schedule, manifest, noise_levels(manifest, asked, run.sizes), size, backend);
  if (run.policy->gate() && !manifest.gate) throw UsageError("the schedule needs a gate graph, which the bundle lacks");
  const int steps = run.policy->steps(request.steps, manifest.sampler.steps);
  run.sigmas = noise_levels(manifest, steps, run.sizes);
  run.timesteps = model_timesteps(manifest, steps, run.sizes);
  run.first_step = request.first_step;
  if (run.first_step < 0 || run.first_step >= steps)
    throw UsageError("the first step must lie between 0 and " + std::to_string(steps - 1) + ", not " +
                     std::to_string(run.first_step));
  if (run.first_step > 0 && !request.latent)
    throw UsageError("a run that goes on at a later step needs the latent to go on from");
  run.scales = scales_of(manifest, run.sizes, *run.policy);
  run.noise = request.noise;
  run.latent = request.latent;
  run.start = start_of(run, manifest);
  if (run.noise) check_array("the noise", *run.noise, latent_shape(manifest, run.sizes));
  if (!run.noise && (!run.latent || !run.start.whole()))
    throw UsageError("the run needs the starting noise " + text(latent_shape(manifest, run.sizes)) +
                     "; give --noise, or a --latent of that shape");
  run.rho = manifest.schedule.rho;
  return run;
}

}  // namespace ddit
