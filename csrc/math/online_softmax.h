// The state of two softmaxes over one row, built piece by piece and merged in any association, in base 2:
//   max = max_v x_v,  sum = sum_v 2^(x_v - max),  lse = max + log2(sum),
// where x = log2(e) * logits / temperature. A piece without a finite logit has max = -inf and sum = 0 (or NaN).
#pragma once
#include "elementary.h"

namespace fastkd::FASTKD_ISA {

// Which weighted sum of x_teacher - x_student the first pass over a row accumulates.
// kTeacherCrossing also sums what the cross-entropy needs.
enum class Pass { kNormalizersOnly, kTeacherWeighted, kTeacherCrossing, kStudentWeighted };

// The factor that carries a sum relative to `from` over to `to`.
template <class Real>
FASTKD_INLINE Real rescale(Real from, Real to) {
  return from == to ? Real(1) : exp2_of(from - to);
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

template <class Real>
struct RowState {
  MaxSum<Real> student, teacher;
  Real ratio;      // sum of 2^(x_w - max_w) ((x_w - max_w) - (x_o - max_o)), w the side that weights, o the other
  Real crossing;   // sum of 2^(x_teacher - teacher.max) (student.max - x_student); kTeacherCrossing only
  Real label_sum;  // sum of 2^((x_student - student.max) label_ratio): the student's softmax at temperature 1

  static FASTKD_INLINE RowState empty() {
    return {MaxSum<Real>::empty(), MaxSum<Real>::empty(), Real(0), Real(0), Real(0)};
  }

  // label_ratio: the student's temperature.
  FASTKD_INLINE void merge(const RowState& other, Pass pass, Real label_ratio) {
    RowState add = other;
    const Real student_max = at_least(student.max, other.student.max);
    const Real teacher_max = at_least(teacher.max, other.teacher.max);
    raise(student_max, teacher_max, pass, label_ratio);
    add.raise(student_max, teacher_max, pass, label_ratio);
    student.sum += add.student.sum;
    teacher.sum += add.teacher.sum;
    ratio += add.ratio;
    crossing += add.crossing;
    label_sum += add.label_sum;
  }

  // The same sums relative to larger maxima.
  FASTKD_INLINE void raise(Real student_max, Real teacher_max, Pass pass, Real label_ratio) {
    if (student.max == student_max && teacher.max == teacher_max) return;
    const Real student_step = student_max == student.max ? Real(0) : student_max - student.max;
    const Real teacher_step = teacher_max == teacher.max ? Real(0) : teacher_max - teacher.max;
    const Real student_scale = exp2_of(-student_step), teacher_scale = exp2_of(-teacher_step);
    // What is infinite stays so, however little of its weight is left.
    if (crossing < Real(INFINITY)) crossing = moved(crossing, teacher.sum, student_step) * teacher_scale;
    if (ratio < Real(INFINITY)) {
      ratio = weights_student(pass) ? moved(ratio, student.sum, teacher_step - student_step) * student_scale
                                    : moved(ratio, teacher.sum, student_step - teacher_step) * teacher_scale;
    }
    label_sum *= exp2_of(-student_step * label_ratio);
    student = {student_max, student.sum * student_scale};
    teacher = {teacher_max, teacher.sum * teacher_scale};
  }
  // KL in nats of the weighting side from the other one, and the mean log-ratio whose size limits its accuracy.
  FASTKD_INLINE Real kl(Pass pass) const {
    const Real shift = log2_of(student.sum) - log2_of(teacher.sum);
    return (weights_student(pass) ? ratio / student.sum - shift : ratio / teacher.sum + shift) * Real(kLn2) + poison();
  }
  FASTKD_INLINE Real mean_ratio(Pass pass) const {
    return magnitude(ratio / (weights_student(pass) ? student.sum : teacher.sum)) * Real(kLn2);
  }
  // -sum p log q in nats: two terms, neither negative but for the slack in student.max.
  FASTKD_INLINE Real cross_entropy() const {
    return (log2_of(student.sum) + crossing / teacher.sum) * Real(kLn2) + poison();
  }

 private:
  static FASTKD_INLINE bool weights_student(Pass pass) { return pass == Pass::kStudentWeighted; }

  // NaN where a side has no finite logit, or +inf.
  FASTKD_INLINE Real poison() const { return (student.max - student.max) + (teacher.max - teacher.max); }

  static FASTKD_INLINE Real moved(Real sum, Real weight, Real step) {
    return weight > Real(0) ? sum + weight * step : sum;
  }
};

}  // namespace fastkd::FASTKD_ISA
