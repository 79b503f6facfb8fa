// The arguments of softmax_divergence, in the form that every backend takes.
#pragma once
#include "find_divergence.h"
#include "row_problem.h"

namespace fastkd {

inline constexpr const char* kSoftmaxDivergence = "softmax_divergence";

// kContrast and kShare: see adaptive_mix.h; teacher_weights are then its strength and coefficient.
enum class TeacherMix : int64_t { kLogits, kProbs, kContrast, kShare };
struct TeacherMixes {  // in the order of TeacherMix
  static std::array<const char*, 4> names() { return {"logits", "probs", "contrast", "share"}; }
};

struct SoftmaxDivergenceArguments {
  static constexpr const char *kName = kSoftmaxDivergence, *kLogits = "student_logits";

  Tensor student_logits;
  std::vector<Tensor> teacher_logits;
  Choice<DivergenceNames<portable::Divergences>> divergence;
  double beta = 0.5, alpha = 1, teacher_temperature = 1;
  std::optional<Tensor> betas, alphas, teacher_temperatures, teacher_weights, teacher_rows;
  Choice<TeacherMixes> teacher_mix;
  RowOptions rows;

  TeacherMix mix() const { return TeacherMix(teacher_mix.place); }

  template <class Visitor>
  void fields(Visitor& v) {
    v("student_logits", student_logits), v("teacher_logits", teacher_logits), v("divergence", divergence);
    v("beta", beta), v("betas", betas), v("alpha", alpha), v("alphas", alphas);
    v("teacher_temperature", teacher_temperature);
    v("teacher_temperatures", teacher_temperatures), v("teacher_weights", teacher_weights);
    v("teacher_mix", teacher_mix), v("teacher_rows", teacher_rows);
    rows.fields(v);
  }
};

// All arguments of softmax_divergence, checked.
struct Problem : RowProblem {
  const SoftmaxDivergenceArguments& own;
  const std::vector<Tensor>& teacher_tensors;
  Rows student_gradient, teacher_gradient;
  std::vector<Rows> teachers;
  int64_t teacher_width, teacher_row_count = -1;  // rows: only with teacher_rows
  Rows teacher_weights;
  portable::DivergencePlaces divergence;
  bool mix_probs;
  bool mix_adapts;        // the weights of the teachers depend on their distance
  bool constant_teacher;  // its gradient is 0
  bool excludes_label;    // it is of all tokens but the label
  bool any_beta;          // beta need not be a share, but alpha + beta not negative
  double alpha;
  Rows alphas;

  Problem(const SoftmaxDivergenceArguments& arguments, bool check_values)
      : RowProblem(kSoftmaxDivergence, arguments.student_logits, arguments.rows, check_values),
        own(arguments),
        teacher_tensors(arguments.teacher_logits) {
    const std::vector<Tensor>& t = teacher_tensors;
    divergence = find_divergence<portable::Divergences>(own.divergence);
    constant_teacher = DivergenceNames<portable::Divergences>::constant_teacher()[size_t(own.divergence.place)];
    excludes_label = DivergenceNames<portable::Divergences>::excludes_label()[size_t(own.divergence.place)];
    FASTKD_CHECK_VALUE(!excludes_label || options.labels, kSoftmaxDivergence,
                       "labels must be given with divergence='decoupled_kl', got None");
    any_beta = DivergenceNames<portable::Divergences>::any_beta()[size_t(own.divergence.place)];
    set_places();
    set_beta(own.beta, own.betas, any_beta);
    set_alpha();
    for (const Tensor& teacher : t) {
      teachers.push_back(teacher_rows(teacher));
      float64 = float64 || teacher.scalar_type() == ScalarType::Double;
    }
    teacher_width = t[0].size(t[0].dim() - 1);
    mix_probs = own.mix() == TeacherMix::kProbs && t.size() > 1;
    mix_adapts = own.mix() == TeacherMix::kContrast || own.mix() == TeacherMix::kShare;
    if (mix_adapts) {
      FASTKD_CHECK_VALUE(t.size() == 2, kSoftmaxDivergence, "teacher_logits must hold two tensors with teacher_mix='",
                         TeacherMixes::names()[size_t(own.mix())], "', got ", t.size());
      FASTKD_CHECK_VALUE(!own.teacher_rows, kSoftmaxDivergence, "teacher_rows are not available with teacher_mix='",
                         TeacherMixes::names()[size_t(own.mix())], "'");
    }
    set_teacher_temperature(own.teacher_temperature, own.teacher_temperatures);
    check_teacher_weights(own.student_logits, t.size());
  }

  void set_places() {
    if (!own.teacher_rows) return;
    int64_t count = -1;
    for (const Tensor& teacher : teacher_tensors) {
      FASTKD_CHECK_VALUE(teacher.dim() >= 1, kSoftmaxDivergence,
                         "teacher_logits must have at least one dimension, got a scalar");
      int64_t mine = 1;
      for (int64_t i = 0; i < teacher.dim() - 1; ++i) mine *= teacher.size(i);
      FASTKD_CHECK_VALUE(count < 0 || mine == count, kSoftmaxDivergence,
                         "teacher_logits must all have the same number of rows, got ", count, " and ", mine);
      count = mine;
    }
    teacher_row_count = count;
    set_teacher_places(own.teacher_rows, count);
  }

  void set_alpha() {
    alpha = own.alpha;
    alphas = per_row(own.alphas, "alpha", is_float, "floating-point");
    check_numbers(alpha, alphas, "alpha", " must be finite, got ", [](double x) { return std::isfinite(x); });
    if (!any_beta) return;
    const bool each = alphas || betas;
    if (!each) {
      FASTKD_CHECK_VALUE(alpha + beta >= 0, kSoftmaxDivergence, "alpha + beta must not be negative, got ", alpha, " + ",
                         beta);
    }
    for (int64_t row = 0; each && values_checked && row < rows; ++row) {
      if (!kept(row)) continue;
      const double a = row_alpha(row), b = row_beta(row);
      FASTKD_CHECK_VALUE(a + b >= 0, kSoftmaxDivergence, "alpha + beta must not be negative, got ", a, " + ", b,
                         " in row ", row);
    }
  }
  double row_alpha(int64_t row) const { return alphas ? alphas.number(row) : alpha; }

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
    const bool probs = own.mix() == TeacherMix::kProbs;
    for (int64_t row = 0; values_checked && row < (shared ? 1 : rows); ++row) {
      double sum = 0;
      for (size_t k = 0; k < count; ++k) {
        const double value = teacher_weights.number(row, k);
        FASTKD_CHECK_VALUE(!probs || value >= 0, kSoftmaxDivergence,
                           "teacher_weights must not be negative with teacher_mix='probs', got ", value);
        FASTKD_CHECK_VALUE(!mix_adapts || (value > 0 && std::isfinite(value)), kSoftmaxDivergence,
                           "teacher_weights must be positive and finite with teacher_mix='",
                           TeacherMixes::names()[size_t(own.mix())], "', got ", value);
        sum += value;
      }
      FASTKD_CHECK_VALUE(!probs || sum > 0, kSoftmaxDivergence,
                         "teacher_weights must not all be zero with teacher_mix='probs'");
    }
  }
};

}  // namespace fastkd
