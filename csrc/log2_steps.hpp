// Constants of the float32 logarithm, shared by the plain and the AVX2 form.
#pragma once

#include <cmath>
#include <cstdint>

#include "format.hpp"

namespace mscan {

// log2(1 + f)/f for f in [√½ − 1, √2 − 1], least squares on 400 Chebyshev nodes; |error| of the logarithm ≤ 2.1e-9 before rounding.
constexpr float kLog2[10] = {1.4426950216293335f,  -0.7213473320007324f, 0.4808982014656067f,  -0.3606966733932495f, 0.28856903314590454f,
                             -0.23961789906024933f, 0.20457172393798828f, -0.1910315454006195f, 0.18633928894996643f, -0.11021894216537476f};
constexpr int32_t kSqrtHalf = 0x3F3504F3;  // bits of √½: mantissas are centred on 1
constexpr int32_t kInfinity = 0x7F800000;
constexpr int32_t kSmallestNormal = 0x00800000;
constexpr int32_t kDenormalExponent = 149;  // a denormal's bits, taken as an integer, are the value times 2^149

// lo split into integer and fraction, so that a narrow plane keeps the precision of its fractions.
struct Steps {
  int32_t exponent;
  float fraction;
  float scale;

  explicit Steps(PlaneRange range)
      : exponent(static_cast<int32_t>(std::floor(range.lo))),
        fraction(static_cast<float>(range.lo - std::floor(range.lo))),
        scale(range.hi > range.lo ? static_cast<float>(65532.0 / (range.hi - range.lo)) : 0.0f) {}
};

}  // namespace mscan
