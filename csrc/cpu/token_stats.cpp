// token_stats on the CPU: runs the row kernel (token_stats.h) over the rows of the tensors.
#include <torch/csrc/stable/library.h>

#include "../arguments/token_stats_entry.h"
#include "common/parallel.h"
#include "isa.h"

namespace fastkd {
namespace {

template <class Real>
void put_row(const StatsOutput& out, int64_t row, const RowStats& stats, bool pair) {
  Real* next = static_cast<Real*>(out.numbers) + row;
  const auto put = [&](double value) {
    *next = Real(value);
    next += out.rows;
  };
  const auto put_side = [&](const SideStats& side) {
    for (double value : {side.lse, side.entropy, side.top_prob, side.label_log_prob}) put(value);
  };
  put_side(stats.student);
  out.argmax[row] = stats.student.argmax;
  if (!pair) return;
  put_side(stats.teacher);
  out.argmax[out.rows + row] = stats.teacher.argmax;
  for (double value : {stats.both.forward_kl, stats.both.reverse_kl, stats.both.tvd}) put(value);
}

struct Cpu {
  static constexpr bool kValuesChecked = true;

  static void solve(const RowProblem& problem, const Tensor* teacher_logits, const StatsOutput& out) {
    const TokenStatsKernel kernel = kernels().token_stats.at(problem.float64);
    const Rows teachers = teacher_logits ? Rows(*teacher_logits, problem.leading) : Rows();
    const int64_t scratch = token_stats_scratch(problem.vocab, problem.float64 ? sizeof(double) : sizeof(float));
    for_rows(problem.rows, problem.vocab, scratch, [&](int64_t index, const SliceRunner& runner, char* memory) {
      StatsRow row{};
      row.vocab = problem.vocab;
      row.student = problem.student.row(index);
      if (teachers) row.teacher = teachers.row(index);
      row.temperature = problem.temperature(index);
      const int64_t label = problem.label(index);
      row.has_labels = bool(problem.labels);
      row.label = label == problem.options.ignore_index ? -1 : label;
      row.scratch = memory;
      const RowStats stats = kernel(row, runner);
      if (out.float64) {
        put_row<double>(out, index, stats, bool(teachers));
      } else {
        put_row<float>(out, index, stats, bool(teachers));
      }
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { implement_op<TokenStats, Cpu>(m); }

}  // namespace fastkd
