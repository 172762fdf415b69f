// ddit_vectors: compare this library with conformance vectors (scripts/conformance.py, docs/spec/).
#include <cmath>
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>

#include "ddit/errors.hpp"
#include "ddit/onnxruntime.hpp"
#include "ddit/sampling.hpp"
#include "ddit/session.hpp"

namespace {

using ddit::Tensor;
using nlohmann::json;
namespace fs = std::filesystem;

/// Comparisons that are counted; those that fail are printed.
class Comparisons {
 public:
  void equal(const std::string& what, bool same) {
    ++number_;
    if (same) return;
    ++failed_;
    std::cerr << what << " differs\n";
  }
  void near(const std::string& what, double found, double wanted, double relative, double absolute) {
    equal(what + " (" + std::to_string(found) + ", not " + std::to_string(wanted) + ")",
          std::abs(found - wanted) <= absolute + relative * std::abs(wanted));
  }
  void near(const std::string& what, const std::vector<float>& found, const std::vector<float>& wanted, double relative,
            double absolute) {
    bool same = found.size() == wanted.size();
    for (std::size_t i = 0; same && i < found.size(); ++i) {
      const double difference = std::abs(static_cast<double>(found[i]) - static_cast<double>(wanted[i]));
      same = difference <= absolute + relative * std::abs(static_cast<double>(wanted[i]));
    }
    equal(what, same);
  }
  int report() const {
    std::printf("%d comparisons, %d failed\n", number_, failed_);
    return failed_ == 0 ? 0 : 1;
  }

 private:
  int number_ = 0, failed_ = 0;
};

class Check {
 public:
  Check(const fs::path& bundle, const fs::path& folder)
      : bundle_(ddit::Bundle::open(bundle)),
        engines_(bundle_),
        folder_(folder),
        content_(json::parse(ddit::read_text(folder / "vectors.json", 100'000'000))) {}

  int all() {
    sampling();
    for (const json& graph : content_.at("graphs")) this->graph(graph);
    for (const json& run : content_.at("runs")) this->run(run);
    return compare_.report();
  }

 private:
  Tensor load(const json& file) const { return ddit::read_npy(folder_ / file.get<std::string>()); }

  static std::map<std::string, std::vector<std::int64_t>> token_ids(const json& rows) {
    return rows.get<std::map<std::string, std::vector<std::int64_t>>>();
  }

  ddit::Request request() const {
    ddit::Request request;
    request.ids = token_ids(content_.at("ids"));
    if (const json& negative = content_.at("negative_ids"); !negative.is_null())
      request.negative_ids = token_ids(negative);
    request.noise = load(content_.at("noise"));
    request.height = content_.at("height").get<std::int64_t>();
    request.width = content_.at("width").get<std::int64_t>();
    if (const json& frames = content_.at("frames"); !frames.is_null()) request.frames = frames.get<std::int64_t>();
    request.text_length = content_.at("text_length").get<int>();
    request.guidance = content_.at("guidance").get<double>();
    request.carry = content_.at("carry").get<double>();
    request.steps = content_.at("steps").get<int>();
    return request;
  }

  void sampling() {
    const ddit::Run run = ddit::resolve(request(), bundle_.manifest(), engines_.name());
    compare_.near("sigmas", run.sigmas, load(content_.at("sigmas")).values, 1e-6, 0);
    compare_.near("timesteps", run.timesteps, load(content_.at("timesteps")).values, 1e-6, 0);
    solver(run);
    for (const auto& [patch, names] : content_.at("tables").items())
      tables("level " + patch, ddit::rotary_tables(bundle_.manifest(), std::stoi(patch), run.sizes), names);
    const Tensor coefficients = ddit::dct_coefficients(*run.noise), small = load(content_.at("small_noise"));
    compare_.near("coefficients", coefficients.values, load(content_.at("coefficients")).values, 1e-6, 1e-6);
    const std::int64_t low = ddit::height_of(small.shape), columns = ddit::width_of(small.shape);
    const std::int64_t height = ddit::height_of(run.noise->shape), width = ddit::width_of(run.noise->shape);
    compare_.near("small noise", ddit::inverse_dct(ddit::lowest(coefficients, low, columns)).values, small.values, 1e-6,
                  1e-6);
    tables("growing", ddit::growing_tables(low, columns, height, width), content_.at("growing_tables"));
  }

  /// UniPC's weights of every step.
  void solver(const ddit::Run& run) {
    const json& file = content_.at("solver");
    const int order = bundle_.manifest().sampler.order;
    compare_.equal("solver", file.is_null() == (order == 0));
    if (file.is_null() || order == 0) return;
    std::vector<float> found;
    for (int step = 0; step + 1 < static_cast<int>(run.sigmas.size()); ++step)
      for (const double weight : ddit::solver_weights(run.sigmas, step, 0, order))
        found.push_back(static_cast<float>(weight));
    compare_.near("solver weights", found, load(file).values, 1e-6, 1e-7);
  }

  void tables(const std::string& what, const std::map<std::string, Tensor>& found, const json& names) {
    for (const auto& [name, table] : found)
      compare_.near(what + " " + name, table.values, load(names.at(name)).values, 0, 2e-7);
  }

  void graph(const json& one) {
    const auto name = one.at("graph").get<std::string>();
    const ddit::GraphInfo& info = bundle_.manifest().graphs.at(name);
    std::map<std::string, Tensor> tensors;
    std::map<std::string, ddit::Ids> ids;
    std::vector<ddit::Input> inputs;
    for (const ddit::TensorSpec& spec : info.inputs)
      if (spec.dtype == ddit::Dtype::int64) {
        const auto row = one.at("ids").at(spec.name).get<std::vector<std::int64_t>>();
        ids[spec.name] = {{1, static_cast<std::int64_t>(row.size())}, row};
        inputs.emplace_back(&ids[spec.name]);
      } else {
        tensors[spec.name] = load(one.at("inputs").at(spec.name));
        inputs.emplace_back(&tensors[spec.name]);
      }
    std::vector<Tensor> wanted, found;
    for (const ddit::TensorSpec& spec : info.outputs) wanted.push_back(load(one.at("outputs").at(spec.name)));
    for (const Tensor& tensor : wanted) found.emplace_back(tensor.shape);
    std::vector<Tensor*> outputs;
    for (Tensor& tensor : found) outputs.push_back(&tensor);
    engines_.engine(name).run(inputs, outputs);
    for (std::size_t i = 0; i < found.size(); ++i)
      compare_.near(name + "." + info.outputs[i].name, found[i].values, wanted[i].values, 1e-4, 1e-5);
  }

  /// A whole run: every decision, what it was made on, and where it led.
  void run(const json& one) {
    ddit::Request asked = request();
    asked.schedule = one.at("schedule").get<std::string>();
    const ddit::Result result = ddit::generate(engines_, asked);
    compare_.equal(asked.schedule + ": policy", result.trace.schedule == one.at("policy").get<std::string>());
    compare_.equal(asked.schedule + ": steps", result.trace.steps.size() == one.at("steps").size());
    for (std::size_t i = 0; i < std::min(result.trace.steps.size(), one.at("steps").size()); ++i)
      step(asked.schedule + ": step " + std::to_string(i), result.trace.steps[i], one.at("steps")[i]);
    compare_.near(asked.schedule + ": latent", result.latent.values, load(one.at("latent")).values, 0, 1e-3);
    std::vector<float> pixels;  // of all frames, one after another
    for (const ddit::Image& frame : result.frames)
      pixels.insert(pixels.end(), frame.pixels.begin(), frame.pixels.end());
    compare_.near(asked.schedule + ": frames", pixels, load(one.at("frames")).values, 0, 1);
  }

  void step(const std::string& what, const ddit::StepRecord& found, const json& wanted) {
    const json& level = wanted.at("level");
    compare_.equal(what + ": level", found.level ? level == *found.level : level.is_null());
    compare_.equal(what + ": by", found.by == wanted.at("by").get<std::string>());
    compare_.near(what + ": sigma", found.sigma, wanted.at("sigma").get<double>(), 1e-6, 0);
    compare_.near(what + ": gain", found.gain, wanted.at("gain").get<double>(), 1e-9, 0);
    compare_.near(what + ": correction", found.correction, wanted.at("correction").get<double>(), 1e-6, 1e-12);
    const auto weights = wanted.at("prediction").get<std::vector<double>>();
    compare_.equal(what + ": weights", found.prediction.size() == weights.size());
    for (std::size_t i = 0; i < std::min(weights.size(), found.prediction.size()); ++i)
      compare_.near(what + ": weight", found.prediction[i], weights[i], 1e-6, 1e-9);
    compare_.equal(what + ": error", found.error.has_value() == !wanted.at("error").is_null());
    if (found.error) compare_.near(what + ": error", *found.error, wanted.at("error").get<double>(), 1e-3, 1e-6);
    compare_.equal(what + ": statistics", found.statistic.size() == wanted.at("statistic").size());
    for (const auto& [patch, value] : found.statistic)
      compare_.near(what + ": statistic", value, wanted.at("statistic").at(std::to_string(patch)).get<double>(), 1e-3,
                    1e-6);
    compare_.equal(what + ": figures", found.figures.size() == wanted.at("figures").size());
    for (const auto& [name, value] : found.figures)
      compare_.near(what + ": " + name, value, wanted.at("figures").at(name).get<double>(), 1e-3, 1e-6);
  }

  ddit::Bundle bundle_;
  ddit::OnnxRuntime engines_;
  fs::path folder_;
  json content_;
  Comparisons compare_;
};

}  // namespace

int main(int count, char** words) {
  if (count != 3) {
    std::cerr << "Usage: ddit_vectors BUNDLE VECTORS\n";
    return 2;
  }
  try {
    return Check(words[1], words[2]).all();
  } catch (const ddit::Error& error) {
    std::cerr << "error: " << error.what() << "\n";
    return error.exit_code();
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
