#include "encode.hpp"

#include <algorithm>
#include <string>

#include "validate.hpp"

namespace mscan {
namespace {

bool missing(float value) { return value != value; }

uint64_t count_stored(const float* a, const float* b, uint64_t cells) {
  uint64_t stored = 0;
  for (uint64_t i = 0; i < cells; ++i) stored += !(missing(a[i]) && missing(b[i]));
  return stored;
}

}  // namespace

void DataEncoder::encode_plane(const float* values, uint64_t count, PlaneRange range, uint8_t* out) const {
  if (codec_ == Codec::f32) {
    if (count > 0) std::memcpy(out, values, count * 4);
  } else {
    encode_log2u16(values, count, range, reinterpret_cast<uint16_t*>(out));
  }
}

void DataEncoder::gather(const float* a, const float* b, uint64_t tokens, uint64_t columns, uint64_t stored) {
  rows_.clear();
  columns_.clear();
  rows_.reserve(tokens + 1);
  columns_.reserve(stored);
  for (auto& plane : values_) {
    plane.clear();
    plane.reserve(stored);
  }
  rows_.push_back(0);
  for (uint64_t token = 0; token < tokens; ++token) {
    for (uint64_t c = 0; c < columns; ++c) {
      const float x = a[token * columns + c], y = b[token * columns + c];
      if (missing(x) && missing(y)) continue;
      columns_.push_back(static_cast<uint32_t>(c));
      values_[0].push_back(x);
      values_[1].push_back(y);
    }
    rows_.push_back(columns_.size());
  }
}

void DataEncoder::encode(const float* activation, const float* grad_norm, uint64_t columns, const std::vector<Span>& spans,
                         ChunkHeader& header, Buffer& out, Moments* stats) {
  const uint64_t tokens = header.token_count, cells = tokens * columns;
  const float* planes[2] = {activation, grad_norm};
  const char* names[2] = {"activation", "grad_norm"};
  DataHead head{};
  uint64_t absent = cells;
  for (int p = 0; p < 2; ++p) {
    const PlaneScan scan = scan_spans(planes[p], tokens, columns, spans, sums_, stats + p, 2);
    if (scan.negative) throw InputFault(std::string(names[p]) + " must not be negative: it is a norm.");
    if (codec_ == Codec::log2u16) head.range[p] = plane_range(scan);
    absent = std::min(absent, scan.missing);
  }
  head.columns = columns;
  head.values = cells;
  header.codec = static_cast<uint8_t>(codec_);
  header.flags = compress_ ? kZstd : 0;

  // Sparse if it saves a quarter: a column number costs four bytes in addition to the two values.
  if (absent > cells / 2) {
    const uint64_t stored = count_stored(activation, grad_norm, cells);
    const uint64_t sparse_bytes = 8 * (tokens + 1) + stored * (4 + 2 * value_bytes());
    if (sparse_bytes < cells * 2 * value_bytes() / 4 * 3) {
      gather(activation, grad_norm, tokens, columns, stored);
      header.flags |= kSparse;
      head.values = stored;
      planes[0] = values_[0].data();
      planes[1] = values_[1].data();
    }
  }

  const PlaneMap map = plane_map(header, head, 0);
  head.raw_length = map.length;
  out.append(&head, sizeof head);
  if (compress_) raw_.clear();
  uint8_t* raw = compress_ ? raw_.grow(map.length) : out.grow(map.length);
  struct Part {
    uint64_t at, count, width;
  };
  std::vector<Part> parts;
  if (header.flags & kSparse) {
    parts.push_back({map.rows, tokens + 1, 8});
    parts.push_back({map.columns, head.values, 4});
    std::memcpy(raw + map.rows, rows_.data(), (tokens + 1) * 8);
    if (head.values > 0) std::memcpy(raw + map.columns, columns_.data(), head.values * 4);
  }
  for (int p = 0; p < 2; ++p) {
    parts.push_back({map.plane[p], head.values, map.width});
    encode_plane(planes[p], head.values, head.range[p], raw + map.plane[p]);
  }
  for (size_t i = 0; i + 1 < parts.size(); ++i) {
    const uint64_t end = parts[i].at + parts[i].count * parts[i].width;
    std::memset(raw + end, 0, parts[i + 1].at - end);
  }
  if (!compress_) return;

  shuffled_.clear();
  uint8_t* shuffled = shuffled_.grow(map.length);
  std::memset(shuffled, 0, map.length);
  for (const Part& part : parts) byte_shuffle(raw + part.at, part.count, part.width, shuffled + part.at);
  const std::vector<uint8_t> frame = compress_(shuffled, map.length);
  out.append(frame.data(), frame.size());
}

}  // namespace mscan
