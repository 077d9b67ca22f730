#include "codec.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "codec_avx2.hpp"
#include "log2_steps.hpp"

namespace mscan {
namespace {

std::atomic<bool> plain_only{false};

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void scan_columns(const float* plane, size_t rows, size_t columns, size_t from, ColumnSums& sums, PlaneScan& scan) {
  for (size_t row = 0; row < rows; ++row) {
    for (size_t column = from; column < columns; ++column) {
      const float x = plane[row * columns + column];
      const uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFFu;
      if (magnitude > static_cast<uint32_t>(kInfinity)) {
        ++sums.missing[column];
        continue;
      }
      if (magnitude != 0 && bits >> 31) scan.negative = true;
      if (magnitude == static_cast<uint32_t>(kInfinity)) {
        ++sums.nonfinite[column];
        continue;
      }
      if (magnitude == 0) {
        ++sums.zeros[column];
      } else {
        scan.min_bits = std::min(scan.min_bits, magnitude);
        scan.max_bits = std::max(scan.max_bits, magnitude);
      }
      const double d = static_cast<double>(x) - sums.shift[column];
      sums.sum[column] += d;
      sums.squares[column] += d * d;
    }
  }
}

uint16_t encode_one(float value, const Steps& steps) {
  const uint32_t bits = bits_of(value) & 0x7FFFFFFFu;
  const auto magnitude = static_cast<int32_t>(bits);
  if (magnitude == 0) return kCodeZero;
  if (magnitude >= kInfinity) return magnitude > kInfinity ? kCodeMissing : kCodeInfinite;
  const bool tiny = magnitude < kSmallestNormal;
  const int32_t normal = tiny ? static_cast<int32_t>(bits_of(static_cast<float>(magnitude))) : magnitude;
  const int32_t offset = normal - kSqrtHalf;
  const int32_t exponent = (offset >> 23) - steps.exponent - (tiny ? kDenormalExponent : 0);
  const float f = float_of(static_cast<uint32_t>((offset & 0x7FFFFF) + kSqrtHalf)) - 1.0f;
  float p = kLog2[9];
  for (int i = 8; i >= 0; --i) p = p * f + kLog2[i];
  const float fraction = p * f - steps.fraction;
  float k = (static_cast<float>(exponent) + fraction) * steps.scale;
  k = std::min(std::max(k, 0.0f), 65532.0f);
  return static_cast<uint16_t>(static_cast<int32_t>(k + 0.5f) + 1);
}

// First finite value of a weight's columns: the shift that makes a constant's deviations exactly zero.
double first_finite(const float* plane, size_t rows, size_t columns, Span span) {
  for (size_t row = 0; row < rows; ++row) {
    const float* p = plane + row * columns + span.base;
    for (size_t block = 0; block < span.blocks; ++block) {
      if ((bits_of(p[block]) & 0x7FFFFFFFu) < static_cast<uint32_t>(kInfinity)) return p[block];
    }
  }
  return 0.0;
}

// Mean and m2 from sums of values less `shift`.
void finish(Moments& part, double shift, double sum, double squares) {
  if (part.count == 0) return;
  const double n = static_cast<double>(part.count);
  part.mean = shift + sum / n;
  part.m2 = std::max(0.0, squares - sum * sum / n);
}

constexpr size_t kFewRows = 4;

// The same without sums per column, which cost more than they save when there are few rows.
PlaneScan scan_few_rows(const float* plane, size_t rows, size_t columns, const std::vector<Span>& spans, Moments* totals, size_t stride) {
  PlaneScan scan;
  for (size_t i = 0; i < spans.size(); ++i) {
    Moments part;
    const double shift = first_finite(plane, rows, columns, spans[i]);
    double sum = 0, squares = 0;
    uint64_t zeros = 0, missing = 0, nonfinite = 0;
    uint32_t smallest = scan.min_bits, largest = scan.max_bits, negative = 0;
    for (size_t row = 0; row < rows; ++row) {
      const float* p = plane + row * columns + spans[i].base;
      for (uint64_t block = 0; block < spans[i].blocks; ++block) {
        const uint32_t bits = bits_of(p[block]), magnitude = bits & 0x7FFFFFFFu;
        const bool is_missing = magnitude > static_cast<uint32_t>(kInfinity), is_infinite = magnitude == static_cast<uint32_t>(kInfinity);
        const bool has_log = magnitude - 1 < static_cast<uint32_t>(kInfinity) - 1;
        missing += is_missing;
        nonfinite += is_infinite;
        zeros += magnitude == 0;
        negative |= has_log || is_infinite ? bits : 0;
        smallest = std::min(smallest, has_log ? magnitude : 0x7FFFFFFFu);
        largest = std::max(largest, has_log ? magnitude : 0);
        const double d = is_missing || is_infinite ? 0.0 : static_cast<double>(p[block]) - shift;
        sum += d;
        squares += d * d;
      }
    }
    scan.min_bits = smallest;
    scan.max_bits = largest;
    scan.negative |= (negative >> 31) != 0;
    part.zeros = zeros;
    part.missing = missing;
    part.nonfinite = nonfinite;
    scan.missing += missing;
    part.count = rows * spans[i].blocks - missing - nonfinite;
    finish(part, shift, sum, squares);
    totals[i * stride].merge(part);
  }
  return scan;
}

}  // namespace

void Moments::merge(const Moments& other) {
  zeros += other.zeros;
  missing += other.missing;
  nonfinite += other.nonfinite;
  if (other.count == 0) return;
  if (count == 0) {
    count = other.count;
    mean = other.mean;
    m2 = other.m2;
    return;
  }
  const double n = static_cast<double>(count) + static_cast<double>(other.count);
  const double delta = other.mean - mean;
  const double share = static_cast<double>(other.count) / n;
  m2 += other.m2 + delta * delta * static_cast<double>(count) * share;
  mean += delta * share;
  count += other.count;
}

void ColumnSums::reset(size_t columns) {
  shift.assign(columns, 0.0);
  sum.assign(columns, 0.0);
  squares.assign(columns, 0.0);
  zeros.assign(columns, 0);
  missing.assign(columns, 0);
  nonfinite.assign(columns, 0);
}

bool codec_is_vectorised() {
#if defined(__x86_64__)
  static const bool available = __builtin_cpu_supports("avx2");
  return available && !plain_only.load(std::memory_order_relaxed);
#else
  return false;
#endif
}

void force_plain_codec(bool force) { plain_only.store(force, std::memory_order_relaxed); }

PlaneScan scan_plane(const float* plane, size_t rows, size_t columns, ColumnSums& sums) {
  PlaneScan scan;
  size_t done = 0;
#if defined(__x86_64__)
  if (codec_is_vectorised()) {
    avx2::scan_plane(plane, rows, columns, sums, scan);
    done = columns & ~size_t{7};
  }
#endif
  scan_columns(plane, rows, columns, done, sums, scan);
  return scan;
}

PlaneRange plane_range(const PlaneScan& scan) {
  if (scan.max_bits == 0) return {0.0, 0.0};
  // The value is rebuilt from its bits, not cast, so that a thread that flushes denormals to zero still gets its logarithm.
  const auto log2_of = [](uint32_t bits) {
    if (bits >= static_cast<uint32_t>(kSmallestNormal)) return std::log2(static_cast<double>(float_of(bits)));
    return std::log2(static_cast<double>(bits)) - kDenormalExponent;
  };
  return {log2_of(scan.min_bits), log2_of(scan.max_bits)};
}

PlaneScan scan_spans(const float* plane, size_t rows, size_t columns, const std::vector<Span>& spans, ColumnSums& sums, Moments* totals,
                     size_t stride) {
  if (rows < kFewRows) return scan_few_rows(plane, rows, columns, spans, totals, stride);
  sums.reset(columns);
  for (const Span& span : spans) {
    std::fill_n(sums.shift.begin() + static_cast<std::ptrdiff_t>(span.base), span.blocks, first_finite(plane, rows, columns, span));
  }
  PlaneScan scan = scan_plane(plane, rows, columns, sums);
  if (scan.negative) return scan;
  for (size_t i = 0; i < spans.size(); ++i) {
    Moments part;
    double sum = 0, squares = 0;
    for (uint64_t c = spans[i].base; c < spans[i].base + spans[i].blocks; ++c) {
      sum += sums.sum[c];
      squares += sums.squares[c];
      part.zeros += static_cast<uint64_t>(sums.zeros[c]);
      part.missing += static_cast<uint64_t>(sums.missing[c]);
      part.nonfinite += static_cast<uint64_t>(sums.nonfinite[c]);
    }
    part.count = rows * spans[i].blocks - part.missing - part.nonfinite;
    scan.missing += part.missing;
    finish(part, sums.shift[spans[i].base], sum, squares);
    totals[i * stride].merge(part);
  }
  return scan;
}

void encode_log2u16(const float* values, size_t count, PlaneRange range, uint16_t* codes) {
  const Steps steps(range);
  size_t i = 0;
#if defined(__x86_64__)
  if (codec_is_vectorised()) i = avx2::encode(values, count, steps, codes);
#endif
  for (; i < count; ++i) codes[i] = encode_one(values[i], steps);
}

Log2Decoder::Log2Decoder(PlaneRange range)
    : smallest_(static_cast<float>(std::exp2(range.lo))), largest_(static_cast<float>(std::exp2(range.hi))) {
  const double step = (range.hi - range.lo) / kSteps;
  for (int k = 0; k < 256; ++k) {
    coarse_[k] = std::exp2(range.lo + 256.0 * k * step);
    fine_[k] = std::exp2(k * step);
  }
}

void Log2Decoder::decode(const uint16_t* codes, size_t count, float* values) const {
  for (size_t i = 0; i < count; ++i) {
    const uint16_t code = codes[i];
    const auto k = static_cast<uint16_t>(code - 1);
    const double value = std::min(std::max(coarse_[k >> 8] * fine_[k & 255], smallest_), largest_);
    const uint32_t special = code == kCodeZero ? 0 : code == kCodeInfinite ? 0x7F800000u : 0x7FC00000u;
    const bool is_special = static_cast<uint16_t>(code + 2) <= 2;  // 65534, 65535, 0
    values[i] = is_special ? float_of(special) : static_cast<float>(value);
  }
}

void byte_shuffle(const uint8_t* in, size_t count, size_t width, uint8_t* out) {
  for (size_t byte = 0; byte < width; ++byte) {
    for (size_t i = 0; i < count; ++i) out[byte * count + i] = in[i * width + byte];
  }
}

void byte_unshuffle(const uint8_t* in, size_t count, size_t width, uint8_t* out) {
  for (size_t byte = 0; byte < width; ++byte) {
    for (size_t i = 0; i < count; ++i) out[i * width + byte] = in[byte * count + i];
  }
}

}  // namespace mscan
