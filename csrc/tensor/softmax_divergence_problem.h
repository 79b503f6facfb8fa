// The arguments of softmax_divergence, as every backend takes them.
#pragma once
#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "../math/divergence.h"
#include "rows.h"

namespace fastkd {

inline constexpr const char* kSoftmaxDivergence = "softmax_divergence";

struct Options {
  const std::string& divergence;
  double beta, temperature, teacher_temperature;
  const std::optional<Tensor>&temperatures, &teacher_temperatures, &weight, &mask, &teacher_weights;
  const std::string& teacher_mix;
  const std::optional<Tensor>& labels;
  double label_weight;
  int64_t ignore_index, vocab_size;
  bool square_temperature;
  const std::string& reduction;
  double denominator;
  const std::optional<Tensor>& normalizer;
};

template <class... Divergence>
constexpr auto divergence_names(portable::TypeList<Divergence...>) {
  return std::array<const char*, sizeof...(Divergence)>{Divergence::kName...};
}
inline constexpr auto kDivergenceNames = divergence_names(portable::Divergences{});

// The place in portable::Divergences; the ends of a mixture are the plain divergences.
inline int find_divergence(std::string name, double beta) {
  FASTKD_CHECK_VALUE(beta >= 0 && beta <= 1, kSoftmaxDivergence, "beta must lie in [0, 1], got ", beta);
  if (name == "jsd" && beta == 0) name = "forward_kl";
  if (name == "jsd" && beta == 1) name = "reverse_kl";
  if (name == "skew_kl" && beta == 0) name = "forward_kl";
  if (name == "skew_reverse_kl" && beta == 0) name = "reverse_kl";
  std::ostringstream known;
  for (size_t i = 0; i < kDivergenceNames.size(); ++i) {
    if (name == kDivergenceNames[i]) return int(i);
    known << (i ? ", " : "") << kDivergenceNames[i];
  }
  fail("ValueError", kSoftmaxDivergence, "divergence must be one of ", known.str(), "; got '", name, "'");
}

// All arguments of softmax_divergence, checked, as rows. What depends on values (of temperatures, teacher weights,
// labels) is checked where they can be read without waiting for a device.
struct Problem {
  Options options;
  const Tensor& student_tensor;
  const std::vector<Tensor>& teacher_tensors;
  bool values_checked;
  int64_t leading, rows = 1, vocab;
  bool float64;
  Rows student, student_gradient, teacher_gradient;
  std::vector<Rows> teachers;
  int64_t student_width, teacher_width;
  Rows temperatures, teacher_temperatures, weight, mask, teacher_weights, labels;
  bool mix_probs;

  Problem(const Tensor& s, const std::vector<Tensor>& t, const Options& o, bool check_values)
      : options(o), student_tensor(s), teacher_tensors(t), values_checked(check_values) {
    find_divergence(o.divergence, o.beta);
    FASTKD_CHECK_VALUE(!t.empty(), kSoftmaxDivergence,
                       "teacher_logits must hold at least one tensor, got an empty list");
    FASTKD_CHECK_VALUE(s.dim() >= 1, kSoftmaxDivergence,
                       "student_logits must have at least one dimension, got a scalar");
    check_logits(s, "student_logits");
    leading = s.dim() - 1;
    for (int64_t i = 0; i < leading; ++i) rows *= s.size(i);
    student = Rows(s, leading);
    student_width = s.size(leading);
    float64 = s.scalar_type() == ScalarType::Double;
    for (const Tensor& teacher : t) {
      check_logits(teacher, "teacher_logits");
      FASTKD_CHECK_VALUE(teacher.dim() == s.dim() && same_leading(teacher, s, leading), kSoftmaxDivergence,
                         "teacher_logits must have student_logits' leading dimensions ", leading_of(s, leading),
                         ", got shape ", shape_of(teacher));
      teachers.emplace_back(teacher, leading);
      float64 = float64 || teacher.scalar_type() == ScalarType::Double;
    }
    teacher_width = t[0].size(leading);
    check_vocab(t);
    mix_probs = o.teacher_mix == "probs" && t.size() > 1;
    FASTKD_CHECK_VALUE(o.teacher_mix == "probs" || o.teacher_mix == "logits", kSoftmaxDivergence,
                       "teacher_mix must be 'logits' or 'probs', got '", o.teacher_mix, "'");
    FASTKD_CHECK_VALUE(o.reduction == "none" || o.reduction == "sum" || o.reduction == "mean", kSoftmaxDivergence,
                       "reduction must be none, sum or mean, got '", o.reduction, "'");
    temperatures = per_row(s, o.temperatures, "temperature", is_float, "floating-point");
    teacher_temperatures = per_row(s, o.teacher_temperatures, "teacher_temperature", is_float, "floating-point");
    weight = per_row(s, o.weight, "weight", is_float, "floating-point");
    mask = per_row(s, o.mask, "mask", [](ScalarType x) { return x == ScalarType::Bool; }, "bool");
    labels = per_row(
        s, o.labels, "labels", [](ScalarType x) { return x == ScalarType::Long || x == ScalarType::Int; },
        "int64 or int32");
    check_positive(o.temperature, temperatures, "temperature");
    check_positive(o.teacher_temperature, teacher_temperatures, "teacher_temperature");
    check_teacher_weights(s, t.size());
    FASTKD_CHECK_VALUE(std::isfinite(o.label_weight), kSoftmaxDivergence, "label_weight must be finite, got ",
                       o.label_weight);
    check_labels();
    check_normalizer();
  }

  void check_device(const Tensor& x, const char* argument) const {
    FASTKD_CHECK_VALUE(
        x.is_cpu() == student_tensor.is_cpu() && x.get_device_index() == student_tensor.get_device_index(),
        kSoftmaxDivergence, argument, " must be on the device of student_logits");
  }

  void check_logits(const Tensor& x, const char* argument) const {
    FASTKD_CHECK_TYPE(is_float(x.scalar_type()), kSoftmaxDivergence, argument,
                      " must be float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(x.scalar_type()));
    check_device(x, argument);
  }

  void check_vocab(const std::vector<Tensor>& t) {
    vocab = options.vocab_size < 0 ? student_width : options.vocab_size;
    for (const Tensor& teacher : t) {
      const int64_t width = teacher.size(leading);
      if (options.vocab_size < 0) {
        FASTKD_CHECK_VALUE(width == student_width, kSoftmaxDivergence, "teacher_logits has ", width,
                           " columns, student_logits has ", student_width,
                           "; pass vocab_size to compare only the first columns");
      }
      FASTKD_CHECK_VALUE(vocab <= width, kSoftmaxDivergence, "vocab_size is ", vocab, ", teacher_logits has only ",
                         width, " columns");
    }
    FASTKD_CHECK_VALUE(vocab <= student_width, kSoftmaxDivergence, "vocab_size is ", vocab,
                       ", student_logits has only ", student_width, " columns");
    FASTKD_CHECK_VALUE(vocab >= 1, kSoftmaxDivergence, "the vocabulary must have at least one column, got ", vocab);
  }

  template <class Allowed>
  Rows per_row(const Tensor& s, const std::optional<Tensor>& x, const char* argument, Allowed allowed,
               const char* expected) const {
    if (!x) return Rows();
    FASTKD_CHECK_TYPE(allowed(x->scalar_type()), kSoftmaxDivergence, argument, " must be ", expected, ", got ",
                      torch::headeronly::toString(x->scalar_type()));
    check_device(*x, argument);
    FASTKD_CHECK_VALUE(x->dim() == leading && same_leading(*x, s, leading), kSoftmaxDivergence, argument,
                       " must have one entry a row, shape ", leading_of(s, leading), ", got shape ", shape_of(*x));
    return Rows(*x, leading);
  }

  void check_positive(double all, const Rows& each, const char* argument) const {
    if (!each) {
      FASTKD_CHECK_VALUE(all > 0 && std::isfinite(all), kSoftmaxDivergence, argument,
                         " must be positive and finite, got ", all);
      return;
    }
    for (int64_t row = 0; values_checked && row < rows; ++row) {
      const double value = each.number(row);
      FASTKD_CHECK_VALUE((value > 0 && std::isfinite(value)) || !kept(row), kSoftmaxDivergence, argument,
                         " must be positive and finite, got ", value, " in row ", row);
    }
  }

  void check_teacher_weights(const Tensor& s, size_t count) {
    if (!options.teacher_weights) return;
    const Tensor& w = *options.teacher_weights;
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

  void check_labels() const {
    for (int64_t row = 0; values_checked && labels && row < rows; ++row) {
      if (mask && mask.number(row) == 0) continue;
      const int64_t label = labels.integer(row);
      FASTKD_CHECK_INDEX(label == options.ignore_index || (label >= 0 && label < vocab), kSoftmaxDivergence,
                         "labels must lie in [0, ", vocab, ") or be ignore_index ", options.ignore_index, ", got ",
                         label, " in row ", row);
    }
  }

  void check_normalizer() const {
    if (!options.normalizer) return;
    FASTKD_CHECK_VALUE(options.normalizer->numel() == 1 && is_float(options.normalizer->scalar_type()),
                       kSoftmaxDivergence, "normalizer must be a number or a 0-d float tensor, got shape ",
                       shape_of(*options.normalizer));
    check_device(*options.normalizer, "normalizer");
  }

  bool kept(int64_t row) const {
    return (!mask || mask.number(row) != 0) && (!labels || labels.integer(row) != options.ignore_index);
  }
  double row_weight(int64_t row) const { return !kept(row) ? 0 : weight ? weight.number(row) : 1; }

  // 1 / denominator, 0 for an empty one.
  double factor() const {
    double denominator = options.denominator;
    if (options.normalizer) {
      denominator = Rows(*options.normalizer, 0).number(0);
    } else if (options.reduction == "mean") {
      denominator = 0;
      for (int64_t row = 0; row < rows; ++row) denominator += kept(row);
    }
    return denominator == 0 ? 0 : 1 / denominator;
  }
};

inline std::vector<int64_t> loss_shape(const Tensor& student, const std::string& reduction) {
  std::vector<int64_t> shape;
  if (reduction != "none") return shape;
  for (int64_t i = 0; i + 1 < student.dim(); ++i) shape.push_back(student.size(i));
  return shape;
}

}  // namespace fastkd
