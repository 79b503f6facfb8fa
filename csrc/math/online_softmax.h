// The state of two softmaxes over one row, in base 2, accumulated piece by piece; pieces may be merged in any grouping:
//   max = max_v x_v,  sum = sum_v 2^(x_v - max),  lse = max + log2(sum),
// where x = log2(e) * logits / temperature. A piece without a finite logit has max = -inf and sum = 0 (or NaN).
#pragma once
#include "elementary.h"

namespace fastkd::FASTKD_ISA {

// Which weighted sum of x_teacher - x_student the first pass over a row accumulates.
// kTeacherCrossing also sums what the cross-entropy needs.
enum class Pass { kNormalizersOnly, kTeacherWeighted, kTeacherCrossing, kStudentWeighted };

// The factor that converts a sum relative to `from` to one relative to `to`.
template <class Real>
FASTKD_INLINE Real rescale(Real from, Real to) {
  return from == to ? Real(1) : exp2_of(from - to);
}

// How far an origin moves. From -inf (no logit so far) the sum is empty, and any step is right.
template <class Real>
FASTKD_INLINE Real step_between(Real from, Real to) {
  return from == to ? Real(0) : to - from;
}

template <class Real>
struct MaxSum {
  Real max, sum;

  static FASTKD_INLINE MaxSum empty() { return {Real(-INFINITY), Real(0)}; }
  // NaN where no logit is finite, or one is +inf.
  FASTKD_INLINE Real log2() const { return (max - max) + max + log2_of(sum); }
  FASTKD_INLINE void merge(const MaxSum& other) {
    const Real all = at_least(max, other.max);
    sum = sum * rescale(max, all) + other.sum * rescale(other.max, all);
    max = all;
  }
};

// As MaxSum, but relative to an origin that is a logit near the largest. The origin is subtracted from a logit before
// scaling, so that neither a constant added to all logits nor very large logits (a mask may set all of them to the
// smallest finite number) reduce the sum's accuracy.
//   sum = sum_v 2^((z_v - origin) scale),  scale = log2(e) / temperature
template <class Real>
struct OriginSum {
  Real origin, sum;

  static FASTKD_INLINE OriginSum empty() { return {Real(-INFINITY), Real(0)}; }
  // The log-sum-exp in base 2, relative to the origin. NaN where no logit is finite, or one is +inf.
  FASTKD_INLINE Real log2() const { return (origin - origin) + log2_of(sum); }
  FASTKD_INLINE void merge(const OriginSum& other, Real scale) {
    const Real all = at_least(origin, other.origin);
    sum = sum * exp2_of(-step_between(origin, all) * scale) +
          other.sum * exp2_of(-step_between(other.origin, all) * scale);
    origin = all;
  }
};

// log2(e) / temperature of both sides, and of the label's softmax (0: not summed).
template <class Real>
struct RowScales {
  Real student, teacher, label;
};

// By which both sides' sums are multiplied.
template <class Real>
struct RowFactors {
  Real student, teacher;
};

// Converts a weighted sum of log-ratios to other origins: the weights, whose sum is `weight`, are multiplied by
// `scale`, and each log-ratio grows by `step`. An infinite sum stays infinite, unless `scale` is 0.
template <class Real>
FASTKD_INLINE Real carried(Real sum, Real weight, Real step, Real scale) {
  if (scale == Real(0)) return sum == sum ? Real(0) : sum;
  if (!(sum < Real(INFINITY))) return sum;
  return (weight > Real(0) && step != Real(0) ? sum + weight * step : sum) * scale;
}

// Both softmaxes' log-sum-exps in base 2, relative to their origins.
struct RowLses {
  double student, teacher;
};

// Sums relative to one pair of origins, student.origin and teacher.origin. In base 2, with x = (z - origin) scale.
template <class Real>
struct RowState {
  OriginSum<Real> student, teacher;
  Real ratio;      // sum of 2^x_w (x_w - x_o), w the side that weights, o the other
  Real crossing;   // sum of 2^x_teacher (-x_student); kTeacherCrossing only
  Real label_sum;  // sum of 2^((z_student - origin) label scale): the student's softmax at temperature 1

  static FASTKD_INLINE RowState empty() {
    return {OriginSum<Real>::empty(), OriginSum<Real>::empty(), Real(0), Real(0), Real(0)};
  }

  FASTKD_INLINE void merge(const RowState& other, Pass pass, const RowScales<Real>& scales) {
    RowState add = other;
    const Real student_origin = at_least(student.origin, other.student.origin);
    const Real teacher_origin = at_least(teacher.origin, other.teacher.origin);
    raise(student_origin, teacher_origin, pass, scales);
    add.raise(student_origin, teacher_origin, pass, scales);
    student.sum += add.student.sum;
    teacher.sum += add.teacher.sum;
    ratio += add.ratio;
    crossing += add.crossing;
    label_sum += add.label_sum;
  }

  // The same sums relative to larger origins.
  FASTKD_INLINE void raise(Real student_origin, Real teacher_origin, Pass pass, const RowScales<Real>& scales) {
    if (student.origin == student_origin && teacher.origin == teacher_origin) return;
    raise(student_origin, teacher_origin, pass, scales,
          [](Real x, Real y) { return RowFactors<Real>{exp2_of(x), exp2_of(y)}; });
  }
  // exponentials(x, y): 2^x and 2^y.
  template <class Exponentials>
  FASTKD_INLINE void raise(Real student_origin, Real teacher_origin, Pass pass, const RowScales<Real>& scales,
                           const Exponentials& exponentials) {
    const Real moved = step_between(student.origin, student_origin);
    const Real student_step = moved * scales.student;
    const Real teacher_step = step_between(teacher.origin, teacher_origin) * scales.teacher;
    const RowFactors<Real> by = exponentials(-student_step, -teacher_step);
    crossing = carried(crossing, teacher.sum, student_step, by.teacher);
    ratio = weights_student(pass) ? carried(ratio, student.sum, teacher_step - student_step, by.student)
                                  : carried(ratio, teacher.sum, student_step - teacher_step, by.teacher);
    if (scales.label != Real(0)) label_sum *= exp2_of(-moved * scales.label);
    student = {student_origin, student.sum * by.student};
    teacher = {teacher_origin, teacher.sum * by.teacher};
  }
  FASTKD_INLINE RowLses lses() const { return {student.log2(), teacher.log2()}; }
  // The mean log-ratio in nats by the side that pass weights by, relative to the origins.
  FASTKD_INLINE Real mean_ratio(Pass pass) const {
    return ratio / (weights_student(pass) ? student.sum : teacher.sum) * Real(kLn2);
  }
  // The KL divergence in nats from mean_ratio and lses. Its accuracy is limited by the size of mean_ratio.
  static FASTKD_INLINE Real kl(Pass pass, Real mean_ratio, const RowLses& lses) {
    const Real shift = (lses.student - lses.teacher) * Real(kLn2);
    return weights_student(pass) ? mean_ratio - shift : mean_ratio + shift;
  }
  // -sum p log q in nats, as two terms. Both are non-negative except for the distance of student.origin from the
  // largest logit.
  FASTKD_INLINE Real cross_entropy(const RowLses& lses) const {
    return (lses.student + crossing / teacher.sum) * Real(kLn2) + (lses.teacher - lses.teacher);
  }

 private:
  static FASTKD_INLINE bool weights_student(Pass pass) { return pass == Pass::kStudentWeighted; }
};

}  // namespace fastkd::FASTKD_ISA
