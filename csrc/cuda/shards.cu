// The ops on one process's columns, on CUDA: arguments and launches.
#include <torch/csrc/stable/library.h>

#include "common/register.h"
#include "shards.cuh"

namespace fastkd::cuda {
namespace {

__global__ void __launch_bounds__(kRowThreads, kShardBlocks)
    shard_statistics_kernel(const __grid_constant__ ShardSideArguments arguments, const RowLaunch launch) {
  work_on_shard_rows(arguments, launch, [&](int64_t row, const Team& team, unsigned* filter) {
    shard_statistics_row(arguments, row, team, filter);
  });
}
__global__ void __launch_bounds__(kRowThreads, kShardBlocks)
    shard_softmax_gradient_kernel(const __grid_constant__ ShardSideArguments arguments, const RowLaunch launch) {
  work_on_shard_rows(arguments, launch, [&](int64_t row, const Team& team, unsigned* filter) {
    shard_softmax_gradient_row(arguments, row, team, filter);
  });
}

// Calls body with a value of the type at a place of the list.
template <class Body, class First, class... Rest>
void with_place(int place, const Body& body, TypeList<First, Rest...>) {
  if (place == 0) return body(static_cast<First*>(nullptr));
  if constexpr (sizeof...(Rest) > 0) with_place(place - 1, body, TypeList<Rest...>{});
}

struct Cuda {
  static constexpr bool kValuesChecked = false;

  static void statistics(const ShardSideProblem& problem, int64_t wanted, Tensor& results) {
    ShardSideArguments a = side_of(problem, ShardStatistics::kName);
    a.out = static_cast<double*>(results.data_ptr());
    a.wanted = int(wanted);
    launch("statistics", problem, ShardStatistics::kName, shard_statistics_kernel, a);
  }

  static void softmax_gradient(const ShardSideProblem& problem, const double* hole_gradients, const Tensor& gradient) {
    ShardSideArguments a = side_of(problem, ShardSoftmaxGradient::kName);
    a.hole_gradients = hole_gradients;
    a.gradient = device_rows(gradient, problem.leading, ShardSoftmaxGradient::kName);
    launch("softmax gradient", problem, ShardSoftmaxGradient::kName, shard_softmax_gradient_kernel, a);
  }

  static void sums(const ShardPairProblem& problem, Tensor& results) {
    ShardPairArguments a = pair_of(problem, ShardSumsOp::kName);
    a.out = static_cast<double*>(results.data_ptr());
    for_places(problem.divergence, [&](int place) {
      a.place = place;
      with_place(
          place,
          [&](auto* divergence) {
            using Divergence = std::remove_pointer_t<decltype(divergence)>;
            launch("sums", problem, ShardSumsOp::kName, shard_sums_kernel<Divergence>, a);
          },
          Divergences{});
    });
  }

  static void gradient(const ShardPairProblem& problem, bool of_teacher, const Tensor& gradient) {
    ShardPairArguments a = pair_of(problem, ShardGradient::kName);
    a.of_teacher = of_teacher;
    a.constant_teacher = problem.constant_teacher;
    a.gradient = device_rows(gradient, problem.leading, ShardGradient::kName);
    a.width = int(gradient.size(problem.leading));
    for_places(problem.divergence, [&](int place) {
      a.place = place;
      with_place(
          place,
          [&](auto* divergence) {
            using Divergence = std::remove_pointer_t<decltype(divergence)>;
            launch("gradient", problem, ShardGradient::kName, shard_gradient_kernel<Divergence>, a);
          },
          Divergences{});
    });
  }

 private:
  // A row's beta, which is on the device, decides between the divergence and what it is at the ends.
  template <class Body>
  static void for_places(const portable::DivergencePlaces& places, const Body& body) {
    body(places.inside);
    if (places.at_zero != places.inside) body(places.at_zero);
    if (places.at_one != places.inside && places.at_one != places.at_zero) body(places.at_one);
  }

  static void check(const ShardProblem& problem, const char* name) {
    FASTKD_CHECK_TYPE(!problem.float64, name, "float64 logits are supported on the CPU only");
    FASTKD_CHECK_VALUE(problem.student_width < kMaxColumns, name,
                       "a vocabulary on CUDA must have fewer than 2^31 - 1024 columns, got ", problem.student_width);
  }
  static ShardSideArguments side_of(const ShardSideProblem& problem, const char* name) {
    check(problem, name);
    ShardSideArguments a{};
    a.rows = problem.rows;
    a.vocab = int(problem.vocab);
    a.numbers = problem.numbers;
    a.width = int(problem.student_width);
    a.logits = device_rows(problem.student_tensor, problem.leading, name);
    a.tokens = problem.tokens;
    a.columns = problem.columns;
    a.holes = problem.holes;
    a.hole_count = problem.hole_count;
    return a;
  }
  static ShardPairArguments pair_of(const ShardPairProblem& problem, const char* name) {
    check(problem, name);
    ShardPairArguments a{};
    a.rows = problem.rows;
    a.vocab = int(problem.vocab);
    a.numbers = problem.numbers;
    a.student = device_rows(problem.student_tensor, problem.leading, name);
    a.teacher = device_rows(problem.teacher_tensor, problem.leading, name);
    a.tokens = problem.tokens;
    a.places = problem.divergence;
    return a;
  }

  template <class Kernel, class Arguments>
  static void launch(const char* role, const ShardProblem& problem, const char* name, Kernel kernel,
                     const Arguments& arguments) {
    const Device device(problem.student_tensor, name);
    launch_teams(device, kernel, arguments, 4, {kShardTeamBytes, /*packed=*/false}, shard_team_bytes, role);
  }
};

}  // namespace

FASTKD_IMPL(m) { implement_shard_ops<Cuda>(m); }

}  // namespace fastkd::cuda
