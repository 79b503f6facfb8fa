// token_log_probs on CUDA: arguments and launches.
#include <torch/csrc/stable/library.h>

#include "../arguments/token_log_probs_entry.h"
#include "common/register.h"
#include "token_log_probs.cuh"

namespace fastkd::cuda {
namespace {

struct Cuda {
  static constexpr bool kValuesChecked = false;

  static void solve(const TokenProblem& problem, TokenOutput& out) {
    TokenArguments a = arguments_of(problem, out.numbers);
    a.log_probs = static_cast<float*>(out.log_probs.data_ptr());
    a.entropy = static_cast<float*>(out.entropy.data_ptr());
    launch("rows", problem, a, [](auto entropy, auto source) {
      return token_log_probs_kernel<decltype(entropy)::value, typename decltype(source)::Type>;
    });
  }

  static void differentiate(const TokenProblem& problem, const Tensor& gradient, const TokenLogProbsBackward& given) {
    TokenArguments a = arguments_of(problem, given.numbers);
    a.student_gradient = device_rows(gradient, problem.leading, kTokenLogProbs);
    a.log_probs_gradient = static_cast<const float*>(given.log_probs_gradient.data_ptr());
    a.entropy_gradient = static_cast<const float*>(given.entropy_gradient.data_ptr());
    launch("gradient", problem, a, [](auto entropy, auto source) {
      return token_gradient_kernel<decltype(entropy)::value, typename decltype(source)::Type>;
    });
  }

 private:
  static TokenArguments arguments_of(const TokenProblem& problem, const Tensor& numbers) {
    FASTKD_CHECK_TYPE(!problem.float64, kTokenLogProbs, "float64 logits are supported on the CPU only");
    FASTKD_CHECK_VALUE(problem.student_width < kMaxColumns, kTokenLogProbs,
                       "a vocabulary on CUDA must have fewer than 2^31 - 1024 columns, got ", problem.student_width);
    const RowOptions& options = problem.options;
    const auto rows_of = [&](const Tensor& x) { return device_rows(x, problem.leading, kTokenLogProbs); };
    TokenArguments a{};
    a.rows = problem.rows;
    a.vocab = int(problem.vocab);
    a.student_width = int(problem.student_width);
    a.student = rows_of(problem.student_tensor);
    a.student_map = LogitFunction<float>(options.student_map());
    a.labels = rows_of(*options.labels);
    if (options.mask) a.mask = rows_of(*options.mask);
    a.temperature = options.temperature;
    if (options.temperatures) a.temperatures = rows_of(*options.temperatures);
    a.ignore_index = options.ignore_index;
    a.shift = options.shift;
    a.sequence = problem.sequence;
    a.numbers = static_cast<double*>(numbers.data_ptr());
    return a;
  }

  // kernel_of(entropy, source): the kernel for a flag and a source, by their types.
  template <class KernelOf>
  static void launch(const char* role, const TokenProblem& problem, const TokenArguments& a,
                     const KernelOf& kernel_of) {
    const Device device(problem.student_tensor, kTokenLogProbs);
    with_source<false>(source_kind(a), [&](auto source, int element_size) {
      RowNeeds needs{token_overhead(false), decltype(source)::Type::kPacked, /*tensors=*/1};
      needs.adapt = one_pass;
      if (problem.entropy) {
        launch_teams(device, kernel_of(std::true_type(), source), a, element_size, needs, token_team_bytes, role);
      } else {
        launch_teams(device, kernel_of(std::false_type(), source), a, element_size, needs, token_team_bytes, role);
      }
    });
  }
};

}  // namespace

FASTKD_IMPL(m) { implement_differentiable<TokenLogProbs, TokenLogProbsBackward, Cuda>(m); }

}  // namespace fastkd::cuda
