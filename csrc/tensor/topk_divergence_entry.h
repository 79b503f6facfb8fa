// The op _topk_divergence: checks and allocation for a backend, which solves the problem.
#pragma once
#include <tuple>

#include "../math/topk_plan.h"
#include "allocate.h"
#include "find_divergence.h"
#include "row_problem.h"

namespace fastkd {

inline constexpr const char* kTopkDivergence = "topk_divergence";

inline Tail find_tail(const std::string& name) {
  if (name == "lump") return Tail::kLump;
  if (name == "uniform") return Tail::kUniform;
  if (name == "renormalize") return Tail::kRenormalize;
  FASTKD_CHECK_VALUE(name == "drop", kTopkDivergence, "tail must be one of lump, uniform, renormalize, drop; got '",
                     name, "'");
  return Tail::kDrop;
}

struct TopkProblem : RowProblem {
  int divergence;
  double beta;
  Tail tail;
  double stored_temperature, floor, cap;
  const Tensor &log_probs_tensor, &indices_tensor;
  Rows log_probs, indices;
  int64_t k;

  TopkProblem(const Tensor& student, const RowOptions& options, const Tensor& l, const Tensor& i, bool check_values)
      : RowProblem(kTopkDivergence, student, options, check_values), log_probs_tensor(l), indices_tensor(i) {
    check_logits(l, "teacher_log_probs");
    FASTKD_CHECK_TYPE(i.scalar_type() == ScalarType::Long || i.scalar_type() == ScalarType::Int, function,
                      "teacher_indices must be int64 or int32, got ", torch::headeronly::toString(i.scalar_type()));
    check_device(i, "teacher_indices");
    FASTKD_CHECK_VALUE(l.dim() == student.dim() && same_leading(l, student, leading), function,
                       "teacher_log_probs must have student_logits' leading dimensions ", leading_of(student, leading),
                       ", got shape ", shape_of(l));
    FASTKD_CHECK_VALUE(i.dim() == l.dim() && same_leading(i, l, l.dim()), function,
                       "teacher_indices must have teacher_log_probs' shape ", shape_of(l), ", got shape ", shape_of(i));
    k = l.size(leading);
    log_probs = Rows(l, leading);
    indices = Rows(i, leading);
    float64 = float64 || l.scalar_type() == ScalarType::Double;
  }

  TopkTask task(int64_t row, double scale) const {
    const double t = temperature(row);
    return {divergence,
            beta,
            tail,
            t,
            stored_temperature / row_teacher_temperature(row),
            floor,
            cap,
            options.square_temperature ? t * t : 1,
            scale,
            options.label_weight,
            bool(labels)};
  }
};

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> topk_divergence(
    const std::optional<Tensor>& gradient, const Tensor& student_logits, const Tensor& teacher_log_probs,
    const Tensor& teacher_indices, const std::string& divergence, double beta, const std::string& tail,
    double stored_temperature, double teacher_temperature, const std::optional<Tensor>& teacher_temperatures,
    double min_log_prob, double max_token_loss, double temperature, const std::optional<Tensor>& temperatures,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& mask, const std::optional<Tensor>& labels,
    double label_weight, int64_t ignore_index, int64_t vocab_size, bool square_temperature,
    const std::string& reduction, double denominator, const std::optional<Tensor>& normalizer, bool teacher_gradient) {
  TopkProblem problem(student_logits,
                      {temperature, temperatures, weight, mask, labels, label_weight, ignore_index, vocab_size,
                       square_temperature, reduction, denominator, normalizer},
                      teacher_log_probs, teacher_indices, Backend::kValuesChecked);
  problem.divergence = find_divergence<portable::BareDivergences>(kTopkDivergence, divergence, beta);
  problem.beta = beta;
  problem.tail = find_tail(tail);
  problem.stored_temperature = stored_temperature;
  problem.check_positive(stored_temperature, Rows(), "stored_temperature");
  problem.set_teacher_temperature(teacher_temperature, teacher_temperatures);
  FASTKD_CHECK_VALUE(min_log_prob < 0, kTopkDivergence, "min_log_prob must be negative, got ", min_log_prob);
  FASTKD_CHECK_VALUE(max_token_loss >= 0, kTopkDivergence, "max_token_loss must not be negative, got ", max_token_loss);
  problem.floor = min_log_prob;
  problem.cap = max_token_loss;
  check_gradient(problem, gradient);
  Tensor t = teacher_gradient ? torch::stable::empty_like(teacher_log_probs)
                              : torch::stable::new_empty(teacher_log_probs, {0});
  auto [loss, pending] = Backend::solve(problem, gradient ? &*gradient : nullptr, teacher_gradient ? &t : nullptr);
  return {loss, t, pending};
}

}  // namespace fastkd
