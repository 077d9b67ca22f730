#include "check.hpp"

namespace mscan {
namespace {

constexpr uint64_t kMostDecoded = 1ull << 22;  // a sparse chunk of a few bytes may stand for very many missing cells

}  // namespace

void validate_buffer(const uint8_t* data, size_t size, Recovery recovery) {
  Reader reader({data, size}, recovery, nullptr);
  std::vector<float> activation, grad_norm;
  bool compressed = false;
  for (uint64_t ordinal = 0; ordinal < reader.size(); ++ordinal) {
    const SequenceView sequence = reader.sequence(ordinal);
    reader.find(std::string(sequence.id, sequence.id_length));
    uint64_t held = 0;
    for (const uint8_t* p = sequence.token_ids; p < sequence.token_ids + 4 * sequence.tokens; p += 4) held += load<uint32_t>(p);
    for (const uint8_t* p = sequence.loss; p < sequence.loss + 4 * sequence.tokens; p += 4) held += load<uint32_t>(p);
    if (sequence.mask != nullptr) held += sequence.mask[sequence.tokens - 1];
    if (sequence.text_length > 0) held += static_cast<uint8_t>(sequence.text[sequence.text_length - 1]);
    volatile uint64_t sink = held;  // the reads above must happen
    static_cast<void>(sink);
    for (const Chunk& chunk : reader.data_chunks(ordinal)) {
      compressed |= chunk.compressed();
      const uint64_t columns = load<DataHead>(chunk.payload).columns;
      if (chunk.compressed() || uint64_t{chunk.header.token_count} * columns > kMostDecoded) continue;
      activation.resize(chunk.header.token_count * columns);
      grad_norm.resize(activation.size());
      decode_planes(reader.planes(chunk), columns, activation.data(), grad_norm.data());
    }
    Chunk chunk;
    reader.integral(ordinal, chunk);
  }
  Chunk total;
  reader.integral(kWholeFile, total);
  if (!compressed && reader.blocks() <= kMostDecoded / 64) reader.stats();
}

}  // namespace mscan
