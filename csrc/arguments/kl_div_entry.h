// The ops of kl_div: checks and allocation. The backend computes the results.
#pragma once
#include <optional>
#include <tuple>

#include "allocate.h"
#include "rows.h"

namespace fastkd {

// The integers of the reductions in the ops' schemas; the first three are those of at::Reduction.
enum KlDivReduction : int64_t { kKlDivNone = 0, kKlDivMean = 1, kKlDivSum = 2, kKlDivBatchMean = 3 };

// What to compute. Undefined tensors are not requested.
struct KlDivCall {
  const Tensor* input;  // null: no requested result depends on it
  const Tensor& target;
  bool log_target;
  bool reduce;                           // loss is a scalar, scale times the sum of the terms; else it is the terms
  double scale;                          // 1 / (the divisor of the sum)
  std::optional<Tensor> loss, upstream;  // upstream: the gradient of the loss, a scalar or one number per term
  std::optional<Tensor> input_gradient, target_gradient;
};

inline void check_device(const Tensor& x, const Tensor& like, const char* argument) {
  FASTKD_CHECK_VALUE(x.is_cpu() == like.is_cpu() && x.get_device_index() == like.get_device_index(), "kl_div", argument,
                     " must be on the device of input");
}

inline void check_flat(const Tensor& x, const Tensor& like, const char* argument) {
  FASTKD_CHECK_TYPE(is_float(x.scalar_type()) && x.scalar_type() == like.scalar_type(), "kl_div", argument,
                    " must be float32, float64, bfloat16 or float16 like input, got ",
                    torch::headeronly::toString(x.scalar_type()));
  FASTKD_CHECK_VALUE(x.is_cpu() == like.is_cpu() && x.get_device_index() == like.get_device_index() &&
                         x.is_contiguous() && x.numel() == like.numel(),
                     "kl_div", argument, " must be contiguous, on input's device and of its shape ", shape_of(like),
                     ", got ", shape_of(x));
}

inline double scale_of(const Tensor& x, int64_t reduction) {
  FASTKD_CHECK_VALUE(reduction >= kKlDivNone && reduction <= kKlDivBatchMean, "kl_div",
                     "reduction expected 0 to 3, got ", reduction);
  if (reduction == kKlDivMean) return 1.0 / double(x.numel());
  if (reduction == kKlDivBatchMean && x.dim() > 0) return 1.0 / double(x.size(0));
  return 1.0;
}

inline KlDivCall checked_call(const Tensor* input, const Tensor& target, bool log_target, int64_t reduction) {
  if (input != nullptr) {
    check_flat(*input, *input, "input");
    check_flat(target, *input, "target");
  } else {
    check_flat(target, target, "target");
  }
  return {input, target, log_target, reduction != kKlDivNone, scale_of(target, reduction), {}, {}, {}, {}};
}

inline Tensor or_empty(const std::optional<Tensor>& x, const Tensor& like) {
  return x ? *x : torch::stable::new_empty(like, {0});
}

inline Tensor loss_like(const Tensor& input, int64_t reduction) {
  return reduction == kKlDivNone ? gradient_like(input) : torch::stable::new_empty(input, std::vector<int64_t>{});
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> kl_div(const Tensor& input, const Tensor& target, bool log_target, int64_t reduction,
                                          bool input_gradient, bool target_gradient) {
  KlDivCall call = checked_call(&input, target, log_target, reduction);
  call.loss = loss_like(input, reduction);
  if (input_gradient) call.input_gradient = gradient_like(input);
  if (target_gradient) call.target_gradient = gradient_like(target);
  Backend::solve(call);
  return {*call.loss, or_empty(call.input_gradient, input), or_empty(call.target_gradient, target)};
}

template <class Backend>
std::tuple<Tensor, Tensor> kl_div_into(const Tensor& gradient, const Tensor& input, const Tensor& target,
                                       bool log_target, int64_t reduction, bool target_gradient) {
  KlDivCall call = checked_call(&input, target, log_target, reduction);
  check_flat(gradient, input, "gradient");
  call.loss = loss_like(input, reduction);
  call.input_gradient = gradient;
  if (target_gradient) call.target_gradient = gradient_like(target);
  Backend::solve(call);
  return {*call.loss, or_empty(call.target_gradient, target)};
}

// The loss alone, of tensors of any strides, including empty ones: a graph traced for many sizes cannot branch on them.
template <class Backend>
Tensor kl_div_loss(const Tensor& input, const Tensor& target, bool log_target, int64_t reduction) {
  FASTKD_CHECK_VALUE(input.dim() == target.dim() && same_leading(input, target, input.dim()), "kl_div",
                     "target must have input's shape ", shape_of(input), ", got ", shape_of(target));
  const Tensor x = torch::stable::contiguous(input), t = torch::stable::contiguous(target);
  KlDivCall call = checked_call(&x, t, log_target, reduction);
  call.loss = loss_like(x, reduction);
  if (x.numel() > 0) {
    Backend::solve(call);
  } else if (call.reduce) {
    torch::stable::fill_(*call.loss, 0.0 * call.scale);  // NaN where the divisor is 0, as torch
  }
  return *call.loss;
}

template <class Backend>
std::tuple<Tensor, Tensor> kl_div_backward(const Tensor& grad_output, const std::optional<Tensor>& input,
                                           const Tensor& target, bool log_target, int64_t reduction,
                                           bool input_gradient, bool target_gradient) {
  FASTKD_CHECK_VALUE(input || !target_gradient, "kl_div", "input is needed for the gradient of target");
  KlDivCall call = checked_call(input ? &*input : nullptr, target, log_target, reduction);
  if (grad_output.dim() != 0 || !is_float(grad_output.scalar_type())) {
    check_flat(grad_output, target, "grad_output");
  } else {
    check_device(grad_output, target, "grad_output");
  }
  call.reduce = false;
  call.upstream = grad_output;
  if (input_gradient) call.input_gradient = gradient_like(target);
  if (target_gradient) call.target_gradient = gradient_like(target);
  Backend::solve(call);
  return {or_empty(call.input_gradient, target), or_empty(call.target_gradient, target)};
}

}  // namespace fastkd
