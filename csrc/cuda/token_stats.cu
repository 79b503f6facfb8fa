// token_stats on CUDA: arguments and launches.
#include <torch/csrc/stable/library.h>

#include "../arguments/token_stats_entry.h"
#include "common/register.h"
#include "token_stats.cuh"

namespace fastkd::cuda {
namespace {

template <bool kPair, class Source>
void launch_rows(const Device& device, const StatsArguments& arguments, int element_size) {
  RowNeeds needs{stats_overhead(false), Source::kPacked, kPair ? 2 : 1};
  if (!kPair) needs.adapt = one_pass;
  launch_teams(device, token_stats_kernel<kPair, Source>, arguments, element_size, needs, stats_team_bytes<kPair>);
}

struct Cuda {
  static constexpr bool kValuesChecked = false;

  static void solve(const RowProblem& problem, const Tensor* teacher_logits, const StatsOutput& out) {
    FASTKD_CHECK_TYPE(!problem.float64, kTokenStats, "float64 logits are supported on the CPU only");
    const int64_t leading = problem.leading;
    const int64_t width = teacher_logits != nullptr ? teacher_logits->size(leading) : 0;
    for (int64_t columns : {problem.student_width, width}) {
      FASTKD_CHECK_VALUE(columns < kMaxColumns, kTokenStats,
                         "a vocabulary on CUDA must have fewer than 2^31 - 1024 columns, got ", columns);
    }
    const Device device(problem.student_tensor, kTokenStats);
    const auto rows_of = [&](const Tensor& x) { return device_rows(x, leading, kTokenStats); };
    StatsArguments a{};
    a.rows = problem.rows;
    a.vocab = int(problem.vocab);
    a.student_width = int(problem.student_width);
    a.teacher_width = int(width);
    a.temperature = problem.options.temperature;
    if (const auto& temperatures = problem.options.temperatures) a.temperatures = rows_of(*temperatures);
    if (const auto& labels = problem.options.labels) a.labels = rows_of(*labels);
    a.ignore_index = problem.options.ignore_index;
    a.student = rows_of(problem.student_tensor);
    if (teacher_logits != nullptr) a.teachers[a.teacher_count++] = rows_of(*teacher_logits);
    a.numbers = static_cast<float*>(out.numbers);
    a.argmax = out.argmax;
    if (teacher_logits != nullptr) {
      launch<true>(device, a);
    } else {
      launch<false>(device, a);
    }
  }

 private:
  template <bool kPair>
  static void launch(const Device& device, const StatsArguments& a) {
    with_source<kPair>(source_kind(a), [&](auto source, int element_size) {
      launch_rows<kPair, typename decltype(source)::Type>(device, a, element_size);
    });
  }
};

}  // namespace

FASTKD_IMPL(m) { implement_op<TokenStats, Cuda>(m); }

}  // namespace fastkd::cuda
