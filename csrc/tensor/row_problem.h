// The arguments that every loss over rows of logits takes: the student, its temperature, labels, and how rows count.
#pragma once
#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "rows.h"

namespace fastkd {

struct RowOptions {
  double temperature;
  const std::optional<Tensor>&temperatures, &weight, &mask, &labels;
  double label_weight;
  int64_t ignore_index, vocab_size;
  bool square_temperature;
  const std::string& reduction;
  double denominator;
  const std::optional<Tensor>& normalizer;
};

// For functions that take logits, a temperature and labels, and reduce nothing.
inline RowOptions plain_options(double temperature, const std::optional<Tensor>& temperatures,
                                const std::optional<Tensor>& labels, int64_t vocab_size) {
  static const std::optional<Tensor> none;
  static const std::string reduction = "none";
  return {temperature, temperatures, none, none, labels, 0, -100, vocab_size, false, reduction, 1, none};
}
inline RowOptions plain_options(double temperature) {
  static const std::optional<Tensor> none;
  return plain_options(temperature, none, none, -1);
}

// Those arguments, checked, as rows. What depends on values (of temperatures, labels) is checked where they can be read
// without waiting for a device.
struct RowProblem {
  const char* function;
  RowOptions options;
  const Tensor& student_tensor;
  bool values_checked;
  int64_t leading, rows = 1, vocab;
  bool float64;
  Rows student, temperatures, weight, mask, labels;
  int64_t student_width;
  // Of ops that have a teacher: set_teacher_temperature.
  double teacher_temperature = 1;
  const Tensor* teacher_temperatures_tensor = nullptr;
  Rows teacher_temperatures;

  // input: what the function calls the logits.
  RowProblem(const char* name, const Tensor& s, const RowOptions& o, bool check_values,
             const char* input = "student_logits")
      : function(name), options(o), student_tensor(s), values_checked(check_values) {
    FASTKD_CHECK_VALUE(s.dim() >= 1, function, input, " must have at least one dimension, got a scalar");
    check_logits(s, input);
    leading = s.dim() - 1;
    for (int64_t i = 0; i < leading; ++i) rows *= s.size(i);
    student = Rows(s, leading);
    student_width = s.size(leading);
    float64 = s.scalar_type() == ScalarType::Double;
    vocab = o.vocab_size < 0 ? student_width : o.vocab_size;
    FASTKD_CHECK_VALUE(vocab <= student_width, function, "vocab_size is ", vocab, ", ", input, " has only ",
                       student_width, " columns");
    FASTKD_CHECK_VALUE(vocab >= 1, function, "the vocabulary must have at least one column, got ", vocab);
    FASTKD_CHECK_VALUE(o.reduction == "none" || o.reduction == "sum" || o.reduction == "mean", function,
                       "reduction must be none, sum or mean, got '", o.reduction, "'");
    temperatures = per_row(o.temperatures, "temperature", is_float, "floating-point");
    weight = per_row(o.weight, "weight", is_float, "floating-point");
    mask = per_row(o.mask, "mask", [](ScalarType x) { return x == ScalarType::Bool; }, "bool");
    labels = per_row(
        o.labels, "labels", [](ScalarType x) { return x == ScalarType::Long || x == ScalarType::Int; },
        "int64 or int32");
    check_positive(o.temperature, temperatures, "temperature");
    FASTKD_CHECK_VALUE(std::isfinite(o.label_weight), function, "label_weight must be finite, got ", o.label_weight);
    check_labels();
    check_normalizer();
  }

  void check_device(const Tensor& x, const char* argument) const {
    FASTKD_CHECK_VALUE(
        x.is_cpu() == student_tensor.is_cpu() && x.get_device_index() == student_tensor.get_device_index(), function,
        argument, " must be on the device of student_logits");
  }

  // What a forward call left for its backward, and gradients of what it returned.
  void check_kept(const Tensor& x, ScalarType type, int64_t count, const char* argument) const {
    check_device(x, argument);
    FASTKD_CHECK_VALUE(x.scalar_type() == type && x.numel() == count && x.is_contiguous(), function, argument,
                       " must be contiguous with ", count, " entries, got shape ", shape_of(x));
  }

  void check_logits(const Tensor& x, const char* argument) const {
    FASTKD_CHECK_TYPE(is_float(x.scalar_type()), function, argument,
                      " must be float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(x.scalar_type()));
    check_device(x, argument);
  }

  // A teacher's logits beside the student's.
  void check_teacher(const Tensor& teacher) const {
    check_logits(teacher, "teacher_logits");
    FASTKD_CHECK_VALUE(teacher.dim() == student_tensor.dim() && same_leading(teacher, student_tensor, leading),
                       function, "teacher_logits must have student_logits' leading dimensions ",
                       leading_of(student_tensor, leading), ", got shape ", shape_of(teacher));
    const int64_t width = teacher.size(leading);
    if (options.vocab_size < 0) {
      FASTKD_CHECK_VALUE(width == student_width, function, "teacher_logits has ", width,
                         " columns, student_logits has ", student_width,
                         "; pass vocab_size to compare only the first columns");
    }
    FASTKD_CHECK_VALUE(vocab <= width, function, "vocab_size is ", vocab, ", teacher_logits has only ", width,
                       " columns");
  }

  template <class Allowed>
  Rows per_row(const std::optional<Tensor>& x, const char* argument, Allowed allowed, const char* expected) const {
    if (!x) return Rows();
    FASTKD_CHECK_TYPE(allowed(x->scalar_type()), function, argument, " must be ", expected, ", got ",
                      torch::headeronly::toString(x->scalar_type()));
    check_device(*x, argument);
    FASTKD_CHECK_VALUE(x->dim() == leading && same_leading(*x, student_tensor, leading), function, argument,
                       " must have one entry a row, shape ", leading_of(student_tensor, leading), ", got shape ",
                       shape_of(*x));
    return Rows(*x, leading);
  }

  void check_positive(double all, const Rows& each, const char* argument) const {
    if (!each) {
      FASTKD_CHECK_VALUE(all > 0 && std::isfinite(all), function, argument, " must be positive and finite, got ", all);
      return;
    }
    for (int64_t row = 0; values_checked && row < rows; ++row) {
      const double value = each.number(row);
      FASTKD_CHECK_VALUE((value > 0 && std::isfinite(value)) || !kept(row), function, argument,
                         " must be positive and finite, got ", value, " in row ", row);
    }
  }

  void set_teacher_temperature(double all, const std::optional<Tensor>& each) {
    teacher_temperature = all;
    if (each) teacher_temperatures_tensor = &*each;
    teacher_temperatures = per_row(each, "teacher_temperature", is_float, "floating-point");
    check_positive(all, teacher_temperatures, "teacher_temperature");
  }

  void check_labels() const {
    for (int64_t row = 0; values_checked && labels && row < rows; ++row) {
      if (mask && mask.number(row) == 0) continue;
      const int64_t label = labels.integer(row);
      FASTKD_CHECK_INDEX(label == options.ignore_index || (label >= 0 && label < vocab), function,
                         "labels must lie in [0, ", vocab, ") or be ignore_index ", options.ignore_index, ", got ",
                         label, " in row ", row);
    }
  }

  void check_normalizer() const {
    if (!options.normalizer) return;
    FASTKD_CHECK_VALUE(options.normalizer->numel() == 1 && is_float(options.normalizer->scalar_type()), function,
                       "normalizer must be a number or a 0-d float tensor, got shape ", shape_of(*options.normalizer));
    check_device(*options.normalizer, "normalizer");
  }

  bool kept(int64_t row) const {
    return (!mask || mask.number(row) != 0) && (!labels || labels.integer(row) != options.ignore_index);
  }
  double row_weight(int64_t row) const { return !kept(row) ? 0 : weight ? weight.number(row) : 1; }
  double temperature(int64_t row) const { return temperatures ? temperatures.number(row) : options.temperature; }
  double row_teacher_temperature(int64_t row) const {
    return teacher_temperatures ? teacher_temperatures.number(row) : teacher_temperature;
  }
  int64_t label(int64_t row) const { return labels ? labels.integer(row) : -1; }

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

// A float16 gradient divided by thousands of rows would vanish before a loss scaler can lift it: the division waits.
inline bool gradient_waits(const RowProblem& problem, std::initializer_list<const Tensor*> gradients) {
  bool half = false;
  for (const Tensor* x : gradients) half = half || (x != nullptr && x->scalar_type() == ScalarType::Half);
  return half && problem.options.reduction != "none";
}

// Where gradients of the student go.
inline void check_gradient(const RowProblem& problem, const std::optional<Tensor>& gradient) {
  if (!gradient) return;
  const Tensor& student = problem.student_tensor;
  problem.check_device(*gradient, "gradient");
  FASTKD_CHECK_VALUE(gradient->dim() == student.dim() && same_leading(*gradient, student, student.dim()) &&
                         gradient->scalar_type() == student.scalar_type(),
                     problem.function, "gradient must be like student_logits, shape ", shape_of(student),
                     ", got shape ", shape_of(*gradient));
}

inline std::vector<int64_t> loss_shape(const Tensor& student, const std::string& reduction) {
  std::vector<int64_t> shape;
  if (reduction != "none") return shape;
  for (int64_t i = 0; i + 1 < student.dim(); ++i) shape.push_back(student.size(i));
  return shape;
}

}  // namespace fastkd
