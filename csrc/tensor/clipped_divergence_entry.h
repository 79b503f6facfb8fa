// The op _clipped_divergence: checks and allocation for a backend, which solves the problem.
#pragma once
#include <tuple>

#include "../math/clipped_plan.h"
#include "allocate.h"
#include "row_problem.h"

namespace fastkd {

inline constexpr const char* kClippedDivergence = "clipped_divergence";

struct ClippedProblem : RowProblem {
  const Tensor &teacher_tensor, &lower_tensor, &upper_tensor;
  Rows teacher, lower, upper;
  double softness = 0;
  bool keep_label = false, lump = false, quantile = false;
  Renormalize renormalize = Renormalize::kNone;
  int64_t teacher_width;

  ClippedProblem(const Tensor& student, const RowOptions& options, const Tensor& t, const Tensor& l, const Tensor& u,
                 bool check_values)
      : RowProblem(kClippedDivergence, student, options, check_values),
        teacher_tensor(t),
        lower_tensor(l),
        upper_tensor(u) {
    check_teacher(t);
    teacher = Rows(t, leading);
    teacher_width = t.size(leading);
    float64 = float64 || t.scalar_type() == ScalarType::Double;
    lower = per_row(std::optional<Tensor>(l), "lower", is_float, "floating-point");
    upper = per_row(std::optional<Tensor>(u), "upper", is_float, "floating-point");
  }

  void check_edges() const {
    for (int64_t row = 0; values_checked && row < rows; ++row) {
      if (row_weight(row) == 0) continue;
      const double low = lower.number(row), high = upper.number(row);
      FASTKD_CHECK_VALUE(low <= high, function, "lower must not exceed upper, got ", low, " and ", high, " in row ",
                         row);
      FASTKD_CHECK_VALUE(!quantile || (low >= 0 && high <= 1), function,
                         "lower and upper are quantile levels, in [0, 1]; got ", low, " and ", high, " in row ", row);
    }
  }
};

inline Renormalize find_renormalize(const std::string& name) {
  if (name == "none") return Renormalize::kNone;
  if (name == "teacher") return Renormalize::kTeacher;
  FASTKD_CHECK_VALUE(name == "both", kClippedDivergence, "renormalize must be none, teacher or both; got '", name, "'");
  return Renormalize::kBoth;
}

// Where the gradients go; null: not asked for.
struct ClippedGradients {
  const Tensor *student, *teacher, *lower, *upper;
};

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> clipped_divergence(
    const std::optional<Tensor>& gradient, const Tensor& student_logits, const Tensor& teacher_logits,
    const Tensor& lower, const Tensor& upper, bool keep_label, const std::string& renormalize, const std::string& tail,
    double softness, bool quantile, double teacher_temperature, const std::optional<Tensor>& teacher_temperatures,
    double temperature, const std::optional<Tensor>& temperatures, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& labels, double label_weight, int64_t ignore_index,
    int64_t vocab_size, bool square_temperature, const std::string& reduction, double denominator,
    const std::optional<Tensor>& normalizer, bool teacher_gradient, bool bound_gradients) {
  ClippedProblem problem(student_logits,
                         {temperature, temperatures, weight, mask, labels, label_weight, ignore_index, vocab_size,
                          square_temperature, reduction, denominator, normalizer},
                         teacher_logits, lower, upper, Backend::kValuesChecked);
  problem.keep_label = keep_label;
  problem.renormalize = find_renormalize(renormalize);
  FASTKD_CHECK_VALUE(tail == "drop" || tail == "lump", kClippedDivergence, "tail must be drop or lump; got '", tail,
                     "'");
  problem.lump = tail == "lump";
  FASTKD_CHECK_VALUE(softness >= 0 && std::isfinite(softness), kClippedDivergence,
                     "softness must be positive and finite, got ", softness);
  FASTKD_CHECK_VALUE(softness > 0 || !bound_gradients, kClippedDivergence,
                     "gradients of lower and upper need a softness");
  problem.softness = softness;
  problem.quantile = quantile;
  problem.set_teacher_temperature(teacher_temperature, teacher_temperatures);
  problem.check_edges();
  check_gradient(problem, gradient);
  const auto like = [](const Tensor& x, bool wanted) {
    return wanted ? gradient_like(x) : torch::stable::new_empty(x, {0});
  };
  Tensor t = like(teacher_logits, teacher_gradient);
  Tensor l = like(lower, bound_gradients), u = like(upper, bound_gradients);
  auto [loss, pending] = Backend::solve(problem, {gradient ? &*gradient : nullptr, teacher_gradient ? &t : nullptr,
                                                  bound_gradients ? &l : nullptr, bound_gradients ? &u : nullptr});
  return {loss, t, l, u, pending};
}

}  // namespace fastkd
