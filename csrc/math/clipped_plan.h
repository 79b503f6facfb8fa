// clipped_divergence: forward KL over a part of the vocabulary. This file holds the arithmetic between the passes over
// a row; every backend uses it. s_v in [0, 1] is the share of token v that belongs to the part. With a = log q, b = log
// p and sums over v
//   A = sum s p (b - a),  P = sum s p,  Q = sum s q,  P_r = sum (1 - s) p,  Q_r = sum (1 - s) q
// a row's value is
//   renormalize none      A                    and with the tail lumped  A + P_r log(P_r / Q_r)
//   renormalize teacher   A / P - log P
//   renormalize both      A / P - log P + log Q
//
// A = K + P - Q with K = sum s (p (b - a) + q - p), a sum of terms that are never negative. Where student and teacher
// are close, the value is computed from K. Since P + P_r = Q + Q_r = 1, P - Q also equals Q_r - P_r; that form is exact
// where the part is nearly the whole vocabulary.
//
// A mass may be smaller than the sums can represent. Rows where that matters are computed by clipped_small.h.
#pragma once
#include "divergence.h"

namespace fastkd {

enum class Renormalize : int { kNone, kTeacher, kBoth };

// The smallest mass that the sums below represent well enough. Besides rounding, a float sum of probabilities is off by
// at most 2^-118 an entry, which is 2^-20 of this mass in a row of 2^18 entries.
inline constexpr double kLeastShare = 0x1p-80;

// The part: tokens with p between two edges. Hard edges are given as logits, soft edges as probabilities.
struct ClipEdges {
  double lower, upper;
  double lower_logit, upper_logit;
  double softness;  // 0: hard
};

struct ClipSums {
  double k, a, p, q, difference, p_rest, q_rest;  // K, A, P, Q, Q - P, P_r, Q_r
  // For soft edges: lower and upper are the sums of ds/dedge times p (b - a), p and q. own holds the sums of p ds/dp
  // times the same three, for the teacher's gradient.
  double lower[3], upper[3], own[3];

  FASTKD_INLINE void add(const ClipSums& o) {
    k += o.k;
    a += o.a;
    p += o.p;
    q += o.q;
    difference += o.difference;
    p_rest += o.p_rest;
    q_rest += o.q_rest;
    for (int i = 0; i < 3; ++i) {
      lower[i] += o.lower[i];
      upper[i] += o.upper[i];
      own[i] += o.own[i];
    }
  }
};

// A row's value and the factors of its gradients, computed from its sums.
struct ClipNumbers {
  double value;
  // dz_student = s (alpha q - gamma p) + (1 - s) delta q, before the factor scale / temperature.
  double alpha, gamma, delta;
  // dvalue/dA, dvalue/dP, dvalue/dQ and sum p dvalue/dp, each divided by `gain` (1 / P where the part is renormalised).
  double gain, by_a, by_p, by_q, mean;
  double lower_gradient, upper_gradient;  // dvalue/dedge
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

FASTKD_INLINE float neighbour(float x, float towards) { return ::nextafterf(x, towards); }
FASTKD_INLINE double neighbour(double x, double towards) { return ::nextafter(x, towards); }

// The logit of a hard edge at probability p. Tokens from it on (lower edge) or up to it (upper edge) are inside.
// Representable logits may lie far apart at this size, so the result is the neighbour on the correct side of the edge,
// unless the rounded logit differs from the edge by no more than the rounding error of lse, a sum of floats.
template <class Real>
FASTKD_INLINE double edge_logit(double p, bool upper, double origin, double scale, double lse) {
  if (p <= 0) return -INFINITY;
  if (p >= 1) return INFINITY;  // every token, even where a float sum of p exceeds 1 by its rounding
  const double step = (::log2(p) + lse) / scale;
  const Real edge = Real(origin + step);
  const double missing = (step - (double(edge) - origin)) * scale;
  constexpr double kFar = 0x1p-16;
  if (upper && missing < -kFar) return neighbour(edge, Real(-INFINITY));
  if (!upper && missing > kFar) return neighbour(edge, Real(INFINITY));
  return edge;
}

// Whether a mass that the value divides by, or takes the logarithm of, is too small for these sums. A teacher's rest
// whose sum is 0 (each entry below 2^-126 in float) counts as empty, whatever the student's is: distinguishing the two
// would take another sum in every row.
FASTKD_INLINE bool is_small(const ClipSums& sums, Renormalize renormalize, bool lump) {
  if (renormalize == Renormalize::kNone) return lump && sums.p_rest > 0 && sums.q_rest < kLeastShare;
  return sums.p < kLeastShare || (renormalize == Renormalize::kBoth && sums.q < kLeastShare);
}

// p log(p / q) + q - p >= 0
FASTKD_INLINE double lump_term(double p, double q) {
  if (p == 0) return q;
  if (q == 0) return INFINITY;
  const double d = ::log(q / p);
  return magnitude(d) < 0.5 ? p * expm1_gap(d) : q - p - p * d;
}

// K is infinite where an entry of the part has mass and the student's probability is 0. A and the gradients stay
// finite.
FASTKD_INLINE ClipNumbers clip_numbers(const ClipSums& sums, Renormalize renormalize, bool lump, double nan_or_zero) {
  ClipNumbers out{};
  const double p = sums.p, q = sums.q, whole = sums.a;
  const double p_rest = sums.p_rest, q_rest = sums.q_rest;
  const bool nearly_all = sums.k < INFINITY && p_rest + q_rest < 0.1;
  out.gain = out.by_a = 1;
  if (renormalize == Renormalize::kNone) {
    out.value = nearly_all ? sums.k + (q_rest - p_rest) : whole;
    out.alpha = out.delta = p;
    out.gamma = 1;
    if (lump) {
      // P + P_r = Q + Q_r = 1, so the q - p terms that K and lump_term add cancel between them.
      out.value = sums.k + lump_term(p_rest, q_rest);
      const double ratio = p_rest == 0 ? 0 : p_rest / q_rest;
      out.alpha = 1;
      out.delta = q_rest == 0 ? 0 : 1 - ratio;
      out.by_p = p_rest == 0 ? 0 : -::log(ratio) - 1;
      out.by_q = ratio;
    }
  } else if (p == 0) {  // nothing to compare
    out.by_a = 0;
  } else {
    out.gain = out.gamma = 1 / p;
    out.by_p = -whole / p - 1;
    if (renormalize == Renormalize::kTeacher) {
      // The value is (K + P - Q) / P - log P = (K + Q_r - P_r) / P - log(1 - P_r). P is 1 - P_r, and
      // missing = -log(1 - P_r) - P_r / P.
      const double missing = -::log1p(-p_rest) - p_rest / (1 - p_rest);
      out.value = at_least(0.0, nearly_all ? (sums.k + q_rest) / p + missing : whole / p - ::log(p));
      out.alpha = out.delta = 1;
    } else {
      // The value is K / P - (x - log(1 + x)) with x = Q / P - 1.
      const double x = sums.difference / p;
      const bool close = magnitude(x) < 0.1;
      out.value = close ? sums.k / p - log1p_gap(x) : whole / p + ::log(q / p);
      out.value = at_least(0.0, out.value);
      out.alpha = 1 / q;
      out.by_q = p / q;
    }
  }
  if (sums.k == INFINITY && out.by_a != 0) out.value = INFINITY;
  const auto through = [&](const double (&x)[3]) { return out.by_a * x[0] + out.by_p * x[1] + out.by_q * x[2]; };
  out.lower_gradient = out.gain * through(sums.lower) + nan_or_zero;
  out.upper_gradient = out.gain * through(sums.upper) + nan_or_zero;
  out.mean = out.by_a * (whole + p) + out.by_p * p + through(sums.own);
  out.value += nan_or_zero;
  out.alpha += nan_or_zero;
  out.mean += nan_or_zero;
  return out;
}

}  // namespace fastkd::FASTKD_ISA
