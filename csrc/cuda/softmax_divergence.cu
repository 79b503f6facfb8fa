// softmax_divergence on CUDA: arguments, launches, and what comes before and after the rows: the denominator where only
// the device can count it, and the sum of the losses.
#include <torch/csrc/stable/library.h>

#include "../tensor/softmax_divergence_entry.h"
#include "register.h"
#include "softmax_divergence_launch.h"

namespace fastkd::cuda {
namespace {

constexpr int kReduceThreads = 512;

// factor = 1 / the number of rows that count, or 1 / normalizer; 0 where there is none.
__global__ void __launch_bounds__(kReduceThreads)
    denominator_kernel(const RowArguments arguments, const DeviceRows normalizer, double* factor) {
  const Team<false> team(shared_memory(), 1);
  double denominator = 0;
  if (normalizer) {
    denominator = team.leads() ? normalizer.number(0) : 0;
  } else {
    for (int64_t row = threadIdx.x; row < arguments.rows; row += blockDim.x) denominator += arguments.counts(row);
    denominator = team.sum(denominator, [](double& all, double next) { all += next; });
  }
  if (team.leads()) global_store(factor, denominator == 0 ? 0 : 1 / denominator);
}

// loss = factor x the sum of all rows' losses.
__global__ void __launch_bounds__(kReduceThreads)
    sum_kernel(const double* losses, int64_t rows, const double* factors, double factor, const DeviceRows loss,
               const DeviceRows pending) {
  const Team<false> team(shared_memory(), 1);
  double sum = 0;
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) sum += global_load(losses + row);
  sum = team.sum(sum, [](double& all, double next) { all += next; });
  if (!team.leads()) return;
  if (factors != nullptr) factor = global_load(factors);
  loss.put(loss.data, factor == 0 ? 0 : sum * factor);
  if (pending) pending.put(pending.data, factor);
}

__global__ void __launch_bounds__(kFlatThreads) copy_kernel(const double* losses, int64_t rows, const DeviceRows loss) {
  for (int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; row < rows; row += int64_t(gridDim.x) * blockDim.x)
    loss.put(loss.data + row * loss.element_size, global_load(losses + row));
}

RowArguments row_arguments(const Problem& problem, const Options& o, const std::vector<Tensor>& teachers) {
  const auto rows_of = [&](const Tensor& x) { return device_rows(x, problem.leading, kSoftmaxDivergence); };
  const auto optional_rows = [&](const std::optional<Tensor>& x) { return x ? rows_of(*x) : DeviceRows(); };
  RowArguments a{};
  a.rows = problem.rows;
  FASTKD_CHECK_VALUE(problem.student_width < kMaxColumns && problem.teacher_width < kMaxColumns, kSoftmaxDivergence,
                     "a vocabulary on CUDA must have fewer than 2^31 - 1024 columns, got ", problem.student_width,
                     " and ", problem.teacher_width);
  a.vocab = int(problem.vocab);
  a.student_width = int(problem.student_width);
  a.teacher_width = int(problem.teacher_width);
  a.student = rows_of(problem.student_tensor);
  FASTKD_CHECK_VALUE(teachers.size() <= kMaxTeachers, kSoftmaxDivergence, "teacher_logits may hold at most ",
                     kMaxTeachers, " tensors on CUDA, got ", teachers.size());
  for (const Tensor& teacher : teachers) a.teachers[a.teacher_count++] = rows_of(teacher);
  a.mix_probs = problem.mix_probs;
  a.square_temperature = o.square_temperature;
  a.beta = o.beta;
  a.temperature = o.temperature;
  a.teacher_temperature = o.teacher_temperature;
  a.label_weight = o.label_weight;
  a.temperatures = optional_rows(o.temperatures);
  a.teacher_temperatures = optional_rows(o.teacher_temperatures);
  a.weight = optional_rows(o.weight);
  a.mask = optional_rows(o.mask);
  a.labels = optional_rows(o.labels);
  a.ignore_index = o.ignore_index;
  if (o.teacher_weights) {
    const bool shared = o.teacher_weights->dim() == 1;
    a.teacher_weights = device_rows(*o.teacher_weights, shared ? 0 : problem.leading, kSoftmaxDivergence);
  }
  return a;
}

SourceKind source_kind(const RowArguments& a) {
  const bool packed = a.teacher_count == 1 && moves_like(a.student, a.student) &&
                      moves_like(a.teachers[0], a.student) &&
                      (!a.student_gradient || moves_like(a.student_gradient, a.student)) &&
                      (!a.teacher_gradient || moves_like(a.teacher_gradient, a.student));
  if (!packed) return SourceKind::kAny;
  return a.student.type == ScalarType::BFloat16 ? SourceKind::kPackedBFloat16
         : a.student.type == ScalarType::Half   ? SourceKind::kPackedFloat16
                                                : SourceKind::kPackedFloat32;
}

struct Cuda {
  static constexpr bool kValuesChecked = false;

  static std::tuple<Tensor, Tensor> solve(Problem& problem, const Tensor* student_gradient,
                                          const Tensor* teacher_gradient) {
    FASTKD_CHECK_TYPE(!problem.float64, kSoftmaxDivergence, "float64 logits are supported on the CPU only");
    const Options& o = problem.options;
    const Tensor& student = problem.student_tensor;
    const Device device(student, kSoftmaxDivergence);
    const bool reduced = o.reduction != "none";
    RowArguments arguments = row_arguments(problem, o, problem.teacher_tensors);
    if (student_gradient != nullptr) {
      arguments.student_gradient = device_rows(*student_gradient, problem.leading, kSoftmaxDivergence);
    }
    if (teacher_gradient != nullptr) {
      arguments.teacher_gradient = device_rows(*teacher_gradient, problem.leading, kSoftmaxDivergence);
    }
    const Tensor losses = torch::stable::new_empty(student, {problem.rows}, ScalarType::Double);
    arguments.losses = static_cast<double*>(losses.data_ptr());

    // The factor of the sum: known here, or counted there.
    double factor = 1;
    std::optional<Tensor> counted;
    if (reduced && (o.normalizer || (o.reduction == "mean" && (o.mask || o.labels)))) {
      counted = torch::stable::new_empty(student, {1}, ScalarType::Double);
      const DeviceRows normalizer =
          o.normalizer ? device_rows(*o.normalizer, o.normalizer->dim(), kSoftmaxDivergence) : DeviceRows();
      device.launch(denominator_kernel, 1, kReduceThreads, Team<false>::kSharedBytes, 1, arguments, normalizer,
                    static_cast<double*>(counted->data_ptr()));
    } else if (reduced) {
      const double denominator = o.reduction == "mean" ? double(problem.rows) : o.denominator;
      factor = denominator == 0 ? 0 : 1 / denominator;
    }
    const double* factors = counted ? static_cast<const double*>(counted->data_ptr()) : nullptr;
    // A float16 gradient divided by thousands of rows would vanish before a loss scaler can lift it: the division
    // waits.
    const auto is_half = [](const Tensor* x) { return x != nullptr && x->scalar_type() == ScalarType::Half; };
    const bool wait = reduced && (is_half(student_gradient) || is_half(teacher_gradient));
    arguments.gradient_factor = wait ? (factor == 0 ? 0 : 1) : factor;
    arguments.gradient_factors = wait ? nullptr : factors;

    const int divergence = find_divergence(o.divergence, o.beta);
    const SourceKind kind = source_kind(arguments);
    if (!launch_shard<0>(divergence, device, arguments, kind) &&
        !launch_shard<1>(divergence, device, arguments, kind) &&
        !launch_shard<2>(divergence, device, arguments, kind)) {
      launch_shard<3>(divergence, device, arguments, kind);
    }

    const Tensor loss = torch::stable::new_empty(student, loss_shape(student, o.reduction), ScalarType::Float);
    const Tensor pending = wait ? torch::stable::new_empty(student, std::vector<int64_t>{}, ScalarType::Float)
                                : torch::stable::new_empty(student, {0}, ScalarType::Float);
    const DeviceRows loss_rows = device_rows(loss, 0, kSoftmaxDivergence);
    if (reduced) {
      device.launch(sum_kernel, 1, kReduceThreads, Team<false>::kSharedBytes, 1, arguments.losses, problem.rows,
                    factors, factor, loss_rows, wait ? device_rows(pending, 0, kSoftmaxDivergence) : DeviceRows());
    } else {
      const int64_t blocks = (problem.rows + kFlatThreads - 1) / kFlatThreads;
      device.launch(copy_kernel, blocks < 65536 ? blocks : 65536, kFlatThreads, 0, 1, arguments.losses, problem.rows,
                    loss_rows);
    }
    return {loss, pending};
  }
};

}  // namespace

FASTKD_IMPL(m) {
  m.impl("_softmax_divergence", TORCH_BOX(&softmax_divergence<Cuda>));
  m.impl("_softmax_divergence_into", TORCH_BOX(&softmax_divergence_into<Cuda>));
}

}  // namespace fastkd::cuda
