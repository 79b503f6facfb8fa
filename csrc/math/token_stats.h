// Statistics of a row under two softmaxes, student (u) and teacher (w), from sums relative to a pair of origins, which
// are logits. With e_u = 2^x_u and e_w = 2^x_w, x = (logit - origin) scale in base 2:
//   entropy      log sum e - sum e x / sum e
//   KL(p || q)   sum e_w (x_w - x_u) / sum e_w + log sum e_u - log sum e_w,   and the reverse likewise
#pragma once
#include "divergence.h"

namespace fastkd {

// Statistics of one side.
struct SideStats {
  double lse, entropy, top_prob, label_log_prob;
  int64_t argmax;  // -1: the row has no valid softmax
};

struct PairStats {
  double forward_kl, reverse_kl, tvd;
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

template <class Real, class Column = int64_t>
struct Best {
  Real logit;
  Column column;
  // Of equal logits, the one with the lower column.
  FASTKD_INLINE void merge(const Best& o) {
    if (o.logit > logit || (o.logit == logit && o.column < column)) *this = o;
  }
};

// Sums of one side relative to its origin.
template <class Real>
struct SideSumsOf {
  Real sum, weighted;  // of e and e x
  FASTKD_INLINE void add(const SideSumsOf& o) {
    sum += o.sum;
    weighted += o.weighted;
  }
  // Converts the sums to an origin that is `step` higher, in base 2.
  FASTKD_INLINE void raise(Real step) {
    if (step == 0) return;
    const Real scale = exp2_of(-step);
    weighted = carried(weighted, sum, -step, scale);
    sum *= scale;
  }
};
using SideSums = SideSumsOf<double>;

// Sums of both sides, and of their log-ratios: `ratio` sums e_w (x_w - x_u), `reverse` sums e_u (x_u - x_w).
template <class Real>
struct PairSumsOf {
  SideSumsOf<Real> student, teacher;
  Real ratio, reverse;
  FASTKD_INLINE void add(const PairSumsOf& o) {
    student.add(o.student);
    teacher.add(o.teacher);
    ratio += o.ratio;
    reverse += o.reverse;
  }
  FASTKD_INLINE void raise(Real student_step, Real teacher_step) {
    raise(student_step, teacher_step, student_step - teacher_step);
  }
  // apart: the change of each x_w - x_u.
  FASTKD_INLINE void raise(Real student_step, Real teacher_step, Real apart) {
    if (student_step == 0 && teacher_step == 0) return;
    ratio = carried(ratio, teacher.sum, apart, exp2_of(-teacher_step));
    reverse = carried(reverse, student.sum, -apart, exp2_of(-student_step));
    student.raise(student_step);
    teacher.raise(teacher_step);
  }
};
using PairSums = PairSumsOf<double>;

// Sums, and the origins (logits) that they are relative to.
struct PairState {
  double student_origin, teacher_origin;
  PairSums sums;

  static FASTKD_INLINE PairState empty() { return {-INFINITY, -INFINITY, {}}; }
  FASTKD_INLINE void merge(const PairState& o, double scale) {
    PairState other = o;
    const double student = at_least(student_origin, o.student_origin);
    const double teacher = at_least(teacher_origin, o.teacher_origin);
    sums.raise(step_between(student_origin, student) * scale, step_between(teacher_origin, teacher) * scale);
    other.sums.raise(step_between(o.student_origin, student) * scale, step_between(o.teacher_origin, teacher) * scale);
    sums.add(other.sums);
    student_origin = student;
    teacher_origin = teacher;
  }
  // KL(p || q) and KL(q || p) in nats. Each is a difference from a mean log-ratio, whose size limits its accuracy.
  // Below the limits it is computed from the logits again.
  FASTKD_INLINE double forward_kl() const { return (sums.ratio / sums.teacher.sum + shift()) * kLn2 + nan_or_zero(); }
  FASTKD_INLINE double reverse_kl() const { return (sums.reverse / sums.student.sum - shift()) * kLn2 + nan_or_zero(); }
  FASTKD_INLINE double forward_limit() const { return kNearKl * (1 + magnitude(sums.ratio / sums.teacher.sum) * kLn2); }
  FASTKD_INLINE double reverse_limit() const {
    return kNearKl * (1 + magnitude(sums.reverse / sums.student.sum) * kLn2);
  }
  FASTKD_INLINE double nan_or_zero() const {
    return (student_origin - student_origin) + (teacher_origin - teacher_origin);
  }

 private:
  FASTKD_INLINE double shift() const { return ::log2(sums.student.sum) - ::log2(sums.teacher.sum); }
};

// Statistics of one side. label: the label's logit (NaN: no label). Differences of logits are taken before scaling.
FASTKD_INLINE SideStats side_stats(double temperature, double origin, const SideSums& sums, const Best<double>& best,
                                   double label) {
  const double nan_or_zero = origin - origin;  // NaN where no logit is finite, or one is +inf
  const double log2_sum = ::log2(sums.sum) + nan_or_zero, log_sum = log2_sum * kLn2;
  SideStats out;
  out.lse = origin / temperature + log_sum;
  out.entropy = at_least(0.0, log_sum - sums.weighted / sums.sum * kLn2) + (log_sum - log_sum);
  out.top_prob = ::exp((best.logit - origin) / temperature - log_sum);
  out.label_log_prob = (label - origin) / temperature - log_sum;
  out.argmax = log_sum == log_sum ? best.column : -1;
  return out;
}

}  // namespace fastkd::FASTKD_ISA
