// The op softmax_divergence: its declaration. The backend computes the result.
#pragma once
#include "loss_op.h"
#include "softmax_divergence_problem.h"

namespace fastkd {

struct SoftmaxDivergence : SoftmaxDivergenceArguments {
  static constexpr int kGradients = 2;

  const Tensor& differentiable(int i) const { return i == 0 ? student_logits : teacher_logits[0]; }

  void check_gradients(int64_t wanted) const {
    FASTKD_CHECK_VALUE(!teacher_logits.empty(), kName,
                       "teacher_logits must hold at least one tensor, got an empty list");
    FASTKD_CHECK_VALUE((wanted & 2) == 0 || teacher_logits.size() == 1, kName,
                       "teacher_logits in a list take no gradient");
    FASTKD_CHECK_VALUE((wanted & 2) == 0 || !teacher_rows, kName, "teacher_logits take no gradient with teacher_rows");
  }

  template <class Backend>
  std::tuple<Tensor, Tensor> solve(const std::array<const Tensor*, kGradients>& gradients) const {
    Problem problem(*this, Backend::kValuesChecked);
    return Backend::solve(problem, gradients[0], gradients[1]);
  }
};

}  // namespace fastkd
