// Reductions of the losses over all rows.
#include <torch/csrc/stable/ops.h>

#include "block.cuh"
#include "policy.cuh"
#include "row_losses.cuh"

namespace fastkd::cuda {
namespace {

constexpr int kReduceThreads = 512;
constexpr const char* kOneBlock = "one block adds in a fixed order";

// factor = 1 / the number of rows that count, or 1 / normalizer; 0 where there is none.
__global__ void __launch_bounds__(kReduceThreads)
    denominator_kernel(const __grid_constant__ RowNumbers numbers, const __grid_constant__ DeviceRows normalizer,
                       double* factor) {
  const Team team(shared_memory(), 1);
  double denominator = 0;
  if (normalizer) {
    denominator = team.leads() ? normalizer.number(0) : 0;
  } else {
    for (int64_t row = threadIdx.x; row < numbers.rows; row += blockDim.x) denominator += numbers.counts(row);
    denominator = team.sum(denominator, [](double& all, double next) { all += next; });
  }
  if (team.leads()) global_store(factor, denominator == 0 ? 0 : 1 / denominator);
}

// loss = factor x the sum of all rows' losses.
__global__ void __launch_bounds__(kReduceThreads)
    sum_kernel(const double* losses, int64_t rows, const double* factors, double factor,
               const __grid_constant__ DeviceRows loss, const __grid_constant__ DeviceRows pending) {
  const Team team(shared_memory(), 1);
  double sum = 0;
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) sum += global_load(losses + row);
  sum = team.sum(sum, [](double& all, double next) { all += next; });
  if (!team.leads()) return;
  if (factors != nullptr) factor = global_load(factors);
  loss.put(loss.data, factor == 0 ? 0 : sum * factor);
  if (pending) pending.put(pending.data, factor);
}

__global__ void __launch_bounds__(kFlatThreads)
    copy_kernel(const double* losses, int64_t rows, const __grid_constant__ DeviceRows loss) {
  for (int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; row < rows; row += int64_t(gridDim.x) * blockDim.x)
    loss.put(loss.data + row * loss.element_size, global_load(losses + row));
}

// Known without reading data from the device.
double known_factor(const RowProblem& problem) {
  const double denominator = problem.known_denominator();
  return denominator == 0 ? 0 : 1 / denominator;
}

bool is_counted(const RowProblem& problem) {
  return problem.options.reduced() != Reduction::kNone && !problem.denominator_is_known();
}

Tensor losses_of(const RowProblem& problem) {
  return torch::stable::new_empty(problem.student_tensor, {problem.rows + 1}, ScalarType::Double);
}

}  // namespace

RowLosses::RowLosses(const Device& device, const RowProblem& problem, std::initializer_list<const Tensor*> gradients)
    : device_(device),
      problem_(problem),
      wait_(gradient_waits(problem, gradients)),
      counted_(is_counted(problem)),
      factor_(known_factor(problem)),
      losses_(losses_of(problem)) {
  const RowOptions& o = problem.options;
  const char* const function = problem.function;
  FASTKD_CHECK_TYPE(!problem.float64, function, "float64 logits are supported on the CPU only");
  FASTKD_CHECK_VALUE(problem.student_width < kMaxColumns, function,
                     "a vocabulary on CUDA must have fewer than 2^31 - 1024 columns, got ", problem.student_width);
  const auto optional_rows = [&](const std::optional<Tensor>& x) {
    return x ? device_rows(*x, problem.leading, function) : DeviceRows();
  };
  numbers.rows = problem.rows;
  numbers.vocab = int(problem.vocab);
  numbers.student_width = int(problem.student_width);
  numbers.temperatures = optional_rows(o.temperatures);
  numbers.weight = optional_rows(o.weight);
  numbers.mask = optional_rows(o.mask);
  numbers.labels = optional_rows(o.labels);
  numbers.label_weights = optional_rows(o.label_weights);
  if (problem.teacher_places_tensor) numbers.teacher_places = optional_rows(*problem.teacher_places_tensor);
  numbers.temperature = o.temperature;
  numbers.label_weight = o.label_weight;
  numbers.student_map = LogitFunction<float>(o.student_map());
  numbers.teacher_map = LogitFunction<float>(o.teacher_map());
  numbers.square_temperature = o.square_temperature;
  numbers.ignore_index = o.ignore_index;
  numbers.shift = o.shift;
  numbers.sequence = problem.sequence;
  numbers.losses = static_cast<double*>(losses_.data_ptr());
  double* const place = numbers.losses + problem.rows;
  if (counted_) {
    const DeviceRows normalizer =
        o.normalizer ? device_rows(*o.normalizer, o.normalizer->dim(), function) : DeviceRows();
    device.launch({"denominator", kOneBlock}, denominator_kernel, 1, kReduceThreads, Team::kSharedBytes, 1, numbers,
                  normalizer, place);
  }
  numbers.gradient_factor = wait_ && factor_ != 0 ? 1 : factor_;
  numbers.gradient_factors = counted_ && !wait_ ? place : nullptr;
}

std::tuple<Tensor, Tensor> RowLosses::finish() const {
  const Tensor& student = problem_.student_tensor;
  const Tensor loss = torch::stable::new_empty(student, loss_shape(problem_), ScalarType::Float);
  const Tensor pending = wait_ ? torch::stable::new_empty(student, std::vector<int64_t>{}, ScalarType::Float)
                               : torch::stable::new_empty(student, {0}, ScalarType::Float);
  const DeviceRows loss_rows = device_rows(loss, 0, problem_.function);
  if (problem_.options.reduced() != Reduction::kNone) {
    device_.launch({"sum of the losses", kOneBlock}, sum_kernel, 1, kReduceThreads, Team::kSharedBytes, 1,
                   numbers.losses, problem_.rows, counted_ ? numbers.losses + problem_.rows : nullptr, factor_,
                   loss_rows, wait_ ? device_rows(pending, 0, problem_.function) : DeviceRows());
  } else {
    const int64_t blocks = (problem_.rows + kFlatThreads - 1) / kFlatThreads;
    device_.launch({"losses", "one thread per row"}, copy_kernel, blocks < 65536 ? blocks : 65536, kFlatThreads, 0, 1,
                   numbers.losses, problem_.rows, loss_rows);
  }
  return {loss, pending};
}

}  // namespace fastkd::cuda
