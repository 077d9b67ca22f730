#include "reader.hpp"

#include <algorithm>
#include <limits>

#include "group.hpp"

namespace mscan {

bool Reader::is_touched(uint64_t offset) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return touched_.count(offset) > 0;
}

void Reader::mark_touched(uint64_t offset) {
  const std::lock_guard<std::mutex> lock(mutex_);
  touched_.insert(offset);
}

Chunk Reader::touch(uint64_t offset, ChunkType type) {
  const bool known = is_touched(offset);
  const Chunk chunk = validate_chunk(file_, uuid_, offset, known ? Depth::header : Depth::payload);
  if (chunk.type() != type) throw Fault("the chunk here must be of another type.", offset);
  if (!known) mark_touched(offset);
  return chunk;
}

IndexEntry Reader::entry(uint64_t ordinal) {
  if (ordinal >= size()) throw std::out_of_range("sequence " + std::to_string(ordinal) + " of " + std::to_string(size()));
  if (ordinal >= indexed_) return extra_[ordinal - indexed_];
  const auto after = [](uint64_t value, const Run& run) { return value < run.first + run.count; };
  const Run& run = *std::upper_bound(runs_.begin(), runs_.end(), ordinal, after);
  const Chunk chunk = touch(run.offset, ChunkType::index);
  return load<IndexEntry>(chunk.payload + sizeof(IndexHead) + (ordinal - run.first) * sizeof(IndexEntry));
}

SequenceView Reader::sequence(uint64_t ordinal) {
  const IndexEntry listed = entry(ordinal);
  const bool known = is_touched(listed.sequence_offset);
  const Chunk chunk = validate_chunk(file_, uuid_, listed.sequence_offset, known ? Depth::header : Depth::payload);
  if (chunk.type() != ChunkType::sequence) throw Fault("an offset in the INDEX must be that of a SEQUENCE.", chunk.offset);
  if (!known) {
    if (bond_of(chunk.header).link != 0) check_link(chunk, predecessor(ordinal, listed.group_offset));
    mark_touched(chunk.offset);
  }
  const auto head = load<SequenceHead>(chunk.payload);
  const IndexEntry found = entry_of(chunk);
  if (std::memcmp(&listed, &found, sizeof found) != 0) throw Fault("the INDEX must agree with the SEQUENCE it names.", chunk.offset);
  if (recovery_ != Recovery::salvage && chunk.header.ordinal != ordinal) throw Fault("a SEQUENCE must carry its ordinal.", chunk.offset);
  const SequenceMap map = sequence_map(head, chunk.offset);
  const char* text = reinterpret_cast<const char*>(chunk.payload);
  const Salvaged* found_of_it = recovery_ == Recovery::salvage ? &salvaged_[ordinal] : nullptr;
  return {chunk.header.ordinal,
          head.tokens,
          head.data_chunks,
          head.integral_offset,
          found_of_it != nullptr ? !found_of_it->data.empty() : head.data_chunks > 0,
          found_of_it != nullptr ? found_of_it->integral != 0 : head.integral_offset != 0,
          found_of_it != nullptr ? found_of_it->lost_tokens : 0,
          found_of_it != nullptr && found_of_it->lost_integral,
          text + map.id,
          head.id_length,
          chunk.payload + map.token_ids,
          chunk.payload + map.loss,
          (head.flags & kHasMask) ? chunk.payload + map.mask : nullptr,
          (head.flags & kHasText) ? text + map.text : nullptr,
          head.text_length};
}

const std::vector<std::pair<uint64_t, uint64_t>>& Reader::hashes() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (have_hashes_) return by_hash_;
  }
  std::vector<std::pair<uint64_t, uint64_t>> table;
  table.reserve(size());
  for (const Run& run : runs_) {
    const Chunk chunk = touch(run.offset, ChunkType::index);
    for (uint64_t i = 0; i < run.count; ++i) {
      table.emplace_back(load<IndexEntry>(chunk.payload + sizeof(IndexHead) + i * sizeof(IndexEntry)).id_hash, run.first + i);
    }
  }
  for (size_t i = 0; i < extra_.size(); ++i) table.emplace_back(extra_[i].id_hash, indexed_ + i);
  std::sort(table.begin(), table.end());
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!have_hashes_) by_hash_ = std::move(table);
  have_hashes_ = true;
  return by_hash_;
}

int64_t Reader::find(const std::string& id) {
  const auto& table = hashes();
  const uint64_t hash = id_hash(id.data(), id.size());
  for (auto it = std::lower_bound(table.begin(), table.end(), std::make_pair(hash, uint64_t{0})); it != table.end() && it->first == hash; ++it) {
    const SequenceView view = sequence(it->second);
    if (id.size() == view.id_length && std::memcmp(id.data(), view.id, id.size()) == 0) return static_cast<int64_t>(it->second);
  }
  return -1;
}

const Layout* Reader::layout_of(uint32_t id) const {
  for (const Layout& layout : layouts_) {
    if (layout.id == id) return &layout;
  }
  return nullptr;
}

const uint32_t* Reader::layout_crc(const Chunk& sequence) const {
  const Layout* layout = layout_of(sequence.header.layout_id);
  return layout != nullptr ? &layout->crc : nullptr;
}

// Whether a chunk of a group, with a checked payload, is as wide as its layout.
void Reader::check_columns(const Chunk& member) const {
  const Layout* layout = layout_of(member.header.layout_id);
  const bool holds_planes = member.type() == ChunkType::data;
  const uint64_t found = holds_planes ? load<DataHead>(member.payload).columns : load<IntegralHead>(member.payload).blocks;
  if (layout != nullptr ? found != layout->blocks : spans_of(member.header.layout_id, found).empty()) {
    throw Fault(holds_planes ? "DATA columns must match their layout." : "INTEGRAL blocks must match their layout.", member.offset);
  }
  if (layout == nullptr && recovery_ != Recovery::salvage) throw Fault("DATA and INTEGRAL must name a LAYOUT of the file.", member.offset);
}

// The columns of each weight in planes of `columns` columns. If salvage lost their LAYOUT, the columns of a later one, which starts with
// the same entries; none if no entry ends at `columns`.
std::vector<Span> Reader::spans_of(uint32_t layout_id, uint64_t columns) const {
  if (const Layout* layout = layout_of(layout_id)) return layout->spans;
  if (layouts_.empty()) return {};
  std::vector<Span> spans;
  for (const Span& span : layouts_.back().spans) {
    spans.push_back(span);
    if (span.base + span.blocks == columns) return spans;
  }
  return {};
}

// The chunks of a group; their headers prove that they belong to its SEQUENCE.
std::vector<Chunk> Reader::members(uint64_t ordinal) {
  const IndexEntry where = entry(ordinal);
  std::vector<Chunk> chunks;
  for (uint64_t offset = where.group_offset; offset < where.sequence_offset; offset = chunks.back().end) {
    chunks.push_back(validate_chunk(file_, uuid_, offset, Depth::header));
    if (!chunks.back().in_group()) throw Fault("a group must hold only DATA and INTEGRAL.", offset);
    if (chunks.back().end > where.sequence_offset) throw Fault("a group must end at its SEQUENCE.", offset);
  }
  const Chunk sequence = touch(where.sequence_offset, ChunkType::sequence);
  check_group(sequence, chunks, layout_crc(sequence));
  return chunks;
}

// The crc of the header of the last chunk that committed before `until`. Only such chunks may lie between sequence ordinal − 1 and
// `until`, each linked to the one before it.
uint32_t Reader::predecessor(uint64_t ordinal, uint64_t until) {
  uint32_t crc = prologue_crc_;
  uint64_t offset = first_chunk_;
  const auto pass = [&](const Chunk& chunk) {
    crc = chunk.header.crc;
    offset = chunk.end;
  };
  if (ordinal > 0) pass(validate_chunk(file_, uuid_, entry(ordinal - 1).sequence_offset, Depth::header));
  while (offset < until) {
    const Chunk chunk = validate_chunk(file_, uuid_, offset, Depth::header);
    if (chunk.in_group() || chunk.type() == ChunkType::sequence) throw Fault("a SEQUENCE must commit the chunks since the last one.", until);
    check_link(chunk, crc);
    pass(chunk);
  }
  if (offset != until) throw Fault("chunks must follow each other without a gap.", until);
  return crc;
}

std::vector<Chunk> Reader::data_chunks(uint64_t ordinal) {
  sequence(ordinal);
  std::vector<Chunk> chunks;
  if (recovery_ == Recovery::salvage) {
    for (const uint64_t offset : salvaged_[ordinal].data) chunks.push_back(touch(offset, ChunkType::data));
    return chunks;
  }
  for (const Chunk& member : members(ordinal)) {
    if (member.type() != ChunkType::data) continue;
    chunks.push_back(touch(member.offset, ChunkType::data));
    check_columns(chunks.back());
  }
  return chunks;
}

PlanesView Reader::planes(const Chunk& chunk) {
  PlanesView view{chunk, load<DataHead>(chunk.payload), {}, chunk.payload + sizeof(DataHead), {}};
  view.map = plane_map(chunk.header, view.head, chunk.offset);
  if (!chunk.compressed()) return view;
  if (!decompress_) throw Fault("compressed DATA needs a decompressor.", chunk.offset);
  const std::vector<uint8_t> shuffled = decompress_(view.base, chunk.length() - sizeof(DataHead), view.head.raw_length);
  if (shuffled.size() != view.head.raw_length) throw Fault("compressed DATA must expand to its raw length.", chunk.offset);
  view.raw.assign(view.head.raw_length, 0);
  const auto restore = [&](uint64_t at, uint64_t count, uint64_t width) {
    byte_unshuffle(shuffled.data() + at, count, width, view.raw.data() + at);
  };
  if (chunk.sparse()) {
    restore(view.map.rows, uint64_t{chunk.header.token_count} + 1, 8);
    restore(view.map.columns, view.head.values, 4);
  }
  for (const uint64_t plane : view.map.plane) restore(plane, view.head.values, view.map.width);
  view.base = view.raw.data();
  validate_planes(chunk.header, view.head, view.base, chunk.offset);
  return view;
}

void Reader::decode(uint64_t ordinal, float* activation, float* grad_norm) {
  const std::vector<Chunk> chunks = data_chunks(ordinal);
  const uint64_t stride = blocks(), tokens = sequence(ordinal).tokens;
  uint64_t next = 0;
  const auto fill_to = [&](uint64_t token) {
    if (token <= next) return;
    for (float* plane : {activation, grad_norm}) std::fill(plane + next * stride, plane + token * stride, std::numeric_limits<float>::quiet_NaN());
  };
  for (const Chunk& chunk : chunks) {
    fill_to(chunk.header.first_token);
    const uint64_t at = chunk.header.first_token * stride;
    decode_planes(planes(chunk), stride, activation + at, grad_norm + at);
    next = std::max(next, chunk.header.first_token + chunk.header.token_count);
  }
  fill_to(tokens);
}

bool Reader::integral(uint64_t ordinal, Chunk& chunk) {
  if (ordinal == kWholeFile) {
    // A total is outdated once a sequence was appended after it.
    if (integral_offset_ == 0 || (size() > 0 && entry(size() - 1).sequence_offset > integral_offset_)) return false;
    chunk = touch(integral_offset_, ChunkType::integral);
    if (chunk.header.ordinal != kWholeFile) throw Fault("the file's INTEGRAL must belong to no sequence.", chunk.offset);
    if (recovery_ != Recovery::salvage && bond_of(chunk.header).link != 0) check_link(chunk, predecessor(size(), chunk.offset));
    if (load<IntegralHead>(chunk.payload).blocks > blocks()) throw Fault("INTEGRAL blocks must fit the layout.", chunk.offset);
    return true;
  }
  const SequenceView view = sequence(ordinal);
  if (!view.has_integral) return false;
  if (recovery_ == Recovery::salvage) {
    chunk = touch(salvaged_[ordinal].integral, ChunkType::integral);
    return true;
  }
  members(ordinal);
  chunk = touch(view.integral_offset, ChunkType::integral);
  check_columns(chunk);
  return true;
}

void integral_planes(const Chunk& chunk, uint64_t& blocks, const uint8_t* planes[6]) {
  blocks = load<IntegralHead>(chunk.payload).blocks;
  for (int i = 0; i < 6; ++i) planes[i] = chunk.payload + sizeof(IntegralHead) + static_cast<uint64_t>(i) * align_up(blocks * 8);
}

void Reader::sum_integrals(double* const out[6]) {
  for (uint64_t ordinal = 0; ordinal < size(); ++ordinal) {
    Chunk chunk;
    if (!integral(ordinal, chunk)) throw Fault("sequence " + std::to_string(ordinal) + " must hold an integral.");
    uint64_t count = 0;
    const uint8_t* in[6];
    integral_planes(chunk, count, in);
    for (uint64_t b = 0; b < count; ++b) {
      const auto at = [&](int plane) { return load<double>(in[plane] + 8 * b); };
      const double before = out[1][b], added = at(1), total = before + added;
      const double share = total > 0 ? added / total : 0.0;
      out[0][b] += at(0);
      out[1][b] = total;
      for (int plane = 2; plane < 6; plane += 2) {
        const double delta = at(plane) - out[plane][b];
        out[plane][b] += delta * share;
        out[plane + 1][b] += at(plane + 1) + delta * delta * before * share;
      }
    }
  }
}

std::vector<Moments> Reader::stats() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (have_stats_) return stats_;
  }
  std::vector<Moments> totals = indexed_stats_;
  if (!layouts_.empty()) totals.resize(2 * layouts_.back().items.size());
  ColumnSums scratch;
  std::vector<float> activation, grad_norm;
  for (uint64_t ordinal = indexed_; ordinal < size(); ++ordinal) {
    for (const Chunk& chunk : data_chunks(ordinal)) {
      const PlanesView view = planes(chunk);
      const uint64_t tokens = chunk.header.token_count, columns = view.head.columns;
      activation.resize(tokens * columns);
      grad_norm.resize(tokens * columns);
      decode_planes(view, columns, activation.data(), grad_norm.data());
      const std::vector<Span> spans = spans_of(chunk.header.layout_id, columns);
      scan_spans(activation.data(), tokens, columns, spans, scratch, totals.data(), 2);
      scan_spans(grad_norm.data(), tokens, columns, spans, scratch, totals.data() + 1, 2);
    }
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  stats_ = totals;
  have_stats_ = true;
  return totals;
}

void decode_planes(const PlanesView& view, uint64_t stride, float* activation, float* grad_norm) {
  const uint64_t tokens = view.chunk.header.token_count, columns = view.head.columns;
  const bool sparse = view.chunk.sparse(), wide = stride == columns && !sparse;
  const float missing = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> row;
  for (int p = 0; p < 2; ++p) {
    float* out = p == 0 ? activation : grad_norm;
    const uint8_t* in = view.base + view.map.plane[p];
    const Log2Decoder decoder(view.head.range[p]);
    const auto values = [&](uint64_t first, uint64_t count, float* to) {
      if (count == 0) return;
      const uint8_t* from = in + first * view.map.width;
      if (view.map.width == 4) {
        std::memcpy(to, from, count * 4);
      } else {
        decoder.decode(reinterpret_cast<const uint16_t*>(from), count, to);
      }
    };
    if (wide) {
      values(0, tokens * columns, out);
      continue;
    }
    for (uint64_t token = 0; token < tokens; ++token) {
      float* to = out + token * stride;
      if (!sparse) {
        values(token * columns, columns, to);
        std::fill(to + columns, to + stride, missing);
        continue;
      }
      std::fill(to, to + stride, missing);
      const auto first = load<uint64_t>(view.base + view.map.rows + 8 * token);
      const uint64_t count = load<uint64_t>(view.base + view.map.rows + 8 * (token + 1)) - first;
      row.resize(count);
      values(first, count, row.data());
      for (uint64_t i = 0; i < count; ++i) to[load<uint32_t>(view.base + view.map.columns + 4 * (first + i))] = row[i];
    }
  }
}

}  // namespace mscan
