// Every error that ddit raises on purpose: one line that says what was wrong and what to do.
#pragma once

#include <stdexcept>
#include <string>

namespace ddit {

/// Base of all. A program prints the message and leaves with the exit code.
class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& message, int exit_code = 1) : std::runtime_error(message), exit_code_(exit_code) {}
  int exit_code() const noexcept { return exit_code_; }

 private:
  int exit_code_;
};

/// The request cannot be met as asked: an unknown level, a size outside the profile.
class UsageError : public Error {
 public:
  explicit UsageError(const std::string& message) : Error(message, 2) {}
};

/// A bundle or one of its files is missing, damaged or from another version.
class BundleError : public Error {
 public:
  using Error::Error;
};

/// The inference engine failed to load or to run a graph.
class BackendError : public Error {
 public:
  using Error::Error;
};

}  // namespace ddit
