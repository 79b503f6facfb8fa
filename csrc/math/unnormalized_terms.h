// Terms of a divergence between sets of outcomes that need not sum to 1, such as a teacher's most likely tokens alone,
// or logarithms raised to a floor. With a = log q and b = log p, the gradients of a plain sum of f(a, b) are
//   student logits  df/da - q sum df/da,   teacher log-probabilities  df/db.
#pragma once
#include "divergence.h"

namespace fastkd {

struct UnnormalizedSums {
  double value, excess, g, h;
  FASTKD_INLINE void add(const UnnormalizedSums& o) {
    value += o.value;
    excess += o.excess;
    g += o.g;
    h += o.h;
  }
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

template <class Real>
struct UnnormalizedTerms {
  // The term is value + excess. Where both sides sum to 1, the excesses sum to 0 and every value is non-negative.
  Real value, excess;
  Real g, h;  // df/da, df/db
};

// One outcome, given natural logarithms that may be -inf.
template <class Real>
FASTKD_INLINE Outcome<Real> outcome_of(Real log_q, Real log_p) {
  const Real a = at_least(Real(-kDead), log_q), b = at_least(Real(-kDead), log_p), apart = a - b;
  Outcome<Real> o;
  o.q = exp2_of(log_q * Real(kLog2E));
  o.p = exp2_of(log_p * Real(kLog2E));
  o.log2_q = a * Real(kLog2E);
  o.log2_p = b * Real(kLog2E);
  o.d = magnitude(apart) > Real(kInfiniteLogRatio) ? with_sign(Real(kLargestLogRatio), apart) : apart;
  o.small = magnitude(o.d) < Real(0.5);
  o.difference = select(o.small, o.p * (o.d + expm1_gap(o.d)), o.q - o.p);
  return o;
}

// Infinite where p > 0 and q = 0.
template <class Real>
FASTKD_INLINE Real lost(Real p, Real log2_q) {
  return p > Real(0) && log2_q < Real(-kInfiniteLogRatio) ? Real(INFINITY) : Real(0);
}

template <class Real>
FASTKD_INLINE UnnormalizedTerms<Real> unnormalized_terms(const ForwardKl& divergence, const Outcome<Real>& o) {
  const Real value = divergence.template operator()<true>(o).f + lost(o.p, o.log2_q);
  return {value, -o.difference, -o.p, o.p * (Real(1) - o.d)};
}
template <class Real>
FASTKD_INLINE UnnormalizedTerms<Real> unnormalized_terms(const ReverseKl& divergence, const Outcome<Real>& o) {
  const UnnormalizedTerms<Real> t = unnormalized_terms(ForwardKl{divergence.beta}, mirrored(o));
  return {t.value, t.excess, t.h, t.g};
}
template <class Real>
FASTKD_INLINE UnnormalizedTerms<Real> unnormalized_terms(const Jsd& divergence, const Outcome<Real>& o) {
  const Terms<Real> t = divergence.template operator()<true>(o);
  return {t.f, Real(0), o.q * t.g, o.p * t.h};
}
template <class Real>
FASTKD_INLINE UnnormalizedTerms<Real> unnormalized_terms(const CrossEntropy& divergence, const Outcome<Real>& o) {
  const Terms<Real> t = divergence.template operator()<true>(o);
  return {t.f + lost(o.p, o.log2_q), Real(0), -o.p, o.p * t.h};
}

// The divergences that have unnormalized terms.
using UnnormalizedDivergences = TypeList<ForwardKl, ReverseKl, Jsd, CrossEntropy>;

// Calls body with the divergence at the given place in UnnormalizedDivergences.
template <class Body>
FASTKD_INLINE void with_unnormalized_divergence(int place, double beta, const Body& body) {
  switch (place) {
    case 0:
      return body(ForwardKl{beta});
    case 1:
      return body(ReverseKl{beta});
    case 2:
      return body(Jsd{beta});
    default:
      return body(CrossEntropy{beta});
  }
}

}  // namespace fastkd::FASTKD_ISA
