// The chunks of a Writer: each function puts one kind of chunk into the buffer.
#include <chrono>

#include "crc32c.hpp"
#include "group.hpp"
#include "writer.hpp"

namespace mscan {
namespace {

constexpr uint64_t kChunkBytes = 4ull << 20;  // encoded bytes of a DATA chunk

class Stopwatch {
 public:
  explicit Stopwatch(double& total) : total_(total), start_(std::chrono::steady_clock::now()) {}
  ~Stopwatch() { total_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  double& total_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace

ChunkHeader Writer::header(ChunkType type, uint64_t ordinal) const {
  ChunkHeader header{};
  header.uuid = uuid_;
  header.type = static_cast<uint16_t>(type);
  header.layout_id = layouts_.empty() ? 0 : layouts_.back().id;
  header.ordinal = ordinal;
  return header;
}

uint64_t Writer::open_chunk() {
  const uint64_t start = buffer_.size();
  buffer_.grow(sizeof(ChunkHeader));
  return start;
}

uint32_t Writer::finish_chunk(uint64_t start, ChunkHeader header) {
  header.payload_length = buffer_.size() - start - sizeof(ChunkHeader);
  buffer_.pad();
  header.payload_crc = crc32c(buffer_.data() + start + sizeof(ChunkHeader), header.payload_length);
  seal(header);
  std::memcpy(buffer_.data() + start, &header, sizeof header);
  return last_crc_ = header.crc;
}

// Records in the header of a committing chunk which chunk it follows and which chunks its group holds.
void Writer::bind(ChunkHeader& header, uint32_t group) const {
  const Bond bond{group, link_to(link_)};
  std::memcpy(&header.first_token, &bond, sizeof bond);
}

void Writer::flush() {
  const Stopwatch watch(write_seconds_);
  file_.write(buffer_.data(), buffer_.size(), buffer_offset_);
  buffer_offset_ += buffer_.size();
  buffer_.clear();
}

void Writer::put_layout(const Layout& layout) {
  const uint64_t start = open_chunk();
  LayoutHead head{};
  head.entries = static_cast<uint32_t>(layout.items.size());
  head.blocks = layout.blocks;
  for (const LayoutItem& item : layout.items) head.names_length += item.name.size();
  buffer_.append(&head, sizeof head);
  uint32_t name_offset = 0;
  for (const LayoutItem& item : layout.items) {
    const LayoutRow row{item.base, item.blocks, item.out_features, name_offset, static_cast<uint32_t>(item.name.size())};
    buffer_.append(&row, sizeof row);
    name_offset += row.name_length;
  }
  for (const LayoutItem& item : layout.items) buffer_.append(item.name.data(), item.name.size());
  ChunkHeader chunk = header(ChunkType::layout, kWholeFile);
  chunk.layout_id = layout.id;
  bind(chunk, 0);
  finish_chunk(start, chunk);
}

void Writer::put_integral(uint64_t ordinal, const double* const planes[6]) {
  const uint64_t start = open_chunk();
  IntegralHead head{};
  head.blocks = layouts_.back().blocks;
  buffer_.append(&head, sizeof head);
  for (int i = 0; i < 6; ++i) {
    buffer_.pad();
    buffer_.append(planes[i], head.blocks * 8);
  }
  ChunkHeader chunk = header(ChunkType::integral, ordinal);
  if (ordinal == kWholeFile) bind(chunk, 0);
  group_crc_ = group_crc(group_crc_, finish_chunk(start, chunk));
}

void Writer::put_data(const RecordView& record, uint64_t ordinal, uint32_t& chunks) {
  const Layout& layout = layouts_.back();
  delta_.assign(stats_.size(), Moments{});
  const uint64_t token_bytes = layout.blocks * 2 * encoder_.value_bytes();
  const uint64_t step = std::max<uint64_t>(1, kChunkBytes / token_bytes);
  for (uint64_t token = 0; token < record.tokens; token += step) {
    ChunkHeader chunk = header(ChunkType::data, ordinal);
    chunk.first_token = token;
    chunk.token_count = static_cast<uint32_t>(std::min(step, record.tokens - token));
    const uint64_t start = open_chunk(), at = token * layout.blocks;
    {
      const Stopwatch watch(encode_seconds_);
      encoder_.encode(record.activation + at, record.grad_norm + at, layout.blocks, layout.spans, chunk, buffer_, delta_.data());
      // The crc costs least here, while the planes are in cache. A separate thread would wait for a core that the model is using.
      group_crc_ = group_crc(group_crc_, finish_chunk(start, chunk));
    }
    if (buffer_.size() >= kChunkBytes) flush();
    ++chunks;
  }
}

void Writer::put_sequence(const RecordView& record, uint64_t ordinal, uint64_t group, uint64_t integral, uint32_t chunks) {
  const uint64_t start = open_chunk();
  SequenceHead head{};
  head.tokens = record.tokens;
  head.group_offset = group;
  head.integral_offset = integral;
  head.data_chunks = chunks;
  head.id_length = static_cast<uint32_t>(record.id.size());
  head.text_length = record.text != nullptr ? record.text->size() : 0;
  head.flags = (record.text != nullptr ? kHasText : 0u) | (record.mask != nullptr ? kHasMask : 0u);
  head.id_hash = id_hash(record.id.data(), record.id.size());
  buffer_.append(&head, sizeof head);
  buffer_.append(record.id.data(), record.id.size());
  buffer_.pad();
  uint8_t* ids = buffer_.grow(record.tokens * 4);
  for (uint64_t i = 0; i < record.tokens; ++i) {
    if (record.token_ids[i] < 0 || record.token_ids[i] > 0xFFFFFFFFll) {
      throw InputFault("token_ids must be 0 … 4294967295, got " + std::to_string(record.token_ids[i]) + ".");
    }
    const auto id = static_cast<uint32_t>(record.token_ids[i]);
    std::memcpy(ids + 4 * i, &id, sizeof id);
  }
  buffer_.pad();
  buffer_.append(record.loss, record.tokens * 4);
  buffer_.pad();
  if (record.mask != nullptr) {
    buffer_.append(record.mask, record.tokens);
    buffer_.pad();
  }
  if (record.text != nullptr) buffer_.append(record.text->data(), record.text->size());
  ChunkHeader chunk = header(ChunkType::sequence, ordinal);
  chunk.token_count = static_cast<uint32_t>(record.tokens);
  bind(chunk, group_crc_);
  finish_chunk(start, chunk);
}

void Writer::put_index(IndexHead head, size_t kept) {
  const uint64_t start = open_chunk();
  buffer_.grow(sizeof head);
  for (size_t i = kept; i < runs_.size(); ++i) {
    const uint64_t bytes = runs_[i].count * sizeof(IndexEntry);
    file_.read(buffer_.grow(bytes), bytes, runs_[i].offset + sizeof(ChunkHeader) + sizeof(IndexHead));
  }
  buffer_.append(pending_.data(), pending_.size() * sizeof(IndexEntry));
  buffer_.pad();
  const uint64_t tables = buffer_.size();
  buffer_.append(stats_.data(), stats_.size() * sizeof(Moments));
  buffer_.pad();
  for (const Layout& layout : layouts_) buffer_.append(&layout.offset, sizeof layout.offset);
  head.tables_crc = crc32c(buffer_.data() + tables, buffer_.size() - tables);
  seal(head);
  std::memcpy(buffer_.data() + start + sizeof(ChunkHeader), &head, sizeof head);
  ChunkHeader chunk = header(ChunkType::index, kWholeFile);
  bind(chunk, 0);
  finish_chunk(start, chunk);
}

uint64_t Writer::tables_bytes() const { return align_up(stats_.size() * sizeof(Moments)) + layouts_.size() * 8 + 2 * sizeof(IndexHead); }

}  // namespace mscan
