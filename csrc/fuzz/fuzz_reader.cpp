// libFuzzer target: for any bytes, the reader raises Fault or returns numbers and never reads out of bounds; a writer that continues the
// file adds its sequence to those that it found, or leaves them as they are.
//
// A random change almost always breaks a checksum, and the reader stops there. So the mutator corrects the checksums of half of its
// files after changing them: that half tests the rules behind the checksums.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "crc32c.hpp"
#include "group.hpp"
#include "reader.hpp"
#include "writer.hpp"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace {

using namespace mscan;

constexpr uint64_t kMaxValues = 1 << 20;  // values decoded of one sequence, so that a run stays short

template <typename T>
void store(uint8_t* p, const T& value) {
  std::memcpy(p, &value, sizeof value);
}

// Writes the last four bytes of a structure, the crc of the bytes before them.
template <typename T>
void seal(uint8_t* p) {
  store(p + sizeof(T) - 4, crc32c(p, sizeof(T) - 4));
}

void mend_index(uint8_t* payload, uint64_t length) {
  if (length < sizeof(IndexHead)) return;
  auto head = load<IndexHead>(payload);
  const uint64_t tables = align_up(sizeof(IndexHead) + head.count * sizeof(IndexEntry));
  if (head.count < length && tables <= length) head.tables_crc = crc32c(payload + tables, length - tables);
  store(payload, head);
  seal<IndexHead>(payload);
}

// Corrects checksums and the links of chunks to those before them.
void mend(uint8_t* data, size_t size) {
  if (size < sizeof(Prologue)) return;
  auto prologue = load<Prologue>(data);
  if (prologue.metadata_length <= size - sizeof(Prologue)) {
    prologue.metadata_crc = crc32c(data + sizeof(Prologue), prologue.metadata_length);
    store(data, prologue);
  }
  seal<Prologue>(data);
  uint32_t before = load<Prologue>(data).crc, layout = 0, group = 0;
  const auto fresh = [&] { group = group_crc(0, layout); };
  for (uint64_t offset = align_up(sizeof(Prologue) + uint64_t{prologue.metadata_length}); offset + sizeof(ChunkHeader) <= size;) {
    uint8_t* at = data + offset;
    if (std::memcmp(at, kTrailerMagic, 8) == 0) return seal<Trailer>(at);
    auto header = load<ChunkHeader>(at);
    const uint64_t room = size - offset - sizeof(ChunkHeader);
    if (header.payload_length > room) header.payload_length = room;
    uint8_t* payload = at + sizeof(ChunkHeader);
    if (header.type == static_cast<uint16_t>(ChunkType::index)) mend_index(payload, header.payload_length);
    header.payload_crc = crc32c(payload, header.payload_length);
    Chunk chunk;
    chunk.header = header;
    const bool linked = !chunk.in_group() && bond_of(header).link != 0;
    if (linked) {
      const Bond bond{chunk.type() == ChunkType::sequence ? group : 0, link_to(before)};
      std::memcpy(&header.first_token, &bond, sizeof bond);
    }
    store(at, header);
    seal<ChunkHeader>(at);
    const uint32_t crc = load<ChunkHeader>(at).crc;
    if (chunk.in_group()) {
      group = group_crc(group, crc);
    } else {
      before = crc;
      if (chunk.type() == ChunkType::layout) layout = crc;
      fresh();
    }
    offset += sizeof(ChunkHeader) + align_up(header.payload_length);
  }
}

// Replaces zstd, which the codec itself never calls: any bytes of the expected length.
std::vector<uint8_t> expand(const uint8_t* frame, size_t size, size_t raw_length) {
  if (raw_length > kMaxValues) throw Fault("a frame must stay small here.");
  std::vector<uint8_t> raw(raw_length);
  for (size_t i = 0; i < raw_length; ++i) raw[i] = frame[i % size];
  return raw;
}

template <typename Call>
void attempt(const Call& call) {
  try {
    call();
  } catch (const Fault&) {
  }
}

void read_sequence(Reader& reader, uint64_t ordinal) {
  const SequenceView view = reader.sequence(ordinal);
  volatile uint32_t sum = crc32c(view.id, view.id_length) ^ crc32c(view.token_ids, view.tokens * 4) ^ crc32c(view.loss, view.tokens * 4);
  if (view.mask != nullptr) sum = crc32c(view.mask, view.tokens);
  if (view.text != nullptr) sum = crc32c(view.text, view.text_length);
  (void)sum;
  if (reader.find({view.id, static_cast<size_t>(view.id_length)}) < 0) std::abort();
  if (reader.blocks() != 0 && view.tokens > kMaxValues / reader.blocks()) return;
  const auto chunks = reader.data_chunks(ordinal);
  const bool exact = std::any_of(chunks.begin(), chunks.end(), [](const Chunk& chunk) { return chunk.codec() == Codec::f32; });
  std::vector<float> planes[2];
  for (auto& plane : planes) plane.assign(view.tokens * reader.blocks(), -1.0f);
  reader.decode(ordinal, planes[0].data(), planes[1].data());
  for (const auto& plane : planes) {
    // A value that decoding skipped; no code means a negative number, f32 may hold any.
    if (!exact && std::count(plane.begin(), plane.end(), -1.0f) != 0) std::abort();
  }
}

void read_all(const uint8_t* data, size_t size, Recovery recovery) {
  Reader reader({data, size}, recovery, expand);
  for (uint64_t ordinal = 0; ordinal < std::min<uint64_t>(reader.size(), 64); ++ordinal) {
    attempt([&] { read_sequence(reader, ordinal); });
    attempt([&] {
      Chunk chunk;
      reader.integral(ordinal, chunk);
    });
  }
  if (reader.blocks() > kMaxValues) return;
  attempt([&] {
    std::vector<std::vector<double>> planes(6, std::vector<double>(reader.blocks()));
    double* out[6];
    for (int i = 0; i < 6; ++i) out[i] = planes[i].data();
    reader.sum_integrals(out);
  });
  attempt([&] { reader.stats(); });
  attempt([&] { reader.verify(); });
}

uint64_t sequences_of(const std::string& path) {
  const MappedFile file(path);
  return Reader(file.bytes(), Recovery::tail, expand).size();
}

void go_on(const uint8_t* data, size_t size) {
  const int fd = memfd_create("fuzz", MFD_CLOEXEC);
  const std::string path = "/proc/self/fd/" + std::to_string(fd);
  if (fd < 0 || ::write(fd, data, size) != static_cast<ssize_t>(size)) std::abort();
  uint64_t before = 0;
  bool opened = false;
  try {
    Writer writer(path, OpenMode::append, "{}", {{"a", 64, 1, 0}}, Codec::f32, Sync::none, nullptr, expand);
    before = writer.size();
    opened = true;
    const int64_t token = 7;
    const float loss = 0.5f;
    RecordView record;
    record.id = "fuzz";
    record.tokens = 1;
    record.token_ids = &token;
    record.loss = &loss;
    if (writer.append(record) != before) std::abort();
    writer.close();
    ++before;
  } catch (const Fault&) {
  } catch (const InputFault&) {
  }
  if (opened && sequences_of(path) != before) std::abort();
  ::close(fd);
}

}  // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  const size_t grown = LLVMFuzzerMutate(data, size, max_size);
  if (seed % 2 == 0) mend(data, grown);
  return grown;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // An exact copy on the heap, so that the sanitizer sees a read one byte past the file.
  const std::unique_ptr<uint8_t[]> copy(new uint8_t[size]);
  std::copy(data, data + size, copy.get());
  for (const Recovery recovery : {Recovery::strict, Recovery::tail, Recovery::salvage}) {
    attempt([&] { read_all(copy.get(), size, recovery); });
  }
  go_on(copy.get(), size);
  return 0;
}
