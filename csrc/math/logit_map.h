// What a loss over rows does to each logit where it reads it, before anything else. The logits of the formulas are the
// mapped ones; gradients are those of the logits as given, so each is multiplied by the slope of the map.
//
//   softcap   cap tanh(z / cap), slope 1 - tanh^2(z / cap). Infinite logits stay as they are, with slope 1: a column
//             masked with -inf stays one of probability 0.
//
// An option of all losses that changes logits one by one is added here and in RowOptions (row_problem.h), which makes
// the map of a call's options. CPU kernels apply it in `load` and `store` (csrc/cpu/common/simd.h), CUDA kernels in
// AnySource (csrc/cuda/common/sources.cuh).
#pragma once
#include "elementary.h"

namespace fastkd {

struct LogitMap {
  double softcap = INFINITY;  // infinite: none
  // Whether it changes any logit.
  FASTKD_INLINE explicit operator bool() const { return !(softcap == INFINITY); }
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

// A map in the precision of the arithmetic.
template <class Real>
struct LogitFunction {
  static constexpr double kLargest = sizeof(Real) == sizeof(float) ? 3.4028234663852886e38 : 1.7976931348623157e308;
  Real cap = Real(INFINITY), inverse = Real(0);

  LogitFunction() = default;
  // A cap that the precision cannot hold is replaced by the nearest number: the inverse of a tiny one is finite.
  FASTKD_INLINE explicit LogitFunction(const LogitMap& map)
      : cap(map ? Real(at_most(kLargest, map.softcap)) : Real(INFINITY)),
        inverse(Real(at_most(kLargest, 1 / map.softcap))) {}

  FASTKD_INLINE explicit operator bool() const { return !(cap == Real(INFINITY)); }

  FASTKD_INLINE float value(float z) const {
    const float x = z * inverse, square = x * x, size = magnitude(x);
    // tanh(x) / x - 1 by a polynomial (Cephes) below 0.625: the digits of z are kept however large the cap is.
    float p = -5.70498872745e-3f;
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const float near = z + z * (square * p);
    const float e = exp2_of(size * float(-2 * kLog2E));
    const float far = with_sign(cap * ((1.0f - e) / (1.0f + e)), z);
    const float capped = select(size < 0.625f, near, far);
    return select(magnitude(z) < INFINITY, capped, z);  // NaN stays, too
  }
  FASTKD_INLINE double value(double z) const {
    return magnitude(z) < INFINITY && magnitude(z * inverse) > 1e-8 ? cap * ::tanh(z * inverse) : z;
  }

  // 1 - t^2 = 4 e / (1 + e)^2 with e = exp(-2 |x|): relatively accurate also where t is nearly 1.
  FASTKD_INLINE Real slope(Real z) const {
    const Real e = exp2_of(magnitude(z) * inverse * Real(-2 * kLog2E)), share = Real(1) / (Real(1) + e);
    return select(magnitude(z) < Real(INFINITY), Real(4) * e * share * share, Real(1));
  }
};

}  // namespace fastkd::FASTKD_ISA
