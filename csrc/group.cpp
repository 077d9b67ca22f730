#include "group.hpp"

namespace mscan {
namespace {

void require(bool holds, const char* rule, uint64_t offset) {
  if (!holds) throw Fault(rule, offset);
}

}  // namespace

uint32_t group_crc(uint32_t layout_crc, const std::vector<Chunk>& members) {
  uint32_t crc = group_crc(0, layout_crc);
  for (const Chunk& member : members) crc = group_crc(crc, member.header.crc);
  return crc;
}

IndexEntry entry_of(const Chunk& sequence) {
  const auto head = load<SequenceHead>(sequence.payload);
  return {head.group_offset, sequence.offset, head.id_hash, static_cast<uint32_t>(head.tokens), head.data_chunks};
}

void check_group(const Chunk& sequence, const std::vector<Chunk>& members, const uint32_t* layout_crc) {
  const auto head = load<SequenceHead>(sequence.payload);
  uint64_t token = 0, data = 0, integral = 0;
  require(head.group_offset == (members.empty() ? sequence.offset : members.front().offset),
          "a SEQUENCE must commit the chunks since the last one.", sequence.offset);
  for (const Chunk& member : members) {
    const bool holds_planes = member.type() == ChunkType::data;
    const char* const ordinal = holds_planes ? "DATA must carry the ordinal of its SEQUENCE." : "INTEGRAL must carry the ordinal of its SEQUENCE.";
    require(member.header.ordinal == sequence.header.ordinal, ordinal, member.offset);
    require(integral == 0, "the INTEGRAL of a group must be the last chunk before its SEQUENCE.", member.offset);
    if (holds_planes) {
      require(member.header.first_token == token, "DATA chunks must follow each other.", member.offset);
      token += member.header.token_count;
      require(token <= head.tokens, "DATA tokens must lie within their sequence.", member.offset);
      ++data;
    } else {
      integral = member.offset;
    }
  }
  require(data == head.data_chunks && (data == 0 || token == head.tokens), "DATA must cover the tokens of its SEQUENCE.", sequence.offset);
  require(integral == head.integral_offset, "a SEQUENCE must name the INTEGRAL of its group.", sequence.offset);
  const Bond bond = bond_of(sequence.header);
  if (bond.link == 0) return;
  require(layout_crc != nullptr, "a SEQUENCE must name a LAYOUT of the file.", sequence.offset);
  require(group_crc(*layout_crc, members) == bond.group, "a SEQUENCE must follow the chunks it was written with, not others.",
          sequence.offset);
}

void check_link(const Chunk& chunk, uint32_t before) {
  const Bond bond = bond_of(chunk.header);
  require(bond.link == 0 || bond.link == link_to(before), "a chunk must follow the chunk it was written after, not another.",
          chunk.offset);
}

}  // namespace mscan
