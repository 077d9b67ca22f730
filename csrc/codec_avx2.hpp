// AVX2 forms of the loops that set the encoding speed. Each is the plain form in codec.cpp, eight lanes at a time; codes come from the
// same operations in the same order and without fused multiply-add, so their bits agree.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "codec.hpp"
#include "log2_steps.hpp"

#define MSCAN_AVX2 __attribute__((target("avx2,popcnt")))

namespace mscan::avx2 {

constexpr size_t kRowsAtOnce = 16;  // rows whose sums stay in registers before they go back to memory

MSCAN_AVX2 inline void add_half(__m128 x, __m128i bad, __m256d shift, __m256d& sum, __m256d& squares) {
  const __m256d leave_out = _mm256_castsi256_pd(_mm256_cvtepi32_epi64(bad));
  const __m256d d = _mm256_andnot_pd(leave_out, _mm256_sub_pd(_mm256_cvtps_pd(x), shift));
  sum = _mm256_add_pd(sum, d);
  squares = _mm256_add_pd(squares, _mm256_mul_pd(d, d));
}

MSCAN_AVX2 inline void count_lanes(int32_t* counts, __m256i less) {
  auto* p = reinterpret_cast<__m256i*>(counts);
  _mm256_storeu_si256(p, _mm256_sub_epi32(_mm256_loadu_si256(p), less));
}

// What eight values are: all ones in the lanes it holds for.
struct Kinds {
  __m256i magnitude, missing, infinite, zero;

  MSCAN_AVX2 explicit Kinds(__m256 x) {
    const __m256i infinity = _mm256_set1_epi32(kInfinity);
    magnitude = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7FFFFFFF));
    missing = _mm256_cmpgt_epi32(magnitude, infinity);
    infinite = _mm256_cmpeq_epi32(magnitude, infinity);
    zero = _mm256_cmpeq_epi32(magnitude, _mm256_setzero_si256());
  }
};

struct Extremes {
  __m256i smallest, largest, negative;

  MSCAN_AVX2 Extremes() : smallest(_mm256_set1_epi32(0x7FFFFFFF)), largest(_mm256_setzero_si256()), negative(_mm256_setzero_si256()) {}

  MSCAN_AVX2 void take(__m256 x, const Kinds& is) {
    const __m256i no_log = _mm256_or_si256(_mm256_or_si256(is.missing, is.infinite), is.zero);
    smallest = _mm256_min_epi32(smallest, _mm256_and_si256(_mm256_or_si256(is.magnitude, no_log), _mm256_set1_epi32(0x7FFFFFFF)));
    largest = _mm256_max_epi32(largest, _mm256_andnot_si256(no_log, is.magnitude));
    negative = _mm256_or_si256(negative, _mm256_andnot_si256(_mm256_or_si256(is.missing, is.zero), _mm256_castps_si256(x)));
  }

  MSCAN_AVX2 void give(PlaneScan& scan) const {
    alignas(32) uint32_t low[8], high[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(low), smallest);
    _mm256_store_si256(reinterpret_cast<__m256i*>(high), largest);
    for (int lane = 0; lane < 8; ++lane) {
      if (low[lane] < scan.min_bits) scan.min_bits = low[lane];
      if (high[lane] > scan.max_bits) scan.max_bits = high[lane];
    }
    scan.negative |= _mm256_movemask_ps(_mm256_castsi256_ps(negative)) != 0;
  }
};

// Scans the first columns & ~7 columns.
MSCAN_AVX2 inline void scan_plane(const float* plane, size_t rows, size_t columns, ColumnSums& sums, PlaneScan& scan) {
  Extremes extremes;
  for (size_t first = 0; first < rows; first += kRowsAtOnce) {
    const size_t last = first + kRowsAtOnce < rows ? first + kRowsAtOnce : rows;
    for (size_t column = 0; column + 8 <= columns; column += 8) {
      __m256d sum_a = _mm256_loadu_pd(&sums.sum[column]), sum_b = _mm256_loadu_pd(&sums.sum[column + 4]);
      __m256d squares_a = _mm256_loadu_pd(&sums.squares[column]), squares_b = _mm256_loadu_pd(&sums.squares[column + 4]);
      __m256i zeros = _mm256_setzero_si256(), missing = zeros, nonfinite = zeros;
      const __m256d shift_a = _mm256_loadu_pd(&sums.shift[column]), shift_b = _mm256_loadu_pd(&sums.shift[column + 4]);
      for (size_t row = first; row < last; ++row) {
        const __m256 x = _mm256_loadu_ps(plane + row * columns + column);
        const Kinds is(x);
        extremes.take(x, is);
        zeros = _mm256_add_epi32(zeros, is.zero);
        missing = _mm256_add_epi32(missing, is.missing);
        nonfinite = _mm256_add_epi32(nonfinite, is.infinite);
        const __m256i bad = _mm256_or_si256(is.missing, is.infinite);
        add_half(_mm256_castps256_ps128(x), _mm256_castsi256_si128(bad), shift_a, sum_a, squares_a);
        add_half(_mm256_extractf128_ps(x, 1), _mm256_extracti128_si256(bad, 1), shift_b, sum_b, squares_b);
      }
      _mm256_storeu_pd(&sums.sum[column], sum_a);
      _mm256_storeu_pd(&sums.sum[column + 4], sum_b);
      _mm256_storeu_pd(&sums.squares[column], squares_a);
      _mm256_storeu_pd(&sums.squares[column + 4], squares_b);
      count_lanes(&sums.zeros[column], zeros);
      count_lanes(&sums.missing[column], missing);
      count_lanes(&sums.nonfinite[column], nonfinite);
    }
  }
  extremes.give(scan);
}

MSCAN_AVX2 inline uint64_t lanes(__m256i mask) {
  return static_cast<uint64_t>(__builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(mask)))));
}

MSCAN_AVX2 inline double total(__m256d a, __m256d b) {
  alignas(32) double part[4];
  _mm256_store_pd(part, _mm256_add_pd(a, b));
  return (part[0] + part[2]) + (part[1] + part[3]);
}

// Scans one weight's columns, eight along the row at a time.
MSCAN_AVX2 inline void scan_span(const float* plane, size_t rows, size_t columns, Span span, SpanSums& sums, Extremes& extremes) {
  const __m256d shift = _mm256_set1_pd(sums.shift);
  const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256d sum_a = _mm256_setzero_pd(), sum_b = sum_a, squares_a = sum_a, squares_b = sum_a;
  for (size_t row = 0; row < rows; ++row) {
    const float* p = plane + row * columns + span.base;
    for (uint64_t block = 0; block < span.blocks; block += 8) {
      const auto left = static_cast<int>(span.blocks - block < 8 ? span.blocks - block : 8);
      const __m256i live = _mm256_cmpgt_epi32(_mm256_set1_epi32(left), places);
      const __m256 x = _mm256_maskload_ps(p + block, live);
      const Kinds is(x);
      extremes.take(x, is);
      sums.zeros += lanes(_mm256_and_si256(is.zero, live));
      sums.missing += lanes(is.missing);
      sums.nonfinite += lanes(is.infinite);
      const __m256i bad = _mm256_or_si256(_mm256_or_si256(is.missing, is.infinite), _mm256_cmpeq_epi32(live, _mm256_setzero_si256()));
      add_half(_mm256_castps256_ps128(x), _mm256_castsi256_si128(bad), shift, sum_a, squares_a);
      add_half(_mm256_extractf128_ps(x, 1), _mm256_extracti128_si256(bad, 1), shift, sum_b, squares_b);
    }
  }
  sums.sum = total(sum_a, sum_b);
  sums.squares = total(squares_a, squares_b);
}

MSCAN_AVX2 inline __m256i encode8(const float* values, const Steps& steps) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  const __m256i infinity = _mm256_set1_epi32(kInfinity), centre = _mm256_set1_epi32(kSqrtHalf);
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
  const __m256i tiny = _mm256_cmpgt_epi32(_mm256_set1_epi32(kSmallestNormal), magnitude);
  const __m256i normal = _mm256_blendv_epi8(magnitude, _mm256_castps_si256(_mm256_cvtepi32_ps(magnitude)), tiny);
  const __m256i offset = _mm256_sub_epi32(normal, centre);
  const __m256i mantissa = _mm256_add_epi32(_mm256_and_si256(offset, _mm256_set1_epi32(0x7FFFFF)), centre);
  __m256i exponent = _mm256_sub_epi32(_mm256_srai_epi32(offset, 23), _mm256_set1_epi32(steps.exponent));
  exponent = _mm256_sub_epi32(exponent, _mm256_and_si256(tiny, _mm256_set1_epi32(kDenormalExponent)));

  const __m256 f = _mm256_sub_ps(_mm256_castsi256_ps(mantissa), _mm256_set1_ps(1.0f));
  __m256 p = _mm256_set1_ps(kLog2[9]);
  for (int i = 8; i >= 0; --i) p = _mm256_add_ps(_mm256_mul_ps(p, f), _mm256_set1_ps(kLog2[i]));
  const __m256 fraction = _mm256_sub_ps(_mm256_mul_ps(p, f), _mm256_set1_ps(steps.fraction));
  __m256 k = _mm256_mul_ps(_mm256_add_ps(_mm256_cvtepi32_ps(exponent), fraction), _mm256_set1_ps(steps.scale));
  k = _mm256_min_ps(_mm256_max_ps(k, _mm256_setzero_ps()), _mm256_set1_ps(65532.0f));
  __m256i code = _mm256_add_epi32(_mm256_cvttps_epi32(_mm256_add_ps(k, _mm256_set1_ps(0.5f))), _mm256_set1_epi32(1));

  code = _mm256_andnot_si256(_mm256_cmpeq_epi32(magnitude, _mm256_setzero_si256()), code);
  code = _mm256_blendv_epi8(code, _mm256_set1_epi32(kCodeInfinite), _mm256_cmpeq_epi32(magnitude, infinity));
  return _mm256_blendv_epi8(code, _mm256_set1_epi32(kCodeMissing), _mm256_cmpgt_epi32(magnitude, infinity));
}

// Encodes the first count & ~15 values and returns how many.
MSCAN_AVX2 inline size_t encode(const float* values, size_t count, const Steps& steps, uint16_t* codes) {
  size_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m256i packed = _mm256_packus_epi32(encode8(values + i, steps), encode8(values + i + 8, steps));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), _mm256_permute4x64_epi64(packed, 0xD8));
  }
  return i;
}

}  // namespace mscan::avx2
#endif
