// Activation functions of the gated-routing learners and their derivatives, for float and double, on host and device.
//
//   gelu       x Phi(x), Phi and phi the normal distribution and density;  derivative Phi(x) + x phi(x)
//   gelu_tanh  x sigma(v), v = sqrt(8/pi) (x + 0.044715 x^3);  derivative sigma + x sigma (1 - sigma) v'
//   silu       the same with v = x
#pragma once
#include "elementary.h"

namespace fastkd {

// The values are the integers of the ops' activation argument: ACTIVATIONS in fastkd/acm/_kernels.py.
enum class Activation : int { kGelu, kGeluTanh, kRelu, kSilu, kIdentity };
inline constexpr int kActivations = 5;

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

template <class Real>
struct Activated {
  Real value, slope;
};

// Phi(-u) e^(u^2/2) for u >= 0, which falls from 1/2 like 1/u. A polynomial fit in t = 1 / (1 + 0.21 u), with a
// relative error of 3e-8.
FASTKD_INLINE float mills_ratio(float u) {
  const float t = 1.0f / (1.0f + 0.21f * u);
  float p = -0.07094472f;
  p = p * t + 0.28007967f;
  p = p * t - 0.32286642f;
  p = p * t + 0.34074285f;
  p = p * t - 0.0877549f;
  p = p * t + 0.12213875f;
  p = p * t + 0.06992678f;
  p = p * t + 0.08495952f;
  p = p * t + 0.08371847f;
  return p * t;
}

FASTKD_INLINE Activated<float> gelu(float x) {
  const float u = at_most(14.0f, magnitude(x));
  const float square = u * u;
  // The rounding error of u^2 would become a relative error of the exponential; `bell` corrects it by `rest`.
  const float rest = __builtin_fmaf(u, u, -square);
  const float bell = exp2_of(square * float(-0.5 * kLog2E)) * (1.0f - 0.5f * rest);
  const float tail = bell * mills_ratio(u);
  const float below = select(x > 0.0f, 1.0f - tail, tail);
  return {x * below, below + x * bell * 0.39894228f};
}

FASTKD_INLINE Activated<double> gelu(double x) {
  const double below = 0.5 * ::erfc(x * -0.70710678118654752440);
  return {x * below, below + x * ::exp(-0.5 * x * x) * 0.39894228040143267794};
}

// x sigma(v), v' = slope, and its derivative.
template <class Real>
FASTKD_INLINE Activated<Real> gated(Real x, Real v, Real slope) {
  // The exponential is of -|v|, so it cannot overflow. exp2_of itself does not return 0 for very negative arguments.
  const Real y = magnitude(v) * Real(-kLog2E), e = select(y < Real(-126), Real(0), exp2_of(y));
  const Real scale = Real(1) / (Real(1) + e);
  const Real open = select(v > Real(0), scale, e * scale);
  return {x * open, open + x * slope * (e * scale * scale)};
}

template <class Real>
FASTKD_INLINE Activated<Real> gelu_tanh(Real x) {
  // Outside [-32, 32] sigma is 0 or 1. The clamp keeps x^3 finite.
  const Real near = at_most(Real(32), at_least(Real(-32), x)), square = near * near;
  return gated(x, Real(1.5957691216057307) * near * (Real(1) + Real(0.044715) * square),
               Real(1.5957691216057307) * (Real(1) + Real(3 * 0.044715) * square));
}

template <Activation kind, class Real>
FASTKD_INLINE Activated<Real> activated(Real x) {
  if constexpr (kind == Activation::kRelu) return {at_least(Real(0), x), select(x > Real(0), Real(1), Real(0))};
  if constexpr (kind == Activation::kGelu) return gelu(x);
  if constexpr (kind == Activation::kGeluTanh) return gelu_tanh(x);
  if constexpr (kind == Activation::kSilu) return gated(x, x, Real(1));
  return {x, Real(1)};
}

template <class Real>
FASTKD_INLINE Activated<Real> activated(Activation kind, Real x) {
  switch (kind) {
    case Activation::kRelu:
      return activated<Activation::kRelu>(x);
    case Activation::kGelu:
      return activated<Activation::kGelu>(x);
    case Activation::kGeluTanh:
      return activated<Activation::kGeluTanh>(x);
    case Activation::kSilu:
      return activated<Activation::kSilu>(x);
    default:
      return {x, Real(1)};
  }
}

}  // namespace fastkd::FASTKD_ISA
