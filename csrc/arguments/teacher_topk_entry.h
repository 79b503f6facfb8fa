// The op _teacher_topk: checks and allocation. The backend does the selection.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "row_problem.h"

namespace fastkd {

inline constexpr const char* kTeacherTopk = "teacher_topk";

struct TeacherTopk {
  static constexpr const char* kName = kTeacherTopk;
  static constexpr int kResults = 2;

  Tensor teacher_logits;
  int64_t k = 0;
  double temperature = 1;
  std::optional<Tensor> temperatures;
  int64_t vocab_size = -1;

  template <class Visitor>
  void fields(Visitor& v) {
    v("teacher_logits", teacher_logits), v("k", k), v("temperature", temperature), v("temperatures", temperatures);
    v("vocab_size", vocab_size);
  }

  // Returns log-probabilities (float32) and indices (int32), both [..., k].
  template <class Backend>
  std::tuple<Tensor, Tensor> run() const {
    const RowProblem problem(kName, teacher_logits, plain_options(temperature, temperatures, std::nullopt, vocab_size),
                             Backend::kValuesChecked, {"teacher_logits"});
    FASTKD_CHECK_VALUE(k >= 1 && k <= problem.vocab, kName, "k must lie in [1, ", problem.vocab,
                       "], the size of the vocabulary; got ", k);
    FASTKD_CHECK_VALUE(problem.vocab <= INT32_MAX, kName,
                       "indices are int32: the vocabulary must have fewer than 2^31 columns, got ", problem.vocab);
    std::vector<int64_t> shape = row_shape(teacher_logits);
    shape.push_back(k);
    Tensor log_probs = torch::stable::new_empty(teacher_logits, shape, ScalarType::Float);
    Tensor indices = torch::stable::new_empty(teacher_logits, shape, ScalarType::Int);
    Backend::solve(problem, k, static_cast<float*>(log_probs.data_ptr()), static_cast<int32_t*>(indices.data_ptr()));
    return {log_probs, indices};
  }
};

}  // namespace fastkd
