// Appends sequences to a .mscan file. One append is one group of chunks, DATA first and SEQUENCE, which commits it, last.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "encode.hpp"
#include "file.hpp"
#include "reader.hpp"

namespace mscan {

enum class Sync { none, chunk, close };

struct RecordView {
  std::string id;
  const int64_t* token_ids = nullptr;
  const float* loss = nullptr;
  const uint8_t* mask = nullptr;         // null: every token is marked
  const float* activation = nullptr;     // null: no planes
  const float* grad_norm = nullptr;
  uint64_t tokens = 0;
  uint64_t columns = 0;                  // of both planes and of the integral
  const std::string* text = nullptr;     // null: not stored
  const double* integral[6] = {};        // [0] null: none
};

class Writer {
 public:
  // OpenMode::append uses metadata and layout only if the file was cut before it held them.
  Writer(const std::string& path, OpenMode mode, std::string metadata, std::vector<LayoutItem> layout, Codec codec, Sync sync,
         Compress compress, Decompress decompress);

  uint64_t append(const RecordView& record);
  void append_integral(const double* const planes[6], uint64_t columns);
  void extend_layout(std::vector<LayoutItem> items);
  void close();
  void abandon();  // closes the file as it is; a file opened for append without a write is unchanged

  const std::string& metadata() const { return metadata_; }
  const Layout& layout() const { return layouts_.back(); }
  uint64_t blocks() const { return blocks_; }  // from any thread, unlike layout()
  uint64_t size() const { return indexed_ + pending_.size(); }
  const std::vector<Gap>& gaps() const { return gaps_; }
  double encode_seconds() const { return encode_seconds_; }
  double write_seconds() const { return write_seconds_; }

 private:
  void create(std::vector<LayoutItem> items);
  void reopen(const std::string& path, std::vector<LayoutItem> items, const Decompress& decompress);
  void add_layout(Layout layout);
  void require_usable() const;
  void require_columns(const char* what, uint64_t columns) const;
  void begin();
  ChunkHeader header(ChunkType type, uint64_t ordinal) const;
  uint64_t open_chunk();
  uint32_t finish_chunk(uint64_t start, ChunkHeader header);
  void flush();
  void put_layout(const Layout& layout);
  void put_integral(uint64_t ordinal, const double* const planes[6]);
  void put_data(const RecordView& record, uint64_t ordinal, uint32_t& chunks);
  void put_sequence(const RecordView& record, uint64_t ordinal, uint64_t group, uint64_t integral, uint32_t chunks);
  void put_index(IndexHead head, size_t kept);
  void bind(ChunkHeader& header, uint32_t group) const;
  uint64_t tables_bytes() const;
  void write_index();
  template <typename Body>
  void transaction(Body&& body);

  std::string metadata_;
  OutputFile file_;
  Uuid uuid_{};
  Sync sync_;
  DataEncoder encoder_;
  std::mutex mutex_;

  std::vector<Layout> layouts_;
  std::atomic<uint64_t> blocks_{0};  // of the last layout
  std::vector<Moments> stats_, delta_;
  std::vector<Run> runs_;
  std::vector<IndexEntry> pending_;  // sequences that no INDEX lists yet
  uint64_t indexed_ = 0;
  uint64_t integral_offset_ = 0;
  uint64_t end_ = 0;             // everything before it is committed
  uint32_t link_ = 0;            // crc of the header of the chunk that ends there
  uint32_t last_crc_ = 0;        // the same of the chunk finished last
  uint32_t group_crc_ = 0;       // of the group being written
  uint64_t last_index_end_ = 0;  // a trailer may follow here without a new INDEX
  bool ends_clean_ = true;       // nothing follows end_
  bool changed_ = false;
  bool broken_ = false;
  std::vector<Gap> gaps_;

  Buffer buffer_;        // chunks not yet written, which belong at buffer_offset_
  uint64_t buffer_offset_ = 0;
  double encode_seconds_ = 0, write_seconds_ = 0;
};

Layout make_layout(std::vector<LayoutItem> items, uint32_t id);

}  // namespace mscan
