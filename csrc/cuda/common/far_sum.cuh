// Sums of log-ratios that are infinite or too large for plain sums.
#pragma once
#include "../../math/divergence.h"
#include "device.cuh"

namespace fastkd::cuda {

// Logits at most this far below their origin have finite log-ratios, below kDead even as differences of two sides.
inline constexpr double kFarLogit = kDead / 8;

// A sum of weighted log-ratios that are infinite or come from the smallest finite number. It is held in units of 2^30,
// so that the products do not overflow, and so that weights count that would underflow in a plain sum. An entry without
// weight adds nothing.
template <class Real>
struct FarSum {
  Real sum = 0;

  // log_weight: logarithm in base 2.
  __device__ __forceinline__ void add(Real log_weight, Real log_ratio) {
    if (log_weight > Real(-kNoWeight) && log_ratio >= Real(kDead)) {
      sum += log_ratio == Real(INFINITY) ? log_ratio : exp2_of(log_weight + Real(60)) * (log_ratio * Real(0x1p-90));
    }
  }
  // Converts the sum to other origins: the weights, whose sum is `weight`, shrink by 2^-shrink; log-ratios grow by
  // `step`.
  __device__ __forceinline__ void raise(Real weight, Real shrink, Real step) {
    if (step >= Real(kDead) && weight > Real(0)) sum += weight * Real(0x1p-30) * step;
    sum = sum < Real(INFINITY) ? sum * exp2_of(-shrink) : shrink < Real(kNoWeight) ? sum : Real(0);
  }
  __device__ __forceinline__ double value() const { return double(sum) * 0x1p30; }
};

}  // namespace fastkd::cuda
