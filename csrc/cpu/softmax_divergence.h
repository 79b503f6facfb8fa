// One row of softmax_divergence: its loss and its gradients.
//
// Memory: pass 1 reads student and teacher, accumulates the softmax states with the log-ratio sum that is the whole
// value of the KL divergences, and keeps what it computed of each entry (RowPasses). From there the others go on: they
// read no logits again and compute no exponential. The last pass writes the gradient; divergences of a mixture need one
// more before it, for their sums. Rows that came out nearly equal take a careful route (kNear), from the logits: their
// value and gradient are differences too small for what pass 1 kept.
#pragma once
#include "softmax_divergence_passes.h"

namespace fastkd::FASTKD_ISA {

// The row's loss (divergence and label term, not weighted), its gradients written where wanted.
template <class Real, class Divergence>
double softmax_divergence_row(const SoftmaxDivergenceRow& row, const SliceRunner& runner) {
  constexpr Pass kPass = Divergence::kPass;
  constexpr bool kOnePass = kPass != Pass::kNormalizersOnly, kCrossing = kPass == Pass::kTeacherCrossing;
  const Divergence divergence{row.beta};
  RowPasses<Real> passes(row, runner);

  Real label_logit = 0;
  const Real* label_at = row.label < 0 ? &label_logit : load(row.student, row.label, 1, &label_logit);
  label_logit = *label_at;

  const bool keep = !kOnePass || row.student_gradient;
  const RowState<double> state =
      keep ? passes.template accumulate<kPass, true>() : passes.template accumulate<kPass, false>();
  const bool wants_gradient = row.student_gradient || row.teacher_gradient;
  // The first pass already has the mean that the student's gradient needs, as long as it is finite.
  const bool needs_teacher_mean = row.teacher_gradient && !Divergence::kHIsGradient;
  const bool needs_student_mean = row.student_gradient && !Divergence::kGIsGradient;
  Sums sums{};
  double value, closeness, student_mean = 0;
  if constexpr (kOnePass) {
    closeness = state.kl(kPass);
    student_mean = closeness;
    value = kCrossing ? state.cross_entropy() : closeness;
    if (needs_teacher_mean || (needs_student_mean && value >= kInfiniteLogRatio)) {
      sums = passes.template sum_terms<false>(divergence);
      student_mean = sums.qg / sums.q;
    }
  } else {
    sums = passes.template sum_terms<false>(divergence);
    closeness = value = sums.f;
    student_mean = sums.qg / sums.q;
  }
  const bool near = closeness < Divergence::kNearBelow * (1 + (kOnePass ? state.mean_ratio(kPass) : 0));
  if (near && (wants_gradient || !kCrossing)) {
    sums = passes.template sum_terms<true>(divergence);
    passes.refine(sums);
    if (needs_teacher_mean || needs_student_mean) sums = passes.template sum_terms<true>(divergence);
    if (!kCrossing) value = sums.f;
    student_mean = sums.qg / sums.q;
  }
  if (Divergence::kGIsGradient) student_mean = 0;
  double teacher_mean = needs_teacher_mean ? sums.ph / sums.p : 0;
  // A normaliser that is NaN makes the whole row so, whatever the logarithms made of it.
  const double poison = (passes.student_lse - passes.student_lse) + (passes.teacher_lse - passes.teacher_lse);
  value += poison;
  student_mean += poison;
  teacher_mean += poison;
  if (wants_gradient) {  // the teacher's first: the student's may overwrite its logits
    if (near) {
      if (row.teacher_gradient) passes.template write_teacher_gradient<true>(divergence, teacher_mean);
      if (row.student_gradient) passes.template write_student_gradient<true, false>(divergence, student_mean);
    } else {
      if (row.teacher_gradient) passes.template write_teacher_gradient<false>(divergence, teacher_mean);
      // Of an infinite log-ratio only that was kept.
      const bool kept = kPass != Pass::kStudentWeighted || !(value >= kInfiniteLogRatio);
      if (row.student_gradient && kept) passes.template write_student_gradient<false, true>(divergence, student_mean);
      if (row.student_gradient && !kept) passes.template write_student_gradient<false, false>(divergence, student_mean);
    }
    fill_zero(row.student_gradient, row.vocab, row.student_width);
    fill_zero(row.teacher_gradient, row.vocab, row.teacher_width);
  }
  value *= row.divergence_scale;
  if (row.label >= 0)
    value += row.label_weight * (passes.label_lse * kLn2 - (double(label_logit) - double(passes.student_origin)));
  return value;
}

template <class... Divergence>
constexpr void list_kernels(SoftmaxDivergenceKernel* out, TypeList<Divergence...>) {
  static_assert(sizeof...(Divergence) == kDivergences);
  ((*out++ = {Divergence::kName, softmax_divergence_row<float, Divergence>,
              softmax_divergence_row<double, Divergence>}),
   ...);
}

}  // namespace fastkd::FASTKD_ISA
