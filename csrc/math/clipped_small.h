// clipped_divergence of a row in which a mass that its value divides by, or takes the logarithm of, is so small that
// sums of probabilities lose it. Everything here is in double precision. The small mass is summed relative to its own
// largest term, whose logarithm is kept separately, so that each entry's share of the mass and the mass's logarithm
// stay accurate however small it is. With a = log q, b = log p, s the entry's share in the part, and
//   t = s where the part is renormalised, 1 - s where the tail is lumped,
//   P' = e^-B P and Q' = e^-C sum t q, with B = max (log s + b) (lump: 0) and C = max (log t + a) (teacher: 0),
//   c = (b - B) - a, for renormalize both (b - B) - (a - C),
// the value is
//   renormalize   A' / P' - log P', for both + log Q',  A' = sum s e^(b - B) c
//   lump          A' + P_r R,  R = log P_r - (C + log Q')
#pragma once
#include "clipped_plan.h"
#include "logit_sum.h"
#include "normalized.h"

namespace fastkd {

// Natural logarithms of s, of 1 - s, and of |ds/dedge| softness for the lower and the upper edge. ds/dlower is
// negative.
struct LogShares {
  double own, rest, lower, upper;
};

// B and C, natural logarithms.
struct SmallBases {
  double p = -INFINITY, q = -INFINITY;
};

// One vocabulary entry.
struct SmallEntry {
  double p, q;       // probabilities
  double own_p;      // s p e^-B
  double rest_p;     // (1 - s) p
  double part_q;     // t q e^-C
  double log_ratio;  // c
  bool lost;         // the teacher has mass in the part and the student's probability is 0
  // ds/dedge p e^-B and ds/dedge q e^-C.
  double lower_p, upper_p, lower_q, upper_q;
};

// The value and the factors of the gradients. They are computed from masses relative to B and C, so that none
// overflows.
struct SmallNumbers {
  double value, lower_gradient, upper_gradient;
  double by_q, by_own_p, by_part_q;        // dvalue/da, through the softmax
  double by_ratio, by_p, by_rest_p, mean;  // dvalue/db, s fixed, and the sum of all of dvalue/db
  double by_share_p, by_share_q;           // dvalue/ds: by_ratio p c + by_share_p p + by_share_q q
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

FASTKD_INLINE double log_of_sum(double log_x, double log_y) {
  const double all = at_least(log_x, log_y);
  return all == -INFINITY ? all : all + ::log1p(::exp(at_most(log_x, log_y) - all));
}

struct SmallRow {
  double student_scale, teacher_scale, student_origin, teacher_origin;  // natural; logits
  double student_lse, teacher_lse;                                      // relative to the origins, natural
  double low, high;                                                     // hard edges: logits; soft: probabilities
  double sharp;                                                         // 1 / softness; 0: hard edges
  bool lump, both;
  double p_base, q_base;  // B and C
  SmallNumbers numbers;

  template <class Real>
  FASTKD_INLINE void set(const RowTask& task, const RowFrame<Real>& frame, const ClipEdges& edges,
                         Renormalize renormalize) {
    student_scale = 1 / task.temperature;
    teacher_scale = 1 / task.teacher_temperature;
    student_origin = frame.student_origin;
    teacher_origin = frame.teacher_origin;
    student_lse = frame.student_lse * kLn2;
    teacher_lse = frame.teacher_lse * kLn2;
    const bool soft = edges.softness != 0;
    low = soft ? edges.lower : edges.lower_logit;
    high = soft ? edges.upper : edges.upper_logit;
    sharp = soft ? 1 / edges.softness : 0;
    lump = renormalize == Renormalize::kNone;
    both = renormalize == Renormalize::kBoth;
  }

  FASTKD_INLINE double log_q(double u) const {
    const double x = u - student_origin;
    return x < -kImpossible ? -INFINITY : x * student_scale - student_lse;
  }
  FASTKD_INLINE double log_p(double w) const {
    const double y = w - teacher_origin;
    return y < -kImpossible ? -INFINITY : y * teacher_scale - teacher_lse;
  }

  // w: the teacher's logit. b: its log-probability. kept: the entry belongs to the part wholly.
  FASTKD_INLINE LogShares shares(double w, double b, bool kept) const {
    if (kept) return {0, -INFINITY, -INFINITY, -INFINITY};
    if (sharp == 0) {
      const bool inside = w >= low && w <= high;
      return {inside ? 0 : -INFINITY, inside ? -INFINITY : 0, -INFINITY, -INFINITY};
    }
    const double p = ::exp(b), x = (p - low) * sharp, y = (high - p) * sharp;
    const double above = log_sigmoid(x), below = log_sigmoid(y), own = above + below;
    const double not_above = log_sigmoid(-x), not_below = log_sigmoid(-y);
    return {own, log_of_sum(not_above, above + not_below), own + not_above, own + not_below};
  }

  // One entry's values of the quantities whose maxima are B and C.
  FASTKD_INLINE SmallBases bases_of(double u, double w, bool kept) const {
    const double b = log_p(w);
    const LogShares log = shares(w, b, kept);
    return {lump ? 0 : log.own + b, lump || both ? (lump ? log.rest : log.own) + log_q(u) : 0};
  }
  FASTKD_INLINE void set_bases(const SmallBases& largest) {
    p_base = largest.p == -INFINITY ? 0 : largest.p;  // -inf: the part has no mass
    q_base = largest.q == -INFINITY ? 0 : largest.q;
  }

  FASTKD_INLINE SmallEntry entry(double u, double w, bool kept) const {
    const double a = log_q(u), b = log_p(w);
    const LogShares log = shares(w, b, kept);
    SmallEntry e;
    e.p = ::exp(b);
    e.q = ::exp(a);
    e.own_p = ::exp(log.own + b - p_base);
    e.rest_p = lump ? ::exp(log.rest + b) : 0;
    const bool counts = lump || both;
    e.part_q = counts ? ::exp((lump ? log.rest : log.own) + a - q_base) : 0;
    e.lost = e.own_p > 0 && a == -INFINITY;
    e.log_ratio = e.lost ? kLargestLogRatio : e.own_p > 0 ? (b - p_base) - (both ? a - q_base : a) : 0;
    e.lower_p = e.upper_p = e.lower_q = e.upper_q = 0;
    if (sharp != 0) {
      e.lower_p = -sharp * ::exp(log.lower + b - p_base);
      e.upper_p = sharp * ::exp(log.upper + b - p_base);
      if (counts) {
        e.lower_q = -sharp * ::exp(log.lower + a - q_base);
        e.upper_q = sharp * ::exp(log.upper + a - q_base);
      }
    }
    return e;
  }

  // Computes the value and gradient factors from the sums over all entries.
  FASTKD_INLINE void finish(const ClipSums& sums) {
    const double p = sums.p, q = sums.q, p_rest = sums.p_rest;
    SmallNumbers out{};
    if (lump) {
      const double gap = p_rest > 0 && q > 0 ? ::log(p_rest) - (q_base + ::log(q)) : kLargestLogRatio;
      const double ratio = p_rest == 0 ? 0 : gap;
      out.value = p_rest > 0 && q == 0 ? double(INFINITY) : at_least(0.0, sums.a + p_rest * ratio);
      out.by_q = out.by_ratio = 1;
      out.by_own_p = -1;
      out.by_part_q = q == 0 ? 0 : -p_rest / q;
      out.by_rest_p = ratio;
      out.by_share_p = -ratio - 1;
      out.by_share_q = -out.by_part_q;
    } else if (p > 0) {  // at p = 0 the part is empty: value and factors are 0
      const bool none = both && q == 0;
      out.value = none ? double(INFINITY) : at_least(0.0, sums.a / p - ::log(p) + (both ? ::log(q) : 0));
      out.by_q = both ? 0 : 1;
      out.by_own_p = none ? 0 : -1 / p;
      out.by_part_q = !both || none ? 0 : 1 / q;
      out.by_ratio = 1 / p;
      out.by_p = -sums.a / p / p;
      out.by_share_p = out.by_p - 1 / p;
      out.by_share_q = out.by_part_q;
    }
    if (sums.k == INFINITY) out.value = INFINITY;
    const auto through = [&](const double (&x)[3]) {
      return out.by_ratio * x[0] + out.by_share_p * x[1] + out.by_share_q * x[2];
    };
    out.lower_gradient = through(sums.lower);
    out.upper_gradient = through(sums.upper);
    out.mean = out.by_ratio * sums.a + out.by_p * p + out.by_rest_p * p_rest + through(sums.own);
    numbers = out;
  }

  // The gradients without the factor scale / temperature.
  FASTKD_INLINE double student_gradient(const SmallEntry& e) const {
    return numbers.by_q * e.q + numbers.by_own_p * e.own_p + numbers.by_part_q * e.part_q;
  }
  FASTKD_INLINE double teacher_gradient(const SmallEntry& e) const {
    const double p_slope = e.lower_p + e.upper_p, q_slope = e.lower_q + e.upper_q;
    const double by_share =
        p_slope * (numbers.by_ratio * e.log_ratio + numbers.by_share_p) + q_slope * numbers.by_share_q;
    return e.own_p * (numbers.by_ratio * e.log_ratio + numbers.by_p) + e.rest_p * numbers.by_rest_p -
           e.p * (by_share + numbers.mean);
  }
};

FASTKD_INLINE void raise(SmallBases& all, const SmallBases& next) {
  all.p = at_least(all.p, next.p);
  all.q = at_least(all.q, next.q);
}

// Adds one entry to the sums: k becomes infinite where the entry is `lost`, q is Q'.
FASTKD_INLINE void add_entry(ClipSums& sums, const SmallEntry& e) {
  if (e.lost) sums.k = INFINITY;
  sums.a += e.own_p * e.log_ratio;
  sums.p += e.own_p;
  sums.q += e.part_q;
  sums.p_rest += e.rest_p;
  const auto add = [&](double (&slope)[3], double p, double q) {
    slope[0] += p * e.log_ratio;
    slope[1] += p;
    slope[2] += q;
  };
  add(sums.lower, e.lower_p, e.lower_q);
  add(sums.upper, e.upper_p, e.upper_q);
  add(sums.own, -e.p * (e.lower_p + e.upper_p), -e.p * (e.lower_q + e.upper_q));
}

}  // namespace fastkd::FASTKD_ISA
