#include "file.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#if defined(__linux__)
#include <linux/magic.h>
#include <sys/vfs.h>
#endif

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <system_error>

namespace mscan {
namespace {

constexpr uint64_t kLargestWrite = 1ull << 30;  // Linux moves at most 2^31 − 4096 bytes a call
constexpr uint64_t kReserve = 64ull << 20;       // blocks asked for at a time, at most
constexpr uint64_t kReservingSize = 1ull << 20;  // by writes, or in files, of at least this size

[[noreturn]] void fail(const std::string& what, int error) { throw Fault(what + " failed: " + std::strerror(error) + "."); }

int lock(int fd) {
  int result;
  do result = ::flock(fd, LOCK_EX | LOCK_NB);
  while (result != 0 && errno == EINTR);
  return result;
}

}  // namespace

OutputFile::OutputFile(std::string path, OpenMode mode) : path_(std::move(path)), owner_(::getpid()) {
  if (mode == OpenMode::replace) {
    // A symbolic link stays; its target is replaced.
    if (char* target = ::realpath(path_.c_str(), nullptr)) {
      path_ = target;
      std::free(target);
    }
  }
  const char* name = path_.c_str();
  const auto open_as = [&](int flags) { return ::open(name, flags | O_RDWR | O_CLOEXEC, 0666); };
  const auto take_lock = [&] {
    if (lock(fd_) == 0) return;
    const int error = errno;
    ::close(fd_);
    fd_ = -1;
    if (error == EWOULDBLOCK) throw Fault("only one writer may open a file, and another writer has it open.");
    fail("flock", error);
  };
  fd_ = open_as(mode == OpenMode::create ? O_CREAT | O_EXCL : 0);
  const bool missing = fd_ < 0 && errno == ENOENT && mode == OpenMode::replace;
  if (missing) fd_ = open_as(O_CREAT | O_EXCL);
  if (fd_ < 0) throw std::system_error(errno, std::generic_category(), path_);
  struct stat info {};
  if (::fstat(fd_, &info) != 0 || !S_ISREG(info.st_mode)) {
    ::close(fd_);
    fd_ = -1;
    throw Fault("a .mscan file must be a file, got a pipe or device.");
  }
  take_lock();
  if (mode == OpenMode::replace && !missing) {
    // A new file takes the old one's name, so a reader that has mapped the old one keeps it. Until then the old file stays in place,
    // locked.
    const int old = fd_;
    const std::string beside = path_ + ".new";
    static_cast<void>(::unlink(beside.c_str()));  // left by one that was killed here
    fd_ = ::open(beside.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0666);
    if (fd_ < 0 || lock(fd_) != 0 || ::fchmod(fd_, info.st_mode & 07777) != 0 || ::rename(beside.c_str(), name) != 0) {
      const int error = errno;
      if (fd_ >= 0) static_cast<void>(::unlink(beside.c_str()));
      if (fd_ >= 0) ::close(fd_);
      ::close(old);
      fd_ = -1;
      throw std::system_error(error, std::generic_category(), path_);
    }
    ::close(old);
  }
#if defined(__linux__)
  struct statfs where {};
  reserves_ = ::fstatfs(fd_, &where) == 0 && where.f_type == EXT4_SUPER_MAGIC;
  // A killed writer did not release its reserved blocks; this writer uses them.
  if (mode == OpenMode::append && reserves_ && ::fstat(fd_, &info) == 0 && info.st_blocks * 512 >= info.st_size + info.st_blksize) {
    reserved_ = static_cast<uint64_t>(info.st_blocks) * 512;
  }
#endif
}

OutputFile::~OutputFile() { close(); }

void OutputFile::require_owner() const {
  if (::getpid() != owner_) throw Fault("a writer belongs to the process that opened it; a forked one must open its own file.");
}

void OutputFile::close() {
  if (fd_ < 0) return;
  if (::getpid() == owner_) {  // in another process nothing of the file is touched
    struct stat info {};
    // Releases reserved blocks. If that fails, the blocks stay with the file and nothing else is lost.
    if (reserved_ != 0 && ::fstat(fd_, &info) == 0) static_cast<void>(!::ftruncate(fd_, info.st_size));
    ::flock(fd_, LOCK_UN);  // a forked child may hold the descriptor for longer
  }
  ::close(fd_);
  fd_ = -1;
}

// Reserves blocks of ext4 in large steps: a large append is then written 1.5 times as fast, one of 10 kB 1.2 times, because an append
// allocates no block. The file's size does not change. Other file systems reserve blocks by themselves or, like tmpfs, would allocate
// them at once.
void OutputFile::reserve(uint64_t offset, uint64_t size) {
#if defined(__linux__)
  if (!reserves_ || offset + size <= reserved_ || std::max(offset, size) < kReservingSize) return;
  const uint64_t step = size < kReservingSize ? std::min(kReserve, offset / 4) : kReserve;  // small appends: in proportion to the file
  const uint64_t begin = std::max(offset, reserved_), length = size + step;
  reserves_ = ::fallocate(fd_, FALLOC_FL_KEEP_SIZE, static_cast<off_t>(begin), static_cast<off_t>(length)) == 0;
  reserved_ = begin + length;  // where the disk was too full, a part may be reserved all the same
#else
  static_cast<void>(offset + size);
#endif
}

uint64_t OutputFile::size() const {
  struct stat info {};
  if (::fstat(fd_, &info) != 0) fail("fstat", errno);
  return static_cast<uint64_t>(info.st_size);
}

void OutputFile::write(const void* data, uint64_t size, uint64_t offset) {
  require_owner();
  const auto* p = static_cast<const uint8_t*>(data);
  reserve(offset, size);
  while (size > 0) {
    const ssize_t done = ::pwrite(fd_, p, std::min(size, kLargestWrite), static_cast<off_t>(offset));
    if (done < 0) {
      if (errno == EINTR) continue;
      throw Fault(std::string("write failed: ") + std::strerror(errno) + ".", offset);
    }
    if (done == 0) throw Fault("write failed: no byte was written.", offset);
    p += done;
    offset += static_cast<uint64_t>(done);
    size -= static_cast<uint64_t>(done);
  }
}

void OutputFile::read(void* data, uint64_t size, uint64_t offset) const {
  auto* p = static_cast<uint8_t*>(data);
  while (size > 0) {
    const ssize_t done = ::pread(fd_, p, std::min(size, kLargestWrite), static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) throw Fault(std::string("read failed: ") + (done < 0 ? std::strerror(errno) : "end of file") + ".", offset);
    p += done;
    offset += static_cast<uint64_t>(done);
    size -= static_cast<uint64_t>(done);
  }
}

void OutputFile::truncate(uint64_t size) {
  require_owner();
  int result;
  do result = ::ftruncate(fd_, static_cast<off_t>(size));
  while (result != 0 && errno == EINTR);
  if (result != 0) fail("ftruncate", errno);
  reserved_ = 0;
}

void OutputFile::sync() {
  if (::fdatasync(fd_) != 0) fail("fdatasync", errno);
}

void OutputFile::sync_directory() {
  const size_t slash = path_.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : slash == 0 ? "/" : path_.substr(0, slash);
  const int fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) fail("open of the directory", errno);
  const int result = ::fsync(fd), error = errno;
  ::close(fd);
  if (result != 0) fail("fsync of the directory", error);
}

MappedFile::MappedFile(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) throw std::system_error(errno, std::generic_category(), path);
  struct stat info {};
  if (::fstat(fd, &info) != 0 || S_ISDIR(info.st_mode)) {
    const int error = S_ISDIR(info.st_mode) ? EISDIR : errno;
    ::close(fd);
    throw std::system_error(error, std::generic_category(), path);
  }
  bytes_.size = static_cast<uint64_t>(info.st_size);
  if (bytes_.size > 0) {
    void* mapped = ::mmap(nullptr, bytes_.size, PROT_READ, MAP_SHARED, fd, 0);
    const int error = errno;
    if (mapped == MAP_FAILED) {
      ::close(fd);
      throw std::system_error(error, std::generic_category(), path);
    }
    bytes_.data = static_cast<const uint8_t*>(mapped);
  }
  ::close(fd);
}

MappedFile::~MappedFile() {
  if (bytes_.data != nullptr) ::munmap(const_cast<uint8_t*>(bytes_.data), bytes_.size);
}

}  // namespace mscan
