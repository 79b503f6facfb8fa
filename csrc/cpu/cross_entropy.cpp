// cross_entropy on the CPU: runs the row kernel over the rows of the tensors.
#include "cross_entropy.h"

#include <torch/csrc/stable/library.h>

#include "../arguments/cross_entropy_entry.h"
#include "common/row_losses.h"
#include "isa.h"

namespace fastkd {
namespace {

struct Cpu {
  static constexpr bool kValuesChecked = true;

  static std::tuple<Tensor, Tensor> solve(const CrossEntropyProblem& problem, const Tensor* gradient) {
    const auto kernel = kernels().cross_entropy.at(problem.float64);
    const Rows gradients = gradient_rows(gradient, problem);
    const CrossEntropyArguments& own = problem.own;
    const auto solve_row = [&](int64_t index, double scale, const SliceRunner& runner, char* memory) {
      CrossEntropyRow row{};
      row.vocab = problem.vocab;
      row.logits = problem.student.row(index);
      row.gradient = gradient_row(gradients, index, row.logits);
      row.width = problem.student_width;
      row.task = {problem.temperature(index),
                  own.entropy_temperature,
                  own.label_smoothing,
                  problem.entropy(index) ? own.entropy_weight : 0,
                  own.z_loss_weight,
                  scale,
                  problem.vocab,
                  false};
      row.task.apart = row.task.entropy_weight != 0 && row.task.temperature != own.entropy_temperature;
      row.label = problem.label(index);
      row.correct_only = own.entropy_correct && row.task.entropy_weight != 0;
      row.scratch = memory;
      return kernel(row, runner);
    };
    const auto skip_row = [&](int64_t index) {
      if (gradients) portable::fill_zero(gradients.row(index), 0, problem.student_width);
    };
    const int64_t scratch = cross_entropy_scratch(problem.vocab, problem.float64 ? sizeof(double) : sizeof(float));
    return solve_rows(problem, {gradient}, scratch, solve_row, skip_row);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { implement_loss<CrossEntropy, Cpu>(m); }

}  // namespace fastkd
