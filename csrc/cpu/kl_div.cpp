// kl_div and the scaling of finished gradients on the CPU: checks, allocation, threads.
#include "kl_div.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../tensor/allocate.h"
#include "../tensor/rows.h"
#include "isa.h"

namespace fastkd {
namespace {

constexpr int64_t kChunk = 32768;

void check_flat(const Tensor& x, const Tensor& like, const char* argument) {
  FASTKD_CHECK_TYPE(is_float(x.scalar_type()) && x.scalar_type() == like.scalar_type(), "kl_div", argument,
                    " must be float32, float64, bfloat16 or float16 like input, got ",
                    torch::headeronly::toString(x.scalar_type()));
  FASTKD_CHECK_VALUE(x.is_cpu() && x.is_contiguous() && x.numel() == like.numel(), "kl_div", argument,
                     " must be contiguous, on the CPU and of input's shape ", shape_of(like), ", got ", shape_of(x));
}

Row flat(const Tensor& x) { return {x.data_ptr(), 1, dtype_of(x.scalar_type())}; }

Row flat_gradient(const Tensor& x) {
  Row row = flat(x);
  row.streamed = x.numel() * element_size(x.scalar_type()) >= kStreamedBytes;
  return row;
}

double run(KlDivChunk whole, int64_t count, bool float64) {
  const auto kernel = float64 ? kernels().kl_div_double : kernels().kl_div_float;
  std::vector<double> sums((count + kChunk - 1) / kChunk);
  torch::stable::parallel_for(0, int64_t(sums.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      KlDivChunk chunk = whole;
      chunk.begin = i * kChunk;
      chunk.end = chunk.begin + kChunk < count ? chunk.begin + kChunk : count;
      sums[i] = kernel(chunk);
    }
  });
  double sum = 0;
  for (double part : sums) sum += part;
  return sum;
}

void put_scalar(Tensor& tensor, double value) {
  void* p = tensor.data_ptr();
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      *static_cast<double*>(p) = value;
      break;
    case ScalarType::BFloat16:
      portable::from_float(float(value), *static_cast<portable::BFloat16*>(p));
      break;
    case ScalarType::Half:
      portable::from_float(float(value), *static_cast<portable::Float16*>(p));
      break;
    default:
      *static_cast<float*>(p) = float(value);
  }
}

KlDivChunk checked_chunk(const Tensor& input, const Tensor& target, bool log_target, double scale) {
  check_flat(input, input, "input");
  check_flat(target, input, "target");
  KlDivChunk chunk{};
  chunk.input = flat(input);
  chunk.target = flat(target);
  chunk.log_target = log_target;
  chunk.scale = scale;
  return chunk;
}

std::tuple<Tensor, Tensor> gradients(KlDivChunk& chunk, const Tensor& input, const Tensor& target, bool input_gradient,
                                     bool target_gradient) {
  Tensor g = input_gradient ? gradient_like(input) : torch::stable::new_empty(input, {0});
  Tensor h = target_gradient ? gradient_like(target) : torch::stable::new_empty(target, {0});
  if (input_gradient) chunk.input_gradient = flat_gradient(g);
  if (target_gradient) chunk.target_gradient = flat_gradient(h);
  return {g, h};
}

std::tuple<Tensor, Tensor, Tensor> kl_div(const Tensor& input, const Tensor& target, bool log_target, bool reduce,
                                          double scale, bool input_gradient, bool target_gradient) {
  KlDivChunk chunk = checked_chunk(input, target, log_target, scale);
  chunk.reduce = reduce;
  auto [g, h] = gradients(chunk, input, target, input_gradient, target_gradient);
  Tensor loss = reduce ? torch::stable::new_empty(input, std::vector<int64_t>{}) : gradient_like(input);
  if (!reduce) chunk.terms = flat(loss);
  const double sum = run(chunk, input.numel(), input.scalar_type() == ScalarType::Double);
  if (reduce) put_scalar(loss, sum * scale);
  return {loss, g, h};
}

std::tuple<Tensor, Tensor> kl_div_into(Tensor& gradient, const Tensor& input, const Tensor& target, bool log_target,
                                       double scale, bool target_gradient) {
  KlDivChunk chunk = checked_chunk(input, target, log_target, scale);
  check_flat(gradient, input, "gradient");
  chunk.reduce = true;
  auto [none, h] = gradients(chunk, input, target, false, target_gradient);
  chunk.input_gradient = flat_gradient(gradient);
  Tensor loss = torch::stable::new_empty(input, std::vector<int64_t>{});
  put_scalar(loss, run(chunk, input.numel(), input.scalar_type() == ScalarType::Double) * scale);
  return {loss, h};
}

std::tuple<Tensor, Tensor> kl_div_backward(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                                           bool log_target, double scale, bool input_gradient, bool target_gradient) {
  KlDivChunk chunk = checked_chunk(input, target, log_target, scale);
  if (grad_output.dim() == 0 && is_float(grad_output.scalar_type())) {
    chunk.scale *= Rows(grad_output, 0).number(0);
  } else {
    check_flat(grad_output, input, "grad_output");
    chunk.upstream = flat(grad_output);
  }
  auto [g, h] = gradients(chunk, input, target, input_gradient, target_gradient);
  run(chunk, input.numel(), input.scalar_type() == ScalarType::Double);
  return {g, h};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("_kl_div", TORCH_BOX(&kl_div));
  m.impl("_kl_div_into", TORCH_BOX(&kl_div_into));
  m.impl("_kl_div_backward", TORCH_BOX(&kl_div_backward));
}

}  // namespace fastkd
