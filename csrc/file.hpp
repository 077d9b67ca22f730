// Files through plain system calls: open, fchmod, flock, fstat, fstatfs, fallocate, pread, pwrite, ftruncate, fdatasync, fsync,
// rename, unlink, mmap, close.
#pragma once

#include <cstdint>
#include <string>

#include "validate.hpp"

namespace mscan {

enum class OpenMode { create, replace, append };

// A file opened for writing, locked against a second writer. Errors raise Fault with the system's reason.
class OutputFile {
 public:
  OutputFile(std::string path, OpenMode mode);
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  ~OutputFile();

  uint64_t size() const;
  void write(const void* data, uint64_t size, uint64_t offset);
  void read(void* data, uint64_t size, uint64_t offset) const;
  void truncate(uint64_t size);
  void sync();            // data, and what is needed to find it
  void sync_directory();  // the file's name
  void close();
  bool is_open() const { return fd_ >= 0; }

 private:
  void require_owner() const;
  void reserve(uint64_t offset, uint64_t size);

  std::string path_;
  int owner_ = 0;  // the process that opened it
  int fd_ = -1;
  bool reserves_ = false;
  uint64_t reserved_ = 0;  // blocks up to here are the file's already, though it ends before
};

// A file mapped for reading. If another process truncates it, reading the lost part raises a bus error, as with every mmap.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();
  Bytes bytes() const { return bytes_; }

 private:
  Bytes bytes_;
};

}  // namespace mscan
