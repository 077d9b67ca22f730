#include "validate.hpp"

#include <cmath>

#include "crc32c.hpp"

namespace mscan {
namespace {

[[noreturn]] void fail(const std::string& rule, uint64_t offset) { throw Fault(rule, offset); }

void require(bool holds, const char* rule, uint64_t offset) {
  if (!holds) fail(rule, offset);
}

// Sums and products of untrusted numbers; every length of the format passes through these.
uint64_t add(uint64_t a, uint64_t b, uint64_t offset) {
  uint64_t out;
  if (__builtin_add_overflow(a, b, &out)) fail("a length must fit 64 bits, got an overflow.", offset);
  return out;
}

uint64_t multiply(uint64_t a, uint64_t b, uint64_t offset) {
  uint64_t out;
  if (__builtin_mul_overflow(a, b, &out)) fail("a length must fit 64 bits, got an overflow.", offset);
  return out;
}

uint64_t after(uint64_t start, uint64_t count, uint64_t width, uint64_t offset) {
  return align_up(add(add(start, multiply(count, width, offset), offset), kAlign - 1, offset) & ~(kAlign - 1));
}

bool all_zero(const void* bytes, size_t size) {
  const auto* p = static_cast<const uint8_t*>(bytes);
  for (size_t i = 0; i < size; ++i) {
    if (p[i] != 0) return false;
  }
  return true;
}

// The same rules as Python's decoder: no overlong form, no surrogate, nothing above U+10FFFF.
bool is_utf8(const uint8_t* p, uint64_t size) {
  for (uint64_t i = 0; i < size;) {
    const uint8_t lead = p[i++];
    if (lead < 0x80) continue;
    const int more = lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : 1;
    if (lead < 0xC2 || lead > 0xF4 || size - i < static_cast<uint64_t>(more)) return false;
    const uint8_t second = p[i];
    if ((lead == 0xE0 && second < 0xA0) || (lead == 0xED && second > 0x9F) || (lead == 0xF0 && second < 0x90) || (lead == 0xF4 && second > 0x8F)) {
      return false;
    }
    for (int k = 0; k < more; ++k) {
      if ((p[i++] & 0xC0) != 0x80) return false;
    }
  }
  return true;
}

void check_layout_payload(const Chunk& chunk) {
  const uint64_t at = chunk.offset + sizeof(ChunkHeader);
  require(chunk.length() >= sizeof(LayoutHead), "LAYOUT must hold its 64-byte head.", at);
  const auto head = load<LayoutHead>(chunk.payload);
  const uint64_t names = add(sizeof(LayoutHead), multiply(head.entries, sizeof(LayoutRow), at), at);
  require(add(names, head.names_length, at) == chunk.length(), "LAYOUT length must match its entries and names.", at);
  require(head.reserved0 == 0 && all_zero(head.reserved1, sizeof head.reserved1), "reserved bytes must be 0.", at);
  require(head.entries > 0 && head.blocks <= kMaxBlocks, "LAYOUT must hold 1 or more entries and at most 2^26 blocks.", at);
  uint64_t base = 0;
  for (uint32_t i = 0; i < head.entries; ++i) {
    const auto row = load<LayoutRow>(chunk.payload + sizeof(LayoutHead) + i * sizeof(LayoutRow));
    require(row.base == base, "LAYOUT entries must follow each other without a gap.", at);
    require(row.blocks >= 1 && row.blocks <= row.out_features && row.blocks <= kMaxBlocks, "LAYOUT blocks must be 1 … out_features.", at);
    require(add(row.name_offset, row.name_length, at) <= head.names_length, "LAYOUT names must lie within the name table.", at);
    require(is_utf8(chunk.payload + names + row.name_offset, row.name_length), "LAYOUT names must be UTF-8.", at);
    base = add(base, row.blocks, at);
  }
  require(base == head.blocks, "LAYOUT must sum to its number of blocks.", at);
}

void check_range(const PlaneRange& range, bool logarithmic, uint64_t at) {
  if (!logarithmic) return require(range.lo == 0 && range.hi == 0, "an f32 plane must have lo = hi = 0.", at);
  require(std::isfinite(range.lo) && std::isfinite(range.hi) && range.lo <= range.hi && range.lo >= -149.0 && range.hi <= 128.0,
          "a log2u16 plane must have −149 ≤ lo ≤ hi ≤ 128.", at);
}

void check_data_payload(const Chunk& chunk) {
  const uint64_t at = chunk.offset + sizeof(ChunkHeader);
  require(chunk.length() >= sizeof(DataHead), "DATA must hold its 64-byte head.", at);
  const auto head = load<DataHead>(chunk.payload);
  require(head.reserved == 0, "reserved bytes must be 0.", at);
  require(chunk.header.token_count > 0, "DATA must hold a token.", at);
  add(chunk.header.first_token, chunk.header.token_count, at);
  require(head.columns > 0 && head.columns <= kMaxBlocks, "DATA columns must be 1 … 2^26.", at);
  const uint64_t cells = multiply(chunk.header.token_count, head.columns, at);
  require(chunk.header.token_count == 1 || cells <= kMaxCells, "DATA of several tokens must hold at most 2^24 tokens × columns.", at);
  require(chunk.sparse() ? head.values <= cells : head.values == cells, "DATA values must match tokens × columns.", at);
  for (const PlaneRange& range : {head.range[0], head.range[1]}) check_range(range, chunk.codec() == Codec::log2u16, at);
  const PlaneMap map = plane_map(chunk.header, head, at);
  require(map.length == head.raw_length && map.length <= kMaxPayload, "DATA raw length must match its planes.", at);
  const uint64_t stored = chunk.length() - sizeof(DataHead);
  if (chunk.compressed()) return require(stored > 0, "compressed DATA must hold a frame.", at);
  require(stored == map.length, "DATA length must match its planes.", at);
  validate_planes(chunk.header, head, chunk.payload + sizeof(DataHead), at);
}

void check_sequence_payload(const Chunk& chunk) {
  const uint64_t at = chunk.offset + sizeof(ChunkHeader);
  require(chunk.length() >= sizeof(SequenceHead), "SEQUENCE must hold its 64-byte head.", at);
  const auto head = load<SequenceHead>(chunk.payload);
  require(head.reserved0 == 0 && head.reserved1 == 0 && (head.flags & ~(kHasText | kHasMask)) == 0, "reserved bytes must be 0.", at);
  require((head.flags & kHasText) != 0 || head.text_length == 0, "SEQUENCE without text must have no text length.", at);
  require(head.tokens == chunk.header.token_count, "SEQUENCE tokens must match its chunk header.", at);
  require(head.id_length <= kMaxIdBytes, "a sequence id must have at most 65536 bytes.", at);
  require(sequence_map(head, at).length == chunk.length(), "SEQUENCE length must match its parts.", at);
  const char* id = reinterpret_cast<const char*>(chunk.payload) + sizeof(SequenceHead);
  require(id_hash(id, head.id_length) == head.id_hash, "SEQUENCE id must match its hash.", at);
  require(is_utf8(chunk.payload + sizeof(SequenceHead), head.id_length), "a sequence's id must be UTF-8.", at);
  require(is_utf8(chunk.payload + sequence_map(head, at).text, head.text_length), "a sequence's text must be UTF-8.", at);
}

void check_integral_payload(const Chunk& chunk) {
  const uint64_t at = chunk.offset + sizeof(ChunkHeader);
  require(chunk.length() >= sizeof(IntegralHead), "INTEGRAL must hold its 64-byte head.", at);
  const auto head = load<IntegralHead>(chunk.payload);
  const uint64_t blocks = head.blocks;
  require(all_zero(head.reserved, sizeof head.reserved), "reserved bytes must be 0.", at);
  require(blocks > 0 && blocks <= kMaxBlocks, "INTEGRAL blocks must be 1 … 2^26.", at);
  require(chunk.length() == sizeof(IntegralHead) + 5 * align_up(blocks * 8) + blocks * 8, "INTEGRAL length must match its blocks.", at);
}

void check_index_payload(const Chunk& chunk) {
  const uint64_t at = chunk.offset + sizeof(ChunkHeader);
  const IndexHead head = validate_index_head(chunk);
  uint64_t before = 0;
  for (uint64_t i = 0; i < head.count; ++i) {
    const auto entry = load<IndexEntry>(chunk.payload + sizeof(IndexHead) + i * sizeof(IndexEntry));
    require(entry.group_offset >= before && entry.group_offset <= entry.sequence_offset && entry.sequence_offset < chunk.offset,
            "INDEX offsets must increase and lie before it.", at);
    before = entry.sequence_offset + sizeof(ChunkHeader);
  }
}

void check_header(const ChunkHeader& h, uint64_t offset) {
  require(h.reserved == 0, "reserved bytes must be 0.", offset);
  require(h.type >= 1 && h.type <= 5, "chunk type must be 1 … 5.", offset);
  const bool data = h.type == static_cast<uint16_t>(ChunkType::data);
  const auto codec = static_cast<Codec>(h.codec);
  require(data ? codec == Codec::log2u16 || codec == Codec::f32 : codec == Codec::none, "codec must fit the chunk type.", offset);
  require(data ? (h.flags & ~(kSparse | kZstd)) == 0 : h.flags == 0, "flags must fit the chunk type.", offset);
  require(h.payload_length <= kMaxPayload, "a payload must have at most 2^40 bytes.", offset);
}

// Empty if the header at `offset` is valid, else the rule it breaks.
const char* header_rule(Bytes file, const Uuid& uuid, uint64_t offset, ChunkHeader& header) {
  if (offset % kAlign != 0) return "a chunk must start at a multiple of 64.";
  if (offset > file.size || file.size - offset < sizeof(ChunkHeader)) return "a chunk header must lie within the file.";
  header = load<ChunkHeader>(file.data + offset);
  if (!(header.uuid == uuid)) return "a chunk must carry the file's UUID.";
  if (header.crc != crc_of<ChunkHeader>(file.data + offset)) return "chunk header crc32c must match.";
  return nullptr;
}

}  // namespace

Prologue validate_prologue(Bytes file) {
  require(file.size >= 7 && std::memcmp(file.data, kMagic, 5) == 0, "a .mscan file must start with MSCAN.", 0);
  const auto version = load<uint16_t>(file.data + 5);
  if (version != kVersion) fail("version must be 2, got " + std::to_string(version) + ".", 5);
  require(file.size >= sizeof(Prologue), "the file must hold its 64-byte prologue.", file.size);
  const auto prologue = load<Prologue>(file.data);
  require(prologue.crc == crc_of<Prologue>(file.data), "prologue crc32c must match.", 0);
  require(prologue.reserved0 == 0 && prologue.reserved1 == 0 && prologue.reserved2 == 0 && prologue.reserved3 == 0,
          "reserved bytes must be 0.", 0);
  require(prologue.count == kNoCount, "the count of version 1 must be 0xFFFFFFFF.", 11);
  require(prologue.metadata_length <= kMaxMetadata, "metadata must have at most 2^30 bytes.", 7);
  require(prologue.first_chunk == align_up(sizeof(Prologue) + uint64_t{prologue.metadata_length}), "the first chunk must follow the metadata.",
          40);
  require(prologue.first_chunk <= file.size, "the file must hold its metadata.", file.size);
  return prologue;
}

Trailer validate_trailer(Bytes file, const Uuid& uuid, bool& found) {
  found = false;
  if (file.size < sizeof(Trailer) || file.size % kAlign != 0) return {};
  const uint64_t offset = file.size - sizeof(Trailer);
  const auto trailer = load<Trailer>(file.data + offset);
  found = std::memcmp(trailer.magic, kTrailerMagic, 8) == 0 && trailer.uuid == uuid && trailer.self_offset == offset &&
          trailer.crc == crc_of<Trailer>(file.data + offset) && trailer.index_offset < offset && trailer.reserved0 == 0 &&
          trailer.reserved1 == 0;
  return found ? trailer : Trailer{};
}

Chunk validate_chunk(Bytes file, const Uuid& uuid, uint64_t offset, Depth depth) {
  Chunk chunk;
  if (const char* rule = header_rule(file, uuid, offset, chunk.header)) fail(rule, offset);
  check_header(chunk.header, offset);
  const uint64_t room = file.size - offset - sizeof(ChunkHeader);
  require(align_up(chunk.header.payload_length) <= room, "a payload must lie within the file.", offset);
  chunk.offset = offset;
  chunk.payload = file.data + offset + sizeof(ChunkHeader);
  chunk.end = offset + sizeof(ChunkHeader) + align_up(chunk.header.payload_length);
  if (depth == Depth::header) return chunk;

  require(crc32c(chunk.payload, chunk.length()) == chunk.header.payload_crc, "payload crc32c must match.", offset);
  for (uint64_t i = chunk.length(); i < align_up(chunk.length()); ++i) require(chunk.payload[i] == 0, "padding must be 0.", offset);
  switch (chunk.type()) {
    case ChunkType::layout: check_layout_payload(chunk); break;
    case ChunkType::data: check_data_payload(chunk); break;
    case ChunkType::sequence: check_sequence_payload(chunk); break;
    case ChunkType::integral: check_integral_payload(chunk); break;
    case ChunkType::index: check_index_payload(chunk); break;
  }
  return chunk;
}

bool is_chunk(Bytes file, const Uuid& uuid, uint64_t offset) {
  ChunkHeader header;
  if (header_rule(file, uuid, offset, header) != nullptr) return false;
  return header.payload_length <= kMaxPayload && align_up(header.payload_length) <= file.size - offset - sizeof(ChunkHeader);
}

PlaneMap plane_map(const ChunkHeader& header, const DataHead& head, uint64_t at) {
  PlaneMap map;
  map.width = header.codec == static_cast<uint8_t>(Codec::f32) ? 4 : 2;
  if (header.flags & kSparse) {
    map.columns = after(0, uint64_t{header.token_count} + 1, 8, at);
    map.plane[0] = after(map.columns, head.values, 4, at);
  }
  map.plane[1] = after(map.plane[0], head.values, map.width, at);
  map.length = add(map.plane[1], multiply(head.values, map.width, at), at);
  return map;
}

void validate_planes(const ChunkHeader& header, const DataHead& head, const uint8_t* raw, uint64_t at) {
  if (!(header.flags & kSparse)) return;
  const PlaneMap map = plane_map(header, head, at);
  uint64_t start = load<uint64_t>(raw + map.rows);
  require(start == 0, "sparse rows must start at 0.", at);
  for (uint64_t token = 0; token < header.token_count; ++token) {
    const auto end = load<uint64_t>(raw + map.rows + 8 * (token + 1));
    require(end >= start && end <= head.values, "sparse rows must not decrease.", at);
    uint64_t next = 0;
    for (uint64_t i = start; i < end; ++i) {
      const auto column = load<uint32_t>(raw + map.columns + 4 * i);
      require(column >= next && column < head.columns, "sparse columns must increase and lie within the layout.", at);
      next = uint64_t{column} + 1;
    }
    start = end;
  }
  require(start == head.values, "sparse rows must end at the number of values.", at);
}

SequenceMap sequence_map(const SequenceHead& head, uint64_t at) {
  SequenceMap map{};
  map.id = sizeof(SequenceHead);
  map.token_ids = after(map.id, head.id_length, 1, at);
  map.loss = after(map.token_ids, head.tokens, 4, at);
  map.mask = after(map.loss, head.tokens, 4, at);
  map.text = (head.flags & kHasMask) ? after(map.mask, head.tokens, 1, at) : map.mask;
  map.length = add(map.text, head.text_length, at);
  return map;
}

IndexMap index_map(const IndexHead& head, uint64_t at) {
  IndexMap map{};
  map.entries = sizeof(IndexHead);
  map.stats = after(map.entries, head.count, sizeof(IndexEntry), at);
  map.layouts = after(map.stats, multiply(head.stats_entries, 2, at), sizeof(Moments), at);
  map.length = add(map.layouts, multiply(head.layouts, 8, at), at);
  return map;
}

IndexHead validate_index_head(const Chunk& chunk) {
  const uint64_t at = chunk.offset + sizeof(ChunkHeader);
  require(chunk.type() == ChunkType::index, "the chunk here must be an INDEX.", chunk.offset);
  require(chunk.length() >= sizeof(IndexHead), "INDEX must hold its 64-byte head.", at);
  const auto head = load<IndexHead>(chunk.payload);
  require(head.crc == crc_of<IndexHead>(chunk.payload), "INDEX head crc32c must match.", at);
  require(head.reserved == 0, "reserved bytes must be 0.", at);
  require(head.self_offset == chunk.offset, "INDEX must carry its own offset.", at);
  require(head.prev_offset < chunk.offset, "INDEX must link backwards.", at);
  add(head.first, head.count, at);
  const IndexMap map = index_map(head, at);
  require(map.length == chunk.length(), "INDEX length must match its parts.", at);
  require(crc32c(chunk.payload + map.stats, map.length - map.stats) == head.tables_crc, "INDEX tables crc32c must match.", at);
  return head;
}

}  // namespace mscan
