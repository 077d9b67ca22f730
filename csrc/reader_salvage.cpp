// Recovery of a damaged file: the reader walks over all chunks, keeps what provably belongs to a group, and reports why it left out the
// rest.
#include <algorithm>
#include <map>
#include <tuple>

#include "group.hpp"
#include "reader.hpp"

namespace mscan {
namespace {

constexpr char kUncommitted[] = "chunks must be committed by a SEQUENCE.";
constexpr char kOutOfPlace[] =
    "a chunk must follow the chunk it was written after: chunks are missing, repeated, out of order or from another copy.";

// A chunk of a group; not whole if only its header is valid.
struct Member {
  Chunk chunk;
  bool whole;
};

std::string of_sequence(const Chunk& sequence) { return "sequence " + std::to_string(sequence.header.ordinal); }

std::vector<Chunk> chunks_of(const std::vector<Member>& members) {
  std::vector<Chunk> chunks;
  for (const Member& member : members) chunks.push_back(member.chunk);
  return chunks;
}

// The chunks of one ordinal in the order of the writer, without repetitions.
std::vector<Member> in_order(const std::vector<Member>& members, uint64_t ordinal) {
  std::vector<Member> own;
  for (const Member& member : members) {
    if (member.chunk.header.ordinal == ordinal) own.push_back(member);
  }
  const auto key = [](const Member& member) {
    const ChunkHeader& header = member.chunk.header;
    return std::make_tuple(member.chunk.type() != ChunkType::data, uint64_t{header.first_token}, uint32_t{header.crc}, !member.whole);
  };
  std::stable_sort(own.begin(), own.end(), [&](const Member& a, const Member& b) { return key(a) < key(b); });
  const auto same = [](const Member& a, const Member& b) { return a.chunk.header.crc == b.chunk.header.crc; };
  own.erase(std::unique(own.begin(), own.end(), same), own.end());
  return own;
}

// Removes chunks that contradict another of the same group: two chunks of the same tokens, or two integrals. `members` are in order.
std::vector<Member> without_rivals(const std::vector<Member>& members) {
  std::vector<bool> rival(members.size(), false);
  uint64_t end = 0;
  size_t owner = 0;  // of the chunk that reaches to `end`
  size_t integrals = 0;
  for (size_t i = 0; i < members.size(); ++i) {
    const ChunkHeader& header = members[i].chunk.header;
    if (members[i].chunk.type() != ChunkType::data) {
      ++integrals;
      continue;
    }
    if (i > 0 && header.first_token < end) rival[i] = rival[owner] = true;
    if (i == 0 || header.first_token + header.token_count > end) {
      end = header.first_token + header.token_count;
      owner = i;
    }
  }
  std::vector<Member> alone;
  for (size_t i = 0; i < members.size(); ++i) {
    if (members[i].chunk.type() == ChunkType::data ? !rival[i] : integrals == 1) alone.push_back(members[i]);
  }
  return alone;
}

}  // namespace

class Salvager {
 public:
  Salvager(Reader& reader, uint64_t end) : reader_(reader), bounds_{reader.file_.data, end}, before_(reader.prologue_crc_) {}

  void run(uint64_t from) {
    for (uint64_t offset = from; offset < bounds_.size;) {
      Chunk chunk;
      try {
        chunk = validate_chunk(bounds_, reader_.uuid_, offset, Depth::payload);
        if (chunk.type() == ChunkType::layout) reader_.add_layout(chunk);
      } catch (const Fault& fault) {
        offset = pass_damage(offset, fault.what());
        continue;
      }
      reader_.mark_touched(offset);
      offset = chunk.end;
      if (chunk.in_group()) {
        members_.push_back({chunk, true});
        continue;
      }
      if (chunk.type() == ChunkType::sequence) {
        settle(chunk);
      } else {
        leave_out(members_, kUncommitted);
        if (out_of_place(chunk)) note_place(chunk);
        if (chunk.type() == ChunkType::integral) reader_.integral_offset_ = chunk.offset;
      }
      commit(chunk);
    }
    leave_out(members_, kUncommitted);
    for (size_t i = 0; i < losses_.size(); ++i) {
      if (!losses_[i].empty()) note(reader_.extra_[i].sequence_offset, losses_[i]);
    }
    if (out_of_place_ && reader_.integral_offset_ != 0) {  // of which sequences it is the total, nobody knows
      leave_out({{header_at(reader_.integral_offset_), true}}, "the INTEGRAL of the file must follow all the sequences that it sums.");
      reader_.integral_offset_ = 0;
    }
    std::stable_sort(gaps().begin(), gaps().end(), [](const Gap& a, const Gap& b) { return a.begin < b.begin; });
  }

 private:
  std::vector<Gap>& gaps() { return reader_.gaps_; }
  void note(uint64_t offset, const std::string& rule) { gaps().push_back({offset, offset, rule}); }
  void note_place(const Chunk& chunk) {
    note(chunk.offset, kOutOfPlace);
    out_of_place_ = true;
  }

  // Only whole chunks: the others were reported when their payload failed.
  void leave_out(const std::vector<Member>& members, const std::string& rule) {
    for (const Member& member : members) {
      if (!member.whole) continue;
      if (!gaps().empty() && gaps().back().end == member.chunk.offset && gaps().back().rule == rule) {
        gaps().back().end = member.chunk.end;
      } else {
        gaps().push_back({member.chunk.offset, member.chunk.end, rule});
      }
    }
  }

  void commit(const Chunk& chunk) {
    members_.clear();
    damaged_ = false;
    before_ = chunk.header.crc;
  }

  uint64_t pass_damage(uint64_t offset, const char* rule) {
    const uint64_t next = reader_.next_chunk(offset + kAlign, bounds_.size);
    gaps().push_back({offset, next, rule});
    damaged_ = true;
    Chunk chunk;
    try {
      chunk = validate_chunk(bounds_, reader_.uuid_, offset, Depth::header);
    } catch (const Fault&) {
      return next;
    }
    if (chunk.in_group()) {
      members_.push_back({chunk, false});
    } else {
      leave_out(members_, kUncommitted);
      commit(chunk);
    }
    return next;
  }

  // Whether chunks are missing or repeated between this chunk and the last commit, and no reported damage explains it.
  bool out_of_place(const Chunk& chunk) const {
    const Bond bond = bond_of(chunk.header);
    return !damaged_ && bond.link != 0 && bond.link != link_to(before_);
  }

  // The same for a SEQUENCE without a link: judged by its ordinal and by the offset of its group.
  bool unlinked_out_of_place(const Chunk& sequence) {
    if (bond_of(sequence.header).link != 0) return false;
    const uint64_t start = members_.empty() ? sequence.offset : members_.front().chunk.offset;
    const uint64_t moved = start - load<SequenceHead>(sequence.payload).group_offset;
    const bool wrong = !damaged_ && (sequence.header.ordinal != next_ordinal_ || moved != moved_);
    moved_ = moved;
    return wrong;
  }

  void settle(const Chunk& sequence) {
    const bool misplaced = out_of_place(sequence) || unlinked_out_of_place(sequence);
    std::vector<Member> own = proven(sequence);
    Salvaged found = take(sequence, own);
    std::vector<Member> strays;
    for (const Member& member : members_) {
      const bool used = std::any_of(own.begin(), own.end(), [&](const Member& other) { return other.chunk.offset == member.chunk.offset; });
      if (!used) strays.push_back(member);
    }
    leave_out(strays, "the SEQUENCE at byte " + std::to_string(sequence.offset) + " does not commit this.");

    const IndexEntry entry = entry_of(sequence);
    const auto [place, is_new] = known_.try_emplace({sequence.header.ordinal, entry.id_hash}, reader_.extra_.size());
    if (is_new) {
      if (misplaced) note_place(sequence);
      reader_.extra_.push_back(entry);
      losses_.push_back(loss_line(sequence, own, found));
      reader_.salvaged_.push_back(std::move(found));
      next_ordinal_ = sequence.header.ordinal + 1;
      return;
    }
    Salvaged& first = reader_.salvaged_[place->second];
    const std::string twice = of_sequence(sequence) + " occurs twice: this copy was left out.";
    if (first.whole() || !found.whole()) {
      leave_out(own, twice);
      return leave_out({{sequence, true}}, twice);
    }
    IndexEntry& kept = reader_.extra_[place->second];
    for (const uint64_t offset : first.data) leave_out({{header_at(offset), true}}, twice);
    if (first.integral != 0) leave_out({{header_at(first.integral), true}}, twice);
    leave_out({{header_at(kept.sequence_offset), true}}, twice);
    kept = entry;
    first = std::move(found);
    losses_[place->second].clear();
  }

  Chunk header_at(uint64_t offset) const { return validate_chunk(bounds_, reader_.uuid_, offset, Depth::header); }

  // The chunks since the last commit that belong to `sequence`.
  std::vector<Member> proven(const Chunk& sequence) {
    const Bond bond = bond_of(sequence.header);
    const std::vector<Member> own = in_order(members_, sequence.header.ordinal);
    if (bond.link == 0) return without_rivals(own);
    const uint32_t* layout = reader_.layout_crc(sequence);
    if (layout == nullptr) return {};
    if (group_crc(*layout, chunks_of(own)) == bond.group) return own;
    return {};
  }

  // The readable chunks that belong to `sequence`; removes from `own` those that break a rule.
  Salvaged take(const Chunk& sequence, std::vector<Member>& own) {
    const auto head = load<SequenceHead>(sequence.payload);
    Salvaged found;
    uint64_t covered = 0;
    const auto unfit = [&](const Member& member) {
      const Chunk& chunk = member.chunk;
      const ChunkHeader& header = chunk.header;
      const bool holds_planes = chunk.type() == ChunkType::data;
      try {
        if (holds_planes ? head.data_chunks == 0 : head.integral_offset == 0) return true;
        if (holds_planes && (header.token_count > head.tokens || header.first_token > head.tokens - header.token_count)) return true;
        if (member.whole) reader_.check_columns(chunk);
      } catch (const Fault&) {
        return true;
      }
      if (!member.whole) return false;
      if (holds_planes) {
        found.data.push_back(chunk.offset);
        covered += header.token_count;
      } else {
        found.integral = chunk.offset;
      }
      return false;
    };
    own.erase(std::remove_if(own.begin(), own.end(), unfit), own.end());
    found.lost_tokens = head.data_chunks > 0 ? head.tokens - covered : 0;
    found.lost_integral = head.integral_offset != 0 && found.integral == 0;
    return found;
  }

  // The parts of a sequence that are lost although no damaged chunk was reported.
  std::string loss_line(const Chunk& sequence, const std::vector<Member>& own, const Salvaged& found) const {
    uint64_t tokens = found.lost_tokens;
    bool integral = found.lost_integral;
    for (const Member& member : own) {
      if (member.whole) continue;
      if (member.chunk.type() == ChunkType::data) tokens -= std::min<uint64_t>(tokens, member.chunk.header.token_count);
      if (member.chunk.type() == ChunkType::integral) integral = false;
    }
    if (tokens == 0 && !integral) return "";
    const std::string planes = tokens > 0 ? "the planes of " + std::to_string(tokens) + (tokens == 1 ? " token" : " tokens") : "";
    return of_sequence(sequence) + " must follow all its chunks; lost: " + planes + (tokens > 0 && integral ? " and " : "") +
           (integral ? "its integral" : "") + ".";
  }

  Reader& reader_;
  Bytes bounds_;
  std::vector<Member> members_;  // since the last chunk that committed
  uint32_t before_;              // crc of its header
  bool damaged_ = false;         // something between it and here could not be read
  bool out_of_place_ = false;    // some chunk was
  uint64_t next_ordinal_ = 0;
  uint64_t moved_ = 0;  // bytes by which unlinked groups stand further back than they were written
  std::vector<std::string> losses_;  // a line for each sequence that lost chunks, else empty
  std::map<std::pair<uint64_t, uint64_t>, size_t> known_;  // ordinal and hash of the id → place in extra_
};

void Reader::salvage(uint64_t from, uint64_t end) {
  Salvager(*this, end).run(from);
  if (closed_ && gaps_.empty() && validate_trailer(file_, uuid_, closed_).sequences != size()) {
    gaps_.push_back({end, end, "the trailer must count the sequences of the file."});
  }
}

}  // namespace mscan
