// The ops on one process's columns, on the CPU: runs the row kernels (shards.h) over the rows of the tensors.
#include "shards.h"

#include <torch/csrc/stable/library.h>

#include "../arguments/shards_entry.h"
#include "common/row_losses.h"
#include "isa.h"

namespace fastkd {
namespace {

struct Cpu {
  static constexpr bool kValuesChecked = true;

  static void statistics(const ShardSideProblem& problem, int64_t wanted, Tensor& results) {
    const ShardSideKernels& kernel = side_kernels(problem);
    double* const out = static_cast<double*>(results.data_ptr());
    const int64_t rows = problem.rows, scratch = slices_of(problem.vocab) * kPartialBytes;
    for_rows(rows, problem.vocab, scratch, [&](int64_t index, const SliceRunner& runner, char* memory) {
      ShardNumbers found{-INFINITY, 0, 0, 0, 0, -INFINITY, -INFINITY, 0, 0, -INFINITY, 0};
      if (problem.at(kKeep, index) != 0) {
        ShardSideRow row = row_of(problem, index);
        row.entropy = (wanted & kWantEntropy) != 0;
        row.second = (wanted & kWantSecond) != 0;
        row.best = (wanted & kWantBest) != 0;
        row.total = (wanted & kWantTotal) != 0;
        found = kernel.statistics(row, runner, memory);
      }
      double all[kStatisticsOut];
      all[kOrigin] = found.origin;
      all[kSum] = found.sum;
      all[kWeighted] = found.weighted;
      all[kSecondSum] = found.second_sum;
      all[kSecondWeighted] = found.second_weighted;
      all[kTokenLogit] = found.token_logit;
      all[kBestLogit] = found.best_logit;
      all[kBestColumn] = double(found.best_column);
      all[kTotal] = found.total;
      all[kColumns] = found.columns;
      all[kSecondOrigin] = found.second_origin;
      for (int i = 0; i < kStatisticsOut; ++i) out[i * rows + index] = all[i];
    });
  }

  static void softmax_gradient(const ShardSideProblem& problem, const double* hole_gradients, const Tensor& gradient) {
    const ShardSideKernels& kernel = side_kernels(problem);
    const Rows gradients = gradient_rows(&gradient, problem);
    for_rows(problem.rows, problem.vocab, 0, [&](int64_t index, const SliceRunner& runner, char*) {
      if (problem.at(kKeep, index) == 0) {
        return portable::fill_zero(gradients.row(index), 0, problem.student_width);
      }
      const ShardSideRow row = row_of(problem, index);
      const Row out = gradient_row(gradients, index, row.logits);
      const auto at = [&](int place) { return problem.at(place, index); };
      kernel.gradient(
          row, runner,
          {at(kSoftmaxOrigin), at(kSoftmaxSecondOrigin), at(kFirstLog2Sum), at(kSecondLog2Sum), at(kFirstConstant),
           at(kFirstSlope), at(kSecondConstant), at(kSecondSlope), at(kSoftmaxTokenFactor), at(kEachColumn),
           hole_gradients == nullptr ? nullptr : hole_gradients + index * problem.hole_count},
          out);
      portable::fill_zero(out, problem.vocab, problem.student_width);
    });
  }

  static void sums(const ShardPairProblem& problem, Tensor& results) {
    double* const out = static_cast<double*>(results.data_ptr());
    const int64_t rows = problem.rows, scratch = slices_of(problem.vocab) * kPartialBytes;
    for_rows(rows, problem.vocab, scratch, [&](int64_t index, const SliceRunner& runner, char* memory) {
      ShardSums found{};
      if (problem.at(kKeep, index) != 0) {
        found = pair_kernels(problem, index).sums(pair_of(problem, index), runner, memory);
      }
      out[kValueSum * rows + index] = found.value;
      out[kStudentSlopeSum * rows + index] = found.student;
      out[kTeacherSlopeSum * rows + index] = found.teacher;
    });
  }

  static void gradient(const ShardPairProblem& problem, bool of_teacher, const Tensor& gradient) {
    const Rows gradients = gradient_rows(&gradient, problem);
    const int64_t width = gradient.size(problem.leading);
    for_rows(problem.rows, problem.vocab, 0, [&](int64_t index, const SliceRunner& runner, char*) {
      if (problem.at(kKeep, index) == 0) return portable::fill_zero(gradients.row(index), 0, width);
      const ShardPairRow row = pair_of(problem, index);
      const Row out = gradient_row(gradients, index, of_teacher ? row.teacher : row.student);
      const auto at = [&](int place) { return problem.at(place, index); };
      const double factor = of_teacher && problem.constant_teacher ? 0 : at(kFactor);
      pair_kernels(problem, index)
          .gradient(row, runner,
                    {of_teacher, at(kValue), at(kSlopeSum), factor, at(kOwnFactor), at(kTokenFactor), at(kLabelFactor),
                     at(kLabelLog2Sum)},
                    out);
      portable::fill_zero(out, problem.vocab, width);
    });
  }

 private:
  static const ShardSideKernels& side_kernels(const ShardSideProblem& problem) {
    return kernels().shard_side.at(problem.float64);
  }
  static ShardSideRow row_of(const ShardSideProblem& problem, int64_t index) {
    ShardSideRow row{};
    row.vocab = problem.vocab;
    row.logits = problem.row_at(problem.student, kSoftcap, index);
    row.temperature = problem.at(kTemperature, index);
    row.second_temperature = problem.at(kSecondTemperature, index);
    row.token = problem.tokens[index];
    row.columns = problem.columns;
    row.holes = problem.holes == nullptr ? nullptr : problem.holes + index * problem.hole_count;
    row.hole_count = problem.hole_count;
    return row;
  }

  static const ShardPairKernel& pair_kernels(const ShardPairProblem& problem, int64_t index) {
    const int place = problem.divergence.at(problem.at(kBeta, index));
    return kernels().shard_pair.at(problem.float64).of[place];
  }
  static ShardPairRow pair_of(const ShardPairProblem& problem, int64_t index) {
    const auto at = [&](int place) { return problem.at(place, index); };
    ShardPairRow row{};
    row.vocab = problem.vocab;
    row.student = problem.row_at(problem.student, kStudentSoftcap, index);
    row.teacher = problem.row_at(problem.teacher, kTeacherSoftcap, index);
    row.task.temperature = at(kStudentTemperature);
    row.task.teacher_temperature = at(kTeacherTemperature);
    row.task.beta = at(kBeta);
    row.task.alpha = at(kAlpha);
    row.student_origin = at(kStudentOrigin);
    row.student_log2_sum = at(kStudentLog2Sum);
    row.teacher_origin = at(kTeacherOrigin);
    row.teacher_log2_sum = at(kTeacherLog2Sum);
    row.token = problem.tokens[index];
    return row;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { implement_shard_ops<Cpu>(m); }

}  // namespace fastkd
