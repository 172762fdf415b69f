#include "strings.hpp"

#include <clocale>
#include <cstdio>
#include <cstdlib>
#include <locale>
#include <sstream>

namespace ddit {
namespace {

/// Calls `use` for every character; one that is no UTF-8 is U+FFFFFFFF.
template <typename Use>
void each_character(std::string_view text, Use use) {
  constexpr std::uint32_t kBroken = 0xFFFFFFFF;
  for (std::size_t at = 0; at < text.size();) {
    const auto first = static_cast<unsigned char>(text[at]);
    const std::size_t length = first < 0x80 ? 1 : first >= 0xC2 && first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    std::uint32_t code = length == 1 ? first : first & (0xFFU >> (length + 1));
    bool good = (first < 0x80 || (first >= 0xC2 && first < 0xF5)) && at + length <= text.size();
    for (std::size_t i = 1; good && i < length; ++i) {
      const auto next = static_cast<unsigned char>(text[at + i]);
      good = (next & 0xC0U) == 0x80;
      code = (code << 6U) | (next & 0x3FU);
    }
    constexpr std::uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    good = good && code >= least[length] && code < 0x110000 && (code < 0xD800 || code > 0xDFFF);
    use(good ? code : kBroken, at, good ? length : 1);
    at += good ? length : 1;
  }
}

bool visible(std::uint32_t code) {
  constexpr std::uint32_t hidden[][2] = {{0x00, 0x1F},
                                         {0x7F, 0xA0},
                                         {0xAD, 0xAD},
                                         {0x600, 0x605},
                                         {0x61C, 0x61C},
                                         {0x1680, 0x1680},
                                         {0x180E, 0x180E},
                                         {0x2000, 0x200F},
                                         {0x2028, 0x202F},
                                         {0x205F, 0x206F},
                                         {0x3000, 0x3000},
                                         {0xD800, 0xF8FF},
                                         {0xFEFF, 0xFEFF},
                                         {0xFFF9, 0xFFFB},
                                         {0xFFFE, 0xFFFF},
                                         {0xE0000, 0x10FFFF},
                                         {0xFFFFFFFF, 0xFFFFFFFF}};
  for (const auto& [low, high] : hidden)
    if (code >= low && code <= high) return false;
  return true;
}

}  // namespace

std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> parts;
  for (std::size_t begin = 0;;) {
    const std::size_t end = text.find(separator, begin);
    parts.emplace_back(text.substr(begin, end == std::string_view::npos ? end : end - begin));
    if (end == std::string_view::npos) return parts;
    begin = end + 1;
  }
}

std::string join(const std::vector<std::string>& parts, std::string_view between) {
  std::string joined;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    if (i > 0) joined += between;
    joined += parts[i];
  }
  return joined;
}

std::string join(const std::vector<int>& parts, std::string_view between) {
  std::vector<std::string> texts;
  for (const int part : parts) texts.push_back(std::to_string(part));
  return join(texts, between);
}

std::size_t characters(std::string_view text) {
  std::size_t number = 0;
  each_character(text, [&](std::uint32_t, std::size_t, std::size_t) { ++number; });
  return number;
}

bool printable(std::string_view text) {
  bool all = true;
  each_character(text, [&](std::uint32_t code, std::size_t, std::size_t) { all = all && visible(code); });
  return all;
}

std::string shown(std::string_view text) {
  std::string safe;
  each_character(text, [&](std::uint32_t code, std::size_t at, std::size_t length) {
    visible(code) ? safe += text.substr(at, length) : safe += "?";
  });
  return safe;
}

std::optional<std::int64_t> whole_number(std::string_view text) {
  if (text.empty() || text.size() > 15) return std::nullopt;
  std::int64_t number = 0;
  for (const char digit : text) {
    if (digit < '0' || digit > '9') return std::nullopt;
    number = number * 10 + (digit - '0');
  }
  return number;
}

std::optional<double> decimal_number(std::string_view text) {
  if (text.empty() || text.size() > 60 || text.find_first_not_of("0123456789.eE+-") != std::string_view::npos)
    return std::nullopt;
  std::istringstream stream{std::string(text)};
  stream.imbue(std::locale::classic());  // a point is a point in every country
  double number = 0;
  stream >> number;
  if (stream.fail() || stream.peek() != std::istringstream::traits_type::eof()) return std::nullopt;
  return number;
}

std::string shortest(double number) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", number);
  return text;
}

}  // namespace ddit
