// The op _clipped_divergence: checks and allocation. The backend computes the result.
#pragma once
#include <array>
#include <tuple>

#include "../math/clipped_plan.h"
#include "loss_op.h"
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
    teacher = teacher_rows(t);
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

struct Renormalizations {  // in the order of Renormalize
  static std::array<const char*, 3> names() { return {"none", "teacher", "both"}; }
};
struct ClippedTails {
  static std::array<const char*, 2> names() { return {"drop", "lump"}; }
};

// Where the gradients are written; null: not requested.
struct ClippedGradients {
  const Tensor *student, *teacher, *lower, *upper;
};

struct ClippedDivergence {
  static constexpr const char *kName = kClippedDivergence, *kLogits = "student_logits";
  static constexpr int kGradients = 4;

  Tensor student_logits, teacher_logits, lower, upper;
  bool keep_label = true;
  Choice<Renormalizations> renormalize;
  Choice<ClippedTails> tail;
  double softness = 0;  // hard edges
  bool quantile = false;
  double teacher_temperature = 1;
  std::optional<Tensor> teacher_temperatures;
  RowOptions rows;

  template <class Visitor>
  void fields(Visitor& v) {
    v("student_logits", student_logits), v("teacher_logits", teacher_logits), v("lower", lower), v("upper", upper);
    v("keep_label", keep_label), v("renormalize", renormalize), v("tail", tail), v("softness", softness);
    v("quantile", quantile), v("teacher_temperature", teacher_temperature);
    v("teacher_temperatures", teacher_temperatures);
    rows.fields(v);
  }

  const Tensor& differentiable(int i) const {
    return i == 0 ? student_logits : i == 1 ? teacher_logits : i == 2 ? lower : upper;
  }
  // The two edges' gradients come from the same sums: if one is requested, both are computed.
  void check_gradients(int64_t wanted) const {
    FASTKD_CHECK_VALUE(softness > 0 || (wanted & 12) == 0, kName, "gradients of lower and upper need a softness");
    FASTKD_CHECK_VALUE((wanted & 12) == 0 || (wanted & 12) == 12, kName, "gradients of lower and upper come together");
  }

  template <class Backend>
  std::tuple<Tensor, Tensor> solve(const std::array<const Tensor*, kGradients>& gradients) const {
    ClippedProblem problem(student_logits, rows, teacher_logits, lower, upper, Backend::kValuesChecked);
    problem.keep_label = keep_label;
    problem.renormalize = Renormalize(renormalize.place);
    problem.lump = tail.place == 1;
    FASTKD_CHECK_VALUE(softness >= 0 && std::isfinite(softness), kName, "softness must be positive and finite, got ",
                       softness);
    problem.softness = softness;
    problem.quantile = quantile;
    problem.set_teacher_temperature(teacher_temperature, teacher_temperatures);
    problem.check_edges();
    return Backend::solve(problem, {gradients[0], gradients[1], gradients[2], gradients[3]});
  }
};

}  // namespace fastkd
