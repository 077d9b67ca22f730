// How a reader finds out what a file holds: by its trailer, by its last INDEX, or by walking its chunks.
#include <algorithm>

#include "crc32c.hpp"
#include "reader.hpp"

namespace mscan {

Reader::Reader(Bytes file, Recovery recovery, Decompress decompress)
    : file_(file), recovery_(recovery), decompress_(std::move(decompress)) {
  const Prologue prologue = validate_prologue(file_);
  uuid_ = prologue.uuid;
  first_chunk_ = prologue.first_chunk;
  committed_end_ = first_chunk_;
  const uint8_t* json = file_.data + sizeof(Prologue);
  if (crc32c(json, prologue.metadata_length) == prologue.metadata_crc) {
    metadata_.assign(reinterpret_cast<const char*>(json), prologue.metadata_length);
  } else if (recovery_ == Recovery::salvage) {
    metadata_ = "{}";
    gaps_.push_back({sizeof(Prologue), first_chunk_, "metadata crc32c must match."});
  } else {
    throw Fault("metadata crc32c must match.", sizeof(Prologue));
  }
  if (recovery_ == Recovery::salvage) {
    validate_trailer(file_, uuid_, closed_);
    walk(first_chunk_, closed_ ? file_.size - sizeof(Trailer) : file_.size, false);
  } else {
    open_tail();
    if (recovery_ == Recovery::strict) {
      if (!closed_) throw Fault("a closed file must end in a trailer; recovery \"tail\" reads one that was not closed.", file_.size);
      verify();
    }
  }
  if (layouts_.empty() && size() > 0) throw Fault("no LAYOUT of this file can be read.", first_chunk_);
}

void Reader::open_tail() {
  const Trailer trailer = validate_trailer(file_, uuid_, closed_);
  if (closed_) {
    load_chain(trailer.index_offset);
    const uint64_t end = file_.size - sizeof(Trailer);
    const Chunk index = validate_chunk(file_, uuid_, trailer.index_offset, Depth::header);
    if (index.end != end || trailer.sequences != indexed_) throw Fault("the trailer must follow the INDEX it names.", end);
    committed_end_ = end;
    return;
  }
  uint64_t offset = 0;
  if (find_last_index(offset)) {
    load_chain(offset);
    committed_end_ = validate_chunk(file_, uuid_, offset, Depth::header).end;
  }
  walk(committed_end_, file_.size, false);
}

bool Reader::find_last_index(uint64_t& found) {
  if (file_.size < first_chunk_ + sizeof(ChunkHeader)) return false;
  for (uint64_t offset = (file_.size - sizeof(ChunkHeader)) & ~(kAlign - 1); offset >= first_chunk_; offset -= kAlign) {
    if (load<uint16_t>(file_.data + offset + 16) == static_cast<uint16_t>(ChunkType::index) && is_chunk(file_, uuid_, offset)) {
      try {
        validate_chunk(file_, uuid_, offset, Depth::payload);
        found = offset;
        return true;
      } catch (const Fault&) {
        // A torn INDEX: an older one stands further back.
      }
    }
  }
  return false;
}

void Reader::load_chain(uint64_t offset) {
  const Chunk last = validate_chunk(file_, uuid_, offset, Depth::header);
  const IndexHead newest = validate_index_head(last);
  const IndexMap map = index_map(newest, offset);
  indexed_ = newest.first + newest.count;
  integral_offset_ = newest.integral_offset;
  indexed_stats_.resize(2 * uint64_t{newest.stats_entries});
  if (!indexed_stats_.empty()) std::memcpy(indexed_stats_.data(), last.payload + map.stats, indexed_stats_.size() * sizeof(Moments));
  for (uint32_t i = 0; i < newest.layouts; ++i) {
    const Chunk chunk = validate_chunk(file_, uuid_, load<uint64_t>(last.payload + map.layouts + 8 * i), Depth::payload);
    if (chunk.type() != ChunkType::layout) throw Fault("a LAYOUT must stand where the INDEX says.", chunk.offset);
    add_layout(chunk);
  }
  if (layouts_.empty() ? newest.stats_entries != 0 : newest.stats_entries != layouts_.back().items.size()) {
    throw Fault("INDEX statistics must match the layout.", offset);
  }
  for (uint64_t expected = indexed_;;) {
    const Chunk chunk = validate_chunk(file_, uuid_, offset, Depth::header);
    const IndexHead head = validate_index_head(chunk);
    if (head.first + head.count != expected) throw Fault("INDEX chunks must follow each other without a gap.", offset);
    runs_.push_back({offset, head.first, head.count, head.level});
    expected = head.first;
    offset = head.prev_offset;
    if (offset == 0) {
      if (expected != 0) throw Fault("the oldest INDEX must start at sequence 0.", chunk.offset);
      break;
    }
  }
  std::reverse(runs_.begin(), runs_.end());
}

uint64_t Reader::next_chunk(uint64_t from, uint64_t end) const {
  for (uint64_t offset = align_up(from); offset < end; offset += kAlign) {
    if (is_chunk({file_.data, end}, uuid_, offset)) return offset;
  }
  return end;
}

// Whether something whole that was written later stands behind a failure. Chunks of a group that began at or before it do not count:
// one append may reach the disk in any order.
bool Reader::continues_after(uint64_t failure, uint64_t end) const {
  for (uint64_t offset = next_chunk(failure + kAlign, end); offset < end; offset = next_chunk(offset + kAlign, end)) {
    Chunk chunk;
    try {
      chunk = validate_chunk({file_.data, end}, uuid_, offset, Depth::payload);
    } catch (const Fault&) {
      continue;
    }
    const bool own_group = chunk.type() == ChunkType::sequence && load<SequenceHead>(chunk.payload).group_offset <= failure;
    const bool uncommitted =
        chunk.type() == ChunkType::data || (chunk.type() == ChunkType::integral && chunk.header.ordinal != kWholeFile);
    if (!own_group && !uncommitted) return true;
  }
  return false;
}

// Walks chunks from `from`, taking in what they hold or, when `checking`, comparing it with what the INDEX says.
void Reader::walk(uint64_t from, uint64_t end, bool checking) {
  const Bytes bounds{file_.data, end};
  uint64_t offset = from, seen = 0;
  while (offset < end) {
    Chunk chunk;
    try {
      chunk = validate_chunk(bounds, uuid_, offset, Depth::payload);
      accept(chunk, checking, seen);
    } catch (const Fault& fault) {
      if (checking) throw;
      if (recovery_ != Recovery::salvage) {
        if (continues_after(offset, end)) {
          throw Fault(std::string(fault.what()) + " Valid chunks follow, so this is damage and not an interrupted write; recovery \"salvage\" reads around it.",
                      offset);
        }
        gaps_.push_back({committed_end_, end, fault.what()});
        return;
      }
      const uint64_t next = next_chunk(offset + kAlign, end);
      gaps_.push_back({offset, next, fault.what()});
      offset = next;
      continue;
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      touched_.insert(offset);
    }
    offset = chunk.end;
  }
  if (checking && seen != size()) throw Fault("the INDEX must list every sequence of the file.", end);
  if (committed_end_ < offset && !checking) gaps_.push_back({committed_end_, offset, "chunks must be committed by a SEQUENCE."});
}

void Reader::accept(const Chunk& chunk, bool checking, uint64_t& seen) {
  switch (chunk.type()) {
    case ChunkType::layout:
      if (!checking) add_layout(chunk);
      break;
    case ChunkType::sequence: {
      const auto head = load<SequenceHead>(chunk.payload);
      const IndexEntry found{head.group_offset, chunk.offset, head.id_hash, static_cast<uint32_t>(head.tokens), head.data_chunks};
      if (checking) {
        const IndexEntry listed = entry(seen);
        if (std::memcmp(&listed, &found, sizeof found) != 0) throw Fault("the INDEX must agree with the SEQUENCE it names.", chunk.offset);
        data_chunks(seen++);
        return;
      }
      if (recovery_ != Recovery::salvage && (head.group_offset != committed_end_ || chunk.header.ordinal != size())) {
        throw Fault("a SEQUENCE must commit the chunks since the last one.", chunk.offset);
      }
      extra_.push_back(found);
      break;
    }
    case ChunkType::integral:
      if (chunk.header.ordinal != kWholeFile) return;
      if (!checking) integral_offset_ = chunk.offset;
      break;
    case ChunkType::data: return;
    case ChunkType::index: break;
  }
  if (!checking) committed_end_ = chunk.end;
}

void Reader::add_layout(const Chunk& chunk) {
  const auto head = load<LayoutHead>(chunk.payload);
  Layout layout;
  layout.offset = chunk.offset;
  layout.id = chunk.header.layout_id;
  layout.blocks = head.blocks;
  const char* names = reinterpret_cast<const char*>(chunk.payload) + sizeof(LayoutHead) + head.entries * sizeof(LayoutRow);
  for (uint32_t i = 0; i < head.entries; ++i) {
    const auto row = load<LayoutRow>(chunk.payload + sizeof(LayoutHead) + i * sizeof(LayoutRow));
    layout.items.push_back({std::string(names + row.name_offset, row.name_length), row.out_features, row.blocks, row.base});
    layout.spans.push_back({row.base, row.blocks});
  }
  if (!layouts_.empty()) {
    const Layout& before = layouts_.back();
    bool extends = layout.id > before.id && layout.items.size() >= before.items.size();
    for (size_t i = 0; extends && i < before.items.size(); ++i) {
      const LayoutItem &a = before.items[i], &b = layout.items[i];
      extends = a.name == b.name && a.out_features == b.out_features && a.blocks == b.blocks;
    }
    if (!extends) throw Fault("a later LAYOUT must extend the one before it.", chunk.offset);
  }
  layouts_.push_back(std::move(layout));
}

void Reader::verify() {
  if (!closed_) throw Fault("a closed file must end in a trailer.", file_.size);
  walk(first_chunk_, file_.size - sizeof(Trailer), true);
}

}  // namespace mscan
