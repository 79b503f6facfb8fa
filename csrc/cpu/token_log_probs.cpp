// token_log_probs on the CPU: runs the row kernels over the rows of the tensors.
#include "token_log_probs.h"

#include <torch/csrc/stable/library.h>

#include "../arguments/token_log_probs_entry.h"
#include "common/row_losses.h"
#include "isa.h"

namespace fastkd {
namespace {

struct Cpu {
  static constexpr bool kValuesChecked = true;

  static TokenRow row_of(const TokenProblem& problem, int64_t index) {
    return {problem.vocab, problem.student.row(index), problem.temperature(index), problem.label(index),
            problem.entropy};
  }

  static void solve(const TokenProblem& problem, TokenOutput& out) {
    const auto kernel = kernels().token_log_probs.at(problem.float64).sum;
    double* const stored = static_cast<double*>(out.numbers.data_ptr());
    const int64_t rows = problem.rows, scratch = slices_of(problem.vocab) * kPartialBytes;
    for_rows(rows, problem.vocab, scratch, [&](int64_t index, const SliceRunner& runner, char* memory) {
      TokenNumbers found{};
      if (problem.kept(index)) found = kernel(row_of(problem, index), runner, memory);
      put(out.log_probs, index, found.log_prob);
      if (problem.entropy) put(out.entropy, index, found.entropy);
      stored[index] = found.normalizer.origin;
      stored[rows + index] = found.normalizer.log_sum;
      stored[2 * rows + index] = found.entropy;
    });
  }

  static void differentiate(const TokenProblem& problem, const Tensor& gradient, const TokenLogProbsBackward& given) {
    const auto kernel = kernels().token_log_probs.at(problem.float64).gradient;
    const double* const stored = static_cast<const double*>(given.numbers.data_ptr());
    const Rows gradients = gradient_rows(&gradient, problem);
    const int64_t rows = problem.rows;
    for_rows(rows, problem.vocab, 0, [&](int64_t index, const SliceRunner& runner, char*) {
      const bool kept = problem.kept(index);
      const double into_log_prob = kept ? number(given.log_probs_gradient, index) : 0;
      const double into_entropy = kept && problem.entropy ? number(given.entropy_gradient, index) : 0;
      if (into_log_prob == 0 && into_entropy == 0) {
        return portable::fill_zero(gradients.row(index), 0, problem.student_width);
      }
      const TokenRow row = row_of(problem, index);
      const Row out = gradient_row(gradients, index, row.logits);
      kernel(row, runner, {stored[index], stored[rows + index]},
             portable::token_factors(row.temperature, stored[2 * rows + index], into_log_prob, into_entropy), out);
      portable::fill_zero(out, problem.vocab, problem.student_width);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { implement_differentiable<TokenLogProbs, TokenLogProbsBackward, Cpu>(m); }

}  // namespace fastkd
