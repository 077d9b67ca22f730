// Reads everything in a file in memory, for a fuzzer or a test without Python.
#pragma once

#include <cstddef>
#include <cstdint>

#include "reader.hpp"

namespace mscan {

// Opens `data` and touches every sequence, plane, integral and statistic. Raises Fault for a file that breaks a rule; anything else
// that goes wrong is a bug. Compressed planes are passed over, since their codec is not part of this library.
void validate_buffer(const uint8_t* data, size_t size, Recovery recovery);

}  // namespace mscan
