// softmax_divergence on the CPU: checks, allocation, and which thread takes which rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>

#include "../tensor/allocate.h"
#include "../tensor/softmax_divergence_entry.h"
#include "isa.h"
#include "parallel.h"

namespace fastkd {
namespace {

// Fills losses (weighted, before the reduction's factor) and the gradients.
void run(const Problem& problem, double gradient_factor, std::vector<double>& losses) {
  const Options& o = problem.options;
  const SoftmaxDivergenceKernel& kernel = kernels().softmax_divergence[find_divergence(o.divergence, o.beta)];
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

void put(Tensor& tensor, int64_t index, double value) {
  if (tensor.scalar_type() == ScalarType::Double) {
    static_cast<double*>(tensor.data_ptr())[index] = value;
  } else {
    static_cast<float*>(tensor.data_ptr())[index] = float(value);
  }
}

// Runs the problem; `student_gradient` and `teacher_gradient` are the tensors to fill, if any.
std::tuple<Tensor, Tensor> solve(Problem& problem, const Tensor* student_gradient, const Tensor* teacher_gradient) {
  const Tensor& student = problem.student_tensor;
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

struct Cpu {
  static constexpr bool kValuesChecked = true;
  static std::tuple<Tensor, Tensor> solve(Problem& problem, const Tensor* student_gradient,
                                          const Tensor* teacher_gradient) {
    return fastkd::solve(problem, student_gradient, teacher_gradient);
  }
};

std::string cpu_capability(const std::optional<std::string>& use) {
  FASTKD_CHECK_VALUE(!use || use_isa(use->c_str()), "cpu_capability", "instruction set '", *use,
                     "' is not compiled in or not supported by this machine");
  return kernels().isa;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("_softmax_divergence", TORCH_BOX(&softmax_divergence<Cpu>));
  m.impl("_softmax_divergence_into", TORCH_BOX(&softmax_divergence_into<Cpu>));
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CompositeExplicitAutograd, m) {
  m.impl("_cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace fastkd
