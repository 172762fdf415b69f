#include "ddit/sampling.hpp"

#include <algorithm>
#include <cmath>

#include "names.hpp"

namespace ddit {
namespace {

constexpr double kPi = 3.14159265358979323846;

/// left (n, n) · values (n, m) · rightᵀ, channel by channel; `transposed` takes leftᵀ and right instead.
Tensor both_sides(const Tensor& values, bool transposed) {
  const std::int64_t channels = values.shape[0], height = values.shape[1], width = values.shape[2];
  const auto left = dct_matrix(height), right = dct_matrix(width);
  const auto rows = static_cast<std::size_t>(height), columns = static_cast<std::size_t>(width);
  Tensor result(values.shape);
  std::vector<double> half(rows * columns), whole(columns);
  for (std::size_t channel = 0; channel < static_cast<std::size_t>(channels); ++channel) {
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

}  // namespace

double flow_shift(const SamplerInfo& sampler, double image_tokens) {
  const auto base = static_cast<double>(sampler.base_image_seq_len);
  const double slope =
      (sampler.max_shift - sampler.base_shift) / (static_cast<double>(sampler.max_image_seq_len) - base);
  return sampler.base_shift + slope * (image_tokens - base);
}

std::vector<float> noise_levels(const Manifest& manifest, int steps, const Sizes& sizes) {
  double tokens = 1;
  for (const Axis& axis : manifest.axes) tokens *= static_cast<double>(sizes.at(axis.symbol) / manifest.native);
  const SamplerInfo& sampler = manifest.sampler;
  const double shift = sampler.use_dynamic_shifting ? std::exp(flow_shift(sampler, tokens)) : sampler.shift;
  const double last = sampler.smallest.value_or(1.0 / steps), spacing = steps > 1 ? (last - 1.0) / (steps - 1) : 0.0;
  std::vector<float> levels;
  for (int i = 0; i < steps; ++i) {
    const double even = steps > 1 && i == steps - 1 ? last : i * spacing + 1.0;
    const auto plain = static_cast<double>(static_cast<float>(even));
    levels.push_back(static_cast<float>(shift * plain / (1.0 + (shift - 1.0) * plain)));
  }
  levels.push_back(0.0F);
  return levels;
}

std::map<std::string, Tensor> rotary_tables(const Manifest& manifest, int patch, const Sizes& sizes) {
  const double ratio = static_cast<double>(patch) / manifest.native;
  Shape shape;
  for (const Axis& axis : manifest.axes) shape.push_back(sizes.at(axis.symbol) / patch);
  std::int64_t rotated = 0;
  for (const RotaryAxis& axis : manifest.positions.axes) rotated += axis.dimensions;
  shape.push_back(rotated);
  Tensor cosines(shape), sines(shape);
  std::size_t at = 0;
  for (std::int64_t row = 0; row < shape[0]; ++row)
    for (std::int64_t column = 0; column < shape[1]; ++column)
      for (const RotaryAxis& axis : manifest.positions.axes) {
        double coordinate = 0;
        if (!axis.axis.empty()) {
          const auto index = static_cast<double>(axis.axis == manifest.axes[0].name ? row : column);
          coordinate = (index + 0.5) * ratio - 0.5;
        }
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
  const Shape& large = coefficients.shape;
  Tensor small({large[0], height, width});
  auto out = small.values.begin();
  for (std::int64_t channel = 0; channel < large[0]; ++channel)
    for (std::int64_t row = 0; row < height; ++row) {
      const auto in = coefficients.values.begin() + (channel * large[1] + row) * large[2];
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
  const Shape& small = latent.shape;
  Tensor large({small[0], height, width});
  auto in = latent.values.begin();
  for (std::int64_t channel = 0; channel < small[0]; ++channel)
    for (std::int64_t row = 0; row < small[1]; ++row, in += small[2])
      std::copy(in, in + small[2], large.values.begin() + (channel * height + row) * width);
  return large;
}

}  // namespace ddit
