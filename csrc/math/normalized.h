// From logits to the Outcome (divergence.h) of every vocabulary entry, once the row's normalisers are known.
#pragma once
#include "target_term.h"

namespace fastkd {

// What to compute for a row, besides its logits.
struct RowTask {
  double temperature, teacher_temperature;
  double divergence_scale;  // of the divergence's value: temperature^2 or 1
  double scale;             // of the row's gradients: weight / denominator
  double label_weight;
  bool has_label;
  bool mix_probs;  // the teacher is given as log2-probabilities at its temperature
  bool student_gradient, teacher_gradient;
  double beta = 0, alpha = 1;  // the divergence's
  double teacher_weight = 1;   // dz_mixed / dz: the factor of the teacher's gradient where it is part of a mixture
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

// A mean as a float and its rounding error. The gradient subtracts both from g or h.
template <class Real>
struct Mean {
  Real high, low;
  Mean() = default;
  FASTKD_INLINE explicit Mean(double mean) : high(Real(mean)), low(Real(mean - double(Real(mean)))) {}
};

// Computes outcomes from logits, once both normalisers are known. A logit is first taken relative to the origin, a
// value near the largest logit: probabilities that matter are then exact to rounding, whatever constant the logits
// contain. Logits more than kDead below the origin have probability 0, as those of -inf have.
template <class Real>
struct Normalized {
  Real student_scale, teacher_scale, teacher_ratio;
  Real student_origin, teacher_origin;  // logits
  Real student_lse, teacher_lse;        // relative to the origins, base 2
  // kNear takes the log-ratio from logits less `base`, whose difference is exact where the two sides nearly agree.
  Real student_base, teacher_base;
  Real base_gap;    // the difference of origins less bases: student - teacher_ratio teacher
  Real near_shift;  // the difference of the normalisers, natural, plus the rounding error of base_gap
  Real log_shift;   // the difference of the normalisers relative to the origins, natural

  template <bool kNear>
  FASTKD_INLINE Outcome<Real> outcome(Real u, Real w) const {
    const Real x = u - student_origin, y = w - teacher_origin;
    const Real a = x * student_scale - student_lse, b = y * teacher_scale - teacher_lse;
    Real ratio;
    if constexpr (kNear) {
      const Real alive_u = at_least(Real(-kDead), u - student_base), alive_w = at_least(Real(-kDead), w - teacher_base);
      ratio = ((alive_u - alive_w * teacher_ratio) - base_gap) * student_scale * Real(kLn2) - near_shift;
    } else {
      const Real alive_x = at_least(Real(-kDead), x), alive_y = at_least(Real(-kDead), y);
      ratio = (alive_x - alive_y * teacher_ratio) * student_scale * Real(kLn2) - log_shift;
    }
    Outcome<Real> o;
    o.p = exp2_of(b);
    o.q = exp2_of(a);
    o.log2_p = at_least(Real(-kDead), b);
    o.log2_q = at_least(Real(-kDead), a);
    o.d = magnitude(ratio) > Real(kInfiniteLogRatio) ? with_sign(Real(kLargestLogRatio), ratio) : ratio;
    o.small = kNear && magnitude(o.d) < Real(0.5);
    o.logits_apart = x - y * teacher_ratio;
    o.nats = student_scale * Real(kLn2);
    o.difference = o.q - o.p;
    if constexpr (kNear) o.difference = select(o.small, o.p * (o.d + expm1_gap(o.d)), o.difference);
    return o;
  }
};

// The scales of a row's logits, and its normalisers, known after pass 1.
template <class Real>
struct RowFrame {
  Real student_scale, teacher_scale, teacher_ratio;  // log2(e) / temperature, and teacher's scale over student's
  Real label_scale;                                  // log2(e), or 0 where pass 1 need not sum it separately
  Real student_origin, teacher_origin;               // logits near the largest
  double student_lse, teacher_lse, label_lse;        // relative to the origins, base 2

  FASTKD_INLINE void set_scales(const RowTask& task) {
    student_scale = Real(kLog2E / task.temperature);
    teacher_scale = Real(task.mix_probs ? 1.0 : kLog2E / task.teacher_temperature);
    teacher_ratio =
        task.mix_probs || task.temperature != task.teacher_temperature ? teacher_scale / student_scale : Real(1);
    label_scale = task.has_label && task.temperature != 1.0 ? Real(kLog2E) : Real(0);
  }
  template <class To>
  FASTKD_INLINE RowScales<To> scales() const {
    return {To(student_scale), To(teacher_scale), To(label_scale)};
  }

  FASTKD_INLINE void normalize(const RowTask& task, const RowState<double>& all) { normalize(task, all, all.lses()); }
  FASTKD_INLINE void normalize(const RowTask& task, const RowState<double>& all, const RowLses& lses) {
    student_origin = Real(all.student.origin);
    teacher_origin = Real(all.teacher.origin);
    student_lse = lses.student;
    teacher_lse = lses.teacher;
    label_lse = !task.has_label ? 0 : label_scale == Real(0) ? student_lse : ::log2(all.label_sum);
  }

  // near: also what kNear needs.
  FASTKD_INLINE Normalized<Real> normalized(bool near = true) const {
    const double shift = student_lse - teacher_lse;
    Normalized<Real> at{student_scale,
                        teacher_scale,
                        teacher_ratio,
                        student_origin,
                        teacher_origin,
                        Real(student_lse),
                        Real(teacher_lse),
                        0,
                        0,
                        0,
                        0,
                        Real(shift * kLn2)};
    if (near) set_bases(at, shift);
    return at;
  }

 private:
  FASTKD_INLINE void set_bases(Normalized<Real>& at, double shift) const {
    Real student_base = student_origin, teacher_base = teacher_origin;
    const Real limit = Real(kInfiniteLogRatio);
    if (teacher_ratio == Real(1) && magnitude(student_origin) < limit && magnitude(teacher_origin) < limit) {
      // The difference of two nearly equal numbers is exact. To make the two logits nearly equal, the difference of the
      // origins is subtracted from the side whose origin is farther from 0. It is rounded to a multiple of that side's
      // last digit, so that this subtraction is exact too.
      const bool of_student = magnitude(student_origin) > magnitude(teacher_origin);
      const double far = of_student ? student_origin : teacher_origin;
      const double close = of_student ? teacher_origin : student_origin;
      const double digit = last_digit(Real(far));
      const Real base = magnitude(far - close) < 0.5 ? Real(0) : Real(far - ::rint(close / digit) * digit);
      student_base = of_student ? base : Real(0);
      teacher_base = of_student ? Real(0) : base;
    }
    const double gap = (double(student_origin) - double(student_base)) -
                       double(teacher_ratio) * (double(teacher_origin) - double(teacher_base));
    at.student_base = student_base;
    at.teacher_base = teacher_base;
    at.base_gap = Real(gap);
    at.near_shift = Real((shift + (gap - Real(gap)) * student_scale) * kLn2);
  }
};

// The entries of a block, computed from their logits.
template <class Real, bool kNear>
struct FromLogits {
  Normalized<Real> at;
  const Real *student, *teacher;
  FASTKD_INLINE Outcome<Real> outcome(int64_t i) const { return at.template outcome<kNear>(student[i], teacher[i]); }
};

// The logits that the first pass took a block relative to: near the largest seen so far, -inf where all so far were
// -inf.
template <class Real>
struct Origins {
  Real student, teacher;
};

// The entries of a block from what the first pass stored: 2^x of the student, and 2^x of the teacher or, where the
// student weights, the log-ratio. This saves computing the exponentials again. It serves only rows that are not near,
// and sets only the fields of an outcome that those divergences use: p, q and their difference, or q and d.
template <class Real, Pass kPass>
struct Stored {
  const Real *student, *teacher;
  Real student_factor, teacher_factor;
  // Scale and shift of the log-ratio, each in two parts, since the log-ratio minus its mean may be tiny.
  Mean<Real> ratio_scale, ratio_shift;
  FASTKD_INLINE Outcome<Real> outcome(int64_t i) const {
    const Real q = student[i] * student_factor, none = Real(0);
    if constexpr (kPass == Pass::kStudentWeighted) {
      const Real d = teacher[i] * ratio_scale.high + ratio_shift.high;
      return {none, q, none, none, d + (teacher[i] * ratio_scale.low + ratio_shift.low), none, false};
    } else {
      const Real p = teacher[i] * teacher_factor;
      return {p, q, none, none, none, q - p, false};
    }
  }
};

// The entries of a block with p and q as the first pass stored them, and what else there is from the logits.
template <class Real, Pass kPass>
struct StoredWithRatio {
  Stored<Real, kPass> stored;
  FromLogits<Real, false> logits;
  FASTKD_INLINE Outcome<Real> outcome(int64_t i) const {
    Outcome<Real> o = logits.outcome(i);
    const Outcome<Real> found = stored.outcome(i);
    o.p = found.p;
    o.q = found.q;
    o.difference = found.difference;
    return o;
  }
};

}  // namespace fastkd::FASTKD_ISA
