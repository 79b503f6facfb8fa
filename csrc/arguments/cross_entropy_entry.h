// The op _cross_entropy: checks and allocation. The backend computes the result.
#pragma once
#include <tuple>

#include "../math/cross_entropy.h"
#include "loss_op.h"
#include "row_problem.h"

namespace fastkd {

inline constexpr const char* kCrossEntropy = "cross_entropy";

struct CrossEntropyArguments {
  static constexpr const char *kName = kCrossEntropy, *kLogits = "logits";

  Tensor logits;
  double label_smoothing = 0, entropy_weight = 0, entropy_temperature = 1, z_loss_weight = 0;
  std::optional<Tensor> entropy_mask;
  bool entropy_correct = false;  // the entropy's term only where the label is the likeliest token
  RowOptions rows;

  template <class Visitor>
  void fields(Visitor& v) {
    v("logits", logits), v("label_smoothing", label_smoothing), v("entropy_weight", entropy_weight);
    v("entropy_temperature", entropy_temperature), v("z_loss_weight", z_loss_weight);
    v("entropy_mask", entropy_mask), v("entropy_correct", entropy_correct);
    rows.fields(v);
  }
};

struct CrossEntropyProblem : RowProblem {
  const CrossEntropyArguments& own;
  Rows entropy_mask;

  CrossEntropyProblem(const CrossEntropyArguments& arguments, bool check_values)
      : RowProblem(kCrossEntropy, arguments.logits, arguments.rows, check_values, {"logits", "labels"}),
        own(arguments) {
    FASTKD_CHECK_TYPE(bool(own.rows.labels), function, "labels must be a tensor, got None");
    FASTKD_CHECK_VALUE(own.label_smoothing >= 0 && own.label_smoothing <= 1, function,
                       "label_smoothing must lie in [0, 1], got ", own.label_smoothing);
    check_positive(own.entropy_temperature, Rows(), "entropy_temperature");
    FASTKD_CHECK_VALUE(std::isfinite(own.entropy_weight), function, "entropy_weight must be finite, got ",
                       own.entropy_weight);
    FASTKD_CHECK_VALUE(std::isfinite(own.z_loss_weight), function, "z_loss_weight must be finite, got ",
                       own.z_loss_weight);
    entropy_mask =
        per_row(own.entropy_mask, "entropy_mask", [](ScalarType x) { return x == ScalarType::Bool; }, "bool");
  }

  // Whether the row gets the entropy's term; as a weight of that term.
  bool entropy(int64_t row) const { return !entropy_mask || entropy_mask.number(row + options.shift) != 0; }
};

struct CrossEntropy : CrossEntropyArguments {
  static constexpr int kGradients = 1;

  const Tensor& differentiable(int) const { return logits; }
  void check_gradients(int64_t) const {}

  template <class Backend>
  std::tuple<Tensor, Tensor> solve(const std::array<const Tensor*, kGradients>& gradients) const {
    return Backend::solve(CrossEntropyProblem(*this, Backend::kValuesChecked), gradients[0]);
  }
};

}  // namespace fastkd
