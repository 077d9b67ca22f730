// Opening a file: the reader learns its contents from the trailer, from the last INDEX, or by walking its chunks.
#include <algorithm>

#include "crc32c.hpp"
#include "group.hpp"
#include "reader.hpp"

namespace mscan {

// What a walk over all chunks has found so far.
struct Reader::Seen {
  uint64_t sequences = 0;
  uint64_t total = 0;  // offset of the latest INTEGRAL of the whole file
  std::vector<uint64_t> layouts;
  std::vector<uint64_t> indexes;
};

Reader::Reader(Bytes file, Recovery recovery, Decompress decompress)
    : file_(file), recovery_(recovery), decompress_(std::move(decompress)) {
  const Prologue prologue = validate_prologue(file_);
  uuid_ = prologue.uuid;
  first_chunk_ = prologue.first_chunk;
  committed_end_ = first_chunk_;
  link_ = prologue_crc_ = prologue.crc;
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
    salvage(first_chunk_, closed_ ? file_.size - sizeof(Trailer) : file_.size);
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
    link_ = index.header.crc;
    return;
  }
  uint64_t offset = 0;
  if (find_last_index(offset)) {
    load_chain(offset);
    const Chunk index = validate_chunk(file_, uuid_, offset, Depth::header);
    committed_end_ = index.end;
    link_ = index.header.crc;
  }
  walk(committed_end_, file_.size, link_, nullptr);
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
        // A torn INDEX: an older one lies before it.
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
    if (chunk.type() != ChunkType::layout) throw Fault("an offset in the INDEX must be that of a LAYOUT.", chunk.offset);
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
  if (bond_of(last.header).link != 0) check_link(last, predecessor(indexed_, last.offset));
}

uint64_t Reader::next_chunk(uint64_t from, uint64_t end) const {
  for (uint64_t offset = align_up(from); offset < end; offset += kAlign) {
    if (is_chunk({file_.data, end}, uuid_, offset)) return offset;
  }
  return end;
}

// Whether a whole chunk of a later append follows a failure. Chunks of a group that began at or before the failure do not count: the
// writes of one append may reach the disk in any order.
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

// Walks the chunks from `from`; the chunk before them has header crc `before`. Records what they hold or, given `seen`, compares it with
// the INDEX.
void Reader::walk(uint64_t from, uint64_t end, uint32_t before, Seen* seen) {
  const Bytes bounds{file_.data, end};
  std::vector<Chunk> members;
  uint64_t offset = from;
  while (offset < end) {
    try {
      const Chunk chunk = validate_chunk(bounds, uuid_, offset, Depth::payload);
      if (chunk.in_group()) {
        members.push_back(chunk);
      } else {
        check_link(chunk, before);
        if (chunk.type() == ChunkType::sequence) {
          check_group(chunk, members, layout_crc(chunk));
          for (const Chunk& member : members) check_columns(member);
        } else if (!members.empty()) {
          throw Fault("a group must end in its SEQUENCE.", offset);
        }
        seen != nullptr ? compare(chunk, *seen) : accept(chunk);
        members.clear();
        before = chunk.header.crc;
      }
      mark_touched(offset);
      offset = chunk.end;
    } catch (const Fault& fault) {
      if (seen != nullptr) throw;
      if (continues_after(offset, end)) {
        throw Fault(std::string(fault.what()) + " Valid chunks follow, so this is damage and not an interrupted write; recovery \"salvage\" reads around it.",
                    offset);
      }
      gaps_.push_back({committed_end_, end, fault.what()});
      return;
    }
  }
  if (seen == nullptr && committed_end_ < offset) gaps_.push_back({committed_end_, offset, "chunks must be committed by a SEQUENCE."});
  if (seen != nullptr && !members.empty()) throw Fault("a group must end in its SEQUENCE.", end);
}

void Reader::accept(const Chunk& chunk) {
  if (chunk.type() == ChunkType::layout) add_layout(chunk);
  if (chunk.type() == ChunkType::integral) integral_offset_ = chunk.offset;
  if (chunk.type() == ChunkType::sequence) {
    if (chunk.header.ordinal != size()) throw Fault("a SEQUENCE must carry its ordinal.", chunk.offset);
    extra_.push_back(entry_of(chunk));
  }
  committed_end_ = chunk.end;
  link_ = chunk.header.crc;
}

void Reader::compare(const Chunk& chunk, Seen& seen) {
  switch (chunk.type()) {
    case ChunkType::layout: seen.layouts.push_back(chunk.offset); break;
    case ChunkType::integral: seen.total = chunk.offset; break;
    case ChunkType::sequence: {
      if (seen.sequences >= size()) throw Fault("the INDEX must list every sequence of the file.", chunk.offset);
      const IndexEntry listed = entry(seen.sequences), found = entry_of(chunk);
      if (std::memcmp(&listed, &found, sizeof found) != 0) throw Fault("the INDEX must agree with the SEQUENCE it names.", chunk.offset);
      if (chunk.header.ordinal != seen.sequences) throw Fault("a SEQUENCE must carry its ordinal.", chunk.offset);
      for (const Chunk& data : data_chunks(seen.sequences)) planes(data);
      ++seen.sequences;
      break;
    }
    case ChunkType::index: {
      const IndexHead head = validate_index_head(chunk);
      const IndexMap map = index_map(head, chunk.offset);
      bool agrees = head.first + head.count == seen.sequences && head.integral_offset == seen.total && head.layouts == seen.layouts.size();
      for (size_t i = 0; agrees && i < seen.layouts.size(); ++i) {
        agrees = load<uint64_t>(chunk.payload + map.layouts + 8 * i) == seen.layouts[i];
      }
      agrees = agrees && (head.prev_offset == 0 ? head.first == 0 : std::binary_search(seen.indexes.begin(), seen.indexes.end(), head.prev_offset));
      if (!agrees) throw Fault("an INDEX must list the chunks before it.", chunk.offset);
      seen.indexes.push_back(chunk.offset);
      break;
    }
    case ChunkType::data: break;
  }
}

void Reader::add_layout(const Chunk& chunk) {
  const auto head = load<LayoutHead>(chunk.payload);
  Layout layout;
  layout.offset = chunk.offset;
  layout.crc = chunk.header.crc;
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
  Seen seen;
  const uint64_t end = file_.size - sizeof(Trailer);
  walk(first_chunk_, end, prologue_crc_, &seen);
  if (seen.sequences != size()) throw Fault("the INDEX must list every sequence of the file.", end);
}

}  // namespace mscan
