// softmax_divergence on the CPU: checks, allocation, and which thread takes which rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>

#include "../tensor/allocate.h"
#include "../tensor/rows.h"
#include "isa.h"
#include "parallel.h"

namespace fastkd {
namespace {

constexpr const char* kName = "softmax_divergence";

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

const SoftmaxDivergenceKernel& find_kernel(std::string name, double beta) {
  FASTKD_CHECK_VALUE(beta >= 0 && beta <= 1, kName, "beta must lie in [0, 1], got ", beta);
  if (name == "jsd" && beta == 0) name = "forward_kl";
  if (name == "jsd" && beta == 1) name = "reverse_kl";
  if (name == "skew_kl" && beta == 0) name = "forward_kl";
  if (name == "skew_reverse_kl" && beta == 0) name = "reverse_kl";
  std::ostringstream known;
  for (const SoftmaxDivergenceKernel& kernel : kernels().softmax_divergence) {
    if (name == kernel.name) return kernel;
    known << (known.tellp() > 0 ? ", " : "") << kernel.name;
  }
  fail("ValueError", kName, "divergence must be one of ", known.str(), "; got '", name, "'");
}

// All arguments, checked, as rows.
struct Problem {
  Options options;
  int64_t leading, rows = 1, vocab;
  bool float64;
  Rows student, student_gradient, teacher_gradient;
  std::vector<Rows> teachers;
  int64_t student_width, teacher_width;
  Rows temperatures, teacher_temperatures, weight, mask, teacher_weights, labels;
  bool mix_probs;

  Problem(const Tensor& s, const std::vector<Tensor>& t, const Options& o) : options(o) {
    FASTKD_CHECK_VALUE(!t.empty(), kName, "teacher_logits must hold at least one tensor, got an empty list");
    FASTKD_CHECK_VALUE(s.dim() >= 1, kName, "student_logits must have at least one dimension, got a scalar");
    check_logits(s, "student_logits");
    leading = s.dim() - 1;
    for (int64_t i = 0; i < leading; ++i) rows *= s.size(i);
    student = Rows(s, leading);
    student_width = s.size(leading);
    float64 = s.scalar_type() == ScalarType::Double;
    for (const Tensor& teacher : t) {
      check_logits(teacher, "teacher_logits");
      FASTKD_CHECK_VALUE(teacher.dim() == s.dim() && same_leading(teacher, s, leading), kName,
                         "teacher_logits must have student_logits' leading dimensions ", leading_of(s, leading),
                         ", got shape ", shape_of(teacher));
      teachers.emplace_back(teacher, leading);
      float64 = float64 || teacher.scalar_type() == ScalarType::Double;
    }
    teacher_width = t[0].size(leading);
    check_vocab(t);
    mix_probs = o.teacher_mix == "probs" && t.size() > 1;
    FASTKD_CHECK_VALUE(o.teacher_mix == "probs" || o.teacher_mix == "logits", kName,
                       "teacher_mix must be 'logits' or 'probs', got '", o.teacher_mix, "'");
    FASTKD_CHECK_VALUE(o.reduction == "none" || o.reduction == "sum" || o.reduction == "mean", kName,
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
    FASTKD_CHECK_VALUE(std::isfinite(o.label_weight), kName, "label_weight must be finite, got ", o.label_weight);
    check_labels();
  }

  static void check_logits(const Tensor& x, const char* argument) {
    FASTKD_CHECK_TYPE(is_float(x.scalar_type()), kName, argument,
                      " must be float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(x.scalar_type()));
    FASTKD_CHECK_VALUE(x.is_cpu(), kName, argument, " must be on the CPU like the other arguments");
  }

  void check_vocab(const std::vector<Tensor>& t) {
    vocab = options.vocab_size < 0 ? student_width : options.vocab_size;
    for (const Tensor& teacher : t) {
      const int64_t width = teacher.size(leading);
      if (options.vocab_size < 0) {
        FASTKD_CHECK_VALUE(width == student_width, kName, "teacher_logits has ", width, " columns, student_logits has ",
                           student_width, "; pass vocab_size to compare only the first columns");
      }
      FASTKD_CHECK_VALUE(vocab <= width, kName, "vocab_size is ", vocab, ", teacher_logits has only ", width,
                         " columns");
    }
    FASTKD_CHECK_VALUE(vocab <= student_width, kName, "vocab_size is ", vocab, ", student_logits has only ",
                       student_width, " columns");
    FASTKD_CHECK_VALUE(vocab >= 1, kName, "the vocabulary must have at least one column, got ", vocab);
  }

  template <class Allowed>
  Rows per_row(const Tensor& s, const std::optional<Tensor>& x, const char* argument, Allowed allowed,
               const char* expected) const {
    if (!x) return Rows();
    FASTKD_CHECK_TYPE(allowed(x->scalar_type()), kName, argument, " must be ", expected, ", got ",
                      torch::headeronly::toString(x->scalar_type()));
    FASTKD_CHECK_VALUE(x->is_cpu(), kName, argument, " must be on the CPU like student_logits");
    FASTKD_CHECK_VALUE(x->dim() == leading && same_leading(*x, s, leading), kName, argument,
                       " must have one entry a row, shape ", leading_of(s, leading), ", got shape ", shape_of(*x));
    return Rows(*x, leading);
  }

  void check_positive(double all, const Rows& each, const char* argument) const {
    if (!each) {
      FASTKD_CHECK_VALUE(all > 0 && std::isfinite(all), kName, argument, " must be positive and finite, got ", all);
      return;
    }
    for (int64_t row = 0; row < rows; ++row) {
      const double value = each.number(row);
      FASTKD_CHECK_VALUE((value > 0 && std::isfinite(value)) || !kept(row), kName, argument,
                         " must be positive and finite, got ", value, " in row ", row);
    }
  }

  void check_teacher_weights(const Tensor& s, size_t count) {
    if (!options.teacher_weights) return;
    const Tensor& w = *options.teacher_weights;
    FASTKD_CHECK_TYPE(is_float(w.scalar_type()), kName, "teacher_weights must be floating-point, got ",
                      torch::headeronly::toString(w.scalar_type()));
    FASTKD_CHECK_VALUE(w.is_cpu(), kName, "teacher_weights must be on the CPU like student_logits");
    const bool shared = w.dim() == 1, each = w.dim() == leading + 1 && same_leading(w, s, leading);
    FASTKD_CHECK_VALUE((shared || each) && w.size(w.dim() - 1) == int64_t(count), kName, "teacher_weights must be ",
                       count, " numbers or have shape ", leading_of(s, leading), " + [", count, "], got shape ",
                       shape_of(w));
    teacher_weights = Rows(w, shared ? 0 : leading);
    for (int64_t row = 0; row < (shared ? 1 : rows); ++row) {
      double sum = 0;
      for (size_t k = 0; k < count; ++k) {
        const double value = teacher_weights.number(row, k);
        FASTKD_CHECK_VALUE(!mix_probs || value >= 0, kName,
                           "teacher_weights must not be negative with teacher_mix='probs', got ", value);
        sum += value;
      }
      FASTKD_CHECK_VALUE(!mix_probs || sum > 0, kName, "teacher_weights must not all be zero with teacher_mix='probs'");
    }
  }

  void check_labels() const {
    for (int64_t row = 0; labels && row < rows; ++row) {
      if (mask && mask.number(row) == 0) continue;
      const int64_t label = labels.integer(row);
      FASTKD_CHECK_INDEX(label == options.ignore_index || (label >= 0 && label < vocab), kName,
                         "labels must lie in [0, ", vocab, ") or be ignore_index ", options.ignore_index, ", got ",
                         label, " in row ", row);
    }
  }

  bool kept(int64_t row) const {
    return (!mask || mask.number(row) != 0) && (!labels || labels.integer(row) != options.ignore_index);
  }
  double row_weight(int64_t row) const { return !kept(row) ? 0 : weight ? weight.number(row) : 1; }

  // 1 / denominator, 0 for an empty one.
  double factor() const {
    double denominator = options.denominator;
    if (options.normalizer) {
      FASTKD_CHECK_VALUE(options.normalizer->numel() == 1 && is_float(options.normalizer->scalar_type()), kName,
                         "normalizer must be a number or a 0-d float tensor, got shape ",
                         shape_of(*options.normalizer));
      denominator = Rows(*options.normalizer, 0).number(0);
    } else if (options.reduction == "mean") {
      denominator = 0;
      for (int64_t row = 0; row < rows; ++row) denominator += kept(row);
    }
    return denominator == 0 ? 0 : 1 / denominator;
  }
};

// Fills losses (weighted, before the reduction's factor) and the gradients.
void run(const Problem& problem, double gradient_factor, std::vector<double>& losses) {
  const Options& o = problem.options;
  const SoftmaxDivergenceKernel& kernel = find_kernel(o.divergence, o.beta);
  const auto row_function = problem.float64 ? kernel.double_row : kernel.float_row;
  const int teacher_count = int(problem.teachers.size());

  const auto run_row = [&](int64_t index, const SliceRunner& runner, char* scratch) {
    std::vector<Row> teachers(teacher_count);
    std::vector<double> weights(teacher_count, 1.0 / teacher_count);
    for (int k = 0; k < teacher_count; ++k) {
      teachers[k] = problem.teachers[k].row(index);
      if (problem.teacher_weights) weights[k] = problem.teacher_weights.number(index, k);
    }
    SoftmaxDivergenceRow row{};
    row.vocab = problem.vocab;
    row.student = problem.student.row(index);
    row.teachers = {teachers.data(), weights.data(), teacher_count, problem.mix_probs};
    row.beta = o.beta;
    if (problem.student_gradient) row.student_gradient = problem.student_gradient.row(index);
    if (problem.teacher_gradient) row.teacher_gradient = problem.teacher_gradient.row(index);
    row.student_width = problem.student_width;
    row.teacher_width = problem.teacher_width;
    const double weight = problem.row_weight(index);
    if (weight == 0 || gradient_factor == 0) {  // not read: NaN in it must not show
      if (row.student_gradient) portable::fill_zero(row.student_gradient, 0, row.student_width);
      if (row.teacher_gradient) portable::fill_zero(row.teacher_gradient, 0, row.teacher_width);
      losses[index] = 0;
      return;
    }
    row.label = problem.labels ? problem.labels.integer(index) : -1;
    RowTask& task = row.task;
    task.temperature = problem.temperatures ? problem.temperatures.number(index) : o.temperature;
    task.teacher_temperature =
        problem.teacher_temperatures ? problem.teacher_temperatures.number(index) : o.teacher_temperature;
    task.divergence_scale = o.square_temperature ? task.temperature * task.temperature : 1;
    task.scale = weight * gradient_factor;
    task.label_weight = o.label_weight;
    task.has_label = bool(problem.labels);
    task.mix_probs = problem.mix_probs;
    task.student_gradient = bool(row.student_gradient);
    task.teacher_gradient = bool(row.teacher_gradient);
    row.scratch = scratch;
    losses[index] = weight * row_function(row, runner);
  };
  const int64_t real_size = problem.float64 ? sizeof(double) : sizeof(float);
  const int64_t scratch =
      softmax_divergence_scratch(problem.vocab, teacher_count, real_size, bool(problem.teacher_gradient));
  for_rows(problem.rows, problem.vocab, scratch, run_row);
}

std::vector<int64_t> loss_shape(const Tensor& student, const std::string& reduction) {
  std::vector<int64_t> shape;
  if (reduction != "none") return shape;
  for (int64_t i = 0; i + 1 < student.dim(); ++i) shape.push_back(student.size(i));
  return shape;
}

void put(Tensor& tensor, int64_t index, double value) {
  if (tensor.scalar_type() == ScalarType::Double) {
    static_cast<double*>(tensor.data_ptr())[index] = value;
  } else {
    static_cast<float*>(tensor.data_ptr())[index] = float(value);
  }
}

// Runs the problem; `student_gradient` and `teacher_gradient` are the tensors to fill, if any.
std::tuple<Tensor, Tensor> solve(Problem& problem, const Tensor& student, const Tensor* student_gradient,
                                 const Tensor* teacher_gradient) {
  FASTKD_CHECK_VALUE(teacher_gradient == nullptr || problem.teachers.size() == 1, kName,
                     "teacher_logits in a list take no gradient");
  const bool reduced = problem.options.reduction != "none";
  const bool inplace = student_gradient != nullptr && student_gradient->data_ptr() == student.data_ptr();
  for (auto [tensor, rows] : {std::pair(student_gradient, &problem.student_gradient),
                              std::pair(teacher_gradient, &problem.teacher_gradient)}) {
    if (tensor == nullptr) continue;
    *rows = Rows(*tensor, problem.leading);
    if (!inplace && tensor->numel() * element_size(tensor->scalar_type()) >= kStreamedBytes) rows->stream();
  }
  const double factor = reduced ? problem.factor() : 1;
  // A float16 gradient divided by thousands of rows would vanish before a loss scaler can lift it: the division waits.
  const auto is_half = [](const Tensor* x) { return x != nullptr && x->scalar_type() == ScalarType::Half; };
  const bool wait = reduced && (is_half(student_gradient) || is_half(teacher_gradient));

  std::vector<double> losses(problem.rows);
  run(problem, wait ? (factor == 0 ? 0 : 1) : factor, losses);

  const ScalarType type = problem.float64 ? ScalarType::Double : ScalarType::Float;
  Tensor loss = torch::stable::new_empty(student, loss_shape(student, problem.options.reduction), type);
  if (reduced) {
    double sum = 0;
    for (double row : losses) sum += row;
    put(loss, 0, factor == 0 ? 0 : sum * factor);
  } else {
    for (int64_t row = 0; row < problem.rows; ++row) put(loss, row, losses[row]);
  }
  Tensor pending = wait ? torch::stable::new_empty(student, std::vector<int64_t>{}, ScalarType::Float)
                        : torch::stable::new_empty(student, {0}, ScalarType::Float);
  if (wait) put(pending, 0, factor);
  return {loss, pending};
}

Tensor empty(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

std::tuple<Tensor, Tensor, Tensor, Tensor> softmax_divergence(
    const Tensor& student_logits, const std::vector<Tensor>& teacher_logits, const std::string& divergence, double beta,
    double temperature, double teacher_temperature, const std::optional<Tensor>& temperatures,
    const std::optional<Tensor>& teacher_temperatures, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& teacher_weights, const std::string& teacher_mix,
    const std::optional<Tensor>& labels, double label_weight, int64_t ignore_index, int64_t vocab_size,
    bool square_temperature, const std::string& reduction, double denominator, const std::optional<Tensor>& normalizer,
    bool student_gradient, bool teacher_gradient) {
  Problem problem(student_logits, teacher_logits,
                  {divergence, beta, temperature, teacher_temperature, temperatures, teacher_temperatures, weight, mask,
                   teacher_weights, teacher_mix, labels, label_weight, ignore_index, vocab_size, square_temperature,
                   reduction, denominator, normalizer});
  Tensor s = student_gradient ? gradient_like(student_logits) : empty(student_logits);
  Tensor t = teacher_gradient ? gradient_like(teacher_logits[0]) : empty(teacher_logits[0]);
  auto [loss, pending] =
      solve(problem, student_logits, student_gradient ? &s : nullptr, teacher_gradient ? &t : nullptr);
  return {loss, s, t, pending};
}

std::tuple<Tensor, Tensor, Tensor> softmax_divergence_into(
    const Tensor& gradient, const Tensor& student_logits, const std::vector<Tensor>& teacher_logits,
    const std::string& divergence, double beta, double temperature, double teacher_temperature,
    const std::optional<Tensor>& temperatures, const std::optional<Tensor>& teacher_temperatures,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& teacher_weights, const std::string& teacher_mix, const std::optional<Tensor>& labels,
    double label_weight, int64_t ignore_index, int64_t vocab_size, bool square_temperature,
    const std::string& reduction, double denominator, const std::optional<Tensor>& normalizer, bool teacher_gradient) {
  Problem problem(student_logits, teacher_logits,
                  {divergence, beta, temperature, teacher_temperature, temperatures, teacher_temperatures, weight, mask,
                   teacher_weights, teacher_mix, labels, label_weight, ignore_index, vocab_size, square_temperature,
                   reduction, denominator, normalizer});
  FASTKD_CHECK_VALUE(gradient.is_cpu() && gradient.dim() == student_logits.dim() &&
                         same_leading(gradient, student_logits, student_logits.dim()) &&
                         gradient.scalar_type() == student_logits.scalar_type(),
                     kName, "gradient must be like student_logits, shape ", shape_of(student_logits), ", got shape ",
                     shape_of(gradient));
  for (int64_t i = 0; i < gradient.dim(); ++i) {
    FASTKD_CHECK_VALUE(
        gradient.stride(i) != 0 || gradient.size(i) <= 1, kName,
        "inplace needs student_logits with storage of its own for every element, got an expanded tensor");
  }
  Tensor t = teacher_gradient ? gradient_like(teacher_logits[0]) : empty(teacher_logits[0]);
  auto [loss, pending] = solve(problem, student_logits, &gradient, teacher_gradient ? &t : nullptr);
  return {loss, t, pending};
}

std::string cpu_capability(const std::optional<std::string>& use) {
  FASTKD_CHECK_VALUE(!use || use_isa(use->c_str()), "cpu_capability", "instruction set '", *use,
                     "' is not compiled in or not supported by this machine");
  return kernels().isa;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("_softmax_divergence", TORCH_BOX(&softmax_divergence));
  m.impl("_softmax_divergence_into", TORCH_BOX(&softmax_divergence_into));
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CompositeExplicitAutograd, m) {
  m.impl("_cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace fastkd
