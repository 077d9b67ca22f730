// Reads a .mscan file that lies in memory, usually mapped. Offsets are checked by validate.hpp; crcs at first touch.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "codec.hpp"
#include "validate.hpp"

namespace mscan {

enum class Recovery { strict, tail, salvage };

// Expands a compressed frame to raw_length bytes; raises if it cannot.
using Decompress = std::function<std::vector<uint8_t>(const uint8_t* frame, size_t size, size_t raw_length)>;

// Bytes that a reader left out, and why.
struct Gap {
  uint64_t begin;
  uint64_t end;
  std::string rule;
};

// One INDEX chunk: sequences first … first + count.
struct Run {
  uint64_t offset;
  uint64_t first;
  uint64_t count;
  uint32_t level;
};

struct LayoutItem {
  std::string name;
  uint64_t out_features;
  uint64_t blocks;
  uint64_t base;
};

struct Layout {
  uint64_t offset = 0;
  uint32_t crc = 0;  // of its chunk's header
  uint32_t id = 0;
  uint64_t blocks = 0;
  std::vector<LayoutItem> items;
  std::vector<Span> spans;
};

struct SequenceView {
  uint64_t ordinal;
  uint64_t tokens;
  uint64_t data_chunks;      // that it was written with
  uint64_t integral_offset;  // 0: it was written without
  bool has_planes;           // whether DATA of it can be read; salvage may have lost all
  bool has_integral;
  uint64_t lost_tokens;      // whose DATA salvage lost
  bool lost_integral;
  const char* id;
  uint64_t id_length;
  const uint8_t* token_ids;  // u32 each
  const uint8_t* loss;       // f32 each
  const uint8_t* mask;       // null: every token is marked
  const char* text;          // null: not stored
  uint64_t text_length;
};

// The parts of a group that salvage found.
struct Salvaged {
  std::vector<uint64_t> data;  // offsets, in token order, no token twice
  uint64_t integral = 0;       // offset; 0: none, or lost
  uint64_t lost_tokens = 0;
  bool lost_integral = false;

  bool whole() const { return lost_tokens == 0 && !lost_integral; }
};

// A DATA chunk's planes, uncompressed; `raw` owns them when they were compressed.
struct PlanesView {
  Chunk chunk;
  DataHead head;
  PlaneMap map;
  const uint8_t* base;
  std::vector<uint8_t> raw;
};

class Reader {
 public:
  Reader(Bytes file, Recovery recovery, Decompress decompress);

  const std::string& metadata() const { return metadata_; }
  const Uuid& uuid() const { return uuid_; }
  const std::vector<Layout>& layouts() const { return layouts_; }
  uint64_t blocks() const { return layouts_.empty() ? 0 : layouts_.back().blocks; }
  uint64_t size() const { return indexed_ + extra_.size(); }
  const std::vector<Gap>& gaps() const { return gaps_; }
  bool closed() const { return closed_; }
  uint64_t first_chunk() const { return first_chunk_; }
  Bytes file() const { return file_; }

  SequenceView sequence(uint64_t ordinal);
  // The first sequence of this id, or −1. Builds a table of hashes at the first call.
  int64_t find(const std::string& id);

  std::vector<Chunk> data_chunks(uint64_t ordinal);
  PlanesView planes(const Chunk& chunk);
  // Decodes all tokens into two (tokens, blocks()) planes; what is not stored becomes NaN.
  void decode(uint64_t ordinal, float* activation, float* grad_norm);

  // The chunk of a sequence's integral, or of the file's total (kWholeFile); false when there is none.
  bool integral(uint64_t ordinal, Chunk& chunk);
  // Adds every sequence's integral to six planes of blocks() zeros; Fault when a sequence has none.
  void sum_integrals(double* const planes[6]);

  // Two Moments per layout entry: activation, gradient norm.
  std::vector<Moments> stats();

  // State for a writer that continues the file.
  const std::vector<Run>& runs() const { return runs_; }
  const std::vector<IndexEntry>& extra() const { return extra_; }
  uint64_t integral_offset() const { return integral_offset_; }
  uint64_t committed_end() const { return committed_end_; }
  uint32_t link() const { return link_; }  // crc of the header of the chunk that ends there, or of the prologue

  // Checks every rule of the format, whatever the recovery mode: all crcs, every group, the order of the chunks, frames, and that each
  // INDEX lists what stands before it.
  void verify();

 private:
  friend class Salvager;
  IndexEntry entry(uint64_t ordinal);
  const std::vector<std::pair<uint64_t, uint64_t>>& hashes();
  bool is_touched(uint64_t offset);
  void mark_touched(uint64_t offset);
  Chunk touch(uint64_t offset, ChunkType type);
  std::vector<Chunk> members(uint64_t ordinal);
  uint32_t predecessor(uint64_t ordinal, uint64_t until);
  void open_tail();
  void load_chain(uint64_t offset);
  bool find_last_index(uint64_t& offset);
  struct Seen;
  void walk(uint64_t from, uint64_t end, uint32_t before, Seen* seen);
  void salvage(uint64_t from, uint64_t end);
  uint64_t next_chunk(uint64_t from, uint64_t end) const;
  bool continues_after(uint64_t failure, uint64_t end) const;
  void accept(const Chunk& chunk);
  void compare(const Chunk& chunk, Seen& seen);
  void add_layout(const Chunk& chunk);
  const Layout* layout_of(uint32_t id) const;
  const uint32_t* layout_crc(const Chunk& sequence) const;
  void check_columns(const Chunk& member) const;
  std::vector<Span> spans_of(uint32_t layout_id, uint64_t columns) const;

  Bytes file_;
  Recovery recovery_;
  Decompress decompress_;
  Uuid uuid_{};
  std::string metadata_;
  uint64_t first_chunk_ = 0;
  bool closed_ = false;
  std::vector<Layout> layouts_;
  std::vector<Run> runs_;
  std::vector<IndexEntry> extra_;
  std::vector<Moments> indexed_stats_;
  uint64_t indexed_ = 0;
  uint64_t integral_offset_ = 0;
  uint64_t committed_end_ = 0;
  uint32_t link_ = 0;
  uint32_t prologue_crc_ = 0;
  std::vector<Salvaged> salvaged_;  // of each sequence, in salvage alone
  std::vector<Gap> gaps_;
  std::mutex mutex_;
  std::unordered_set<uint64_t> touched_;
  std::vector<std::pair<uint64_t, uint64_t>> by_hash_;  // (hash of an id, ordinal), sorted
  bool have_hashes_ = false;
  std::vector<Moments> stats_;
  bool have_stats_ = false;
};

// Six planes of an INTEGRAL payload, in the order ∫SPS, count, activation mean and m2, gradient mean and m2.
void integral_planes(const Chunk& chunk, uint64_t& blocks, const uint8_t* planes[6]);

// Decodes `view` into rows of `stride` columns, starting at row 0 of the outputs; columns it does not store become NaN.
void decode_planes(const PlanesView& view, uint64_t stride, float* activation, float* grad_norm);

}  // namespace mscan
