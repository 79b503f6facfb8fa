// byte_log_probs on the CPU: runs the row kernels (byte_log_probs.h) over the rows of the tensors.
#include "byte_log_probs.h"

#include <torch/csrc/stable/library.h>

#include "../arguments/byte_log_probs_entry.h"
#include "common/row_losses.h"
#include "isa.h"

namespace fastkd {
namespace {

ByteRow row_of(const ByteProblem& problem, int64_t index) {
  const int64_t prefix = problem.prefix_of(index);
  const Row valid = problem.valid ? problem.valid.row(index) : Row();
  return {problem.ids,
          problem.columns,
          problem.vocab,
          problem.student.row(index),
          static_cast<const bool*>(valid.data),
          valid.stride,
          problem.order,
          problem.column_of,
          problem.segments + prefix * problem.columns * 2,
          prefix == problem.whole};
}

struct Cpu {
  static constexpr bool kValuesChecked = true;

  static void solve(const ByteProblem& problem, Tensor& out, Tensor& sums) {
    const auto kernel = kernels().byte_log_probs.at(problem.float64).sum;
    const int64_t scratch = byte_log_probs_scratch(problem.ids, problem.columns);
    for_rows(problem.rows, problem.vocab, scratch, [&](int64_t index, const SliceRunner& runner, char* memory) {
      double* const found = static_cast<double*>(sums.data_ptr()) + index * problem.sums_per_row();
      kernel(row_of(problem, index), runner, memory, found);
      for (int64_t c = 0; c < problem.columns; ++c) {
        const double log = found[c] - found[problem.columns];
        put(out, index * problem.columns + c, log > 0 ? 0 : log);
      }
    });
  }

  static void differentiate(const ByteProblem& problem, const Tensor& gradient, const Tensor& sums,
                            const Tensor& grad_output) {
    const auto kernel = kernels().byte_log_probs.at(problem.float64).gradient;
    const Rows gradients = gradient_rows(&gradient, problem);
    for_rows(problem.rows, problem.vocab, 0, [&](int64_t index, const SliceRunner& runner, char*) {
      const double* const logs = static_cast<const double*>(sums.data_ptr()) + index * problem.sums_per_row();
      double factors[kMaxColumns], all = 0;
      bool any = false;
      for (int64_t c = 0; c < problem.columns; ++c) {
        // A column of probability 0 gets no gradient.
        factors[c] = logs[c] == -INFINITY ? 0 : number(grad_output, index * problem.columns + c);
        all += factors[c];
        any = any || factors[c] != 0;
      }
      const Row out = gradients.row(index);
      if (!any) return portable::fill_zero(out, 0, problem.vocab);
      for (int64_t c = 0; c < problem.columns; ++c) factors[c] -= all * ::exp(logs[c] - logs[problem.columns]);
      kernel(row_of(problem, index), runner, logs, factors, out);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { implement_differentiable<ByteLogProbs, ByteLogProbsBackward, Cpu>(m); }

}  // namespace fastkd
