// Tensors on the host: a shape and its values, the last axis innermost.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ddit {

using Shape = std::vector<std::int64_t>;

/// How many values a shape holds. Throws `UsageError` where that is more than memory can address.
std::size_t count(const Shape& shape);

/// The last two sides of a latent or picture, whatever stands before them.
inline std::int64_t height_of(const Shape& shape) { return shape[shape.size() - 2]; }
inline std::int64_t width_of(const Shape& shape) { return shape.back(); }

/// `(4, 8, 8)`.
std::string text(const Shape& shape);

/// float32 values.
struct Tensor {
  Shape shape;
  std::vector<float> values;

  Tensor() = default;
  explicit Tensor(Shape of) : shape(std::move(of)), values(count(shape)) {}
  Tensor(Shape of, std::vector<float> with) : shape(std::move(of)), values(std::move(with)) {}

  /// Whether no value is NaN or infinite.
  bool finite() const;
};

/// Token ids.
struct Ids {
  Shape shape;
  std::vector<std::int64_t> values;
};

}  // namespace ddit
