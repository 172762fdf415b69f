// ddit_host: one picture of a bundle, from token ids and noise.
#include <cstdio>
#include <functional>
#include <iostream>
#include <map>
#include <new>

#include "ddit/errors.hpp"
#include "ddit/onnxruntime.hpp"
#include "ddit/session.hpp"
#include "strings.hpp"
#ifdef DDIT_TENSORRT
#include "ddit/tensorrt.hpp"
#endif

namespace {

constexpr const char* kHelp =
    R"(Usage: ddit_host BUNDLE --ids IDS.json (--latent NOISE.npy | --noise NOISE.npy) --out IMAGE.png [OPTIONS]

  Make a picture or a clip with a bundle, without Python.

  --ids FILE           token ids by text encoder, {"clip": [1, 2], "t5": [3]}; shorter rows are filled up
  --negative-ids FILE  those of the negative prompt, or of the empty text, for models with two passes
  --latent FILE        what the run starts from, float32 (C, H, W) in latent pixels; of a clip (C, F, H, W)
  --noise FILE         the starting noise of the full size, for progressive schedules and instead of --latent
  --out FILE           the picture, PNG; of a clip a name with %d for its frames, as in frames/%03d.png
  --latent-out FILE    the latent that was decoded, .npy
  --trace FILE         what every step did, JSON
  --schedule TEXT      adaptive (default), native, fixed:8x10,2x20, dynamic, progressive, teacache:0.4, …
  --steps NUMBER       denoising steps
  --first-step NUMBER  the step at which the latent is, from 0
  --height, --width    pixels
  --frames NUMBER      of a clip
  --text-length NUMBER tokens, padding included
  --guidance NUMBER    guidance scale
  --carry NUMBER       share of the last native step's detail that coarse steps take over
  --provider NAME      cpu (default), cuda, or tensorrt with the bundle's engines
  --device NUMBER      the GPU, from 0
  --threads NUMBER     of one graph on the CPU
  --repeat NUMBER      make the picture so many times, for measurements
)";

struct Arguments {
  std::string bundle, out, latent_out, trace, provider = "cpu";
  ddit::Request request;
  ddit::OnnxRuntimeOptions engine;
  int repeat = 1;
};

int whole(const std::string& name, const std::string& value, int most) {
  const auto number = ddit::whole_number(value);
  if (!number || *number > most) throw ddit::UsageError(name + " must be a whole number up to " + std::to_string(most));
  return static_cast<int>(*number);
}

double decimal(const std::string& name, const std::string& value) {
  const auto number = ddit::decimal_number(value);
  if (!number) throw ddit::UsageError(name + " must be a number, not '" + value + "'");
  return *number;
}

Arguments read(int count, char** words) {
  constexpr int kSide = 1'000'000, kMost = 100'000;
  Arguments read;
  ddit::Request& request = read.request;
  std::string ids;
  const std::map<std::string, std::function<void(const std::string&, const std::string&)>> options = {
      {"--ids", [&](const auto&, const auto& value) { ids = value; }},
      {"--latent", [&](const auto&, const auto& value) { request.latent = ddit::read_npy(value); }},
      {"--noise", [&](const auto&, const auto& value) { request.noise = ddit::read_npy(value); }},
      {"--out", [&](const auto&, const auto& value) { read.out = value; }},
      {"--latent-out", [&](const auto&, const auto& value) { read.latent_out = value; }},
      {"--trace", [&](const auto&, const auto& value) { read.trace = value; }},
      {"--schedule", [&](const auto&, const auto& value) { request.schedule = value; }},
      {"--steps", [&](const auto& name, const auto& value) { request.steps = whole(name, value, kMost); }},
      {"--first-step", [&](const auto& name, const auto& value) { request.first_step = whole(name, value, kMost); }},
      {"--height", [&](const auto& name, const auto& value) { request.height = whole(name, value, kSide); }},
      {"--width", [&](const auto& name, const auto& value) { request.width = whole(name, value, kSide); }},
      {"--frames", [&](const auto& name, const auto& value) { request.frames = whole(name, value, kSide); }},
      {"--negative-ids", [&](const auto&, const auto& value) { request.negative_ids = ddit::read_ids(value); }},
      {"--text-length", [&](const auto& name, const auto& value) { request.text_length = whole(name, value, kMost); }},
      {"--guidance", [&](const auto& name, const auto& value) { request.guidance = decimal(name, value); }},
      {"--carry", [&](const auto& name, const auto& value) { request.carry = decimal(name, value); }},
      {"--provider", [&](const auto&, const auto& value) { read.provider = value; }},
      {"--device", [&](const auto& name, const auto& value) { read.engine.device = whole(name, value, 1024); }},
      {"--threads", [&](const auto& name, const auto& value) { read.engine.threads = whole(name, value, 1024); }},
      {"--repeat", [&](const auto& name, const auto& value) { read.repeat = whole(name, value, kMost); }},
  };
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    const auto option = options.find(word);
    if (option != options.end()) {
      if (++i == count) throw ddit::UsageError(word + " needs a value");
      option->second(word, words[i]);
    } else if (word.compare(0, 1, "-") == 0 || !read.bundle.empty()) {
      throw ddit::UsageError("'" + word + "' is not known; ddit_host --help shows what is");
    } else {
      read.bundle = word;
    }
  }
  if (read.bundle.empty() || ids.empty() || read.out.empty())
    throw ddit::UsageError("give a bundle, --ids and --out; ddit_host --help shows all");
  if (read.provider != "cpu" && read.provider != "cuda" && read.provider != "tensorrt")
    throw ddit::UsageError("the provider is cpu, cuda or tensorrt, not '" + read.provider + "'");
  read.engine.cuda = read.provider == "cuda";
  request.ids = ddit::read_ids(ids);
  return read;
}

std::unique_ptr<ddit::Backend> open(const ddit::Bundle& bundle, const Arguments& arguments) {
  if (arguments.provider != "tensorrt") return std::make_unique<ddit::OnnxRuntime>(bundle, arguments.engine);
#ifdef DDIT_TENSORRT
  return std::make_unique<ddit::TensorRT>(bundle, arguments.engine.device);
#else
  throw ddit::BackendError(
      "this ddit_host was built without TensorRT; cmake -DTENSORRT_ROOT=FOLDER builds one with it");
#endif
}

/// Where the picture goes, or so many frames of the clip.
std::vector<std::filesystem::path> files_of(const ddit::Manifest& manifest, const std::string& out,
                                            std::size_t number) {
  if (!manifest.has_frames()) return {out};
  return ddit::frame_files(out, static_cast<std::int64_t>(number));
}

void run(const Arguments& arguments) {
  const auto bundle = ddit::Bundle::open(arguments.bundle);
  const auto engines = open(bundle, arguments);
  files_of(bundle.manifest(), arguments.out, 1);  // a name that is no use is refused before anything runs
  for (int i = 0; i < arguments.repeat; ++i) {
    const ddit::Result result = ddit::generate(*engines, arguments.request);
    std::size_t predicted = 0;
    for (const auto& record : result.trace.steps) predicted += record.level ? 0 : 1;
    std::printf("%s: %zu steps, %zu of them predicted, in %.1f ms\n", result.trace.schedule.c_str(),
                result.trace.steps.size(), predicted, result.trace.denoise_milliseconds);
    if (i + 1 < arguments.repeat) continue;
    ddit::write_frames(files_of(bundle.manifest(), arguments.out, result.frames.size()), result.frames);
    if (!arguments.latent_out.empty()) ddit::write_npy(arguments.latent_out, result.latent);
    if (!arguments.trace.empty()) ddit::write_text(arguments.trace, ddit::to_json(result.trace));
  }
}

}  // namespace

int main(int count, char** words) {
  if (count == 2 && std::string(words[1]) == "--help") {
    std::cout << kHelp;
    return 0;
  }
  std::string problem;
  int code = 1;
  try {
    run(read(count, words));
    return 0;
  } catch (const ddit::Error& error) {
    problem = error.what();
    code = error.exit_code();
  } catch (const std::bad_alloc&) {
    problem = "there is not enough memory; choose a smaller picture";
  } catch (const std::exception& error) {
    problem = error.what();
  }
  std::cerr << "error: " << ddit::shown(problem) << "\n";
  return code;
}
