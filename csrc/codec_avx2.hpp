// AVX2 forms of the loops that limit the encoding speed. Each computes the plain form in codec.cpp, eight lanes at a time, with the same
// operations in the same order, fused exactly where the plain form calls std::fma, so the bits agree.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "codec.hpp"
#include "log2_steps.hpp"

#define MSCAN_AVX2 __attribute__((target("avx2,fma,popcnt")))

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

// Classes of eight values; a lane is all ones where the class applies.
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

// The same for values that are all positive and finite, the usual case; returns false and changes nothing if one is not.
MSCAN_AVX2 inline bool scan_positive_span(const float* plane, size_t rows, size_t columns, Span span, SpanSums& sums, Extremes& extremes) {
  if (span.blocks < 8) return false;
  const __m256d shift = _mm256_set1_pd(sums.shift);
  const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const auto beyond = static_cast<int>(span.blocks & 7);
  const __m256i fresh = _mm256_cmpgt_epi32(places, _mm256_set1_epi32(7 - beyond));
  const __m256d fresh_a = _mm256_castsi256_pd(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(fresh)));
  const __m256d fresh_b = _mm256_castsi256_pd(_mm256_cvtepi32_epi64(_mm256_extracti128_si256(fresh, 1)));
  __m256d sum_a = _mm256_setzero_pd(), sum_b = sum_a, squares_a = sum_a, squares_b = sum_a;
  __m256i smallest = extremes.smallest, largest = extremes.largest;
  const auto add = [&](__m256d a, __m256d b) MSCAN_AVX2 {
    sum_a = _mm256_add_pd(sum_a, a);
    sum_b = _mm256_add_pd(sum_b, b);
    squares_a = _mm256_add_pd(squares_a, _mm256_mul_pd(a, a));
    squares_b = _mm256_add_pd(squares_b, _mm256_mul_pd(b, b));
  };
  for (size_t row = 0; row < rows; ++row) {
    const float* p = plane + row * columns + span.base;
    const auto take = [&](const float* eight, __m256d& a, __m256d& b) MSCAN_AVX2 {
      const __m256 x = _mm256_loadu_ps(eight);
      // As integers negative numbers are below zero, infinity and NaN above every finite number.
      smallest = _mm256_min_epi32(smallest, _mm256_castps_si256(x));
      largest = _mm256_max_epi32(largest, _mm256_castps_si256(x));
      a = _mm256_sub_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x)), shift);
      b = _mm256_sub_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)), shift);
    };
    __m256d a, b;
    for (uint64_t block = 0; block + 8 <= span.blocks; block += 8) {
      take(p + block, a, b);
      add(a, b);
    }
    if (beyond > 0) {  // the last eight, of which the first were added already
      take(p + span.blocks - 8, a, b);
      add(_mm256_and_pd(a, fresh_a), _mm256_and_pd(b, fresh_b));
    }
  }
  const __m256i zero_or_less = _mm256_cmpgt_epi32(_mm256_set1_epi32(1), smallest);
  const __m256i unbounded = _mm256_cmpgt_epi32(largest, _mm256_set1_epi32(kInfinity - 1));
  if (_mm256_movemask_epi8(_mm256_or_si256(zero_or_less, unbounded)) != 0) return false;
  extremes.smallest = smallest;
  extremes.largest = largest;
  sums.sum = total(sum_a, sum_b);
  sums.squares = total(squares_a, squares_b);
  return true;
}

// log2 of mantissas in [√½, √2) less `fraction`, plus the exponents, in steps, as codes. Several vectors at
// once (kVectors), because one alone would wait for its own last product nineteen times.
template <size_t kVectors>
MSCAN_AVX2 inline void codes_of(const __m256i* exponent, const __m256i* mantissa, const Steps& steps, __m256i* codes) {
  __m256 f[kVectors], p[kVectors];
  for (size_t v = 0; v < kVectors; ++v) {
    f[v] = _mm256_sub_ps(_mm256_castsi256_ps(mantissa[v]), _mm256_set1_ps(1.0f));
    p[v] = _mm256_set1_ps(kLog2[9]);
  }
  for (int i = 8; i >= 0; --i) {
    const __m256 next = _mm256_set1_ps(kLog2[i]);
    for (size_t v = 0; v < kVectors; ++v) p[v] = _mm256_fmadd_ps(p[v], f[v], next);
    // Stops the compiler from serialising the chains of the vectors.
    if constexpr (kVectors == 4) asm volatile("" : "+x"(p[0]), "+x"(p[1]), "+x"(p[2]), "+x"(p[3]));
  }
  for (size_t v = 0; v < kVectors; ++v) {
    const __m256 fraction = _mm256_fmsub_ps(p[v], f[v], _mm256_set1_ps(steps.fraction));
    __m256 k = _mm256_mul_ps(_mm256_add_ps(_mm256_cvtepi32_ps(exponent[v]), fraction), _mm256_set1_ps(steps.scale));
    k = _mm256_min_ps(_mm256_max_ps(k, _mm256_setzero_ps()), _mm256_set1_ps(65532.0f));
    codes[v] = _mm256_add_epi32(_mm256_cvttps_epi32(_mm256_add_ps(k, _mm256_set1_ps(0.5f))), _mm256_set1_epi32(1));
  }
}

MSCAN_AVX2 inline void split(__m256i normal, const Steps& steps, __m256i& exponent, __m256i& mantissa) {
  const __m256i centre = _mm256_set1_epi32(kSqrtHalf), offset = _mm256_sub_epi32(normal, centre);
  mantissa = _mm256_add_epi32(_mm256_and_si256(offset, _mm256_set1_epi32(0x7FFFFF)), centre);
  exponent = _mm256_sub_epi32(_mm256_srai_epi32(offset, 23), _mm256_set1_epi32(steps.exponent));
}

// Eight values of any kind.
MSCAN_AVX2 inline __m256i encode8(__m256i magnitude, const Steps& steps) {
  const __m256i infinity = _mm256_set1_epi32(kInfinity);
  const __m256i tiny = _mm256_cmpgt_epi32(_mm256_set1_epi32(kSmallestNormal), magnitude);
  const __m256i normal = _mm256_blendv_epi8(magnitude, _mm256_castps_si256(_mm256_cvtepi32_ps(magnitude)), tiny);
  __m256i exponent, mantissa, code;
  split(normal, steps, exponent, mantissa);
  exponent = _mm256_sub_epi32(exponent, _mm256_and_si256(tiny, _mm256_set1_epi32(kDenormalExponent)));
  codes_of<1>(&exponent, &mantissa, steps, &code);
  code = _mm256_andnot_si256(_mm256_cmpeq_epi32(magnitude, _mm256_setzero_si256()), code);
  code = _mm256_blendv_epi8(code, _mm256_set1_epi32(kCodeInfinite), _mm256_cmpeq_epi32(magnitude, infinity));
  return _mm256_blendv_epi8(code, _mm256_set1_epi32(kCodeMissing), _mm256_cmpgt_epi32(magnitude, infinity));
}

MSCAN_AVX2 inline void store_codes(uint16_t* codes, __m256i first, __m256i second) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0xD8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), packed);
}

// Encodes count values, 32 or more. Thirty-two normal numbers, the usual case, need no check of each value.
MSCAN_AVX2 inline void encode(const float* values, size_t count, const Steps& steps, uint16_t* codes) {
  const __m256i smallest = _mm256_set1_epi32(kSmallestNormal), normals = _mm256_set1_epi32(kInfinity - kSmallestNormal - 1);
  for (size_t next = 0; next < count; next += 32) {
    const size_t i = next + 32 <= count ? next : count - 32;  // the last ones again, rather than a few by themselves
    __m256i magnitude[4], code[4], above = _mm256_setzero_si256();
    for (int v = 0; v < 4; ++v) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i) + v);
      magnitude[v] = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
      above = _mm256_max_epu32(above, _mm256_sub_epi32(magnitude[v], smallest));
    }
    if (_mm256_movemask_epi8(_mm256_cmpeq_epi32(_mm256_max_epu32(above, normals), normals)) == -1) {
      __m256i exponent[4], mantissa[4];
      for (int v = 0; v < 4; ++v) split(magnitude[v], steps, exponent[v], mantissa[v]);
      codes_of<4>(exponent, mantissa, steps, code);
    } else {
      for (int v = 0; v < 4; ++v) code[v] = encode8(magnitude[v], steps);
    }
    store_codes(codes + i, code[0], code[1]);
    store_codes(codes + i + 16, code[2], code[3]);
  }
}

}  // namespace mscan::avx2
#endif
