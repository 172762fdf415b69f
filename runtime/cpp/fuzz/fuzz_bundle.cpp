// libFuzzer's entry: any bytes as a manifest are read or refused with a `BundleError`, and never anything else.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "ddit/bundle.hpp"
#include "ddit/errors.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    ddit::parse_manifest({reinterpret_cast<const char*>(data), size}, "bundle.json");
  } catch (const ddit::BundleError&) {
    return 0;
  }
  return 0;
}
