#include "ddit/sampling.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "names.hpp"

namespace ddit {
namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr double kBelowOne = 1 - 1e-6;  // UniPC looks at the logarithm of 1 − σ

/// How many arrays of height and width there are.
std::size_t planes(const Tensor& values) {
  return values.values.size() / static_cast<std::size_t>(height_of(values.shape) * width_of(values.shape));
}

Shape with_sides(Shape shape, std::int64_t height, std::int64_t width) {
  shape[shape.size() - 2] = height;
  shape.back() = width;
  return shape;
}

/// left (n, n) · values (n, m) · rightᵀ, channel by channel; `transposed` takes leftᵀ and right instead.
Tensor both_sides(const Tensor& values, bool transposed) {
  const std::int64_t height = height_of(values.shape), width = width_of(values.shape);
  const auto left = dct_matrix(height), right = dct_matrix(width);
  const auto rows = static_cast<std::size_t>(height), columns = static_cast<std::size_t>(width);
  Tensor result(values.shape);
  std::vector<double> half(rows * columns), whole(columns);
  for (std::size_t channel = 0; channel < planes(values); ++channel) {
    const float* in = values.values.data() + channel * rows * columns;
    float* out = result.values.data() + channel * rows * columns;
    std::fill(half.begin(), half.end(), 0.0);
    for (std::size_t i = 0; i < rows; ++i)
      for (std::size_t k = 0; k < rows; ++k) {
        const double factor = transposed ? left[k * rows + i] : left[i * rows + k];
        for (std::size_t j = 0; j < columns; ++j)
          half[i * columns + j] += factor * static_cast<double>(in[k * columns + j]);
      }
    for (std::size_t i = 0; i < rows; ++i) {
      std::fill(whole.begin(), whole.end(), 0.0);
      for (std::size_t j = 0; j < columns; ++j)
        for (std::size_t k = 0; k < columns; ++k)
          whole[j] += half[i * columns + k] * (transposed ? right[k * columns + j] : right[j * columns + k]);
      for (std::size_t j = 0; j < columns; ++j) out[i * columns + j] = static_cast<float>(whole[j]);
    }
  }
  return result;
}

/// A smaller square matrix in the low corner of zeros.
Tensor table(std::int64_t small, std::int64_t size) {
  Tensor padded({size, size});
  const auto matrix = dct_matrix(small);
  for (std::int64_t i = 0; i < small; ++i)
    for (std::int64_t j = 0; j < small; ++j)
      padded.values[static_cast<std::size_t>(i * size + j)] =
          static_cast<float>(matrix[static_cast<std::size_t>(i * small + j)]);
  return padded;
}

/// The noise levels (steps) before they are rounded to float32.
std::vector<double> exact_levels(const Manifest& manifest, int steps, const Sizes& sizes) {
  const SamplerInfo& sampler = manifest.sampler;
  const auto shifted = [](double level, double shift) { return shift * level / (1.0 + (shift - 1.0) * level); };
  std::vector<double> levels;
  if (sampler.order > 0) {
    const double spacing = (1.0 / static_cast<double>(sampler.train_steps) - 1.0) / steps;
    for (int i = 0; i < steps; ++i) levels.push_back(shifted(i * spacing + 1.0, sampler.shift));
    levels.front() = std::min(levels.front(), kBelowOne);
    return levels;
  }
  const double shift =
      sampler.use_dynamic_shifting ? std::exp(flow_shift(sampler, image_tokens(manifest, sizes))) : sampler.shift;
  const double last = sampler.smallest.value_or(1.0 / steps), spacing = steps > 1 ? (last - 1.0) / (steps - 1) : 0.0;
  for (int i = 0; i < steps; ++i) {
    const double even = steps > 1 && i == steps - 1 ? last : i * spacing + 1.0;
    levels.push_back(shifted(static_cast<double>(static_cast<float>(even)), shift));
  }
  return levels;
}

}  // namespace

double flow_shift(const SamplerInfo& sampler, double image_tokens) {
  const auto base = static_cast<double>(sampler.base_image_seq_len);
  const double slope =
      (sampler.max_shift - sampler.base_shift) / (static_cast<double>(sampler.max_image_seq_len) - base);
  return sampler.base_shift + slope * (image_tokens - base);
}

double image_tokens(const Manifest& manifest, const Sizes& sizes) {
  double tokens = 1;
  for (const Axis& axis : manifest.axes)
    tokens *= static_cast<double>(sizes.at(axis.symbol) / (axis.is_frames() ? 1 : manifest.native));
  return tokens;
}

std::vector<float> noise_levels(const Manifest& manifest, int steps, const Sizes& sizes) {
  std::vector<float> levels;
  for (const double level : exact_levels(manifest, steps, sizes)) levels.push_back(static_cast<float>(level));
  levels.push_back(0.0F);
  return levels;
}

std::vector<float> model_timesteps(const Manifest& manifest, int steps, const Sizes& sizes) {
  std::vector<float> told;  // of the levels in float64: one that is just below a whole step is cut to the step before
  for (const double level : exact_levels(manifest, steps, sizes))
    told.push_back(static_cast<float>(model_timestep(manifest.sampler, level)));
  return told;
}

double model_timestep(const SamplerInfo& sampler, double sigma) {
  if (sampler.order == 0) return sigma;
  const auto whole = static_cast<double>(sampler.train_steps);
  return std::floor(sigma * whole) / whole;
}

std::vector<double> solver_weights(const std::vector<float>& sigmas, int step, int first, int order) {
  const auto sigma = [&](int at) { return static_cast<double>(sigmas[static_cast<std::size_t>(at)]); };
  const auto log_snr = [&](int at) {
    return sigma(at) > 0 ? std::log((1 - sigma(at)) / sigma(at)) : std::numeric_limits<double>::infinity();
  };
  const int steps = static_cast<int>(sigmas.size()) - 1;
  const auto order_at = [&](int at) { return std::min({order, at - first + 1, steps - at}); };
  std::vector<double> weights(static_cast<std::size_t>(order) + 1);
  const double share = sigma(step + 1) / sigma(step);  // of the corrected latent in the next one
  if (step > first) {                                  // UniC: what it adds to the move of the step before
    const double h = log_snr(step) - log_snr(step - 1), scale = -(1 - sigma(step)) * std::expm1(-h) * share;
    if (order_at(step - 1) == 1) {
      weights[0] += scale / 2;
      weights[1] -= scale / 2;
    } else {
      const double ratio = (log_snr(step - 2) - log_snr(step - 1)) / h;
      const double phi2 = std::expm1(-h) / -h - 1, phi3 = phi2 / -h - 0.5;
      const double sum = phi2 / std::expm1(-h), slope = 2 * phi3 / std::expm1(-h);  // x + y and ratio·x + y
      const double x = (sum - slope) / (1 - ratio), y = sum - x, older = (x - 0.5) / ratio;
      weights[0] += scale * y;
      weights[1] -= scale * (y + older);
      weights[2] += scale * older;
    }
  }
  weights[0] += 1 - share;
  if (order_at(step) == 2) {  // UniP
    const double h = log_snr(step + 1) - log_snr(step), ratio = (log_snr(step - 1) - log_snr(step)) / h;
    const double slope = -(1 - sigma(step + 1)) * std::expm1(-h) / (2 * ratio);
    weights[0] -= slope;
    weights[1] += slope;
  }
  return weights;
}

std::map<std::string, Tensor> rotary_tables(const Manifest& manifest, int patch, const Sizes& sizes) {
  const double ratio = static_cast<double>(patch) / manifest.native;
  Shape shape;
  for (const Axis& axis : manifest.axes) shape.push_back(sizes.at(axis.symbol) / (axis.is_frames() ? 1 : patch));
  std::int64_t rotated = 0;
  for (const RotaryAxis& axis : manifest.positions.axes) rotated += axis.dimensions;
  const std::int64_t frames = manifest.has_frames() ? shape.front() : 1;
  const std::int64_t rows = height_of(shape), columns = width_of(shape);
  shape.push_back(rotated);
  Tensor cosines(shape), sines(shape);
  const auto from_centre = [&](std::int64_t index) { return (static_cast<double>(index) + 0.5) * ratio - 0.5; };
  std::size_t at = 0;
  for (std::int64_t frame = 0; frame < frames; ++frame)
    for (std::int64_t row = 0; row < rows; ++row)
      for (std::int64_t column = 0; column < columns; ++column)
        for (const RotaryAxis& axis : manifest.positions.axes) {
          const double coordinate = axis.axis == "frames"   ? static_cast<double>(frame)
                                    : axis.axis == "height" ? from_centre(row)
                                    : axis.axis == "width"  ? from_centre(column)
                                                            : 0;
          for (int pair = 0; pair < axis.dimensions; pair += 2) {
            const double frequency = std::pow(manifest.positions.theta, -(static_cast<double>(pair) / axis.dimensions));
            const double angle = coordinate * frequency;
            for (int twice = 0; twice < 2; ++twice, ++at) {
              cosines.values[at] = static_cast<float>(std::cos(angle));
              sines.values[at] = static_cast<float>(std::sin(angle));
            }
          }
        }
  return {{names::kTables[0], std::move(cosines)}, {names::kTables[1], std::move(sines)}};
}

std::vector<double> dct_matrix(std::int64_t size) {
  const auto number = static_cast<std::size_t>(size);
  std::vector<double> matrix(number * number);
  const double length = static_cast<double>(size), scale = std::sqrt(2 / length);
  for (std::size_t i = 0; i < number; ++i)
    for (std::size_t j = 0; j < number; ++j) {
      const double value = scale * std::cos(kPi / length * static_cast<double>(i) * (static_cast<double>(j) + 0.5));
      matrix[i * number + j] = i == 0 ? value / std::sqrt(2.0) : value;
    }
  return matrix;
}

Tensor dct_coefficients(const Tensor& noise) { return both_sides(noise, false); }

Tensor inverse_dct(const Tensor& coefficients) { return both_sides(coefficients, true); }

Tensor lowest(const Tensor& coefficients, std::int64_t height, std::int64_t width) {
  Tensor small(with_sides(coefficients.shape, height, width));
  auto out = small.values.begin();
  for (std::size_t plane = 0; plane < planes(coefficients); ++plane)
    for (std::int64_t row = 0; row < height; ++row) {
      const auto before = static_cast<std::int64_t>(plane) * height_of(coefficients.shape) + row;
      const auto in = coefficients.values.begin() + before * width_of(coefficients.shape);
      out = std::copy(in, in + width, out);
    }
  return small;
}

std::map<std::string, Tensor> growing_tables(std::int64_t small_height, std::int64_t small_width, std::int64_t height,
                                             std::int64_t width) {
  Tensor fresh({height, width});
  for (std::int64_t i = 0; i < height; ++i)
    for (std::int64_t j = 0; j < width; ++j)
      fresh.values[static_cast<std::size_t>(i * width + j)] = i < small_height && j < small_width ? 0.0F : 1.0F;
  const auto& name = names::kGrowingTables;
  return {{name[0], table(small_height, height)},
          {name[1], table(small_width, width)},
          {name[2], table(height, height)},
          {name[3], table(width, width)},
          {name[4], std::move(fresh)}};
}

Tensor in_corner(const Tensor& latent, std::int64_t height, std::int64_t width) {
  const std::int64_t columns = width_of(latent.shape);
  Tensor large(with_sides(latent.shape, height, width));
  auto in = latent.values.begin();
  for (std::size_t plane = 0; plane < planes(latent); ++plane)
    for (std::int64_t row = 0; row < height_of(latent.shape); ++row, in += columns)
      std::copy(in, in + columns, large.values.begin() + (static_cast<std::int64_t>(plane) * height + row) * width);
  return large;
}

}  // namespace ddit
