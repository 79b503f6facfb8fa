// The arguments of softmax_divergence, as every backend takes them.
#pragma once
#include "find_divergence.h"
#include "row_problem.h"

namespace fastkd {

inline constexpr const char* kSoftmaxDivergence = "softmax_divergence";

struct Options {
  const std::string& divergence;
  double beta, teacher_temperature;
  const std::optional<Tensor>&teacher_temperatures, &teacher_weights;
  const std::string& teacher_mix;
};

// All arguments of softmax_divergence, checked.
struct Problem : RowProblem {
  Options own;
  const std::vector<Tensor>& teacher_tensors;
  Rows student_gradient, teacher_gradient;
  std::vector<Rows> teachers;
  int64_t teacher_width;
  Rows teacher_weights;
  bool mix_probs;

  Problem(const Tensor& s, const std::vector<Tensor>& t, const Options& o, const RowOptions& rows_options,
          bool check_values)
      : RowProblem(kSoftmaxDivergence, s, rows_options, check_values), own(o), teacher_tensors(t) {
    find_divergence<portable::Divergences>(kSoftmaxDivergence, o.divergence, o.beta);
    FASTKD_CHECK_VALUE(!t.empty(), kSoftmaxDivergence,
                       "teacher_logits must hold at least one tensor, got an empty list");
    for (const Tensor& teacher : t) {
      check_teacher(teacher);
      teachers.emplace_back(teacher, leading);
      float64 = float64 || teacher.scalar_type() == ScalarType::Double;
    }
    teacher_width = t[0].size(leading);
    mix_probs = o.teacher_mix == "probs" && t.size() > 1;
    FASTKD_CHECK_VALUE(o.teacher_mix == "probs" || o.teacher_mix == "logits", kSoftmaxDivergence,
                       "teacher_mix must be 'logits' or 'probs', got '", o.teacher_mix, "'");
    set_teacher_temperature(o.teacher_temperature, o.teacher_temperatures);
    check_teacher_weights(s, t.size());
  }

  void check_teacher_weights(const Tensor& s, size_t count) {
    if (!own.teacher_weights) return;
    const Tensor& w = *own.teacher_weights;
    FASTKD_CHECK_TYPE(is_float(w.scalar_type()), kSoftmaxDivergence, "teacher_weights must be floating-point, got ",
                      torch::headeronly::toString(w.scalar_type()));
    check_device(w, "teacher_weights");
    const bool shared = w.dim() == 1, each = w.dim() == leading + 1 && same_leading(w, s, leading);
    FASTKD_CHECK_VALUE((shared || each) && w.size(w.dim() - 1) == int64_t(count), kSoftmaxDivergence,
                       "teacher_weights must be ", count, " numbers or have shape ", leading_of(s, leading), " + [",
                       count, "], got shape ", shape_of(w));
    teacher_weights = Rows(w, shared ? 0 : leading);
    for (int64_t row = 0; values_checked && row < (shared ? 1 : rows); ++row) {
      double sum = 0;
      for (size_t k = 0; k < count; ++k) {
        const double value = teacher_weights.number(row, k);
        FASTKD_CHECK_VALUE(!mix_probs || value >= 0, kSoftmaxDivergence,
                           "teacher_weights must not be negative with teacher_mix='probs', got ", value);
        sum += value;
      }
      FASTKD_CHECK_VALUE(!mix_probs || sum > 0, kSoftmaxDivergence,
                         "teacher_weights must not all be zero with teacher_mix='probs'");
    }
  }
};

}  // namespace fastkd
