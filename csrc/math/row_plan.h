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
  double f, qg, ph, q, p;
  double difference;  // of the far terms, where the divergence is kByMass: their mass

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
  TargetTerm target;  // where the divergence excludes the label

  // To be called after pass 1. label: where the divergence excludes it.
  FASTKD_INLINE void begin(const RowTask& task, const RowState<double>& all, const LabelLogits& label = {}) {
    begin(task, all, all.lses(), label);
  }
  FASTKD_INLINE void begin(const RowTask& task, const RowState<double>& all, const RowLses& lses,
                           const LabelLogits& label) {
    this->normalize(task, all, lses);
    if constexpr (Divergence::kExcludesLabel) exclude_label(all, label);
    near = refined_ = false;
    kept = true;
    value = student_mean = teacher_mean = 0;
    step = Step::kSumFar;
    if (Divergence::kExcludesLabel && no_others()) {
      step = Step::kWrite;
    } else if constexpr (kOnePass) {
      // Pass 1 gives the value, and the mean for the student's gradient if that mean is finite.
      const double mean_ratio = all.mean_ratio(kPass);
      student_mean = all.kl(kPass, mean_ratio, lses);
      value = kCrossing ? all.cross_entropy(lses) : student_mean;
      near = student_mean < Divergence::kNearBelow * (1 + magnitude(mean_ratio));
      kept = kPass != Pass::kStudentWeighted || !(value >= kLargestKept);
      if (near) {
        step = !kCrossing || task.student_gradient || task.teacher_gradient ? Step::kSumNear : Step::kWrite;
      } else if (!needs_teacher_mean(task) && (kept || !needs_student_mean(task))) {
        step = Step::kWrite;
      }
    }
    if (step == Step::kWrite) finish(task);
  }

  // To be called after each pass that sums the row's terms.
  FASTKD_INLINE void add(const RowTask& task, const Sums& sums) {
    if (step == Step::kSumFar) {
      if (!kOnePass) {
        value = sums.f;
        near = value < Divergence::kNearBelow * (Divergence::kByMass ? sums.difference : 1);
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
    if (step == Step::kWrite) finish(task);
  }

  // The divergence plus the label's term, log-sum-exp - logit.
  FASTKD_INLINE double loss(const RowTask& task, double label_logit) const {
    const double label = task.has_label ? this->label_lse * kLn2 - (label_logit - double(this->student_origin)) : 0;
    return divergence() * task.divergence_scale + (task.has_label ? task.label_weight * label : 0);
  }

 private:
  bool refined_;
  LabelLogits label_;
  bool student_alone_, teacher_alone_;  // the label is that side's only token

  FASTKD_INLINE double divergence() const {
    if constexpr (!Divergence::kExcludesLabel) return value;
    return (target.share == 0 ? 0 : target.share * value) + target.value;
  }

  // The distribution of the other tokens is of no account where a side has none: TCKD is then infinite if only the
  // student has none.
  FASTKD_INLINE bool no_others() const { return student_alone_ || teacher_alone_; }
  FASTKD_INLINE void exclude_label(const RowState<double>& all, const LabelLogits& label) {
    label_ = label;
    student_alone_ = all.student.sum == 0, teacher_alone_ = all.teacher.sum == 0;
    if (student_alone_) {
      set_alone(label.student, this->student_origin, this->student_lse);
      this->label_lse = this->student_lse;
    }
    if (teacher_alone_) set_alone(label.teacher, this->teacher_origin, this->teacher_lse);
  }
  // All other probabilities are then 0. NaN if the label is not a token either.
  static FASTKD_INLINE void set_alone(double logit, Real& origin, double& lse) {
    origin = Real(logit);
    lse = logit - logit;
  }

  // The label's log-odds.
  static FASTKD_INLINE double log_odds(double logit, double origin, double scale, double lse, bool alone) {
    if (!(logit < double(INFINITY))) return double(NAN);
    return alone ? double(INFINITY) + (lse - lse) : ((logit - origin) * scale - lse) * kLn2;
  }
  FASTKD_INLINE void find_target(const RowTask& task) {
    const double teacher_scale = task.mix_probs ? 1 : kLog2E / task.teacher_temperature, own = kLog2E;
    const double x =
        log_odds(label_.student, this->student_origin, own / task.temperature, this->student_lse, student_alone_);
    const double y = log_odds(label_.teacher, this->teacher_origin, teacher_scale, this->teacher_lse, teacher_alone_);
    set_target(target, x, y, task.alpha);
    target.share = no_others() ? 0 : task.beta;
    if (!task.has_label) return;
    // The label's softmax, at temperature 1, is of all tokens.
    const bool apart = this->label_scale != Real(0);
    const double lse = apart ? this->label_lse : this->student_lse;
    const double odds = apart ? log_odds(label_.student, this->student_origin, own, lse, student_alone_) : x;
    target.others = sigmoid(-odds);
    this->label_lse = odds > 0 ? (label_.student - this->student_origin) * own - log_sigmoid(odds) * kLog2E
                               : lse - log_sigmoid(-odds) * kLog2E;
  }

  static FASTKD_INLINE bool needs_student_mean(const RowTask& task) {
    return task.student_gradient && Divergence::kStudent != Form::kClosed;
  }
  static FASTKD_INLINE bool needs_teacher_mean(const RowTask& task) {
    return task.teacher_gradient && Divergence::kTeacher != Form::kClosed;
  }

  // A NaN normaliser makes the whole row NaN, whatever the logarithms gave.
  FASTKD_INLINE void finish(const RowTask& task) {
    if constexpr (Divergence::kExcludesLabel) find_target(task);
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
// Where the divergence excludes the label, q, p and softmax(u) are 0 there; `at_label` is the whole gradient of the
// label's logit, and the log-odds' gradient divided by the other tokens, -q d / dx, is part of `label_q`.
template <class Real>
struct GradientFactors {
  Real student, teacher;
  Real label;     // of the label's term
  Real label_q;   // what q is multiplied by besides: label if its softmax is q (temperature 1), else 0, and the softmax
                  // is added separately
  Real at_label;  // what is added to the gradient of the label's logit
  Real teacher_q, teacher_at_label;  // the same of the teacher, where the divergence excludes the label
  GradientFactors() = default;
  FASTKD_INLINE GradientFactors(const RowTask& task, const RowFrame<Real>& frame)
      : student(Real(task.scale * task.divergence_scale / task.temperature)),
        teacher(Real(task.scale * task.divergence_scale * task.teacher_weight / task.teacher_temperature)),
        label(Real(task.has_label ? task.scale * task.label_weight : 0)),
        label_q(frame.label_scale == Real(0) ? label : Real(0)),
        at_label(-label),
        teacher_q(0),
        teacher_at_label(0) {}
  // Of a divergence.
  template <class Divergence>
  static FASTKD_INLINE GradientFactors of(const RowTask& task, const RowPlan<Real, Divergence>& plan) {
    GradientFactors all(task, plan);
    if constexpr (Divergence::kExcludesLabel) {
      const TargetTerm& target = plan.target;
      const double scale = task.scale * task.divergence_scale,
                   label = task.has_label ? task.scale * task.label_weight : 0;
      const double by_x = scale * target.student / task.temperature;
      const double by_y = scale * target.teacher * task.teacher_weight / task.teacher_temperature;
      const bool apart = plan.label_scale != Real(0);
      all.student = Real(target.share * double(all.student));
      all.teacher = Real(target.share * double(all.teacher));
      all.label_q = Real((apart || label == 0 ? 0 : label * target.others) - by_x);
      all.at_label = Real(by_x - (label == 0 ? 0 : label * target.others));
      all.teacher_q = Real(-by_y);
      all.teacher_at_label = Real(by_y);
    }
    return all;
  }
};

// The gradient of one entry of probability `own`, before its factor.
template <Form kForm, class Real>
FASTKD_INLINE Real in_form(Real centred, Real closed, Real own, const Mean<Real>& mean) {
  if constexpr (kForm == Form::kClosed) return closed;
  if constexpr (kForm == Form::kProduct) return (closed - own * mean.high) - own * mean.low;
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
  const Real part = factors.teacher * in_form<Divergence::kTeacher>(t.h, t.teacher, o.p, mean);
  return Divergence::kExcludesLabel ? part + factors.teacher_q * o.p : part;
}

}  // namespace fastkd::FASTKD_ISA
