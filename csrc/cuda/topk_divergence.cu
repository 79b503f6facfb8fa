// topk_divergence on CUDA: arguments and launches.
#include <torch/csrc/stable/library.h>

#include "../arguments/topk_divergence_entry.h"
#include "common/register.h"
#include "topk_divergence.cuh"

namespace fastkd::cuda {
namespace {

template <class Source>
void launch_rows(const Device& device, TopkArguments arguments, int element_size) {
  const int packs = arguments.vocab / Source::kSize + 2;  // a row may begin within its first pack
  while ((packs >> arguments.group_shift) >= kTopkBits) ++arguments.group_shift;
  RowNeeds needs{topk_team_bytes(false, arguments.k), Source::kPacked, /*tensors=*/1};
  needs.most_blocks = kPortableBlocks;  // each block reads the row's k entries
  launch_teams(device, topk_divergence_kernel<Source>, arguments, element_size, needs, [&](const RowLaunch& with) {
    return topk_team_bytes(with.warp_rows > 0, arguments.k) + rows_bytes(with, 1);
  });
}

struct Cuda {
  static constexpr bool kValuesChecked = false;

  static std::tuple<Tensor, Tensor> solve(const TopkProblem& problem, const Tensor* student_gradient,
                                          const Tensor* teacher_gradient) {
    FASTKD_CHECK_VALUE(problem.k <= kMaxTopk, kTopkDivergence, "teacher_log_probs may hold at most ", kMaxTopk,
                       " entries a row on CUDA, got ", problem.k);
    const Device device(problem.student_tensor, kTopkDivergence);
    const RowLosses losses(device, problem, {student_gradient, teacher_gradient});
    const auto rows_of = [&](const Tensor& x) { return device_rows(x, problem.leading, kTopkDivergence); };
    TopkArguments a{};
    static_cast<RowNumbers&>(a) = losses.numbers;
    a.student = rows_of(problem.student_tensor);
    if (student_gradient != nullptr) a.student_gradient = rows_of(*student_gradient);
    a.beta = problem.beta;
    if (const Tensor* each = problem.betas_tensor) a.betas = rows_of(*each);
    a.log_probs = rows_of(problem.log_probs_tensor);
    a.indices = rows_of(problem.indices_tensor);
    if (teacher_gradient != nullptr) a.log_probs_gradient = rows_of(*teacher_gradient);
    if (const Tensor* each = problem.teacher_temperatures_tensor) a.teacher_temperatures = rows_of(*each);
    a.k = int(problem.k);
    a.divergence = problem.divergence;
    a.tail = problem.tail;
    a.stored_temperature = problem.stored_temperature;
    a.teacher_temperature = problem.teacher_temperature;
    a.floor = problem.floor;
    a.cap = problem.cap;
    const ScalarType stored = problem.log_probs_tensor.scalar_type();
    a.rounding = rounding_of_bits(stored == ScalarType::BFloat16 ? 7 : stored == ScalarType::Half ? 10 : 23);
    with_source<false>(source_kind(a), [&](auto source, int element_size) {
      launch_rows<typename decltype(source)::Type>(device, a, element_size);
    });
    return losses.finish();
  }
};

}  // namespace

FASTKD_IMPL(m) { implement_loss<TopkDivergence, Cuda>(m); }

}  // namespace fastkd::cuda
