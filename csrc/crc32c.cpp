#include "crc32c.hpp"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace mscan {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78u;

struct Tables {
  uint32_t slice[8][256];

  Tables() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t crc = byte;
      for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? kPolynomial : 0);
      slice[0][byte] = crc;
    }
    for (int k = 1; k < 8; ++k) {
      for (uint32_t byte = 0; byte < 256; ++byte) slice[k][byte] = (slice[k - 1][byte] >> 8) ^ slice[0][slice[k - 1][byte] & 255];
    }
  }
};

const Tables& tables() {
  static const Tables instance;
  return instance;
}

uint64_t load64(const uint8_t* p) {
  uint64_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

#if defined(__x86_64__) || (defined(__aarch64__) && defined(__linux__))
#define MSCAN_CRC_INSTRUCTION 1

// Appending n zero bytes to a message is linear in its crc: four table look-ups, given the table for n. Three streams of n bytes run in
// parallel (the instruction has a latency of three cycles and a throughput of one per cycle) and are combined with these tables.
struct Shift {
  uint32_t table[4][256];

  explicit Shift(size_t bytes) {
    const Tables& t = tables();
    uint32_t column[32];
    for (int bit = 0; bit < 32; ++bit) {
      uint32_t crc = 1u << bit;
      for (size_t i = 0; i < bytes; ++i) crc = (crc >> 8) ^ t.slice[0][crc & 255];
      column[bit] = crc;
    }
    for (int k = 0; k < 4; ++k) {
      for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t value = 0;
        for (int bit = 0; bit < 8; ++bit) value ^= (byte >> bit & 1) ? column[8 * k + bit] : 0;
        table[k][byte] = value;
      }
    }
  }

  uint32_t operator()(uint32_t crc) const {
    return table[0][crc & 255] ^ table[1][crc >> 8 & 255] ^ table[2][crc >> 16 & 255] ^ table[3][crc >> 24];
  }
};

#if defined(__x86_64__)
#define MSCAN_CRC_TARGET __attribute__((target("sse4.2")))
MSCAN_CRC_TARGET inline uint64_t step64(uint64_t crc, uint64_t word) { return _mm_crc32_u64(crc, word); }
MSCAN_CRC_TARGET inline uint32_t step8(uint32_t crc, uint8_t byte) { return _mm_crc32_u8(crc, byte); }
bool has_instruction() { return __builtin_cpu_supports("sse4.2"); }
#else
#define MSCAN_CRC_TARGET
inline uint64_t step64(uint64_t crc, uint64_t word) {
  uint32_t out;
  asm(".arch_extension crc\n\tcrc32cx %w0, %w1, %x2" : "=r"(out) : "r"(static_cast<uint32_t>(crc)), "r"(word));
  return out;
}
inline uint32_t step8(uint32_t crc, uint8_t byte) {
  uint32_t out;
  asm(".arch_extension crc\n\tcrc32cb %w0, %w1, %w2" : "=r"(out) : "r"(crc), "r"(static_cast<uint32_t>(byte)));
  return out;
}
bool has_instruction() { return (getauxval(AT_HWCAP) & (1u << 7)) != 0; }  // HWCAP_CRC32
#endif

template <size_t kBytes>
MSCAN_CRC_TARGET const uint8_t* three_streams(const uint8_t* p, size_t& size, uint64_t& crc, const Shift& shift) {
  while (size >= 3 * kBytes) {
    uint64_t a = crc, b = 0, c = 0;
    for (size_t i = 0; i < kBytes; i += 8) {
      a = step64(a, load64(p + i));
      b = step64(b, load64(p + kBytes + i));
      c = step64(c, load64(p + 2 * kBytes + i));
    }
    crc = shift(shift(static_cast<uint32_t>(a)) ^ static_cast<uint32_t>(b)) ^ static_cast<uint32_t>(c);
    p += 3 * kBytes;
    size -= 3 * kBytes;
  }
  return p;
}

MSCAN_CRC_TARGET uint32_t crc32c_instruction(const uint8_t* p, size_t size, uint32_t seed) {
  static const Shift shift_long(4096), shift_short(256);
  uint64_t crc = static_cast<uint32_t>(~seed);
  p = three_streams<4096>(p, size, crc, shift_long);
  p = three_streams<256>(p, size, crc, shift_short);
  for (; size >= 8; size -= 8, p += 8) crc = step64(crc, load64(p));
  uint32_t last = static_cast<uint32_t>(crc);
  for (; size > 0; --size) last = step8(last, *p++);
  return ~last;
}
#endif

}  // namespace

uint32_t crc32c_table(const void* data, size_t size, uint32_t seed) {
  const Tables& t = tables();
  const auto* p = static_cast<const uint8_t*>(data);
  uint32_t crc = ~seed;
  for (; size >= 8; size -= 8, p += 8) {
    const uint64_t word = load64(p) ^ crc;
    crc = t.slice[7][word & 255] ^ t.slice[6][word >> 8 & 255] ^ t.slice[5][word >> 16 & 255] ^ t.slice[4][word >> 24 & 255] ^
          t.slice[3][word >> 32 & 255] ^ t.slice[2][word >> 40 & 255] ^ t.slice[1][word >> 48 & 255] ^ t.slice[0][word >> 56];
  }
  for (; size > 0; --size) crc = (crc >> 8) ^ t.slice[0][(crc ^ *p++) & 255];
  return ~crc;
}

bool crc32c_is_hardware() {
#if defined(MSCAN_CRC_INSTRUCTION)
  static const bool available = has_instruction();
  return available;
#else
  return false;
#endif
}

uint32_t crc32c(const void* data, size_t size, uint32_t seed) {
#if defined(MSCAN_CRC_INSTRUCTION)
  if (crc32c_is_hardware()) return crc32c_instruction(static_cast<const uint8_t*>(data), size, seed);
#endif
  return crc32c_table(data, size, seed);
}

}  // namespace mscan
