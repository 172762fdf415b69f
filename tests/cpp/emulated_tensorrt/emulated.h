// What the emulated TensorRT asks the emulated GPU beside CUDA's own functions.
#pragma once

#include <cstddef>

/// Bytes from an address to the end of its allocation; 0 where there is none.
std::size_t emulated_bytes_behind(const void* address);
