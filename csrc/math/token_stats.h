// Statistics of a row under two softmaxes, from sums relative to a pair of origins. With e_u = 2^x_u and e_w = 2^x_w, x
// the logits in base 2 relative to the origins:
//   entropy      log sum e - sum e x / sum e
//   KL(p || q)   sum e_w (x_w - x_u) / sum e_w + log sum e_u - log sum e_w,   and the reverse likewise
#pragma once
#include "divergence.h"

namespace fastkd {

// Of one side.
struct SideStats {
  double lse, entropy, top_prob, label_log_prob;
  int64_t argmax;  // -1: the row is no distribution
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
  // The lower column of equals.
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
  // The same relative to an origin that is `step` higher.
  FASTKD_INLINE void raise(Real step) {
    if (step == 0) return;
    const Real scale = exp2_of(-step);
    weighted = sum > 0 ? scale * (weighted - step * sum) : 0;
    sum *= scale;
  }
};
using SideSums = SideSumsOf<double>;

// Of both, and of their log-ratios: ratio weights x_w - x_u by e_w, reverse x_u - x_w by e_u.
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
    if (student_step == 0 && teacher_step == 0) return;
    const Real apart = student_step - teacher_step;
    if (teacher.sum > 0 && ratio < INFINITY) ratio = exp2_of(-teacher_step) * (ratio + apart * teacher.sum);
    if (student.sum > 0 && reverse < INFINITY) reverse = exp2_of(-student_step) * (reverse - apart * student.sum);
    student.raise(student_step);
    teacher.raise(teacher_step);
  }
};
using PairSums = PairSumsOf<double>;

// Sums and the origins, base 2, that they are relative to.
struct PairState {
  double student_origin, teacher_origin;
  PairSums sums;

  static FASTKD_INLINE PairState empty() { return {-INFINITY, -INFINITY, {}}; }
  FASTKD_INLINE void merge(const PairState& o) {
    PairState other = o;
    const double student = at_least(student_origin, o.student_origin);
    const double teacher = at_least(teacher_origin, o.teacher_origin);
    sums.raise(step(student_origin, student), step(teacher_origin, teacher));
    other.sums.raise(step(o.student_origin, student), step(o.teacher_origin, teacher));
    sums.add(other.sums);
    student_origin = student;
    teacher_origin = teacher;
  }
  // KL(p || q) and KL(q || p) in nats. Below its limit one is better taken from the logits again: the mean log-ratio
  // that it is a difference of bounds its accuracy.
  FASTKD_INLINE double forward_kl() const { return (sums.ratio / sums.teacher.sum + shift()) * kLn2 + poison(); }
  FASTKD_INLINE double reverse_kl() const { return (sums.reverse / sums.student.sum - shift()) * kLn2 + poison(); }
  FASTKD_INLINE double forward_limit() const { return kNearKl * (1 + magnitude(sums.ratio / sums.teacher.sum) * kLn2); }
  FASTKD_INLINE double reverse_limit() const {
    return kNearKl * (1 + magnitude(sums.reverse / sums.student.sum) * kLn2);
  }
  FASTKD_INLINE double poison() const { return (student_origin - student_origin) + (teacher_origin - teacher_origin); }

 private:
  FASTKD_INLINE double shift() const { return ::log2(sums.student.sum) - ::log2(sums.teacher.sum); }
  // An origin that was not there yet has no sums.
  static FASTKD_INLINE double step(double from, double to) { return from == -INFINITY || from == to ? 0 : to - from; }
};

// Of one side: origin and best logit in base 2, label_x too (NaN: no label).
FASTKD_INLINE SideStats side_stats(double origin, const SideSums& sums, const Best<double>& best, double label_x) {
  const double poison = origin - origin;  // NaN where no logit is finite, or one is +inf
  const double log2_sum = ::log2(sums.sum), lse = origin + log2_sum + poison;
  SideStats out;
  out.lse = lse * kLn2;
  out.entropy = at_least(0.0, (log2_sum - sums.weighted / sums.sum) * kLn2) + (lse - lse);
  out.top_prob = ::exp2(best.logit - lse);
  out.label_log_prob = (label_x - lse) * kLn2;
  out.argmax = lse == lse ? best.column : -1;
  return out;
}

}  // namespace fastkd::FASTKD_ISA
