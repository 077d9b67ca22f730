// CRC-32C (Castagnoli, reflected polynomial 0x82F63B78), the checksum of every structure of a .mscan file.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mscan {

// Continues `crc` over `size` bytes; start with 0. Uses the CPU's instruction where it has one.
uint32_t crc32c(const void* data, size_t size, uint32_t crc = 0);

// The same value from tables alone (slicing by eight).
uint32_t crc32c_table(const void* data, size_t size, uint32_t crc = 0);

// Whether crc32c() runs on the CPU's instruction.
bool crc32c_is_hardware();

// The checksum of a structure: over all of its bytes but the last four, which hold it.
template <typename T>
uint32_t crc_of(const void* structure) {
  return crc32c(structure, sizeof(T) - sizeof(uint32_t));
}

// Writes a structure's checksum into it.
template <typename T>
void seal(T& structure) {
  structure.crc = crc_of<T>(&structure);
}

}  // namespace mscan
