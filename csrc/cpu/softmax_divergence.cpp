// softmax_divergence on the CPU: runs the row kernel (softmax_divergence.h) over the rows of the tensors.
#include <torch/csrc/stable/library.h>

#include "../arguments/softmax_divergence_entry.h"
#include "../math/adaptive_mix.h"
#include "common/row_losses.h"
#include "isa.h"

namespace fastkd {
namespace {

struct Cpu {
  static constexpr bool kValuesChecked = true;

  static std::tuple<Tensor, Tensor> solve(Problem& problem, const Tensor* student_gradient,
                                          const Tensor* teacher_gradient) {
    const SoftmaxDivergenceArguments& own = problem.own;
    const SoftmaxDivergenceKernels& divergences = kernels().softmax_divergence.at(problem.float64);
    const int teacher_count = int(problem.teachers.size());
    // In a mixture of probabilities, a single teacher is the mixture itself, whatever its weight.
    const bool weighted = teacher_count > 1 || own.mix() == TeacherMix::kLogits;
    problem.student_gradient = gradient_rows(student_gradient, problem);
    problem.teacher_gradient = gradient_rows(teacher_gradient, problem);

    const auto solve_row = [&](int64_t index, double scale, const SliceRunner& runner, char* scratch) {
      std::vector<Row> teachers(teacher_count);
      std::vector<double> weights(teacher_count, 1.0 / teacher_count);
      for (int k = 0; k < teacher_count; ++k) {
        teachers[k] = problem.teachers[k].row(problem.teacher_place(index));
        if (problem.teacher_weights && weighted) weights[k] = problem.teacher_weights.number(index, k);
      }
      SoftmaxDivergenceRow row{};
      row.vocab = problem.vocab;
      row.student = problem.student.row(index);
      row.teachers = {teachers.data(), weights.data(), teacher_count, problem.mix_probs};
      row.student_gradient = gradient_row(problem.student_gradient, index, row.student);
      row.teacher_gradient = gradient_row(problem.teacher_gradient, index, teachers[0]);
      row.student_width = problem.student_width;
      row.teacher_width = problem.teacher_width;
      RowTask& task = row.task;
      task.temperature = problem.temperature(index);
      task.beta = problem.row_beta(index);
      task.alpha = problem.row_alpha(index);
      task.teacher_temperature = problem.row_teacher_temperature(index);
      task.divergence_scale = problem.options.square_temperature ? task.temperature * task.temperature : 1;
      task.scale = scale;
      task.label_weight = problem.row_label_weight(index);
      task.has_label = bool(problem.labels) && task.label_weight != 0;
      row.excludes_label = problem.excludes_label;
      row.label = task.has_label || row.excludes_label ? problem.label(index) : -1;
      task.mix_probs = problem.mix_probs;
      task.teacher_weight = problem.constant_teacher ? 0 : teacher_count == 1 ? weights[0] : 1;
      task.student_gradient = bool(row.student_gradient);
      task.teacher_gradient = bool(row.teacher_gradient);
      row.scratch = scratch;
      if (problem.mix_adapts) {
        const double distance = divergences.teachers_apart(row, runner);
        const AdaptiveMix mix = adaptive_mix(own.mix() == TeacherMix::kContrast, distance, weights[0], weights[1]);
        weights = {mix.first, mix.second};
        task.divergence_scale *= mix.scale;
      }
      return divergences.of[problem.divergence.at(task.beta)](row, runner);
    };
    const auto skip_row = [&](int64_t index) {
      if (problem.student_gradient) portable::fill_zero(problem.student_gradient.row(index), 0, problem.student_width);
      if (problem.teacher_gradient) portable::fill_zero(problem.teacher_gradient.row(index), 0, problem.teacher_width);
    };
    const int64_t real_size = problem.float64 ? sizeof(double) : sizeof(float);
    const int64_t scratch =
        softmax_divergence_scratch(problem.vocab, teacher_count, real_size, bool(problem.teacher_gradient));
    return solve_rows(problem, {student_gradient, teacher_gradient}, scratch, solve_row, skip_row);
  }
};

std::string cpu_capability(const std::optional<std::string>& use) {
  FASTKD_CHECK_VALUE(!use || use_isa(use->c_str()), "cpu_capability", "instruction set '", *use,
                     "' is not compiled in or not supported by this machine");
  return kernels().isa;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { implement_loss<SoftmaxDivergence, Cpu>(m); }

STABLE_TORCH_LIBRARY_IMPL(fastkd, CompositeExplicitAutograd, m) {
  m.impl("_cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace fastkd
