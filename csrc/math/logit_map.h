// What a loss over rows does to each logit where it reads it, before anything else. The logits of the formulas are the
// mapped ones; gradients are those of the logits as given, so each is multiplied by the slope of the map.
//
// An option of all losses that changes logits one by one is added here and in RowOptions (row_problem.h), which makes
// the map of a call's options. CPU kernels apply it in `load` and `store` (csrc/cpu/common/simd.h), CUDA kernels in
// AnySource (csrc/cuda/common/sources.cuh).
#pragma once
#include "elementary.h"

namespace fastkd {

struct LogitMap {
  constexpr explicit operator bool() const { return false; }  // whether it changes any logit
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

// A map in the precision of the arithmetic.
template <class Real>
struct LogitFunction {
  LogitFunction() = default;
  FASTKD_INLINE explicit LogitFunction(const LogitMap&) {}

  FASTKD_INLINE explicit operator bool() const { return false; }
  FASTKD_INLINE Real value(Real z) const { return z; }
  FASTKD_INLINE Real slope(Real) const { return Real(1); }
};

}  // namespace fastkd::FASTKD_ISA
