#include "writer.hpp"

#include <chrono>
#include <random>

#include "crc32c.hpp"
#include "group.hpp"

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

Uuid new_uuid() {
  std::random_device source;
  Uuid uuid;
  for (int i = 0; i < 16; i += 4) {
    const uint32_t word = source();
    std::memcpy(uuid.bytes + i, &word, sizeof word);
  }
  return uuid;
}

template <typename T>
void seal(T& structure) {
  structure.crc = crc32c(&structure, sizeof(T) - sizeof(uint32_t));
}

// Whether these bytes can only be the start of a file whose creation was cut short: they hold no sequence.
bool is_unfinished_start(Bytes file) {
  if (file.size == 0) return true;
  if (file.size < sizeof(Prologue)) {
    const uint8_t start[7] = {'M', 'S', 'C', 'A', 'N', 2, 0};
    return std::memcmp(file.data, start, file.size < 7 ? file.size : 7) == 0;
  }
  const auto prologue = load<Prologue>(file.data);
  return std::memcmp(prologue.magic, kMagic, 5) == 0 && prologue.version == kVersion && prologue.first_chunk > file.size &&
         prologue.crc == crc32c(file.data, sizeof(Prologue) - sizeof(uint32_t));
}

}  // namespace

Layout make_layout(std::vector<LayoutItem> items, uint32_t id) {
  if (items.empty()) throw InputFault("layout must hold at least one entry, got none.");
  Layout layout;
  layout.id = id;
  uint64_t names = 0;
  for (const LayoutItem& item : items) {
    if (item.base != layout.blocks) throw InputFault("base of '" + item.name + "' must be the end of the entry before it.");
    if (item.blocks < 1 || item.blocks > item.out_features) throw InputFault("blocks of '" + item.name + "' must be 1 … out_features.");
    if (item.blocks > kMaxBlocks - layout.blocks) throw InputFault("layout must hold at most 2^26 blocks.");
    layout.blocks += item.blocks;
    layout.spans.push_back({item.base, item.blocks});
    names += item.name.size();
  }
  if (names > 0xFFFFFFFFull) throw InputFault("layout names must take less than 4 GiB.");
  layout.items = std::move(items);
  return layout;
}

namespace {

// Returns the metadata; raises where a new file could not be made of the two. Before any file is touched.
std::string checked(OpenMode mode, std::string metadata, const std::vector<LayoutItem>& layout) {
  if (metadata.size() > kMaxMetadata) throw InputFault("metadata must take at most 2^30 bytes of JSON.");
  if (mode != OpenMode::append || !layout.empty()) make_layout(layout, 0);
  return metadata;
}

}  // namespace

Writer::Writer(const std::string& path, OpenMode mode, std::string metadata, std::vector<LayoutItem> layout, Codec codec, Sync sync,
               Compress compress, Decompress decompress)
    : metadata_(checked(mode, std::move(metadata), layout)), file_(path, mode), sync_(sync), encoder_(codec, std::move(compress)) {
  if (mode == OpenMode::append) {
    reopen(path, std::move(layout), decompress);
  } else {
    create(std::move(layout));
  }
}

void Writer::create(std::vector<LayoutItem> items) {
  Layout layout = make_layout(std::move(items), 0);
  uuid_ = new_uuid();
  Prologue prologue{};
  std::memcpy(prologue.magic, kMagic, 5);
  prologue.version = kVersion;
  prologue.metadata_length = static_cast<uint32_t>(metadata_.size());
  prologue.count = kNoCount;
  prologue.uuid = uuid_;
  prologue.metadata_crc = crc32c(metadata_.data(), metadata_.size());
  prologue.first_chunk = align_up(sizeof prologue + metadata_.size());
  seal(prologue);
  buffer_.append(&prologue, sizeof prologue);
  buffer_.append(metadata_.data(), metadata_.size());
  buffer_.pad();
  layout.offset = buffer_.size();
  link_ = prologue.crc;
  put_layout(layout);
  layout.crc = link_ = last_crc_;
  add_layout(std::move(layout));
  end_ = buffer_offset_ + buffer_.size();
  flush();
  changed_ = true;
  if (sync_ == Sync::none) return;
  file_.sync();
  file_.sync_directory();
}

void Writer::reopen(const std::string& path, std::vector<LayoutItem> items, const Decompress& decompress) {
  const MappedFile mapped(path);
  if (is_unfinished_start(mapped.bytes())) {
    if (items.empty()) throw Fault("the file was cut before it held a layout, and none was given.", mapped.bytes().size);
    gaps_.push_back({0, mapped.bytes().size, "the file was cut while it was created; it held no sequence."});
    file_.truncate(0);
    create(std::move(items));
    return;
  }
  Reader reader(mapped.bytes(), Recovery::tail, decompress);
  metadata_ = reader.metadata();
  uuid_ = reader.uuid();
  layouts_ = reader.layouts();
  gaps_ = reader.gaps();
  runs_ = reader.runs();
  pending_ = reader.extra();
  indexed_ = reader.size() - pending_.size();
  integral_offset_ = reader.integral_offset();
  end_ = reader.committed_end();
  link_ = reader.link();
  stats_ = reader.stats();
  last_index_end_ = reader.closed() ? end_ : 0;
  changed_ = !reader.closed();
  ends_clean_ = false;
  if (!layouts_.empty()) {
    blocks_ = layouts_.back().blocks;
    return;
  }
  Layout layout = make_layout(std::move(items), 0);
  transaction([&] {
    layout.offset = buffer_offset_ + buffer_.size();
    put_layout(layout);
  });
  layout.crc = link_;
  add_layout(std::move(layout));
}

void Writer::add_layout(Layout layout) {
  blocks_ = layout.blocks;
  layouts_.push_back(std::move(layout));
  stats_.resize(2 * layouts_.back().items.size());
}

void Writer::require_usable() const {
  if (!file_.is_open()) throw Fault("the writer is closed.");
  if (broken_) throw Fault("an earlier write failed and could not be taken back; close the file and open it again.");
}

// Under the lock: another thread may have extended the layout since the caller looked at it.
void Writer::require_columns(const char* what, uint64_t columns) const {
  const uint64_t blocks = layouts_.back().blocks;
  if (columns == blocks) return;
  throw InputFault(std::string(what) + " must have " + std::to_string(blocks) + " columns, one for each block, got " +
                   std::to_string(columns) + ".");
}

// Takes away what stands behind the last committed chunk: a trailer, or the remains of an interrupted append.
void Writer::begin() {
  if (!ends_clean_ && file_.size() != end_) file_.truncate(end_);
  ends_clean_ = true;
  changed_ = true;
}

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

// Says in the header of a chunk that commits what it was written after, and of which chunks its group is.
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

// Runs `body`, which fills buffer_, and commits what it wrote; on any failure the file ends where it did before.
template <typename Body>
void Writer::transaction(Body&& body) {
  require_usable();
  bool writing = false;
  try {
    begin();
    buffer_.clear();
    buffer_offset_ = end_;
    writing = true;
    body();
    flush();
  } catch (...) {
    buffer_.clear();
    if (writing) {
      try {
        file_.truncate(end_);
      } catch (const Fault&) {
        broken_ = true;
      }
    }
    throw;
  }
  if (sync_ == Sync::chunk) {
    try {
      file_.sync();
    } catch (const Fault&) {
      broken_ = true;  // after a failed fsync nobody knows what the disk holds
      throw;
    }
  }
  end_ = buffer_offset_;
  link_ = last_crc_;
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
      // Here, while the planes are still in cache, their crc costs least. A thread of its own would wait for a core that the model is using.
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

uint64_t Writer::append(const RecordView& record) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (record.tokens == 0 || record.tokens > 0xFFFFFFFFull) throw InputFault("token_ids must hold 1 … 4294967295 tokens.");
  if (record.id.size() > kMaxIdBytes) throw InputFault("sequence_id must take at most 65536 bytes.");
  if (record.activation != nullptr) require_columns("activation", record.columns);
  if (record.integral[0] != nullptr) require_columns("integral", record.columns);
  const uint64_t ordinal = size(), group = end_;
  IndexEntry entry{group, 0, id_hash(record.id.data(), record.id.size()), static_cast<uint32_t>(record.tokens), 0};
  transaction([&] {
    uint32_t chunks = 0;
    group_crc_ = group_crc(0, layouts_.back().crc);
    if (record.activation != nullptr) put_data(record, ordinal, chunks);
    uint64_t integral = 0;
    if (record.integral[0] != nullptr) {
      integral = buffer_offset_ + buffer_.size();
      put_integral(ordinal, record.integral);
    }
    entry.sequence_offset = buffer_offset_ + buffer_.size();
    entry.data_chunks = chunks;
    put_sequence(record, ordinal, group, integral, chunks);
  });
  pending_.push_back(entry);
  if (record.activation != nullptr) {
    for (size_t i = 0; i < stats_.size(); ++i) stats_[i].merge(delta_[i]);
  }
  const uint64_t since = end_ - (runs_.empty() ? 0 : std::max(last_index_end_, runs_.back().offset));
  if ((pending_.size() >= 4096 || since >= (64ull << 20)) && since >= 16 * (pending_.size() * sizeof(IndexEntry) + tables_bytes())) {
    try {
      write_index();
    } catch (const std::exception&) {
      // The sequence is committed; an INDEX only saves time and close() tries again.
      if (broken_) throw;
    }
  }
  return ordinal;
}

void Writer::append_integral(const double* const planes[6], uint64_t columns) {
  const std::lock_guard<std::mutex> lock(mutex_);
  require_columns("integral", columns);
  const uint64_t at = end_;
  transaction([&] { put_integral(kWholeFile, planes); });
  integral_offset_ = at;
}

void Writer::extend_layout(std::vector<LayoutItem> items) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Layout& now = layouts_.back();
  Layout next = make_layout(std::move(items), now.id + 1);
  bool extends = next.items.size() > now.items.size();
  for (size_t i = 0; extends && i < now.items.size(); ++i) {
    const LayoutItem &a = now.items[i], &b = next.items[i];
    extends = a.name == b.name && a.out_features == b.out_features && a.blocks == b.blocks;
  }
  if (!extends) throw InputFault("layout must start with the entries of the file's layout and add to them.");
  next.offset = end_;
  transaction([&] { put_layout(next); });
  next.crc = link_;
  add_layout(std::move(next));
}

uint64_t Writer::tables_bytes() const { return align_up(stats_.size() * sizeof(Moments)) + layouts_.size() * 8 + 2 * sizeof(IndexHead); }

// Lists the pending sequences. As soon as seven INDEX chunks of one level stand at the end, they are merged with the new one into the
// next level, so that n sequences need O(log n) chunks and each is rewritten O(log n) times.
void Writer::write_index() {
  size_t kept = runs_.size();
  uint32_t level = 0;
  const auto full = [&] {
    if (kept < 7) return false;
    for (size_t i = kept - 7; i < kept; ++i) {
      if (runs_[i].level != level) return false;
    }
    return true;
  };
  for (; full(); ++level) kept -= 7;

  const uint64_t offset = end_;
  IndexHead head{};
  head.self_offset = offset;
  head.prev_offset = kept > 0 ? runs_[kept - 1].offset : 0;
  head.first = kept < runs_.size() ? runs_[kept].first : indexed_;
  head.count = size() - head.first;
  head.integral_offset = integral_offset_;
  head.stats_entries = static_cast<uint32_t>(stats_.size() / 2);
  head.layouts = static_cast<uint32_t>(layouts_.size());
  head.level = level;
  transaction([&] {
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
  });
  runs_.resize(kept);
  runs_.push_back({offset, head.first, head.count, level});
  indexed_ += pending_.size();
  pending_.clear();
  last_index_end_ = end_;
}

void Writer::close() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!file_.is_open()) return;
  if (broken_ || !changed_) return file_.close();
  try {
    if (last_index_end_ != end_) write_index();
    if (sync_ != Sync::none) file_.sync();
    Trailer trailer{};
    std::memcpy(trailer.magic, kTrailerMagic, 8);
    trailer.uuid = uuid_;
    trailer.index_offset = runs_.back().offset;
    trailer.self_offset = end_;
    trailer.sequences = size();
    seal(trailer);
    begin();
    file_.write(&trailer, sizeof trailer, end_);
    if (sync_ != Sync::none) file_.sync();
  } catch (...) {
    file_.close();
    throw;
  }
  file_.close();
}

void Writer::abandon() {
  const std::lock_guard<std::mutex> lock(mutex_);
  file_.close();
}

}  // namespace mscan
