// What happens between the passes over a row: which pass comes next, and with which means. Every backend uses it and
// implements the passes itself: while `step` is a sum, the backend sums the row's terms and calls add(); then it writes
// the gradients.
#pragma once
#include "normalized.h"

namespace fastkd::FASTKD_ISA {

// Where a row's value is at least this large, the log-ratios that pass 1 stored are not used: some may be infinite.
inline constexpr double kLargestKept = 1e6;

// Sums over a slice or row. Products with g and h are exact and summed in double. A mean is then the mean of exactly
// those rounded values that it is subtracted from, so that their rounding errors cancel.
struct Sums {
  double f, qg, ph, q, p, difference;

  FASTKD_INLINE void add(const Sums& o) {
    f += o.f;
    qg += o.qg;
    ph += o.ph;
    q += o.q;
    p += o.p;
    difference += o.difference;
  }
};

enum class Step { kSumFar, kSumNear, kWrite };

template <class Real, class Divergence>
struct RowPlan : RowFrame<Real> {
  static constexpr Pass kPass = Divergence::kPass;
  static constexpr bool kOnePass = kPass != Pass::kNormalizersOnly, kCrossing = kPass == Pass::kTeacherCrossing;

  Step step;
  bool near;  // all remaining passes use kNear
  // Whether what pass 1 stored of the entries can be used for the student's gradient. An infinite log-ratio was stored
  // only as a finite substitute.
  bool kept;
  double value;  // of the divergence, before its weight
  double student_mean, teacher_mean;

  // To be called after pass 1.
  FASTKD_INLINE void begin(const RowTask& task, const RowState<double>& all) {
    this->normalize(task, all);
    near = refined_ = false;
    kept = true;
    value = student_mean = teacher_mean = 0;
    step = Step::kSumFar;
    if constexpr (kOnePass) {
      // Pass 1 gives the value, and the mean for the student's gradient if that mean is finite.
      student_mean = all.kl(kPass);
      value = kCrossing ? all.cross_entropy() : student_mean;
      near = student_mean < Divergence::kNearBelow * (1 + all.mean_ratio(kPass));
      kept = kPass != Pass::kStudentWeighted || !(value >= kLargestKept);
      if (near) {
        step = !kCrossing || task.student_gradient || task.teacher_gradient ? Step::kSumNear : Step::kWrite;
      } else if (!needs_teacher_mean(task) && (kept || !needs_student_mean(task))) {
        step = Step::kWrite;
      }
    }
    if (step == Step::kWrite) finish();
  }

  // To be called after each pass that sums the row's terms.
  FASTKD_INLINE void add(const RowTask& task, const Sums& sums) {
    if (step == Step::kSumFar) {
      if (!kOnePass) {
        value = sums.f;
        near = value < Divergence::kNearBelow;
      }
      if (!kOnePass || !kept) student_mean = sums.qg / sums.q;
      step = near ? Step::kSumNear : Step::kWrite;
    } else {
      if (!kCrossing) value = sums.f;
      student_mean = sums.qg / sums.q;
      const bool again = !refined_ && (needs_student_mean(task) || needs_teacher_mean(task));
      // Since sum q = 1, the log of sum p e^d / sum p is the error of student_lse - teacher_lse.
      if (!refined_) this->student_lse += ::log1p(sums.difference / sums.p) * kLog2E;
      refined_ = true;
      if (!again) step = Step::kWrite;
    }
    teacher_mean = needs_teacher_mean(task) ? sums.ph / sums.p : 0;
    if (step == Step::kWrite) finish();
  }

  // The divergence plus the label's term, log-sum-exp - logit.
  FASTKD_INLINE double loss(const RowTask& task, double label_logit) const {
    const double label = task.has_label ? this->label_lse * kLn2 - (label_logit - double(this->student_origin)) : 0;
    return value * task.divergence_scale + (task.has_label ? task.label_weight * label : 0);
  }

 private:
  bool refined_;

  static FASTKD_INLINE bool needs_student_mean(const RowTask& task) {
    return task.student_gradient && Divergence::kStudent != Form::kClosed;
  }
  static FASTKD_INLINE bool needs_teacher_mean(const RowTask& task) {
    return task.teacher_gradient && Divergence::kTeacher != Form::kClosed;
  }

  // A NaN normaliser makes the whole row NaN, whatever the logarithms gave.
  FASTKD_INLINE void finish() {
    if (Divergence::kStudent == Form::kClosed) student_mean = 0;
    const double nan_or_zero = (this->student_lse - this->student_lse) + (this->teacher_lse - this->teacher_lse);
    value += nan_or_zero;
    student_mean += nan_or_zero;
    teacher_mean += nan_or_zero;
  }
};

// The factors of a row's gradients:
//   student: scale T^2 q (g - mean g) / temperature + scale label_weight (softmax(u) - onehot(label))
//   teacher: scale T^2 p (h - mean h) / teacher_temperature
template <class Real>
struct GradientFactors {
  Real student, teacher;
  Real label;    // of the label's term
  Real label_q;  // label if its softmax is q (temperature 1), else 0: the softmax is then added separately
  GradientFactors() = default;
  FASTKD_INLINE GradientFactors(const RowTask& task, const RowFrame<Real>& frame)
      : student(Real(task.scale * task.divergence_scale / task.temperature)),
        teacher(Real(task.scale * task.divergence_scale * task.teacher_weight / task.teacher_temperature)),
        label(Real(task.has_label ? task.scale * task.label_weight : 0)),
        label_q(frame.label_scale == Real(0) ? label : Real(0)) {}
};

// The gradient of one entry of probability `own`, before its factor.
template <Form kForm, class Real>
FASTKD_INLINE Real in_form(Real centred, Real closed, Real own, const Mean<Real>& mean) {
  if constexpr (kForm == Form::kClosed) return closed;
  const Real part = own * ((centred - mean.high) - mean.low);
  if constexpr (kForm == Form::kBoth || kForm == Form::kOpen) return closed + part;
  return part;
}
template <bool kNear, class Divergence, class Real>
FASTKD_INLINE Real student_gradient(const Divergence& divergence, const Outcome<Real>& o, const Mean<Real>& mean,
                                    const GradientFactors<Real>& factors) {
  const Terms<Real> t = divergence.template operator()<kNear>(o);
  return factors.student * in_form<Divergence::kStudent>(t.g, t.student, o.q, mean) + factors.label_q * o.q;
}
template <bool kNear, class Divergence, class Real>
FASTKD_INLINE Real teacher_gradient(const Divergence& divergence, const Outcome<Real>& o, const Mean<Real>& mean,
                                    const GradientFactors<Real>& factors) {
  const Terms<Real> t = divergence.template operator()<kNear>(o);
  return factors.teacher * in_form<Divergence::kTeacher>(t.h, t.teacher, o.p, mean);
}

}  // namespace fastkd::FASTKD_ISA
