// Builds the payload of a DATA chunk from two float32 planes.
#pragma once

#include <functional>
#include <vector>

#include "buffer.hpp"
#include "codec.hpp"
#include "format.hpp"

namespace mscan {

using Compress = std::function<std::vector<uint8_t>(const uint8_t* raw, size_t size)>;

class DataEncoder {
 public:
  DataEncoder(Codec codec, Compress compress) : codec_(codec), compress_(std::move(compress)) {}

  uint64_t value_bytes() const { return codec_ == Codec::f32 ? 4 : 2; }

  // Appends head and planes to `out`, sets codec and flags of `header` (whose token_count is given), and merges the statistics of
  // each span into stats[2·i] (activation) and stats[2·i + 1] (gradient). Raises InputFault on a negative norm.
  void encode(const float* activation, const float* grad_norm, uint64_t columns, const std::vector<Span>& spans, ChunkHeader& header,
              Buffer& out, Moments* stats);

 private:
  void encode_plane(const float* values, uint64_t count, PlaneRange range, uint8_t* out) const;
  void gather(const float* activation, const float* grad_norm, uint64_t tokens, uint64_t columns, uint64_t stored);

  Codec codec_;
  Compress compress_;
  ColumnSums sums_;
  std::vector<uint64_t> rows_;
  std::vector<uint32_t> columns_;
  std::vector<float> values_[2];
  Buffer raw_, shuffled_;
};

}  // namespace mscan
