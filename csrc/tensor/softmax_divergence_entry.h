// The ops of softmax_divergence: checks and allocation for a backend, which solves the problem.
#pragma once
#include <tuple>

#include "allocate.h"
#include "softmax_divergence_problem.h"

namespace fastkd {

inline void check_gradients(const std::vector<Tensor>& teachers, bool teacher_gradient) {
  FASTKD_CHECK_VALUE(!teacher_gradient || teachers.size() == 1, kSoftmaxDivergence,
                     "teacher_logits in a list take no gradient");
}

inline Tensor empty(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> softmax_divergence(
    const Tensor& student_logits, const std::vector<Tensor>& teacher_logits, const std::string& divergence, double beta,
    double temperature, double teacher_temperature, const std::optional<Tensor>& temperatures,
    const std::optional<Tensor>& teacher_temperatures, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& teacher_weights, const std::string& teacher_mix,
    const std::optional<Tensor>& labels, double label_weight, int64_t ignore_index, int64_t vocab_size,
    bool square_temperature, const std::string& reduction, double denominator, const std::optional<Tensor>& normalizer,
    bool student_gradient, bool teacher_gradient) {
  Problem problem(student_logits, teacher_logits,
                  {divergence, beta, teacher_temperature, teacher_temperatures, teacher_weights, teacher_mix},
                  {temperature, temperatures, weight, mask, labels, label_weight, ignore_index, vocab_size,
                   square_temperature, reduction, denominator, normalizer},
                  Backend::kValuesChecked);
  check_gradients(teacher_logits, teacher_gradient);
  Tensor s = student_gradient ? gradient_like(student_logits) : empty(student_logits);
  Tensor t = teacher_gradient ? gradient_like(teacher_logits[0]) : empty(teacher_logits[0]);
  auto [loss, pending] = Backend::solve(problem, student_gradient ? &s : nullptr, teacher_gradient ? &t : nullptr);
  return {loss, s, t, pending};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> softmax_divergence_into(
    const Tensor& gradient, const Tensor& student_logits, const std::vector<Tensor>& teacher_logits,
    const std::string& divergence, double beta, double temperature, double teacher_temperature,
    const std::optional<Tensor>& temperatures, const std::optional<Tensor>& teacher_temperatures,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& teacher_weights, const std::string& teacher_mix, const std::optional<Tensor>& labels,
    double label_weight, int64_t ignore_index, int64_t vocab_size, bool square_temperature,
    const std::string& reduction, double denominator, const std::optional<Tensor>& normalizer, bool teacher_gradient) {
  Problem problem(student_logits, teacher_logits,
                  {divergence, beta, teacher_temperature, teacher_temperatures, teacher_weights, teacher_mix},
                  {temperature, temperatures, weight, mask, labels, label_weight, ignore_index, vocab_size,
                   square_temperature, reduction, denominator, normalizer},
                  Backend::kValuesChecked);
  check_gradients(teacher_logits, teacher_gradient);
  problem.check_device(gradient, "gradient");
  FASTKD_CHECK_VALUE(gradient.dim() == student_logits.dim() &&
                         same_leading(gradient, student_logits, student_logits.dim()) &&
                         gradient.scalar_type() == student_logits.scalar_type(),
                     kSoftmaxDivergence, "gradient must be like student_logits, shape ", shape_of(student_logits),
                     ", got shape ", shape_of(gradient));
  for (int64_t i = 0; i < gradient.dim(); ++i) {
    FASTKD_CHECK_VALUE(
        gradient.stride(i) != 0 || gradient.size(i) <= 1, kSoftmaxDivergence,
        "inplace needs student_logits with storage of its own for every element, got an expanded tensor");
  }
  Tensor t = teacher_gradient ? gradient_like(teacher_logits[0]) : empty(teacher_logits[0]);
  auto [loss, pending] = Backend::solve(problem, &gradient, teacher_gradient ? &t : nullptr);
  return {loss, t, pending};
}

}  // namespace fastkd
