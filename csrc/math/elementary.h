// Exponentials and logarithms of float and double that vectorise in plain loops.
//
// Polynomials are minimax fits (relative error below 8e-8) whose constant term is exact. Every function is therefore
// exact at its fixed point and relatively accurate near it: exp2(0) = 1, and the two gap functions vanish like x^2/2.
// Maxima are written `a > b ? a : b` with the variable second: that is x86's MAXPS, and a NaN in the variable passes
// through. Each value depends on one condition only: the compiler turns nested conditions into branches and then does
// not vectorise the loop.
#pragma once
#include <math.h>

#include <cstdint>

#include "gpu_functions.h"

namespace fastkd::FASTKD_ISA {

inline constexpr double kLog2E = 1.4426950408889634074;
inline constexpr double kLn2 = 0.69314718055994530942;

template <class To, class From>
FASTKD_INLINE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  __builtin_memcpy(&out, &value, sizeof(To));
  return out;
}

template <class Real>
FASTKD_INLINE Real at_least(Real bound, Real x) {
  return bound > x ? bound : x;
}

template <class Real>
FASTKD_INLINE Real at_most(Real bound, Real x) {
  return bound < x ? bound : x;
}

FASTKD_INLINE float magnitude(float x) { return __builtin_fabsf(x); }
FASTKD_INLINE double magnitude(double x) { return __builtin_fabs(x); }
FASTKD_INLINE float with_sign(float size, float sign) { return __builtin_copysignf(size, sign); }
FASTKD_INLINE double with_sign(double size, double sign) { return __builtin_copysign(size, sign); }

// The value of the last bit of x's mantissa, for a normal number x.
FASTKD_INLINE double last_digit(double x) {
  return bit_cast<double>(bit_cast<uint64_t>(x) & 0x7ff0000000000000u) * 2.220446049250313e-16;
}
FASTKD_INLINE double last_digit(float x) { return last_digit(double(x)) * 536870912.0; }

// The sign of x, -1, 0 or 1, without a branch. Below the smallest normal float the result falls gradually from 1 to 0.
template <class Real>
FASTKD_INLINE Real sign_of(Real x) {
  return at_most(Real(1), at_least(Real(-1), x * Real(3e38)));
}

template <class Real>
FASTKD_INLINE Real select(bool condition, Real yes, Real no) {
  return condition ? yes : no;
}

// (2^f - 1) / f for |f| <= 1/2.
FASTKD_INLINE float exp2_curve(float f) {
  float p = 1.5403512e-4f;
  p = p * f + 1.3390736e-3f;
  p = p * f + 9.6182376e-3f;
  p = p * f + 5.5503573e-2f;
  p = p * f + 2.4022649e-1f;
  p = p * f + 6.9314718e-1f;
  return p;
}

// 2^x for x <= 127; 0 for x = -inf. Below -126 the error is at most 2^-126.
FASTKD_INLINE float exp2_of(float x) {
#ifdef FASTKD_GPU_FUNCTIONS
  return gpu::exp2(x);
#else
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const float z = at_least(-127.0f, x);
  const float shifted = z + kRound;
  const float f = z - (shifted - kRound);
  const float p = exp2_curve(f) * f + 1.0f;
  return bit_cast<float>(bit_cast<uint32_t>(p) + (bit_cast<uint32_t>(shifted) << 23));
#endif
}
FASTKD_INLINE double exp2_of(double x) { return ::exp2(x); }

// 2^x, x <= 0, as a power of two and the rest, which vanishes with x; 0 of NaN. Differences of such numbers, taken part
// by part, are relatively accurate also where both are nearly 1.
template <class Real>
struct Exp2 {
  Real power, rest;
  FASTKD_INLINE Real value() const { return power + rest; }
  FASTKD_INLINE Real minus(Exp2 other) const { return (power - other.power) + (rest - other.rest); }
};

FASTKD_INLINE Exp2<float> exp2_parts(float x) {
  constexpr float kRound = 12582912.0f;
  const float z = x > -127.0f ? x : -127.0f, shifted = z + kRound, f = z - (shifted - kRound);
  const float power = bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
  return {power, power * (exp2_curve(f) * f)};
}

// The same, on a GPU in a single instruction, with an error of 2 units in the last place and 0 below 2^-126.
FASTKD_INLINE float exp2_fast(float x) {
#ifdef FASTKD_GPU_FUNCTIONS
  return gpu::exp2_approx(x);
#else
  return exp2_of(x);
#endif
}

// a b + c with one rounding.
FASTKD_INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// log2(x) for positive, normal x, as an integer and a fraction in [-1/2, 1/2]. The difference of two logarithms taken
// part by part keeps the digits that rounding would lose if both were single large numbers.
template <class Real>
struct Log2 {
  Real exponent, fraction;
  FASTKD_INLINE Real value() const { return exponent + fraction; }
  FASTKD_INLINE Real minus(Log2 other) const { return (exponent - other.exponent) + (fraction - other.fraction); }
};

FASTKD_INLINE Log2<float> log2_parts(float x) {
  const int32_t exponent = (bit_cast<int32_t>(x) - 0x3f3504f3) >> 23;  // x = m 2^exponent, m in [sqrt(1/2), sqrt(2))
  const float m = bit_cast<float>(bit_cast<int32_t>(x) - exponent * (1 << 23));
  const float t = m - 1.0f;
  float p = 1.2583706e-1f;
  p = p * t - 2.0726982e-1f;
  p = p * t + 2.1571562e-1f;
  p = p * t - 2.3894481e-1f;
  p = p * t + 2.8791624e-1f;
  p = p * t - 3.6070368e-1f;
  p = p * t + 4.8091063e-1f;
  p = p * t - 7.2134733e-1f;
  p = p * t + 1.4426950e+0f;
  return {float(exponent), p * t};
}
FASTKD_INLINE Log2<double> log2_parts(double x) { return {::log2(x), 0.0}; }

template <class Real>
FASTKD_INLINE Real log2_of(Real x) {
  return log2_parts(x).value();
}

// (e^x - 1 - x) / x^2 for |x| <= 1/2.
FASTKD_INLINE float expm1_curve(float x) {
  float p = 1.9875629e-4f;
  p = p * x + 1.3981997e-3f;
  p = p * x + 8.3334521e-3f;
  p = p * x + 4.1665796e-2f;
  p = p * x + 1.6666666e-1f;
  return p * x + 0.5f;
}
FASTKD_INLINE double expm1_curve(double x) {
  return magnitude(x) < 1e-2 ? 0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x / 5040))))
                             : (::expm1(x) - x) / (x * x);
}

// e^x - 1 - x for |x| <= 1/2.
FASTKD_INLINE float expm1_gap(float x) { return expm1_curve(x) * x * x; }
FASTKD_INLINE double expm1_gap(double x) {
  return magnitude(x) < 1e-2 ? x * x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x / 720))))
                             : ::expm1(x) - x;
}

// x - log(1 + x) for -0.4 <= x <= 0.66, the range of e^d - 1 for |d| <= 1/2.
FASTKD_INLINE float log1p_gap(float x) {
  float p = 4.3702945e-2f;
  p = p * x - 1.0872415e-1f;
  p = p * x + 1.2405984e-1f;
  p = p * x - 1.1341766e-1f;
  p = p * x + 1.2128513e-1f;
  p = p * x - 1.4214403e-1f;
  p = p * x + 1.6689090e-1f;
  p = p * x - 2.0004421e-1f;
  p = p * x + 2.4999511e-1f;
  p = p * x - 3.3333269e-1f;
  p = p * x + 0.5f;
  return p * x * x;
}
FASTKD_INLINE double log1p_gap(double x) {
  return magnitude(x) < 1e-3 ? x * x * (0.5 - x * (1.0 / 3 - x * (0.25 - x * (0.2 - x * (1.0 / 6 - x / 7)))))
                             : x - ::log1p(x);
}

}  // namespace fastkd::FASTKD_ISA
