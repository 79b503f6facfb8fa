// The part of a row's log-ratios that plain sums have no room for.
#pragma once
#include "../../math/divergence.h"
#include "device.cuh"

namespace fastkd::cuda {

// A sum of weighted log-ratios of which some are infinite or the smallest number's: in units of 2^30, so that the
// products stay in range, and a weight that underflows elsewhere counts. What has no weight adds nothing.
template <class Real>
struct FarSum {
  Real sum = 0;

  // log_weight: base 2.
  __device__ __forceinline__ void add(Real log_weight, Real log_ratio) {
    if (log_weight > Real(-kNoWeight) && log_ratio >= Real(kDead)) {
      sum += log_ratio == Real(INFINITY) ? log_ratio : exp2_of(log_weight + Real(60)) * (log_ratio * Real(0x1p-90));
    }
  }
  // The weights, which sum to `weight`, shrink by 2^-shrink, and each log-ratio grows by `step`.
  __device__ __forceinline__ void raise(Real weight, Real shrink, Real step) {
    if (step >= Real(kDead) && weight > Real(0)) sum += weight * Real(0x1p-30) * step;
    sum = sum < Real(INFINITY) ? sum * exp2_of(-shrink) : shrink < Real(kNoWeight) ? sum : Real(0);
  }
  __device__ __forceinline__ double value() const { return double(sum) * 0x1p30; }
};

}  // namespace fastkd::cuda
