// cross_entropy on CUDA: arguments and launches.
#include <torch/csrc/stable/library.h>

#include "../arguments/cross_entropy_entry.h"
#include "common/register.h"
#include "cross_entropy.cuh"

namespace fastkd::cuda {
namespace {

template <EntropySums kEntropy>
void launch(const Device& device, const CrossEntropyArgumentsOnDevice& a) {
  with_source<false>(source_kind(a), [&](auto source, int element_size) {
    using Source = typename decltype(source)::Type;
    RowNeeds needs{cross_entropy_overhead(false), Source::kPacked, /*tensors=*/1};
    if (!a.student_gradient) needs.adapt = one_pass;
    launch_teams(device, cross_entropy_kernel<kEntropy, Source>, a, element_size, needs, cross_entropy_team_bytes);
  });
}

struct Cuda {
  static constexpr bool kValuesChecked = false;

  static std::tuple<Tensor, Tensor> solve(const CrossEntropyProblem& problem, const Tensor* gradient) {
    const Device device(problem.student_tensor, kCrossEntropy);
    const RowLosses losses(device, problem, {gradient});
    const auto rows_of = [&](const Tensor& x) { return device_rows(x, problem.leading, kCrossEntropy); };
    const CrossEntropyArguments& own = problem.own;
    CrossEntropyArgumentsOnDevice a{};
    static_cast<RowNumbers&>(a) = losses.numbers;
    a.student = rows_of(problem.student_tensor);
    if (gradient != nullptr) a.student_gradient = rows_of(*gradient);
    a.label_smoothing = own.label_smoothing;
    a.entropy_weight = own.entropy_weight;
    a.entropy_temperature = own.entropy_temperature;
    a.z_loss_weight = own.z_loss_weight;
    if (own.entropy_mask) a.entropy_mask = rows_of(*own.entropy_mask);
    a.entropy_correct = own.entropy_correct;
    if (own.entropy_weight == 0) {
      launch<EntropySums::kNone>(device, a);
    } else if (!own.rows.temperatures && own.rows.temperature == own.entropy_temperature) {
      launch<EntropySums::kSame>(device, a);
    } else {
      launch<EntropySums::kApart>(device, a);
    }
    return losses.finish();
  }
};

}  // namespace

FASTKD_IMPL(m) { implement_loss<fastkd::CrossEntropy, Cuda>(m); }

}  // namespace fastkd::cuda
