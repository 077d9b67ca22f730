// The structures of a .mscan file, version 2. docs/mscan.md tabulates the same bytes.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

static_assert(sizeof(void*) == 8, "a file is mapped whole, and its offsets are 64 bits wide");
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the format is little-endian and its structures are copied as they are");

namespace mscan {

constexpr uint64_t kAlign = 64;
constexpr uint16_t kVersion = 2;
constexpr uint32_t kNoCount = 0xFFFFFFFFu;
constexpr uint64_t kWholeFile = ~0ull;              // ordinal of an INTEGRAL that belongs to no sequence
constexpr uint64_t kMaxBlocks = 1ull << 26;         // columns of a layout
constexpr uint64_t kMaxMetadata = 1ull << 30;       // bytes of JSON
constexpr uint64_t kMaxIdBytes = 1ull << 16;        // bytes of a sequence id
constexpr uint64_t kMaxPayload = 1ull << 40;        // bytes of one chunk
constexpr uint64_t kMaxCells = 1ull << 24;          // tokens × columns of a DATA chunk of several tokens: a sparse one must not expand without bound
constexpr char kMagic[6] = "MSCAN";
constexpr char kTrailerMagic[9] = "MSCANEND";

enum class ChunkType : uint16_t { layout = 1, data = 2, sequence = 3, integral = 4, index = 5 };
enum class Codec : uint8_t { none = 0, log2u16 = 1, f32 = 2 };
enum Flags : uint8_t { kSparse = 1, kZstd = 2 };
enum SequenceFlags : uint32_t { kHasText = 1, kHasMask = 2 };

struct Uuid {
  uint8_t bytes[16];
  bool operator==(const Uuid& other) const { return std::memcmp(bytes, other.bytes, sizeof bytes) == 0; }
};

#pragma pack(push, 1)
struct Prologue {
  char magic[5];
  uint16_t version;
  uint32_t metadata_length;
  uint32_t count;
  uint8_t reserved0;
  Uuid uuid;
  uint32_t metadata_crc;
  uint32_t reserved1;
  uint64_t first_chunk;
  uint64_t reserved2;
  uint32_t reserved3;
  uint32_t crc;
};

struct ChunkHeader {
  Uuid uuid;
  uint16_t type;
  uint8_t codec;
  uint8_t flags;
  uint32_t layout_id;
  uint64_t payload_length;
  uint64_t ordinal;
  uint64_t first_token;  // DATA; in a chunk that commits, its Bond
  uint32_t token_count;
  uint32_t payload_crc;
  uint32_t reserved;
  uint32_t crc;
};

// What a chunk that commits (LAYOUT, SEQUENCE, INDEX, INTEGRAL of the whole file) records of the chunks before it. Files of the first
// revision hold 0 here, and readers of that revision ignore it.
struct Bond {
  uint32_t group;  // SEQUENCE: group_crc() of its layout and chunks; else 0
  uint32_t link;   // link_to() the chunk that committed before it, or to the prologue
};

struct LayoutHead {
  uint32_t entries;
  uint32_t reserved0;
  uint64_t blocks;
  uint64_t names_length;
  uint64_t reserved1[5];
};

struct LayoutRow {
  uint64_t base;
  uint64_t blocks;
  uint64_t out_features;
  uint32_t name_offset;
  uint32_t name_length;
};

struct PlaneRange {
  double lo;
  double hi;
};

struct DataHead {
  PlaneRange range[2];
  uint64_t columns;
  uint64_t values;
  uint64_t raw_length;
  uint64_t reserved;
};

struct SequenceHead {
  uint64_t tokens;
  uint64_t group_offset;
  uint64_t integral_offset;
  uint32_t data_chunks;
  uint32_t id_length;
  uint64_t text_length;
  uint32_t flags;
  uint32_t reserved0;
  uint64_t id_hash;
  uint64_t reserved1;
};

struct IntegralHead {
  uint64_t blocks;
  uint64_t reserved[7];
};

struct IndexHead {
  uint64_t self_offset;
  uint64_t prev_offset;
  uint64_t first;
  uint64_t count;
  uint64_t integral_offset;
  uint32_t stats_entries;
  uint32_t layouts;
  uint32_t level;
  uint32_t tables_crc;
  uint32_t reserved;
  uint32_t crc;
};

struct IndexEntry {
  uint64_t group_offset;
  uint64_t sequence_offset;
  uint64_t id_hash;
  uint32_t tokens;
  uint32_t data_chunks;
};

struct Moments {
  uint64_t count = 0;
  uint64_t zeros = 0;
  uint64_t missing = 0;
  uint64_t nonfinite = 0;
  double mean = 0;
  double m2 = 0;

  void merge(const Moments& other);
};

struct Trailer {
  char magic[8];
  Uuid uuid;
  uint64_t index_offset;
  uint64_t self_offset;
  uint64_t sequences;
  uint64_t reserved0;
  uint32_t reserved1;
  uint32_t crc;
};
#pragma pack(pop)

static_assert(sizeof(Prologue) == 64 && sizeof(ChunkHeader) == 64 && sizeof(LayoutHead) == 64 && sizeof(LayoutRow) == 32);
static_assert(sizeof(DataHead) == 64 && sizeof(SequenceHead) == 64 && sizeof(IntegralHead) == 64 && sizeof(IndexHead) == 64);
static_assert(sizeof(Bond) == sizeof(ChunkHeader::first_token));
static_assert(sizeof(IndexEntry) == 32 && sizeof(Moments) == 48 && sizeof(Trailer) == 64);

// Bytes on disk that break a rule of the format, or a failed system call.
struct Fault : std::runtime_error {
  uint64_t offset;
  bool has_offset;
  explicit Fault(const std::string& rule) : std::runtime_error(rule), offset(0), has_offset(false) {}
  Fault(const std::string& rule, uint64_t at) : std::runtime_error(rule), offset(at), has_offset(true) {}
};

// A wrong argument of the caller.
struct InputFault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr uint64_t align_up(uint64_t value) { return (value + kAlign - 1) & ~(kAlign - 1); }

// Copies a structure out of mapped bytes of any alignment.
template <typename T>
T load(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

inline Bond bond_of(const ChunkHeader& header) {
  Bond bond;
  std::memcpy(&bond, &header.first_token, sizeof bond);
  return bond;
}

// The link of a chunk to the one before it: the crc of that chunk's header, never 0.
constexpr uint32_t link_to(uint32_t header_crc) { return header_crc != 0 ? header_crc : 1; }

// FNV-1a, 64 bits, which finds a sequence by its id without reading the others.
inline uint64_t id_hash(const char* p, size_t size) {
  uint64_t hash = 0xCBF29CE484222325ull;
  for (size_t i = 0; i < size; ++i) hash = (hash ^ static_cast<uint8_t>(p[i])) * 0x100000001B3ull;
  return hash;
}

}  // namespace mscan
