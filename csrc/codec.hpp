// Conversion of planes of non-negative float32 to 16-bit codes and back, with statistics from the same pass.
//
// log2u16: with lo and hi the log2 of the smallest and largest positive finite value of the plane,
//
//     code 0       exact zero
//     code 1+k     2^(lo + k·(hi − lo)/65532),  k = 0 … 65532, clamped to the two values themselves
//     code 65534   +infinity
//     code 65535   missing (NaN)
//
// The logarithm is a float32 polynomial, exact to 1.2e-7; so the relative error of a decoded value is at most
// ln 2 · 0.51·(hi − lo)/65532 + 3e-7, that is 1.5e-3 over the whole range of float32 and 1.1e-4 over twenty binary orders. A constant
// plane is exact: 2^lo in float64 rounds to the value. The AVX2 and the plain form give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "format.hpp"

namespace mscan {

constexpr uint16_t kCodeZero = 0;
constexpr uint16_t kCodeInfinite = 65534;
constexpr uint16_t kCodeMissing = 65535;
constexpr double kSteps = 65532.0;

// Largest and smallest positive finite value as bit patterns, which sort like the values, and the number of missing values.
struct PlaneScan {
  uint32_t min_bits = 0x7FFFFFFFu;
  uint32_t max_bits = 0;
  bool negative = false;
  uint64_t missing = 0;
};

// Running sums of one plane, a column at a time. Values are shifted by `shift` so that a constant has no deviation at all.
struct ColumnSums {
  std::vector<double> shift, sum, squares;
  std::vector<int32_t> zeros, missing, nonfinite;
  void reset(size_t columns);
};

// Columns base … base + blocks of one weight.
struct Span {
  uint64_t base;
  uint64_t blocks;
};

// Sums of one weight's values, less `shift`.
struct SpanSums {
  double shift = 0, sum = 0, squares = 0;
  uint64_t zeros = 0, missing = 0, nonfinite = 0;
};

bool codec_is_vectorised();
void force_plain_codec(bool force);  // for tests: the plain form on a machine with AVX2

PlaneScan scan_plane(const float* plane, size_t rows, size_t columns, ColumnSums& sums);
PlaneRange plane_range(const PlaneScan& scan);

// Scans a plane and merges its statistics into totals[i] for spans[i], which cover every column; `stride` is the step between totals
// in elements.
PlaneScan scan_spans(const float* plane, size_t rows, size_t columns, const std::vector<Span>& spans, ColumnSums& scratch, Moments* totals,
                     size_t stride);

void encode_log2u16(const float* values, size_t count, PlaneRange range, uint16_t* codes);

// Decodes codes of one plane. 2^(lo + k·step) is a product of two powers, so two tables of 256 replace 65533 powers.
class Log2Decoder {
 public:
  explicit Log2Decoder(PlaneRange range);
  void decode(const uint16_t* codes, size_t count, float* values) const;

 private:
  double smallest_, largest_;
  double coarse_[256], fine_[256];
};

// Groups byte k of all elements, which zstd compresses better; `width` bytes per element.
void byte_shuffle(const uint8_t* in, size_t count, size_t width, uint8_t* out);
void byte_unshuffle(const uint8_t* in, size_t count, size_t width, uint8_t* out);

}  // namespace mscan
