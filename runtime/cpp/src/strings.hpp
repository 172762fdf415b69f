// Small helpers for text.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace ddit {

/// Parts between separators; of an empty text one empty part.
std::vector<std::string> split(std::string_view text, char separator);
std::string join(const std::vector<std::string>& parts, std::string_view between);
std::string join(const std::vector<int>& parts, std::string_view between);

inline bool begins(std::string_view text, std::string_view with) { return text.substr(0, with.size()) == with; }

/// Characters of UTF-8 text.
std::size_t characters(std::string_view text);

/// Whether text can be shown on one line: UTF-8 without control characters, line breaks or invisible marks.
bool printable(std::string_view text);

/// Text for a terminal: whatever cannot be shown is a question mark.
std::string shown(std::string_view text);

/// A whole number of digits only, up to 15 of them.
std::optional<std::int64_t> whole_number(std::string_view text);

/// A finite or infinite decimal number, all of the text.
std::optional<double> decimal_number(std::string_view text);

/// The shortest of six significant digits, as C's %g.
std::string shortest(double number);

}  // namespace ddit
