// clipped_divergence on the CPU: runs the row kernel (clipped_divergence.h) over the rows of the tensors.
#include <torch/csrc/stable/library.h>

#include "../arguments/clipped_divergence_entry.h"
#include "common/row_losses.h"
#include "isa.h"
#include "order_statistics.h"

namespace fastkd {
namespace {

struct Cpu {
  static constexpr bool kValuesChecked = true;

  static std::tuple<Tensor, Tensor> solve(const ClippedProblem& problem, const ClippedGradients& wanted) {
    const ClippedKernel kernel = kernels().clipped_divergence.at(problem.float64);
    const Rows student = gradient_rows(wanted.student, problem), teacher = gradient_rows(wanted.teacher, problem);
    const Rows lower = wanted.lower ? Rows(*wanted.lower, problem.leading) : Rows();
    const Rows upper = wanted.upper ? Rows(*wanted.upper, problem.leading) : Rows();
    const auto put_edges = [&](int64_t index, double low, double high) {
      if (!lower) return;
      portable::put_element(lower.row(index), 0, low);
      portable::put_element(upper.row(index), 0, high);
    };
    const auto skip_row = [&](int64_t index) {
      if (student) portable::fill_zero(student.row(index), 0, problem.student_width);
      if (teacher) portable::fill_zero(teacher.row(index), 0, problem.teacher_width);
      put_edges(index, 0, 0);
    };
    const auto solve_row = [&](int64_t index, double scale, const SliceRunner& runner, char* scratch) {
      const double one = 1;
      const Row teacher_row = problem.teacher.row(index);
      ClippedRow row{};
      row.base.vocab = problem.vocab;
      row.base.student = problem.student.row(index);
      row.base.teachers = {&teacher_row, &one, 1, false};
      row.base.student_gradient = gradient_row(student, index, row.base.student);
      row.base.teacher_gradient = gradient_row(teacher, index, teacher_row);
      row.base.student_width = problem.student_width;
      row.base.teacher_width = problem.teacher_width;
      row.base.scratch = scratch;
      RowTask& task = row.base.task;
      task.temperature = problem.temperature(index);
      task.teacher_temperature = problem.row_teacher_temperature(index);
      task.divergence_scale = problem.options.square_temperature ? task.temperature * task.temperature : 1;
      task.scale = scale;
      task.label_weight = problem.row_label_weight(index);
      task.has_label = bool(problem.labels) && task.label_weight != 0;
      row.base.label = task.has_label ? problem.label(index) : -1;
      row.kept_label = problem.keep_label ? problem.label(index) : -1;
      row.renormalize = problem.renormalize;
      row.lump = problem.lump;
      row.quantile = problem.quantile;
      row.softness = problem.softness;
      row.lower = problem.lower.number(index);
      row.upper = problem.upper.number(index);
      if (row.quantile) {
        if (problem.float64) {
          find_quantiles(OrderStatistics<double>(teacher_row, problem.vocab), row);
        } else {
          find_quantiles(OrderStatistics<float>(teacher_row, problem.vocab), row);
        }
      }
      const double loss = kernel(row, runner);
      put_edges(index, row.lower_gradient, row.upper_gradient);
      return loss;
    };
    const int64_t real_size = problem.float64 ? sizeof(double) : sizeof(float);
    const int64_t scratch = softmax_divergence_scratch(problem.vocab, 1, real_size, bool(teacher));
    return solve_rows(problem, {wanted.student, wanted.teacher, wanted.lower, wanted.upper}, scratch, solve_row,
                      skip_row);
  }

  template <class Statistics>
  static void find_quantiles(Statistics statistics, ClippedRow& row) {
    row.lower_quantile = statistics.at(row.lower);
    row.upper_quantile = statistics.at(row.upper);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { implement_loss<ClippedDivergence, Cpu>(m); }

}  // namespace fastkd
