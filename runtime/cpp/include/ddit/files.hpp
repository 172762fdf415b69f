// Files that a host reads and writes. Those that are read may come from anywhere; those that are written appear whole
// or not at all.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "ddit/tensor.hpp"

namespace ddit {

/// The text of a regular file of so many bytes or fewer. Throws `UsageError` with why it cannot be read.
std::string read_text(const std::filesystem::path& path, std::size_t limit);

/// A float32 array in NumPy's .npy format, version 1 or 2, in C order and little-endian. Throws `UsageError`.
Tensor read_npy(const std::filesystem::path& path);
void write_npy(const std::filesystem::path& path, const Tensor& tensor);

/// Token ids by text encoder's graph: a JSON object of lists of whole numbers. Throws `UsageError`.
std::map<std::string, std::vector<std::int64_t>> read_ids(const std::filesystem::path& path);

/// A picture of three bytes a pixel, row by row.
struct Image {
  std::int64_t height = 0, width = 0;
  std::vector<std::uint8_t> pixels;
};

/// Throws `Error` where it cannot be written.
void write_png(const std::filesystem::path& path, const Image& image);

/// Frames to a file each; none of them appears before all are written.
void write_frames(const std::vector<std::filesystem::path>& paths, const std::vector<Image>& frames);

/// The files of so many frames: `frames/%03d.png` → frames/000.png, frames/001.png, … Throws `UsageError` for a name
/// without a place for their numbers.
std::vector<std::filesystem::path> frame_files(const std::filesystem::path& pattern, std::int64_t number);

void write_text(const std::filesystem::path& path, const std::string& text);

/// SHA-256 of a file in hexadecimal digits. Throws `BundleError`.
std::string sha256_of(const std::filesystem::path& path);
std::string sha256_of_text(const std::string& text);

}  // namespace ddit
