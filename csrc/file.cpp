#include "file.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

namespace mscan {
namespace {

constexpr uint64_t kLargestWrite = 1ull << 30;  // Linux moves at most 2^31 − 4096 bytes a call

[[noreturn]] void fail(const std::string& what, int error) { throw Fault(what + " failed: " + std::strerror(error) + "."); }

int lock(int fd) {
  int result;
  do result = ::flock(fd, LOCK_EX | LOCK_NB);
  while (result != 0 && errno == EINTR);
  return result;
}

}  // namespace

OutputFile::OutputFile(std::string path, OpenMode mode) : path_(std::move(path)) {
  const char* name = path_.c_str();
  const auto open_as = [&](int flags) { return ::open(name, flags | O_RDWR | O_CLOEXEC, 0666); };
  const auto take_lock = [&] {
    if (lock(fd_) == 0) return;
    const int error = errno;
    ::close(fd_);
    fd_ = -1;
    if (error == EWOULDBLOCK) throw Fault("only one writer may have a file open, and another has this one.");
    fail("flock", error);
  };
  if (mode == OpenMode::replace) {
    // A new file takes the old one's name, so that a reader that has the old one mapped keeps it.
    fd_ = open_as(0);
    if (fd_ >= 0) {
      take_lock();
      if (::unlink(name) != 0) {
        const int error = errno;
        ::close(fd_);
        fd_ = -1;
        fail("unlink", error);
      }
      ::close(fd_);
    } else if (errno != ENOENT) {
      throw std::system_error(errno, std::generic_category(), path_);
    }
  }
  fd_ = open_as(mode == OpenMode::append ? 0 : O_CREAT | O_EXCL);
  if (fd_ < 0) throw std::system_error(errno, std::generic_category(), path_);
  take_lock();
}

OutputFile::~OutputFile() { close(); }

void OutputFile::close() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

uint64_t OutputFile::size() const {
  struct stat info {};
  if (::fstat(fd_, &info) != 0) fail("fstat", errno);
  return static_cast<uint64_t>(info.st_size);
}

void OutputFile::write(const void* data, uint64_t size, uint64_t offset) {
  const auto* p = static_cast<const uint8_t*>(data);
  while (size > 0) {
    const ssize_t done = ::pwrite(fd_, p, std::min(size, kLargestWrite), static_cast<off_t>(offset));
    if (done < 0) {
      if (errno == EINTR) continue;
      throw Fault(std::string("write failed: ") + std::strerror(errno) + ".", offset);
    }
    if (done == 0) throw Fault("write failed: the device took no byte.", offset);
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
  int result;
  do result = ::ftruncate(fd_, static_cast<off_t>(size));
  while (result != 0 && errno == EINTR);
  if (result != 0) fail("ftruncate", errno);
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
