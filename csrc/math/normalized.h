// From logits to what a divergence needs of every vocabulary entry, once the row's normalisers are known.
#pragma once
#include "divergence.h"

namespace fastkd::FASTKD_ISA {

// What the gradient subtracts from g and h, as a float and the rest.
template <class Real>
struct Mean {
  Real high, low;
  explicit Mean(double mean) : high(Real(mean)), low(Real(mean - double(Real(mean)))) {}
};

// From logits to outcomes, once both normalisers are known. Logits are first taken relative to a value near the
// largest: what counts in a distribution is then exact to rounding, whatever constant the logits carry.
template <class Real>
struct Normalized {
  Real student_scale, teacher_scale, teacher_ratio;
  Real student_origin, teacher_origin;  // logits
  Real student_lse, teacher_lse;        // relative to the origins, base 2
  Real log_shift;                       // their difference, natural, with what origin_gap lost in rounding
  Real origin_gap;                      // student_origin - teacher_ratio teacher_origin

  template <bool kNear>
  FASTKD_INLINE Outcome<Real> outcome(Real u, Real w) const {
    const Real x = u - student_origin, y = w - teacher_origin;
    const Real a = x * student_scale - student_lse, b = y * teacher_scale - teacher_lse;
    // From the logits as they are: their difference is exact where student and teacher nearly agree.
    const Real alive_u = at_least(Real(-kDead), u), alive_w = at_least(Real(-kDead), w);
    const Real apart = (alive_u - alive_w * teacher_ratio) - origin_gap;
    const Real ratio = apart * student_scale * Real(kLn2) - log_shift;
    Outcome<Real> o;
    o.p = exp2_of(b);
    o.q = exp2_of(a);
    o.log2_p = at_least(Real(-kDead), b);
    o.log2_q = at_least(Real(-kDead), a);
    o.d = magnitude(ratio) > Real(kInfiniteLogRatio) ? with_sign(Real(kLargestLogRatio), ratio) : ratio;
    o.small = kNear && magnitude(o.d) < Real(0.5);
    o.difference = o.q - o.p;
    if constexpr (kNear) o.difference = select(o.small, o.p * (o.d + expm1_gap(o.d)), o.difference);
    return o;
  }
};

// The entries of a block, from their logits.
template <class Real, bool kNear>
struct FromLogits {
  Normalized<Real> at;
  const Real *student, *teacher;
  FASTKD_INLINE Outcome<Real> outcome(int64_t i) const { return at.template outcome<kNear>(student[i], teacher[i]); }
};

// What the first pass took a block relative to: logits near the largest so far.
template <class Real>
struct Origins {
  Real student, teacher;
};

// The entries of a block, from what the first pass kept of them instead of having them computed again: 2^x of the
// student, and 2^x of the teacher or, where the student weights, the log-ratio. Good for rows that are not near, and
// of an outcome there is only what those divergences ask for: p, q and their difference, or q and d.
template <class Real, Pass kPass>
struct Kept {
  const Real *student, *teacher;
  Real student_factor, teacher_factor;
  Real ratio_scale, ratio_shift;
  FASTKD_INLINE Outcome<Real> outcome(int64_t i) const {
    const Real q = student[i] * student_factor, none = Real(0);
    if constexpr (kPass == Pass::kStudentWeighted) {
      return {none, q, none, none, teacher[i] * ratio_scale + ratio_shift, none, false};
    } else {
      const Real p = teacher[i] * teacher_factor;
      return {p, q, none, none, none, q - p, false};
    }
  }
};

}  // namespace fastkd::FASTKD_ISA
