// chunk_log_likelihood on the CPU: runs the row kernels over the tensors' rows, and combines rows to chunks.
#include "chunk_log_likelihood.h"

#include <torch/csrc/stable/library.h>

#include "../arguments/chunk_log_likelihood_entry.h"
#include "common/row_losses.h"
#include "isa.h"

namespace fastkd {
namespace {

ChunkRow row_of(const ChunkProblem& problem, int64_t index, bool with_boundary) {
  return {problem.vocab, problem.student.row(index), with_boundary ? problem.boundary : nullptr,
          problem.options.temperature};
}

// The four numbers of a row's sums that the forward stores for the backward, in the layout [4, rows].
struct StoredSums {
  double* first;
  int64_t rows;

  void put(int64_t row, const ChunkRowSums& sums) const {
    const double numbers[] = {sums.all.origin, sums.all.log_sum, sums.boundary.origin, sums.boundary.log_sum};
    for (int i = 0; i < 4; ++i) first[i * rows + row] = numbers[i];
  }
  ChunkRowSums get(int64_t row) const {
    return {{first[row], first[rows + row]}, {first[2 * rows + row], first[3 * rows + row]}};
  }
};

struct Cpu {
  static constexpr bool kValuesChecked = true;

  static void solve(const ChunkProblem& problem, ChunkOutput& out) {
    const auto kernel = kernels().chunk_log_likelihood.at(problem.float64).sum;
    const StoredSums stored{static_cast<double*>(out.numbers.data_ptr()), problem.rows};
    std::vector<double> label_log_prob(problem.rows);
    const int64_t scratch = slices_of(problem.vocab) * kPartialBytes;
    for_rows(problem.rows, problem.vocab, scratch, [&](int64_t index, const SliceRunner& runner, char* memory) {
      const bool scored = problem.scored(index), ended = problem.ended_before(index) >= 0;
      if (!scored && !ended) return;
      const ChunkRow row = row_of(problem, index, ended);
      ChunkRowSums sums = kernel(row, runner, memory);
      if (!ended) sums.boundary = {0, 0};
      stored.put(index, sums);
      if (scored) {
        const double below = problem.student.number(index, problem.ids.integer(index)) - sums.all.origin;
        label_log_prob[index] = log_share(below, below / problem.options.temperature - sums.all.log_sum);
      }
    });
    std::vector<double> likelihood(problem.batch * problem.chunks);
    int64_t* const count = static_cast<int64_t*>(out.token_count.data_ptr());
    for (int64_t index = 0; index < problem.rows; ++index) {
      const int64_t text = index / problem.length * problem.chunks;
      const int64_t ended = problem.ended_before(index);
      if (ended >= 0)
        put(out.boundary_log_prob, text + ended, stored.get(index).boundary_share(problem.options.temperature));
      if (!problem.scored(index)) continue;
      likelihood[text + problem.chunk(index)] += label_log_prob[index];
      ++count[text + problem.chunk(index)];
    }
    for (size_t i = 0; i < likelihood.size(); ++i) put(out.log_likelihood, i, likelihood[i]);
  }

  static void differentiate(const ChunkProblem& problem, const Tensor& gradient, const Tensor& numbers,
                            const Tensor& likelihood_gradient, const Tensor* boundary_gradient) {
    const auto kernel = kernels().chunk_log_likelihood.at(problem.float64).gradient;
    const StoredSums stored{static_cast<double*>(numbers.data_ptr()), problem.rows};
    const Rows gradients = gradient_rows(&gradient, problem);
    for_rows(problem.rows, problem.vocab, 0, [&](int64_t index, const SliceRunner& runner, char*) {
      const int64_t text = index / problem.length * problem.chunks, ended = problem.ended_before(index);
      const bool scored = problem.scored(index);
      const double of_label = scored ? number(likelihood_gradient, text + problem.chunk(index)) : 0;
      const ChunkRowSums sums = stored.get(index);
      // A boundary of probability 0 gets no gradient.
      const bool possible = ended >= 0 && sums.boundary_share(problem.options.temperature) > -INFINITY;
      const double of_boundary = possible ? number(*boundary_gradient, text + ended) : 0;
      const Row out = gradients.row(index);
      if (of_label == 0 && of_boundary == 0) return portable::fill_zero(out, 0, problem.vocab);
      const double factor = 1 / problem.options.temperature;
      kernel(row_of(problem, index, of_boundary != 0), runner, sums,
             {-(of_label + of_boundary) * factor, of_boundary * factor, of_label * factor},
             scored ? problem.ids.integer(index) : -1, out);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  implement_differentiable<ChunkLogLikelihood, ChunkLogLikelihoodBackward, Cpu>(m);
}

}  // namespace fastkd
