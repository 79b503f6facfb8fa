// The arguments common to all losses over rows of logits: the student's logits, temperature, labels, and row weighting.
#pragma once
#include <array>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <vector>

#include "op.h"
#include "rows.h"

namespace fastkd {

// How the rows' losses are reduced to the op's result. kBatchMean: divided by the first dimension; kElementMean:
// divided by rows x vocabulary.
enum class Reduction : int64_t { kNone, kMean, kSum, kBatchMean, kElementMean };
struct Reductions {
  static std::array<const char*, 5> names() { return {"none", "mean", "sum", "batchmean", "elementmean"}; }
};

struct RowOptions {
  double temperature = 1;
  std::optional<Tensor> temperatures, weight, mask, labels, label_weights;
  double label_weight = 0;
  double student_logit_softcap = INFINITY, teacher_logit_softcap = INFINITY;  // infinite: none
  int64_t ignore_index = -100, vocab_size = -1;
  int64_t shift = 0;  // a row uses the label, label weight, mask and weight of the row `shift` places later
  bool square_temperature = false;
  Choice<Reductions> reduction;
  double denominator = 1;  // with kSum
  std::optional<Tensor> normalizer;

  template <class Visitor>
  void fields(Visitor& v) {
    v("temperature", temperature), v("temperatures", temperatures), v("weight", weight), v("mask", mask);
    v("labels", labels), v("label_weight", label_weight), v("label_weights", label_weights);
    v("ignore_index", ignore_index), v("vocab_size", vocab_size);
    v("student_logit_softcap", student_logit_softcap), v("teacher_logit_softcap", teacher_logit_softcap);
    v("shift", shift), v("square_temperature", square_temperature), v("reduction", reduction);
    v("denominator", denominator), v("normalizer", normalizer);
  }
  Reduction reduced() const { return Reduction(reduction.place); }
  LogitMap student_map() const { return {student_logit_softcap}; }
  LogitMap teacher_map() const { return {teacher_logit_softcap}; }
};

// The options of functions that take logits, a temperature and labels, and have no reduction.
inline RowOptions plain_options(double temperature, const std::optional<Tensor>& temperatures = std::nullopt,
                                const std::optional<Tensor>& labels = std::nullopt, int64_t vocab_size = -1) {
  RowOptions options;
  options.temperature = temperature;
  options.temperatures = temperatures;
  options.labels = labels;
  options.vocab_size = vocab_size;
  return options;
}

// What the function calls its logits and its labels.
struct RowNames {
  const char* logits = "student_logits";
  const char* labels = "labels";
};

// Those arguments, checked, as rows. Values (of temperatures, labels) are checked only where they can be read without
// waiting for a device.
struct RowProblem {
  const char* function;
  RowNames names;
  RowOptions options;
  const Tensor& student_tensor;
  bool values_checked;
  int64_t leading, rows = 1, vocab;
  bool float64;
  Rows student, temperatures, weight, mask, labels, label_weights;
  int64_t student_width;
  int64_t sequence = 1;  // the sequence length, where there is a shift
  // Set by set_teacher_places, in ops that have them: which of the teacher's rows belongs to a row, negative: none.
  Rows teacher_places;
  const std::optional<Tensor>* teacher_places_tensor = nullptr;
  // Set by set_beta, in ops that have one.
  double beta = 0.5;
  const Tensor* betas_tensor = nullptr;
  Rows betas;
  // Set by set_teacher_temperature, in ops that have a teacher.
  double teacher_temperature = 1;
  const Tensor* teacher_temperatures_tensor = nullptr;
  Rows teacher_temperatures;

  RowProblem(const char* name, const Tensor& s, const RowOptions& o, bool check_values, const RowNames& called = {})
      : function(name), names(called), options(o), student_tensor(s), values_checked(check_values) {
    const char* const input = names.logits;
    FASTKD_CHECK_VALUE(s.dim() >= 1, function, input, " must have at least one dimension, got a scalar");
    check_logits(s, input);
    leading = s.dim() - 1;
    for (int64_t i = 0; i < leading; ++i) rows *= s.size(i);
    student = Rows(s, leading);
    student.set_map(o.student_map());
    student_width = s.size(leading);
    float64 = s.scalar_type() == ScalarType::Double;
    vocab = o.vocab_size < 0 ? student_width : o.vocab_size;
    FASTKD_CHECK_VALUE(vocab <= student_width, function, "vocab_size is ", vocab, ", ", input, " has only ",
                       student_width, " columns");
    FASTKD_CHECK_VALUE(vocab >= 1, function, "the vocabulary must have at least one column, got ", vocab);
    check_shift();
    temperatures = per_row(o.temperatures, "temperature", is_float, "floating-point");
    weight = per_row(o.weight, "weight", is_float, "floating-point");
    mask = per_row(o.mask, "mask", [](ScalarType x) { return x == ScalarType::Bool; }, "bool");
    labels = per_row(
        o.labels, names.labels, [](ScalarType x) { return x == ScalarType::Long || x == ScalarType::Int; },
        "int64 or int32");
    check_positive(o.temperature, temperatures, "temperature");
    label_weights = per_row(o.label_weights, "label_weight", is_float, "floating-point");
    check_numbers(
        o.label_weight, label_weights, "label_weight", " must be finite, got ",
        [](double x) { return std::isfinite(x); }, options.shift);
    for (const double cap : {o.student_logit_softcap, o.teacher_logit_softcap}) {
      FASTKD_CHECK_VALUE(cap > 0, function, "logit_softcap must be positive and finite, got ", cap);
    }
    check_labels();
    check_normalizer();
  }

  void check_device(const Tensor& x, const char* argument) const {
    FASTKD_CHECK_VALUE(
        x.is_cpu() == student_tensor.is_cpu() && x.get_device_index() == student_tensor.get_device_index(), function,
        argument, " must be on the device of ", names.logits);
  }

  // Checks a tensor that a forward call stored for its backward, or the gradient of one of its results.
  void check_stored(const Tensor& x, ScalarType type, int64_t count, const char* argument) const {
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

  // Checks a teacher's logits against the student's.
  void check_teacher(const Tensor& teacher) const {
    check_logits(teacher, "teacher_logits");
    if (teacher_places_tensor == nullptr || !*teacher_places_tensor) {
      FASTKD_CHECK_VALUE(teacher.dim() == student_tensor.dim() && same_leading(teacher, student_tensor, leading),
                         function, "teacher_logits must have student_logits' leading dimensions ",
                         leading_of(student_tensor, leading), ", got shape ", shape_of(teacher));
    }
    const int64_t width = teacher.size(teacher.dim() - 1);
    if (options.vocab_size < 0) {
      FASTKD_CHECK_VALUE(width == student_width, function, "teacher_logits has ", width,
                         " columns, student_logits has ", student_width,
                         "; pass vocab_size to compare only the first columns");
    }
    FASTKD_CHECK_VALUE(vocab <= width, function, "vocab_size is ", vocab, ", teacher_logits has only ", width,
                       " columns");
  }

  // A teacher's logits, checked.
  Rows teacher_rows(const Tensor& teacher) const {
    check_teacher(teacher);
    Rows rows(teacher, teacher.dim() - 1);
    rows.set_map(options.teacher_map());
    return rows;
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
    check_numbers(all, each, argument, " must be positive and finite, got ",
                  [](double x) { return x > 0 && std::isfinite(x); });
  }

  // Checks a number for all rows or, where there are any, the numbers of the rows that count. A row's number is that of
  // the row `ahead` places later.
  template <class Valid>
  void check_numbers(double all, const Rows& each, const char* argument, const char* expected, Valid valid,
                     int64_t ahead = 0) const {
    if (!each) {
      FASTKD_CHECK_VALUE(valid(all), function, argument, expected, all);
      return;
    }
    for (int64_t row = 0; values_checked && row < rows; ++row) {
      if (!kept(row)) continue;
      const double value = each.number(row + ahead);
      FASTKD_CHECK_VALUE(valid(value), function, argument, expected, value, " in row ", row + ahead);
    }
  }

  // any: it may be any number, not only a share.
  void set_beta(double all, const std::optional<Tensor>& each, bool any = false) {
    beta = all;
    if (each) betas_tensor = &*each;
    betas = per_row(each, "beta", is_float, "floating-point");
    check_numbers(all, betas, "beta", any ? " must be finite, got " : " must lie in [0, 1], got ",
                  [any](double x) { return any ? std::isfinite(x) : x >= 0 && x <= 1; });
  }

  // count: how many rows the teacher has.
  void set_teacher_places(const std::optional<Tensor>& places, int64_t count) {
    teacher_places_tensor = &places;
    teacher_places = per_row(
        places, "teacher_rows", [](ScalarType x) { return x == ScalarType::Long || x == ScalarType::Int; },
        "int64 or int32");
    for (int64_t row = 0; values_checked && teacher_places && row < rows; ++row) {
      const int64_t place = teacher_places.integer(row);
      FASTKD_CHECK_INDEX(place >= -1 && place < count, function, "teacher_rows must lie in [-1, ", count, "), got ",
                         place, " in row ", row);
    }
  }
  int64_t teacher_place(int64_t row) const { return teacher_places ? teacher_places.integer(row) : row; }

  void set_teacher_temperature(double all, const std::optional<Tensor>& each) {
    teacher_temperature = all;
    if (each) teacher_temperatures_tensor = &*each;
    teacher_temperatures = per_row(each, "teacher_temperature", is_float, "floating-point");
    check_positive(all, teacher_temperatures, "teacher_temperature");
  }

  void check_labels() const {
    for (int64_t row = 0; values_checked && labels && row < rows; ++row) {
      const int64_t place = row + options.shift;
      if (!in_sequence(row) || (mask && mask.number(place) == 0)) continue;
      const int64_t label = labels.integer(place);
      FASTKD_CHECK_INDEX(label == options.ignore_index || (label >= 0 && label < vocab), function, names.labels,
                         " must lie in [0, ", vocab, ") or be ignore_index ", options.ignore_index, ", got ", label,
                         " in row ", row);
    }
  }

  void check_normalizer() const {
    FASTKD_CHECK_VALUE(options.denominator >= 0, function, "normalizer must not be negative, got ",
                       options.denominator);
    if (!options.normalizer) return;
    FASTKD_CHECK_VALUE(options.normalizer->numel() == 1 && is_float(options.normalizer->scalar_type()), function,
                       "normalizer must be a number or a 0-d float tensor, got shape ", shape_of(*options.normalizer));
    check_device(*options.normalizer, "normalizer");
  }

  void check_shift() {
    FASTKD_CHECK_VALUE(options.shift >= 0, function, "shift must not be negative, got ", options.shift);
    if (options.shift == 0) return;
    FASTKD_CHECK_VALUE(leading >= 1, function, "shift needs ", names.logits,
                       " with a sequence dimension before the vocabulary, got shape ", shape_of(student_tensor));
    sequence = student_tensor.size(leading - 1);
    if (options.shift > sequence) options.shift = sequence;
  }

  // Whether the row that the shift refers to is in the same sequence.
  bool in_sequence(int64_t row) const { return options.shift == 0 || row % sequence + options.shift < sequence; }
  bool kept(int64_t row) const {
    const int64_t place = row + options.shift;
    return in_sequence(row) && (!mask || mask.number(place) != 0) &&
           (!labels || labels.integer(place) != options.ignore_index) &&
           (!teacher_places || teacher_places.integer(row) >= 0);
  }
  double row_weight(int64_t row) const { return !kept(row) ? 0 : weight ? weight.number(row + options.shift) : 1; }
  double temperature(int64_t row) const { return temperatures ? temperatures.number(row) : options.temperature; }
  double row_label_weight(int64_t row) const {
    return label_weights ? label_weights.number(row + options.shift) : options.label_weight;
  }
  double row_beta(int64_t row) const { return betas ? betas.number(row) : beta; }
  double row_teacher_temperature(int64_t row) const {
    return teacher_temperatures ? teacher_temperatures.number(row) : teacher_temperature;
  }
  int64_t label(int64_t row) const { return labels && in_sequence(row) ? labels.integer(row + options.shift) : -1; }

  // The number of rows that remain after the shift.
  int64_t shifted_rows() const {
    if (options.shift == 0 || rows == 0) return rows;
    return options.shift < sequence ? rows / sequence * (sequence - options.shift) : 0;
  }
  // Known without reading any row's data.
  bool denominator_is_known() const {
    const bool counted = options.reduced() == Reduction::kMean && (mask || labels || teacher_places);
    return !options.normalizer && !counted;
  }
  double known_denominator() const {
    switch (options.reduced()) {
      case Reduction::kNone:
        return 1;
      case Reduction::kMean:
        return double(shifted_rows());
      case Reduction::kBatchMean:
        return double(student_tensor.size(0));
      case Reduction::kElementMean:
        return double(shifted_rows()) * double(vocab);
      default:
        return options.denominator;
    }
  }

  // 1 / denominator; 0 where the denominator is 0.
  double factor() const {
    double denominator = 0;
    if (options.normalizer) {
      denominator = Rows(*options.normalizer, 0).number(0);
      FASTKD_CHECK_VALUE(!(denominator < 0), function, "normalizer must not be negative, got ", denominator);
    } else if (denominator_is_known()) {
      denominator = known_denominator();
    } else {
      for (int64_t row = 0; row < rows; ++row) denominator += kept(row);
    }
    return denominator == 0 ? 0 : 1 / denominator;
  }
};

// Whether the division by the denominator is left to the backward pass. A float16 gradient divided by thousands of rows
// would underflow before a loss scaler can raise it.
inline bool gradient_waits(const RowProblem& problem, std::initializer_list<const Tensor*> gradients) {
  bool half = false;
  for (const Tensor* x : gradients) half = half || (x != nullptr && x->scalar_type() == ScalarType::Half);
  return half && problem.options.reduced() != Reduction::kNone;
}

// Checks the tensor that a backward pass writes the logits' gradient to.
inline void check_gradient(const RowProblem& problem, const Tensor& gradient) {
  const Tensor& logits = problem.student_tensor;
  problem.check_device(gradient, "gradient");
  FASTKD_CHECK_VALUE(gradient.dim() == logits.dim() && same_leading(gradient, logits, logits.dim()) &&
                         gradient.scalar_type() == logits.scalar_type(),
                     problem.function, "gradient must be like the logits, shape ", shape_of(logits), ", got shape ",
                     shape_of(gradient));
}

// The leading dimensions: the shape of a tensor with one number per row.
inline std::vector<int64_t> row_shape(const Tensor& logits) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < logits.dim(); ++i) shape.push_back(logits.size(i));
  return shape;
}
inline std::vector<int64_t> loss_shape(const RowProblem& problem) {
  return problem.options.reduced() == Reduction::kNone ? row_shape(problem.student_tensor) : std::vector<int64_t>{};
}

}  // namespace fastkd
