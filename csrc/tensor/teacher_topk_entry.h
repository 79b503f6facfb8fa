// The op _teacher_topk: checks and allocation for a backend, which selects.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "row_problem.h"

namespace fastkd {

inline constexpr const char* kTeacherTopk = "teacher_topk";

template <class Backend>
std::tuple<Tensor, Tensor> teacher_topk(const Tensor& teacher_logits, int64_t k, double temperature,
                                        const std::optional<Tensor>& temperatures, int64_t vocab_size) {
  static const std::optional<Tensor> none;
  const RowProblem problem(kTeacherTopk, teacher_logits, plain_options(temperature, temperatures, none, vocab_size),
                           Backend::kValuesChecked, "teacher_logits");
  FASTKD_CHECK_VALUE(k >= 1 && k <= problem.vocab, kTeacherTopk, "k must lie in [1, ", problem.vocab,
                     "], the size of the vocabulary; got ", k);
  FASTKD_CHECK_VALUE(problem.vocab <= INT32_MAX, kTeacherTopk,
                     "indices are int32: the vocabulary must have fewer than 2^31 columns, got ", problem.vocab);
  std::vector<int64_t> shape = loss_shape(teacher_logits, "none");
  shape.push_back(k);
  Tensor log_probs = torch::stable::new_empty(teacher_logits, shape, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(teacher_logits, shape, ScalarType::Int);
  Backend::solve(problem, k, static_cast<float*>(log_probs.data_ptr()), static_cast<int32_t*>(indices.data_ptr()));
  return {log_probs, indices};
}

}  // namespace fastkd
