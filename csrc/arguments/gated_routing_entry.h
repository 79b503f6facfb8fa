// The ops of gated routing: checks and allocation. The backend computes the results.
//
// Rows are sorted by decreasing choice. order[i] is the index of the i-th sorted row, and counts[n] rows run learner n,
// n = 0..N-1, so the rows of learner n are order[0..counts[n]). counts[N] rows have a choice in 0..N. Rows with a
// choice out of that range, if any, are sorted last; their results are NaN and their gradients 0. The code here does
// not read the values of order and counts: they stay on their device.
#pragma once
#include <optional>
#include <stdexcept>
#include <tuple>

#include "../math/activation.h"
#include "allocate.h"
#include "rows.h"

namespace fastkd {

inline constexpr const char kAcm[] = "acm.hard";
inline constexpr int64_t kMostLearners = 1023;

struct AcmSizes {
  int64_t rows, learners, inputs, width, outputs;
};

// x [..., inputs], w1 [learners, inputs, width], b1 [learners, width], w2 [learners, width, outputs], all contiguous
// and of one dtype; order [rows] and counts [learners + 1] int32.
struct AcmOperands {
  const Tensor &x, &w1, &b1, &w2, &order, &counts;
  Activation activation;
  AcmSizes sizes;
};

struct AcmRouteCall {
  const Tensor& choices;  // of any shape, int32 or int64, contiguous
  int64_t learners;
  Tensor order, counts;
};

struct AcmRowsCall {
  AcmOperands operands;
  std::optional<Tensor> bias;  // [outputs], or one for each choice [learners + 1, outputs]
  Tensor out;                  // [..., outputs]
  // Pre-activations [learners, rows, width], in sorted order: only counts[n] rows of each learner are used. A backend
  // that can read the counts on the host packs them instead as [1, sum of counts[n], width].
  std::optional<Tensor> pre_activations;
};

// Undefined tensors are not requested.
struct AcmGradientCall {
  AcmOperands operands;
  const Tensor &grad, &pre_activations;
  std::optional<Tensor> x, w1, b1, w2;
};

// The sizes of x, with the last one replaced.
inline std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.push_back(last);
  return sizes;
}

inline void check_acm(const Tensor& x, const char* argument, const Tensor& like, const std::vector<int64_t>& shape,
                      std::optional<ScalarType> type = {}) {
  const ScalarType expected = type ? *type : like.scalar_type();
  FASTKD_CHECK_TYPE(x.scalar_type() == expected, kAcm, argument, " must be ", torch::headeronly::toString(expected),
                    ", got ", torch::headeronly::toString(x.scalar_type()));
  bool same = x.dim() == int64_t(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) same = same && x.size(i++) == size;
  FASTKD_CHECK_VALUE(
      same && x.is_contiguous() && x.is_cpu() == like.is_cpu() && x.get_device_index() == like.get_device_index(), kAcm,
      argument, " must be contiguous, on x's device and of the shape the others ask for, got ", shape_of(x));
}

inline AcmSizes acm_sizes(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2, int64_t activation) {
  FASTKD_CHECK_VALUE(activation >= 0 && activation < kActivations, kAcm, "activation must lie in [0, ", kActivations,
                     "), got ", activation);
  FASTKD_CHECK_VALUE(x.dim() > 0 && w1.dim() == 3 && w2.dim() == 3 && w1.size(0) > 0, kAcm,
                     "x must be [..., D], w1 [N, D, b], w2 [N, b, D_out], got ", shape_of(x), ", ", shape_of(w1), ", ",
                     shape_of(w2));
  FASTKD_CHECK_TYPE(is_float(x.scalar_type()), kAcm, "x must be float32, float64, bfloat16 or float16, got ",
                    torch::headeronly::toString(x.scalar_type()));
  AcmSizes sizes{1, w1.size(0), x.size(x.dim() - 1), w1.size(2), w2.size(2)};
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.rows *= x.size(i);
  FASTKD_CHECK_VALUE(sizes.learners <= kMostLearners, kAcm, "w1 must have at most ", kMostLearners, " learners, got ",
                     sizes.learners);
  FASTKD_CHECK_VALUE(sizes.rows < (int64_t(1) << 31), kAcm, "x must have fewer than 2^31 rows, got ", sizes.rows);
  FASTKD_CHECK_VALUE(x.is_contiguous(), kAcm, "x must be contiguous");
  check_acm(w1, "w1", x, {sizes.learners, sizes.inputs, sizes.width});
  check_acm(b1, "b1", x, {sizes.learners, sizes.width});
  check_acm(w2, "w2", x, {sizes.learners, sizes.width, sizes.outputs});
  return sizes;
}

inline AcmOperands acm_operands(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                                const Tensor& order, const Tensor& counts, int64_t activation) {
  const AcmSizes sizes = acm_sizes(x, w1, b1, w2, activation);
  check_acm(order, "order", x, {sizes.rows}, ScalarType::Int);
  check_acm(counts, "counts", x, {sizes.learners + 1}, ScalarType::Int);
  return {x, w1, b1, w2, order, counts, Activation(activation), sizes};
}

inline void check_bias(const std::optional<Tensor>& bias, const Tensor& x, const AcmSizes& sizes) {
  if (bias && bias->dim() == 1) {
    check_acm(*bias, "bias", x, {sizes.outputs});
  } else if (bias) {
    check_acm(*bias, "bias", x, {sizes.learners + 1, sizes.outputs});
  }
}

inline void check_choices(const Tensor& choices, int64_t learners) {
  FASTKD_CHECK_TYPE(choices.scalar_type() == ScalarType::Long || choices.scalar_type() == ScalarType::Int, kAcm,
                    "choices must be int32 or int64, got ", torch::headeronly::toString(choices.scalar_type()));
  FASTKD_CHECK_VALUE(choices.is_contiguous() && choices.numel() < (int64_t(1) << 31), kAcm,
                     "choices must be contiguous and fewer than 2^31, got ", shape_of(choices));
  FASTKD_CHECK_VALUE(learners > 0 && learners <= kMostLearners, kAcm, "w1 must have 1 to ", kMostLearners,
                     " learners, got ", learners);
}

template <class Backend>
std::tuple<Tensor, Tensor> acm_route(const Tensor& choices, int64_t learners) {
  check_choices(choices, learners);
  const AcmRouteCall call{choices, learners, torch::stable::new_empty(choices, {choices.numel()}, ScalarType::Int),
                          torch::stable::new_empty(choices, {learners + 1}, ScalarType::Int)};
  Backend::solve(call);
  return {call.order, call.counts};
}

// The number of rows of all learners together, for a backend whose counts the host can read.
inline int64_t all_counts(const Tensor& counts, int64_t learners) {
  int64_t all = 0;
  for (int64_t n = 0; n < learners; ++n) all += static_cast<const int32_t*>(counts.data_ptr())[n];
  return all;
}

template <class Backend, bool kPacks = false>
std::tuple<Tensor, Tensor> acm_rows(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                                    const std::optional<Tensor>& bias, const Tensor& order, const Tensor& counts,
                                    int64_t activation, bool keep, bool packed) {
  AcmRowsCall call{acm_operands(x, w1, b1, w2, order, counts, activation), bias, {}, {}};
  const AcmSizes& sizes = call.operands.sizes;
  check_bias(bias, x, sizes);
  call.out = torch::stable::new_empty(x, with_last(x, sizes.outputs));
  Tensor pre_activations = keep && packed && kPacks
                               ? torch::stable::new_empty(x, {1, all_counts(counts, sizes.learners), sizes.width})
                               : torch::stable::new_empty(x, {keep ? sizes.learners : 0, sizes.rows, sizes.width});
  ask_for_huge_pages(pre_activations);
  if (keep) call.pre_activations = pre_activations;
  Backend::solve(call);
  return {call.out, pre_activations};
}

template <class Backend, bool kPacks = false>
std::tuple<Tensor, Tensor, Tensor, Tensor> acm_rows_backward(const Tensor& grad, const Tensor& x, const Tensor& w1,
                                                             const Tensor& b1, const Tensor& w2, const Tensor& order,
                                                             const Tensor& counts, const Tensor& pre_activations,
                                                             int64_t activation, bool x_gradient, bool w1_gradient,
                                                             bool b1_gradient, bool w2_gradient) {
  AcmGradientCall call{acm_operands(x, w1, b1, w2, order, counts, activation), grad, pre_activations, {}, {}, {}, {}};
  const AcmSizes& sizes = call.operands.sizes;
  check_acm(grad, "grad", x, with_last(x, sizes.outputs));
  if (kPacks && pre_activations.dim() == 3 &&
      (pre_activations.size(0) != sizes.learners || pre_activations.size(1) != sizes.rows)) {
    check_acm(pre_activations, "pre_activations", x, {1, all_counts(counts, sizes.learners), sizes.width});
  } else {
    check_acm(pre_activations, "pre_activations", x, {sizes.learners, sizes.rows, sizes.width});
  }
  if (x_gradient) call.x = gradient_like(x);
  if (w1_gradient) call.w1 = gradient_like(w1);
  if (b1_gradient) call.b1 = gradient_like(b1);
  if (w2_gradient) call.w2 = gradient_like(w2);
  Backend::solve(call);
  const auto found = [&](const std::optional<Tensor>& gradient) {
    return gradient ? *gradient : torch::stable::new_empty(x, {0});
  };
  return {found(call.x), found(call.w1), found(call.b1), found(call.w2)};
}

// The value alone, in one op call: for a few rows, several op calls cost as much as the products. Returns none where
// the arguments are wrong or do not have the layout that the kernels take. Python then reports the error, or makes the
// layout right and calls again.
template <class Backend>
std::optional<Tensor> acm_value(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                                const std::optional<Tensor>& bias, const Tensor& choices, int64_t activation) {
  try {
    const AcmSizes sizes = acm_sizes(x, w1, b1, w2, activation);
    check_bias(bias, x, sizes);
    check_choices(choices, sizes.learners);
    FASTKD_CHECK_VALUE(choices.dim() + 1 == x.dim() && same_leading(x, choices, choices.dim()), kAcm,
                       "choices must have x's leading sizes, got ", shape_of(choices), " for ", shape_of(x));
    FASTKD_CHECK_VALUE(choices.is_cpu() == x.is_cpu() && choices.get_device_index() == x.get_device_index(), kAcm,
                       "choices must be on x's device");
  } catch (const std::runtime_error&) {
    return std::nullopt;
  }
  const auto [order, counts] = acm_route<Backend>(choices, w1.size(0));
  return std::get<0>(acm_rows<Backend>(x, w1, b1, w2, bias, order, counts, activation, false, false));
}

}  // namespace fastkd
