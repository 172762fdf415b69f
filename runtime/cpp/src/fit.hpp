// Whether a manifest's fields fit together: what one of them names, another one has, in the shape that it needs.
#pragma once

#include <stdexcept>

#include "ddit/bundle.hpp"

namespace ddit {

/// What is wrong with a manifest.
class Misfit : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Throws `Misfit`. What is checked here cannot fail in the middle of a run.
void check_fit(const Manifest& manifest);

}  // namespace ddit
