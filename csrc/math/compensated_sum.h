// Compensated sums of products in two numbers of the same type, the sum and its accumulated rounding error. Used where
// double precision is slow.
#pragma once
#include "elementary.h"

namespace fastkd::FASTKD_ISA {

// a b and a + b rounded to float, never contracted into one fused multiply-add.
FASTKD_INLINE float product_of(float a, float b) {
#ifdef FASTKD_GPU_FUNCTIONS
  return gpu::product(a, b);
#else
  return a * b;
#endif
}
FASTKD_INLINE float sum_of(float a, float b) {
#ifdef FASTKD_GPU_FUNCTIONS
  return gpu::sum(a, b);
#else
  return a + b;
#endif
}

// The rounding error of `product`, a b rounded. The product of two floats is exact in double.
FASTKD_INLINE float product_error(float a, float b, float product) {
#ifdef __CUDA_ARCH__
  return fmaf(a, b, -product);
#else
  return float(double(a) * double(b) - double(product));
#endif
}

struct CompensatedSum {
  float sum = 0, rest = 0;

  FASTKD_INLINE void add(float x) {
    const float all = sum_of(sum, x), back = sum_of(all, -sum);
    keep(sum_of(sum_of(sum, -sum_of(all, -back)), sum_of(x, -back)));
    sum = all;
  }
  FASTKD_INLINE void add_product(float a, float b) {
    const float product = product_of(a, b);
    add(product);
    keep(product_error(a, b, product));
  }
  FASTKD_INLINE double value() const { return double(sum) + double(rest); }

 private:
  // Adds to the accumulated rounding error, unless `lost` is infinite or NaN (as it is when the sum is).
  FASTKD_INLINE void keep(float lost) { rest += lost - lost == 0.0f ? lost : 0.0f; }
};

}  // namespace fastkd::FASTKD_ISA
