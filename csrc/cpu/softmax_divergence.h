// softmax_divergence of one row: its loss and its gradients.
//
// Memory: pass 1 reads student and teacher. It accumulates the softmax states, together with the log-ratio sum that
// gives the value of the KL divergences, and stores what it computed of each entry (RowPasses). The later passes use
// what pass 1 stored: they read no logits again and compute no exponential. The last pass writes the gradient;
// divergences of a mixture need one more pass before it, for their sums. Rows in which student and teacher are nearly
// equal (kNear) are instead computed from the logits again: their value and gradient are differences too small for what
// pass 1 stored.
#pragma once
#include "softmax_divergence_passes.h"

namespace fastkd::FASTKD_ISA {

template <class Real, class Divergence>
double solve_row(const Divergence& divergence, const SoftmaxDivergenceRow& row, const SliceRunner& runner) {
  const RowTask& task = row.task;
  RowPlan<Real, Divergence> plan;
  plan.set_scales(task);
  const RowPasses<Real> passes(row, runner, plan);

  Real label_logit = 0, teacher_logit = 0, spare;  // read before the gradient may overwrite it
  if (row.label >= 0) label_logit = *load(row.student, row.label, 1, &label_logit);

  const bool keep = !plan.kOnePass || task.student_gradient;
  const RowState<double> state = keep ? passes.template accumulate<Divergence::kPass, true>()
                                      : passes.template accumulate<Divergence::kPass, false>();
  if constexpr (Divergence::kExcludesLabel) {
    teacher_logit = *passes.teacher.load_block(row.label, 1, &teacher_logit, &spare);
  }
  plan.begin(task, state, {label_logit, teacher_logit});
  while (plan.step != Step::kWrite) {
    plan.add(task, plan.step == Step::kSumNear ? passes.template sum_terms<true>(divergence)
                                               : passes.template sum_terms<false>(divergence));
  }
  // The teacher's gradient is written first: writing the student's may overwrite the student's logits.
  if (task.teacher_gradient) {
    if (plan.near)
      passes.template write_teacher_gradient<true>(divergence, plan);
    else
      passes.template write_teacher_gradient<false>(divergence, plan);
    fill_zero(row.teacher_gradient, row.vocab, row.teacher_width);
  }
  if (task.student_gradient) {
    if (plan.near)
      passes.template write_student_gradient<true, false>(divergence, plan);
    else if (plan.kept)
      passes.template write_student_gradient<false, true>(divergence, plan);
    else
      passes.template write_student_gradient<false, false>(divergence, plan);
    fill_zero(row.student_gradient, row.vocab, row.student_width);
  }
  return plan.loss(task, label_logit);
}

// Returns the row's loss (divergence and label term, before its weight), and writes the requested gradients.
template <class Real, class Divergence>
double softmax_divergence_row(const SoftmaxDivergenceRow& row, const SliceRunner& runner) {
  const double beta = row.task.beta, alpha = row.task.alpha;
  if constexpr (sizeof(Real) == sizeof(float) && Short<Divergence>::kExists) {
    if (Short<Divergence>::serves(row.task)) return solve_row<Real>(Short<Divergence>{beta, alpha}, row, runner);
  }
  return solve_row<Real>(Divergence{beta, alpha}, row, runner);
}

// The total variation distance of the row's two teachers at temperature 1. A divergence from their mixture then finds
// them in the cache.
template <class Real>
double teachers_apart(const SoftmaxDivergenceRow& row, const SliceRunner& runner) {
  const double one = 1;
  SoftmaxDivergenceRow pair{};
  pair.vocab = row.vocab;
  pair.student = row.teachers.rows[0];
  pair.teachers = {row.teachers.rows + 1, &one, 1, false};
  pair.task.temperature = pair.task.teacher_temperature = 1;
  pair.scratch = row.scratch;
  RowFrame<Real> frame;
  frame.set_scales(pair.task);
  const RowPasses<Real> passes(pair, runner, frame);
  frame.normalize(pair.task, passes.template accumulate<Pass::kNormalizersOnly, false>());
  const double far = passes.template total_variation<false>();
  return far < Tvd::kNearBelow ? passes.template total_variation<true>() : far;
}

template <class Real, class... Divergence>
constexpr SoftmaxDivergenceKernels list_kernels(TypeList<Divergence...>) {
  return {{softmax_divergence_row<Real, Divergence>...}, teachers_apart<Real>};
}

extern const SoftmaxDivergenceKernels softmax_divergence_float, softmax_divergence_double;

}  // namespace fastkd::FASTKD_ISA
