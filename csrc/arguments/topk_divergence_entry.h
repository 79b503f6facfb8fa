// The op _topk_divergence: checks and allocation. The backend computes the result.
#pragma once
#include <array>
#include <tuple>

#include "../math/topk_plan.h"
#include "find_divergence.h"
#include "loss_op.h"
#include "row_problem.h"

namespace fastkd {

inline constexpr const char* kTopkDivergence = "topk_divergence";

struct Tails {  // in the order of Tail
  static std::array<const char*, 4> names() { return {"lump", "uniform", "renormalize", "drop"}; }
};

struct TopkProblem : RowProblem {
  portable::DivergencePlaces divergence;
  Tail tail;
  double stored_temperature, floor, cap;
  const Tensor &log_probs_tensor, &indices_tensor;
  Rows log_probs, indices;
  int64_t k;

  TopkProblem(const Tensor& student, const RowOptions& row_options, const Tensor& l, const Tensor& i, bool check_values)
      : RowProblem(kTopkDivergence, student, row_options, check_values), log_probs_tensor(l), indices_tensor(i) {
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
    const double t = temperature(row), share = row_beta(row);
    return {divergence.at(share),
            share,
            tail,
            t,
            stored_temperature / row_teacher_temperature(row),
            floor,
            cap,
            options.square_temperature ? t * t : 1,
            scale,
            row_label_weight(row),
            bool(labels)};
  }
};

struct TopkDivergence {
  static constexpr const char *kName = kTopkDivergence, *kLogits = "student_logits";
  static constexpr int kGradients = 2;

  Tensor student_logits, teacher_log_probs, teacher_indices;
  Choice<DivergenceNames<portable::UnnormalizedDivergences>> divergence;
  double beta = 0.5;
  Choice<Tails> tail;
  double stored_temperature = 1, teacher_temperature = 1;
  std::optional<Tensor> betas, teacher_temperatures;
  double min_log_prob = -INFINITY, max_token_loss = INFINITY;
  RowOptions rows;

  template <class Visitor>
  void fields(Visitor& v) {
    v("student_logits", student_logits), v("teacher_log_probs", teacher_log_probs);
    v("teacher_indices", teacher_indices), v("divergence", divergence), v("beta", beta), v("betas", betas);
    v("tail", tail);
    v("stored_temperature", stored_temperature), v("teacher_temperature", teacher_temperature);
    v("teacher_temperatures", teacher_temperatures), v("min_log_prob", min_log_prob);
    v("max_token_loss", max_token_loss);
    rows.fields(v);
  }

  const Tensor& differentiable(int i) const { return i == 0 ? student_logits : teacher_log_probs; }
  void check_gradients(int64_t) const {}

  template <class Backend>
  std::tuple<Tensor, Tensor> solve(const std::array<const Tensor*, kGradients>& gradients) const {
    TopkProblem problem(student_logits, rows, teacher_log_probs, teacher_indices, Backend::kValuesChecked);
    problem.divergence = find_divergence<portable::UnnormalizedDivergences>(divergence);
    problem.set_beta(beta, betas);
    problem.tail = Tail(tail.place);
    problem.stored_temperature = stored_temperature;
    problem.check_positive(stored_temperature, Rows(), "stored_temperature");
    problem.set_teacher_temperature(teacher_temperature, teacher_temperatures);
    FASTKD_CHECK_VALUE(min_log_prob < 0, kName, "min_log_prob must be negative, got ", min_log_prob);
    FASTKD_CHECK_VALUE(max_token_loss >= 0, kName, "max_token_loss must not be negative, got ", max_token_loss);
    problem.floor = min_log_prob;
    problem.cap = max_token_loss;
    return Backend::solve(problem, gradients[0], gradients[1]);
  }
};

}  // namespace fastkd
