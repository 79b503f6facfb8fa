// Short formulas for the terms of divergences on a CPU, for rows that are not near. A divergence that has one names it
// here; the others are their own.
#pragma once
#include "row_plan.h"

namespace fastkd::FASTKD_ISA {

template <class Divergence>
struct Short : Divergence {
  static constexpr bool kExists = false;
};

// The products q g less their mean need a multiply-add of one rounding.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
inline constexpr bool kFusedProducts = true;
#else
inline constexpr bool kFusedProducts = false;
#endif

// alpha_beta of two numbers that are not small. Relative to the larger of p^s and q^s, M, and with d = log q - log p,
//   A = p^s / M = 2^(-s max(d, 0)),
//   B = q^s / M = 2^(-s max(-d, 0)),
//   K = p^alpha q^beta / M = 2^(-alpha d) where d > 0, else 2^(beta d),
//   q g = M (B - K) / alpha,   p h = M (A - K) / beta,   f = (q g + p h) / s.
// No power exceeds 1, and no impossible token needs a substitute.
template <>
struct Short<AlphaBeta> : AlphaBeta {
  static constexpr bool kExists = true;
  static constexpr Form kStudent = Form::kProduct, kTeacher = Form::kProduct;

  using AlphaBeta::AlphaBeta;

  FASTKD_INLINE static bool serves(const RowTask& task) {
    return kFusedProducts && task.alpha >= kLeast && task.beta >= kLeast;
  }

  template <bool kNear, class Real>
  FASTKD_INLINE Terms<Real> operator()(const Outcome<Real>& o) const {
    if constexpr (kNear) return products(AlphaBeta::operator()<true>(o), o);
    const Real s = Real(sum), d = o.log2_q - o.log2_p, apart = -magnitude(d);
    const bool student = d > Real(0);
    const Real M = exp2_of(s * select(student, o.log2_q, o.log2_p));
    const auto smaller = exp2_parts(s * apart), both = exp2_parts(select(student, Real(alpha), Real(beta)) * apart);
    const Real to_larger = M * ((Real(1) - both.power) - both.rest), to_smaller = M * smaller.minus(both);
    const Real of_q = select(student, to_larger, to_smaller) * Real(1 / alpha);
    const Real of_p = select(student, to_smaller, to_larger) * Real(1 / beta);
    return {(of_q + of_p) * Real(per_sum), Real(0), Real(0), of_q, of_p, M};
  }

 private:
  static constexpr double kLeast = 0.1;

  template <class Real>
  static FASTKD_INLINE Terms<Real> products(const Terms<Real>& t, const Outcome<Real>& o) {
    return {t.f, Real(0), Real(0), t.student + o.q * t.g, t.teacher + o.p * t.h, t.mass};
  }
};

}  // namespace fastkd::FASTKD_ISA
