// Noise levels, position tables, and what growing latents need. docs/spec/sampling.md has the formulas.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "ddit/bundle.hpp"
#include "ddit/tensor.hpp"

namespace ddit {

/// The resolution-dependent shift μ, linear in the image tokens of the native level.
double flow_shift(const SamplerInfo& sampler, double image_tokens);

/// Patches of a latent at the native level.
double image_tokens(const Manifest& manifest, const Sizes& sizes);

/// Noise levels (steps + 1), from 1 down to 0, for a latent of a size.
std::vector<float> noise_levels(const Manifest& manifest, int steps, const Sizes& sizes);

/// The noise levels (steps) that the model is told in a run that never grows.
std::vector<float> model_timesteps(const Manifest& manifest, int steps, const Sizes& sizes);

/// What the model is told of a noise level: with UniPC whole steps of its training.
double model_timestep(const SamplerInfo& sampler, double sigma);

/// UniPC's b₀ … b_order of a step: the weights of its estimate and of the ones before. `first` is the number of the
/// history's first step.
std::vector<double> solver_weights(const std::vector<float>& sigmas, int step, int first, int order);

/// `rope_cos` and `rope_sin` ([F,] H/p, W/p, rotated dimensions) of a level.
std::map<std::string, Tensor> rotary_tables(const Manifest& manifest, int patch, const Sizes& sizes);

/// The orthonormal DCT-II as a matrix (size, size), a frequency a row.
std::vector<double> dct_matrix(std::int64_t size);

/// The orthonormal DCT-II of noise (C, [F,] H, W) along height and width, of the same shape.
Tensor dct_coefficients(const Tensor& noise);

/// The lowest frequencies of coefficients (C, [F,] H, W), as a smaller array (C, [F,] h, w) of coefficients.
Tensor lowest(const Tensor& coefficients, std::int64_t height, std::int64_t width);

/// The inverse of `dct_coefficients`.
Tensor inverse_dct(const Tensor& coefficients);

/// The tables of the grow graph, for a latent that grows from a height and width to others.
std::map<std::string, Tensor> growing_tables(std::int64_t small_height, std::int64_t small_width, std::int64_t height,
                                             std::int64_t width);

/// A small latent (C, [F,] h, w) in the low corner of zeros (C, [F,] H, W).
Tensor in_corner(const Tensor& latent, std::int64_t height, std::int64_t width);

}  // namespace ddit
