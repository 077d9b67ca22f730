// All checks of bytes read from disk. No other code in this library uses a length, count or offset that validate_chunk() (or
// validate_prologue(), validate_trailer(), validate_planes()) has not bounded.
#pragma once

#include <cstdint>

#include "format.hpp"

namespace mscan {

struct Bytes {
  const uint8_t* data = nullptr;
  uint64_t size = 0;
};

// A chunk with a valid header; its payload lies wholly within the file.
struct Chunk {
  uint64_t offset = 0;
  uint64_t end = 0;  // where the next chunk starts
  ChunkHeader header{};
  const uint8_t* payload = nullptr;

  ChunkType type() const { return static_cast<ChunkType>(header.type); }
  // Whether it belongs to a group, which a later SEQUENCE commits; every other chunk commits itself.
  bool in_group() const { return type() == ChunkType::data || (type() == ChunkType::integral && header.ordinal != kWholeFile); }
  uint64_t length() const { return header.payload_length; }
  bool compressed() const { return (header.flags & kZstd) != 0; }
  bool sparse() const { return (header.flags & kSparse) != 0; }
  Codec codec() const { return static_cast<Codec>(header.codec); }
};

enum class Depth { header, payload };

Prologue validate_prologue(Bytes file);

// The trailer, if the last 64 bytes are one; found = false otherwise.
Trailer validate_trailer(Bytes file, const Uuid& uuid, bool& found);

// Raises Fault unless a chunk of this file starts at `offset`. Depth::payload adds the payload's crc, its padding and its structure.
Chunk validate_chunk(Bytes file, const Uuid& uuid, uint64_t offset, Depth depth);

// The same without an exception, for searching; header depth.
bool is_chunk(Bytes file, const Uuid& uuid, uint64_t offset);

// Offsets of the planes of a DATA chunk within its raw (uncompressed) region.
struct PlaneMap {
  uint64_t rows = 0;     // sparse: (tokens + 1) u64
  uint64_t columns = 0;  // sparse: u32 per value
  uint64_t plane[2] = {0, 0};
  uint64_t length = 0;
  uint64_t width = 0;  // bytes of one value
};
PlaneMap plane_map(const ChunkHeader& header, const DataHead& head, uint64_t offset);

// Checks the order and range of a sparse chunk's row offsets and columns.
void validate_planes(const ChunkHeader& header, const DataHead& head, const uint8_t* raw, uint64_t offset);

// Offsets of the parts of a SEQUENCE payload.
struct SequenceMap {
  uint64_t id, token_ids, loss, mask, text, length;
};
SequenceMap sequence_map(const SequenceHead& head, uint64_t offset);

struct IndexMap {
  uint64_t entries, stats, layouts, length;
};
IndexMap index_map(const IndexHead& head, uint64_t offset);

IndexHead validate_index_head(const Chunk& chunk);

}  // namespace mscan
