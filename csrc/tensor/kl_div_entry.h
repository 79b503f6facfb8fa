// The ops of kl_div: checks and allocation for a backend, which solves the call.
#pragma once
#include <optional>
#include <tuple>

#include "allocate.h"
#include "rows.h"

namespace fastkd {

// What to compute; what is not there is not wanted.
struct KlDivCall {
  const Tensor &input, &target;
  bool log_target;
  bool reduce;  // loss is a scalar, scale times the sum of the terms; else the terms
  double scale;
  std::optional<Tensor> loss, upstream;  // upstream: the gradient of the loss, a scalar or one a term
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

inline KlDivCall checked_call(const Tensor& input, const Tensor& target, bool log_target, bool reduce, double scale) {
  check_flat(input, input, "input");
  check_flat(target, input, "target");
  return {input, target, log_target, reduce, scale, {}, {}, {}, {}};
}

inline Tensor or_empty(const std::optional<Tensor>& x, const Tensor& like) {
  return x ? *x : torch::stable::new_empty(like, {0});
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> kl_div(const Tensor& input, const Tensor& target, bool log_target, bool reduce,
                                          double scale, bool input_gradient, bool target_gradient) {
  KlDivCall call = checked_call(input, target, log_target, reduce, scale);
  call.loss = reduce ? torch::stable::new_empty(input, std::vector<int64_t>{}) : gradient_like(input);
  if (input_gradient) call.input_gradient = gradient_like(input);
  if (target_gradient) call.target_gradient = gradient_like(target);
  Backend::solve(call);
  return {*call.loss, or_empty(call.input_gradient, input), or_empty(call.target_gradient, target)};
}

template <class Backend>
std::tuple<Tensor, Tensor> kl_div_into(const Tensor& gradient, const Tensor& input, const Tensor& target,
                                       bool log_target, double scale, bool target_gradient) {
  KlDivCall call = checked_call(input, target, log_target, true, scale);
  check_flat(gradient, input, "gradient");
  call.loss = torch::stable::new_empty(input, std::vector<int64_t>{});
  call.input_gradient = gradient;
  if (target_gradient) call.target_gradient = gradient_like(target);
  Backend::solve(call);
  return {*call.loss, or_empty(call.target_gradient, target)};
}

template <class Backend>
std::tuple<Tensor, Tensor> kl_div_backward(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                                           bool log_target, double scale, bool input_gradient, bool target_gradient) {
  KlDivCall call = checked_call(input, target, log_target, false, scale);
  if (grad_output.dim() != 0 || !is_float(grad_output.scalar_type())) {
    check_flat(grad_output, input, "grad_output");
  } else {
    check_device(grad_output, input, "grad_output");
  }
  call.upstream = grad_output;
  if (input_gradient) call.input_gradient = gradient_like(input);
  if (target_gradient) call.target_gradient = gradient_like(target);
  Backend::solve(call);
  return {or_empty(call.input_gradient, input), or_empty(call.target_gradient, target)};
}

}  // namespace fastkd
