#include "writer.hpp"

#include <random>

#include "crc32c.hpp"
#include "group.hpp"

namespace mscan {

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

Uuid new_uuid() {
  std::random_device source;
  Uuid uuid;
  for (int i = 0; i < 16; i += 4) {
    const uint32_t word = source();
    std::memcpy(uuid.bytes + i, &word, sizeof word);
  }
  return uuid;
}

// Whether these bytes are the start of a file whose creation was interrupted; such a file holds no sequence.
bool is_unfinished_start(Bytes file) {
  if (file.size == 0) return true;
  if (file.size < sizeof(Prologue)) {
    const uint8_t start[7] = {'M', 'S', 'C', 'A', 'N', 2, 0};
    return std::memcmp(file.data, start, file.size < 7 ? file.size : 7) == 0;
  }
  const auto prologue = load<Prologue>(file.data);
  return std::memcmp(prologue.magic, kMagic, 5) == 0 && prologue.version == kVersion && prologue.first_chunk > file.size &&
         prologue.crc == crc_of<Prologue>(file.data);
}

// Returns the metadata. Raises, before any file is touched, if metadata or layout are not valid for a new file.
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
    if (items.empty()) throw Fault("the file was cut before its layout; give a layout to start it again.", mapped.bytes().size);
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
  if (broken_) throw Fault("an earlier write failed and could not be undone; close the file and open it again.");
}

// Under the lock: another thread may have extended the layout since the caller looked at it.
void Writer::require_columns(const char* what, uint64_t columns) const {
  const uint64_t blocks = layouts_.back().blocks;
  if (columns == blocks) return;
  throw InputFault(std::string(what) + " must have " + std::to_string(blocks) + " columns, one for each block, got " +
                   std::to_string(columns) + ".");
}

// Removes what follows the last committed chunk: a trailer, or the remains of an interrupted append.
void Writer::begin() {
  if (!ends_clean_ && file_.size() != end_) file_.truncate(end_);
  ends_clean_ = true;
  changed_ = true;
}

// Runs `body`, which fills buffer_, and commits what it wrote. After any failure the file ends where it did before.
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
      broken_ = true;  // after a failed fsync the contents of the disk are unknown
      throw;
    }
  }
  end_ = buffer_offset_;
  link_ = last_crc_;
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
      // The sequence is committed. An INDEX only saves time, and close() tries again.
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

// Writes an INDEX of the pending sequences. Once the last seven INDEX chunks have one level, they are merged with the new one into the
// next level, so n sequences need O(log n) chunks and each is rewritten O(log n) times.
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
  transaction([&] { put_index(head, kept); });
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
