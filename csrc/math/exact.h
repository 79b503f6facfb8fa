// Sums of products that keep what their rounding loses, in two numbers of the same type: where double precision is
// slow.
#pragma once
#include "elementary.h"

namespace fastkd::FASTKD_ISA {

// What a b lost in rounding to `product`. A product of two floats is exact in double.
FASTKD_INLINE float product_error(float a, float b, float product) {
#ifdef __CUDA_ARCH__
  return fmaf(a, b, -product);
#else
  return float(double(a) * double(b) - double(product));
#endif
}
FASTKD_INLINE double product_error(double, double, double) { return 0; }

template <class Real>
struct ExactSum {
  Real sum = 0, rest = 0;

  FASTKD_INLINE void add(Real x) {
    const Real all = sum + x, back = all - sum;
    // An infinite or NaN sum has no rest.
    const Real lost = (sum - (all - back)) + (x - back);
    rest += lost - lost == Real(0) ? lost : Real(0);
    sum = all;
  }
  FASTKD_INLINE void add_product(Real a, Real b) {
    const Real product = a * b, lost = product_error(a, b, product);
    add(product);
    rest += lost - lost == Real(0) ? lost : Real(0);
  }
  FASTKD_INLINE void scale(Real factor) {
    sum *= factor;
    rest *= factor;
  }
  FASTKD_INLINE double value() const { return double(sum) + double(rest); }
};

}  // namespace fastkd::FASTKD_ISA
