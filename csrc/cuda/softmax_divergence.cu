// softmax_divergence on CUDA: arguments and launches.
#include <torch/csrc/stable/library.h>

#include "../arguments/softmax_divergence_entry.h"
#include "common/register.h"
#include "softmax_divergence_launch.h"

namespace fastkd::cuda {
namespace {

RowArguments row_arguments(const Problem& problem, const RowNumbers& numbers) {
  const auto rows_of = [&](const Tensor& x) { return device_rows(x, problem.leading, kSoftmaxDivergence); };
  RowArguments a{};
  static_cast<RowNumbers&>(a) = numbers;
  const std::vector<Tensor>& teachers = problem.teacher_tensors;
  FASTKD_CHECK_VALUE(problem.teacher_width < kMaxColumns, kSoftmaxDivergence,
                     "a vocabulary on CUDA must have fewer than 2^31 - 1024 columns, got ", problem.teacher_width);
  a.teacher_width = int(problem.teacher_width);
  a.student = rows_of(problem.student_tensor);
  FASTKD_CHECK_VALUE(teachers.size() <= kMaxTeachers, kSoftmaxDivergence, "teacher_logits may hold at most ",
                     kMaxTeachers, " tensors on CUDA, got ", teachers.size());
  for (const Tensor& teacher : teachers) {
    a.teachers[a.teacher_count++] = device_rows(teacher, teacher.dim() - 1, kSoftmaxDivergence);
  }
  a.teacher_row_count = problem.teacher_row_count;
  a.mix_probs = problem.mix_probs;
  a.constant_teacher = problem.constant_teacher;
  a.beta = problem.beta;
  a.alpha = problem.alpha;
  a.any_beta = problem.any_beta;
  if (const Tensor* each = problem.betas_tensor) a.betas = rows_of(*each);
  if (const auto& each = problem.own.alphas) a.alphas = rows_of(*each);
  a.teacher_temperature = problem.teacher_temperature;
  if (const Tensor* each = problem.teacher_temperatures_tensor) a.teacher_temperatures = rows_of(*each);
  // In a mixture of probabilities, a single teacher is the mixture itself, whatever its weight.
  const auto& weights = problem.own.teacher_weights;
  if (weights && (teachers.size() > 1 || problem.own.mix() == TeacherMix::kLogits)) {
    a.teacher_weights = device_rows(*weights, weights->dim() == 1 ? 0 : problem.leading, kSoftmaxDivergence);
  }
  return a;
}

struct Cuda {
  static constexpr bool kValuesChecked = false;

  static std::tuple<Tensor, Tensor> solve(Problem& problem, const Tensor* student_gradient,
                                          const Tensor* teacher_gradient) {
    const Device device(problem.student_tensor, kSoftmaxDivergence);
    const RowLosses losses(device, problem, {student_gradient, teacher_gradient});
    RowArguments arguments = row_arguments(problem, losses.numbers);
    if (student_gradient != nullptr) {
      arguments.student_gradient = device_rows(*student_gradient, problem.leading, kSoftmaxDivergence);
    }
    if (teacher_gradient != nullptr) {
      arguments.teacher_gradient = device_rows(*teacher_gradient, problem.leading, kSoftmaxDivergence);
    }
    const Tensor distances =
        torch::stable::new_empty(problem.student_tensor, {problem.mix_adapts ? problem.rows : 0}, ScalarType::Double);
    if (problem.mix_adapts) {
      arguments.distances = static_cast<double*>(distances.data_ptr());
      arguments.contrast = problem.own.mix() == TeacherMix::kContrast;
    }
    const portable::DivergencePlaces& places = problem.divergence;
    if (!arguments.betas && launch_blended(places.at(arguments.beta), device, arguments)) return losses.finish();
    if (problem.mix_adapts) measure_teachers(device, arguments);
    if (!arguments.betas) {
      launch(places.at(arguments.beta), device, arguments, kAnyBeta);
    } else {
      // Rows at the ends of beta are computed by launches of their own where they have another divergence.
      const int zero = places.at_zero != places.inside ? kBetaZero : 0;
      const int one = places.at_one != places.inside ? kBetaOne : 0;
      launch(places.inside, device, arguments, kAnyBeta & ~(zero | one));
      if (zero) launch(places.at_zero, device, arguments, zero);
      if (one) launch(places.at_one, device, arguments, one);
    }
    return losses.finish();
  }

 private:
  // The total variation distances of the rows' two teachers.
  static void measure_teachers(const Device& device, const RowArguments& arguments) {
    RowArguments pair = arguments;
    pair.distances = nullptr;
    pair.student = pair.teachers[0];
    pair.teachers[0] = pair.teachers[1];
    pair.teacher_count = 1;
    pair.student_map = pair.teacher_map;
    pair.student_gradient = pair.teacher_gradient = pair.temperatures = pair.teacher_temperatures = DeviceRows();
    pair.teacher_weights = pair.weight = pair.label_weights = pair.betas = pair.alphas = DeviceRows();
    pair.temperature = pair.teacher_temperature = 1;
    pair.label_weight = pair.beta = 0;
    pair.square_temperature = pair.any_beta = false;
    pair.gradient_factor = 1;
    pair.gradient_factors = nullptr;
    pair.losses = arguments.distances;
    launch(portable::place_in<portable::Tvd>(portable::Divergences{}), device, pair, kAnyBeta);
  }

  static void launch(int divergence, const Device& device, RowArguments arguments, int beta_kinds) {
    arguments.beta_kinds = beta_kinds;
    const SourceKind kind = source_kind(arguments);
    if (!launch_shard<0>(divergence, device, arguments, kind) &&
        !launch_shard<1>(divergence, device, arguments, kind) &&
        !launch_shard<2>(divergence, device, arguments, kind)) {
      launch_shard<3>(divergence, device, arguments, kind);
    }
  }
};

}  // namespace

SourceKind source_kind(const RowArguments& a) {
  const DeviceRows& teacher = a.teachers[0];
  const bool mixed = a.teacher_count > 0 && teacher.type != a.student.type;
  const int pack = 16 / (mixed ? 4 : a.student.element_size);
  const auto packed = [&](const DeviceRows& x, const DeviceRows& like) {
    return !x || (x.type == like.type && moves_like(x, a.student, pack, /*any_row=*/bool(a.teacher_places)));
  };
  if (a.student_map || a.teacher_map || a.teacher_count > 1 || a.teacher_weights || !packed(a.student, a.student) ||
      !packed(teacher, teacher) || !packed(a.student_gradient, a.student) || !packed(a.teacher_gradient, teacher)) {
    return SourceKind::kAny;
  }
  return mixed                                    ? SourceKind::kPackedMixed
         : a.student.type == ScalarType::BFloat16 ? SourceKind::kPackedBFloat16
         : a.student.type == ScalarType::Half     ? SourceKind::kPackedFloat16
                                                  : SourceKind::kPackedFloat32;
}

FASTKD_IMPL(m) { implement_loss<SoftmaxDivergence, Cuda>(m); }

}  // namespace fastkd::cuda
