// The chunks that a SEQUENCE commits, and the check that they are those it was written with.
#pragma once

#include <cstdint>
#include <vector>

#include "crc32c.hpp"
#include "validate.hpp"

namespace mscan {

// Adds one header's crc to the crc of a group: first its LAYOUT's, starting from 0, then its chunks' in file order.
inline uint32_t group_crc(uint32_t crc, uint32_t header_crc) { return crc32c(&header_crc, sizeof header_crc, crc); }

// The crc of a whole group. A header holds the crc of its payload, so this covers every byte.
uint32_t group_crc(uint32_t layout_crc, const std::vector<Chunk>& members);

// Raises Fault unless `members`, the chunks between the last commit and `sequence`, are what `sequence` commits: DATA in token order that
// covers it, then its INTEGRAL, with the offsets and the crc that it records. Reads headers only. `layout_crc` is null if the
// SEQUENCE's LAYOUT is not in the file.
void check_group(const Chunk& sequence, const std::vector<Chunk>& members, const uint32_t* layout_crc);

// The entry of a SEQUENCE in an INDEX.
IndexEntry entry_of(const Chunk& sequence);

// Raises Fault unless `chunk` was written after the chunk whose header has crc `before`. Passes for a file without links.
void check_link(const Chunk& chunk, uint32_t before);

}  // namespace mscan
