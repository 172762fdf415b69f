#include "ddit/files.hpp"

#include <png.h>

#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "ddit/errors.hpp"
#include "strings.hpp"

namespace ddit {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kLargestIds = 64'000'000;  // bytes

std::ifstream open_regular(const fs::path& path) {
  std::error_code error;
  const auto status = fs::status(path, error);
  if (!fs::exists(status)) throw UsageError(path.string() + " does not exist");
  if (!fs::is_regular_file(status)) throw UsageError(path.string() + " is not a regular file");
  std::ifstream file(path, std::ios::binary);
  if (!file) throw UsageError(path.string() + " cannot be read");
  return file;
}

/// The file beside `path` that takes its place when it is whole.
fs::path partial_of(const fs::path& path) { return path.parent_path() / ("." + path.filename().string() + ".partial"); }

/// Files that take their places when `write`, which is told a file's number and the one beside it, has written all.
template <typename Write>
void write_whole(const std::vector<fs::path>& paths, Write write) {
  std::error_code error;
  const auto fail = [&](const fs::path& at) {
    for (const fs::path& path : paths) fs::remove(partial_of(path), error);
    throw Error(at.string() + " cannot be written");
  };
  for (std::size_t i = 0; i < paths.size(); ++i)
    if (!write(i, partial_of(paths[i]))) fail(paths[i]);
  for (const fs::path& path : paths) {
    fs::rename(partial_of(path), path, error);
    if (error) fail(path);
  }
}

void write_bytes(const fs::path& path, const std::string& bytes) {
  write_whole({path}, [&](std::size_t, const fs::path& partial) {
    std::ofstream file(partial, std::ios::binary);
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    return static_cast<bool>(file.flush());
  });
}

/// The value of a key in an .npy header, a Python dictionary in writing: up to the next comma outside parentheses.
std::string header_value(const std::string& header, const std::string& key) {
  const auto at = header.find("'" + key + "':");
  if (at == std::string::npos) return "";
  auto begin = header.find_first_not_of(' ', at + key.size() + 3);
  if (begin == std::string::npos) return "";
  const char close = header[begin] == '(' ? ')' : ',';
  const auto end = header.find(close, begin);
  return end == std::string::npos ? "" : header.substr(begin, end - begin + (close == ')' ? 1 : 0));
}

/// `(4, 8, 8)` as numbers; nothing where it is no shape.
std::optional<Shape> shape_of(const std::string& text) {
  if (text.size() < 2 || text.front() != '(' || text.back() != ')') return std::nullopt;
  Shape shape;
  for (const std::string& part : split(std::string_view(text).substr(1, text.size() - 2), ',')) {
    const auto begin = part.find_first_not_of(' ');
    if (begin == std::string::npos) continue;
    const auto number = whole_number(std::string_view(part).substr(begin));
    if (!number || *number < 1) return std::nullopt;
    shape.push_back(*number);
  }
  return shape;
}

}  // namespace

std::string read_text(const fs::path& path, std::size_t limit) {
  std::ifstream file = open_regular(path);
  std::error_code error;
  const auto size = fs::file_size(path, error);
  if (error || size > limit) throw UsageError(path.string() + " is larger than " + std::to_string(limit) + " bytes");
  std::string content(static_cast<std::size_t>(size), '\0');
  file.read(content.data(), static_cast<std::streamsize>(content.size()));
  content.resize(static_cast<std::size_t>(file.gcount()));
  return content;
}

Tensor read_npy(const fs::path& path) {
  std::ifstream file = open_regular(path);
  const auto fail = [&](const std::string& what) { throw UsageError(path.string() + " " + what); };
  unsigned char start[12] = {};
  file.read(reinterpret_cast<char*>(start), 8);
  if (!file || std::memcmp(start, "\x93NUMPY", 6) != 0 || start[6] < 1 || start[6] > 2)
    fail("is no .npy file of version 1 or 2");
  const int digits = start[6] == 1 ? 2 : 4;
  file.read(reinterpret_cast<char*>(start + 8), digits);
  std::size_t length = 0;
  for (int i = digits - 1; i >= 0; --i) length = length * 256 + start[8 + i];
  if (!file || length > 65'536) fail("has a damaged header");
  std::string header(length, '\0');
  file.read(header.data(), static_cast<std::streamsize>(length));
  if (header_value(header, "descr") != "'<f4'" || header_value(header, "fortran_order") != "False")
    fail("is not float32 in C order; save numpy.ascontiguousarray(x, numpy.float32)");
  const auto shape = shape_of(header_value(header, "shape"));
  if (!file || !shape) {
    fail("has a damaged header");
    return {};
  }
  const std::uintmax_t rest = fs::file_size(path) - static_cast<std::uintmax_t>(file.tellg());
  // before memory is asked for: the header may say anything
  if (count(*shape) > rest / sizeof(float) || count(*shape) * sizeof(float) != rest)
    fail("has another length than its shape " + text(*shape) + " needs");
  Tensor tensor(*shape);
  file.read(reinterpret_cast<char*>(tensor.values.data()), static_cast<std::streamsize>(rest));
  if (!file) fail("cannot be read");
  return tensor;
}

void write_npy(const fs::path& path, const Tensor& tensor) {
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': " + text(tensor.shape) + ", }";
  header.resize((10 + header.size() + 1 + 63) / 64 * 64 - 11, ' ');
  header += '\n';
  std::string bytes("\x93NUMPY\x01\x00", 8);
  bytes += static_cast<char>(header.size() & 0xFFU);
  bytes += static_cast<char>(header.size() >> 8U);
  bytes += header;
  bytes.append(reinterpret_cast<const char*>(tensor.values.data()), tensor.values.size() * sizeof(float));
  write_bytes(path, bytes);
}

std::map<std::string, std::vector<std::int64_t>> read_ids(const fs::path& path) {
  const std::string text = read_text(path, kLargestIds);
  const std::string form = path.string() + R"( has to be like {"clip": [1, 2], "t5": [3]}: token ids by text encoder)";
  std::map<std::string, std::vector<std::int64_t>> ids;
  try {
    const auto content = nlohmann::json::parse(text);
    if (!content.is_object()) throw UsageError(form);
    for (const auto& item : content.items()) {
      if (!item.value().is_array()) throw UsageError(form);
      auto& row = ids[item.key()];
      for (const auto& id : item.value()) {
        if (!id.is_number_integer() || id.get<std::int64_t>() < 0) throw UsageError(form);
        row.push_back(id.get<std::int64_t>());
      }
    }
  } catch (const nlohmann::json::exception&) {
    throw UsageError(form);
  }
  return ids;
}

void write_png(const fs::path& path, const Image& image) { write_frames({path}, {image}); }

void write_frames(const std::vector<fs::path>& paths, const std::vector<Image>& frames) {
  write_whole(paths, [&](std::size_t number, const fs::path& partial) {
    const Image& image = frames[number];
    png_image png = {};
    png.version = PNG_IMAGE_VERSION;
    png.width = static_cast<png_uint_32>(image.width);
    png.height = static_cast<png_uint_32>(image.height);
    png.format = PNG_FORMAT_RGB;
    return png_image_write_to_file(&png, partial.c_str(), 0, image.pixels.data(), 0, nullptr) != 0;
  });
}

std::vector<fs::path> frame_files(const fs::path& pattern, std::int64_t number) {
  const std::string name = pattern.filename().string();
  const auto begin = name.find('%');
  const auto end = begin == std::string::npos ? begin : name.find_first_not_of("0123456789", begin + 1);
  if (end == std::string::npos || name[end] != 'd' || name.find('%', end) != std::string::npos || end - begin > 3)
    throw UsageError(pattern.string() + " has no place for the frames' numbers; give one %d, as in frames/%03d.png");
  const std::string digits = name.substr(begin + 1, end - begin - 1);
  const char filler = !digits.empty() && digits[0] == '0' ? '0' : ' ';
  const auto width = static_cast<std::size_t>(whole_number(digits).value_or(0));
  std::vector<fs::path> files;
  for (std::int64_t i = 0; i < number; ++i) {
    std::string written = std::to_string(i);
    if (written.size() < width) written.insert(0, width - written.size(), filler);
    files.push_back(pattern.parent_path() / (name.substr(0, begin) + written + name.substr(end + 1)));
  }
  return files;
}

void write_text(const fs::path& path, const std::string& text) { write_bytes(path, text); }

}  // namespace ddit
