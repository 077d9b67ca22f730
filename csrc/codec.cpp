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
  for (int i = 8; i >= 0; --i) p = std::fma(p, f, kLog2[i]);
  const float fraction = std::fma(p, f, -steps.fraction);
  float k = (static_cast<float>(exponent) + fraction) * steps.scale;
  k = std::min(std::max(k, 0.0f), 65532.0f);
  return static_cast<uint16_t>(static_cast<int32_t>(k + 0.5f) + 1);
}

// First finite value of a weight's columns. Shifted by it, a constant has deviations of exactly zero.
double first_finite(const float* plane, size_t rows, size_t columns, Span span) {
  for (size_t row = 0; row < rows; ++row) {
    const float* p = plane + row * columns + span.base;
    for (size_t block = 0; block < span.blocks; ++block) {
      if ((bits_of(p[block]) & 0x7FFFFFFFu) < static_cast<uint32_t>(kInfinity)) return p[block];
    }
  }
  return 0.0;
}

Moments moments_of(const SpanSums& sums, uint64_t cells) {
  Moments part;
  part.zeros = sums.zeros;
  part.missing = sums.missing;
  part.nonfinite = sums.nonfinite;
  part.count = cells - sums.missing - sums.nonfinite;
  if (part.count == 0) return part;
  const double n = static_cast<double>(part.count);
  part.mean = sums.shift + sums.sum / n;
  part.m2 = std::max(0.0, sums.squares - sums.sum * sums.sum / n);
  return part;
}

// Fewer rows than this are scanned along the rows: sums per column would cost more than they save.
constexpr size_t kFewRows = 4;

void scan_along_rows(const float* plane, size_t rows, size_t columns, Span span, SpanSums& sums, PlaneScan& scan) {
  for (size_t row = 0; row < rows; ++row) {
    const float* p = plane + row * columns + span.base;
    for (uint64_t block = 0; block < span.blocks; ++block) {
      const uint32_t bits = bits_of(p[block]), magnitude = bits & 0x7FFFFFFFu;
      const bool is_missing = magnitude > static_cast<uint32_t>(kInfinity), is_infinite = magnitude == static_cast<uint32_t>(kInfinity);
      sums.missing += is_missing;
      sums.nonfinite += is_infinite;
      sums.zeros += magnitude == 0;
      if (is_missing) continue;
      scan.negative |= magnitude != 0 && bits >> 31 != 0;
      if (is_infinite) continue;
      if (magnitude != 0) {
        scan.min_bits = std::min(scan.min_bits, magnitude);
        scan.max_bits = std::max(scan.max_bits, magnitude);
      }
      const double d = static_cast<double>(p[block]) - sums.shift;
      sums.sum += d;
      sums.squares += d * d;
    }
  }
}

PlaneScan scan_few_rows(const float* plane, size_t rows, size_t columns, const std::vector<Span>& spans, Moments* totals, size_t stride) {
  PlaneScan scan;
  for (size_t i = 0; i < spans.size(); ++i) {
    SpanSums sums;
    sums.shift = first_finite(plane, rows, columns, spans[i]);
    scan_along_rows(plane, rows, columns, spans[i], sums, scan);
    scan.missing += sums.missing;
    totals[i * stride].merge(moments_of(sums, rows * spans[i].blocks));
  }
  return scan;
}

#if defined(__x86_64__)
MSCAN_AVX2 PlaneScan scan_few_rows_avx2(const float* plane, size_t rows, size_t columns, const std::vector<Span>& spans, Moments* totals,
                                        size_t stride) {
  PlaneScan scan;
  avx2::Extremes extremes;
  for (size_t i = 0; i < spans.size(); ++i) {
    SpanSums sums;
    sums.shift = first_finite(plane, rows, columns, spans[i]);
    if (!avx2::scan_positive_span(plane, rows, columns, spans[i], sums, extremes)) {
      avx2::scan_span(plane, rows, columns, spans[i], sums, extremes);
    }
    scan.missing += sums.missing;
    totals[i * stride].merge(moments_of(sums, rows * spans[i].blocks));
  }
  extremes.give(scan);
  return scan;
}
#endif

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
  static const bool available = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
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
  // The value is rebuilt from its bits, not cast, so the logarithm is right in a thread that flushes denormals to zero.
  const auto log2_of = [](uint32_t bits) {
    if (bits >= static_cast<uint32_t>(kSmallestNormal)) return std::log2(static_cast<double>(float_of(bits)));
    return std::log2(static_cast<double>(bits)) - kDenormalExponent;
  };
  return {log2_of(scan.min_bits), log2_of(scan.max_bits)};
}

PlaneScan scan_spans(const float* plane, size_t rows, size_t columns, const std::vector<Span>& spans, ColumnSums& sums, Moments* totals,
                     size_t stride) {
  if (rows < kFewRows) {
#if defined(__x86_64__)
    if (codec_is_vectorised()) return scan_few_rows_avx2(plane, rows, columns, spans, totals, stride);
#endif
    return scan_few_rows(plane, rows, columns, spans, totals, stride);
  }
  sums.reset(columns);
  for (const Span& span : spans) {
    std::fill_n(sums.shift.begin() + static_cast<std::ptrdiff_t>(span.base), span.blocks, first_finite(plane, rows, columns, span));
  }
  PlaneScan scan = scan_plane(plane, rows, columns, sums);
  if (scan.negative) return scan;
  for (size_t i = 0; i < spans.size(); ++i) {
    SpanSums part;
    part.shift = sums.shift[spans[i].base];
    for (uint64_t c = spans[i].base; c < spans[i].base + spans[i].blocks; ++c) {
      part.sum += sums.sum[c];
      part.squares += sums.squares[c];
      part.zeros += static_cast<uint64_t>(sums.zeros[c]);
      part.missing += static_cast<uint64_t>(sums.missing[c]);
      part.nonfinite += static_cast<uint64_t>(sums.nonfinite[c]);
    }
    scan.missing += part.missing;
    totals[i * stride].merge(moments_of(part, rows * spans[i].blocks));
  }
  return scan;
}

void encode_log2u16(const float* values, size_t count, PlaneRange range, uint16_t* codes) {
  const Steps steps(range);
  size_t i = 0;
#if defined(__x86_64__)
  if (count >= 32 && codec_is_vectorised()) {
    avx2::encode(values, count, steps, codes);
    i = count;
  }
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
