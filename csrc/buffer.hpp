// A growing byte buffer that is not cleared: the writer fills every byte.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "format.hpp"

namespace mscan {

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  uint8_t* data() { return data_; }
  uint64_t size() const { return size_; }
  void clear() { size_ = 0; }
  void shrink_to(uint64_t size) { size_ = size; }

  // Makes room for `count` more bytes and returns their start; invalidates earlier pointers.
  uint8_t* grow(uint64_t count) {
    if (size_ + count > capacity_) {
      const uint64_t wanted = align_up(size_ + count + capacity_ / 2);
      auto* bigger = static_cast<uint8_t*>(std::aligned_alloc(kAlign, wanted));
      if (bigger == nullptr) throw std::bad_alloc();
      if (size_ > 0) std::memcpy(bigger, data_, size_);
      std::free(data_);
      data_ = bigger;
      capacity_ = wanted;
    }
    uint8_t* start = data_ + size_;
    size_ += count;
    return start;
  }

  void append(const void* bytes, uint64_t count) {
    if (count > 0) std::memcpy(grow(count), bytes, count);
  }

  // Zeros up to the next multiple of 64, counted from `origin`.
  void pad(uint64_t origin = 0) {
    const uint64_t gap = align_up(size_ - origin) - (size_ - origin);
    if (gap > 0) std::memset(grow(gap), 0, gap);
  }

 private:
  uint8_t* data_ = nullptr;
  uint64_t size_ = 0;
  uint64_t capacity_ = 0;
};

}  // namespace mscan
