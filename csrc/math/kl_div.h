// One element of torch.nn.functional.kl_div on log-probabilities:
//   term             target (log target - input), 0 where target = 0;   log_target: e^target (target - input)
//   d / d input      -target;                                            log_target: -e^target
//   d / d target     log target + 1 - input;                             log_target: term + e^target
// NaN appears exactly where torch's composite formulas have it. The target's derivative at target 0, for example, is
// NaN.
#pragma once
#include "elementary.h"

namespace fastkd::FASTKD_ISA {

// log(x) for every x >= 0 and NaN. Subnormals are scaled up first.
FASTKD_INLINE float full_log(float x) {
  const bool subnormal = x < 1.17549435e-38f;
  const float lifted = subnormal ? x * 8388608.0f : x;
  const float log = (log2_of(lifted) - (subnormal ? 23.0f : 0.0f)) * float(kLn2);
  const float at_ends = x == 0.0f ? -INFINITY : x;  // log inf = inf, log of a NaN or a negative number NaN
  const float odd = x < 0.0f ? NAN : at_ends;
  return x > 0.0f && x < INFINITY ? log : odd;
}
FASTKD_INLINE double full_log(double x) { return ::log(x); }

// Whether x is positive and normal; and log(x) of such numbers, at half the instructions.
FASTKD_INLINE bool is_ordinary(float x) { return bit_cast<uint32_t>(x) - 0x00800000u < 0x7f000000u; }
FASTKD_INLINE float ordinary_log(float x) { return log2_of(x) * float(kLn2); }

// e^x for every x, as the square of 2^(x log2(e) / 2), whose exponent stays in range until e^x itself overflows.
FASTKD_INLINE float full_exp(float x) {
  const float exponent = x * 1.44269502f;
  const float capped = exponent > 254.0f ? 254.0f : exponent;
  const float root = exp2_of(capped * 0.5f);
  return root * root;
}
FASTKD_INLINE double full_exp(double x) { return ::exp(x); }

template <bool kLogTarget, class Real>
struct KlDivEntry {
  Real x, t;
  FASTKD_INLINE Real mass() const { return kLogTarget ? full_exp(t) : t; }
  FASTKD_INLINE Real term(Real mass) const {
    if constexpr (kLogTarget) return mass * (t - x);
    return t * full_log(nonzero()) - t * x;
  }
  // The term where the target is 0 or ordinary.
  FASTKD_INLINE bool is_ordinary() const { return !kLogTarget && FASTKD_ISA::is_ordinary(nonzero()); }
  FASTKD_INLINE Real ordinary_term() const { return t * ordinary_log(nonzero()) - t * x; }
  FASTKD_INLINE Real by_target(Real mass) const {
    if constexpr (kLogTarget) return term(mass) + mass;
    return full_log(nonzero()) + t / t - x;
  }

 private:
  // 1 instead of 0, whose logarithm adds nothing: without a branch.
  FASTKD_INLINE Real nonzero() const { return t == Real(0) ? Real(1) : t; }
};

}  // namespace fastkd::FASTKD_ISA
