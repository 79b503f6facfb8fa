// The ops of products of bfloat16 matrices whose sums are float32: checks. The backend computes them.
//
//   _bfloat16_logits           out = scale hidden weight^T + bias
//   _bfloat16_hidden_gradient  out = scale gradient weight
//   _bfloat16_weight_gradient  total = scale gradient^T hidden, added to what it holds if `add`
//
// hidden [rows, features] and weight [columns, features] are bfloat16; out of the logits and gradient [rows, columns]
// are float32 or bfloat16, of which float32 gradients are rounded as csrc/cpu/bfloat16_products.h says; out of the
// hidden states' gradient is bfloat16 or float32; bias and total are float32. The last dimension of each is contiguous.
#pragma once
#include <optional>

#include "rows.h"

namespace fastkd {

struct Bfloat16Call {
  const Tensor &out, &left, &right;
  float scale;
  const Tensor* bias = nullptr;
  bool add = false;
};

struct Bfloat16Matrix {
  const Tensor& tensor;
  const char* name;
  int64_t rows, columns;
  enum { kLow, kWide, kEither } dtype;
};

inline void check_bfloat16(const char* op, const Bfloat16Matrix& x) {
  const ScalarType type = x.tensor.scalar_type();
  const bool low = type == ScalarType::BFloat16, wide = type == ScalarType::Float;
  FASTKD_CHECK_TYPE((low && x.dtype != Bfloat16Matrix::kWide) || (wide && x.dtype != Bfloat16Matrix::kLow), op, x.name,
                    " must be ",
                    x.dtype == Bfloat16Matrix::kLow    ? "bfloat16"
                    : x.dtype == Bfloat16Matrix::kWide ? "float32"
                                                       : "bfloat16 or float32",
                    ", got ", torch::headeronly::toString(type));
  FASTKD_CHECK_VALUE(x.tensor.dim() == 2 && x.tensor.size(0) == x.rows && x.tensor.size(1) == x.columns, op, x.name,
                     " must have shape [", x.rows, ", ", x.columns, "], got ", shape_of(x.tensor));
  FASTKD_CHECK_VALUE(x.tensor.is_cpu() && (x.columns <= 1 || x.tensor.stride(1) == 1), op, x.name,
                     " must be on the CPU, with contiguous rows");
}

inline void check_matrix(const char* op, const char* name, const Tensor& x) {
  FASTKD_CHECK_VALUE(x.dim() == 2, op, name, " must be a matrix, got shape ", shape_of(x));
}

template <class Backend>
void bfloat16_logits(const Tensor& out, const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                     double scale) {
  const char* const op = "_bfloat16_logits: ";
  check_matrix(op, "hidden", hidden);
  check_matrix(op, "weight", weight);
  const int64_t rows = hidden.size(0), features = hidden.size(1), columns = weight.size(0);
  check_bfloat16(op, {hidden, "hidden", rows, features, Bfloat16Matrix::kLow});
  check_bfloat16(op, {weight, "weight", columns, features, Bfloat16Matrix::kLow});
  check_bfloat16(op, {out, "out", rows, columns, Bfloat16Matrix::kEither});
  if (bias) {
    FASTKD_CHECK_VALUE(bias->scalar_type() == ScalarType::Float && bias->dim() == 1 && bias->size(0) == columns &&
                           bias->is_contiguous() && bias->is_cpu(),
                       op, "bias must be float32, contiguous, on the CPU and of shape [", columns, "], got ",
                       torch::headeronly::toString(bias->scalar_type()), " of shape ", shape_of(*bias));
  }
  Backend::logits({out, hidden, weight, float(scale), bias ? &*bias : nullptr});
}

template <class Backend>
void bfloat16_hidden_gradient(const Tensor& out, const Tensor& gradient, const Tensor& weight, double scale) {
  const char* const op = "_bfloat16_hidden_gradient: ";
  check_matrix(op, "gradient", gradient);
  check_matrix(op, "weight", weight);
  const int64_t rows = gradient.size(0), columns = gradient.size(1), features = weight.size(1);
  check_bfloat16(op, {gradient, "gradient", rows, columns, Bfloat16Matrix::kEither});
  check_bfloat16(op, {weight, "weight", columns, features, Bfloat16Matrix::kLow});
  check_bfloat16(op, {out, "out", rows, features, Bfloat16Matrix::kEither});
  Backend::hidden_gradient({out, gradient, weight, float(scale)});
}

template <class Backend>
void bfloat16_weight_gradient(const Tensor& total, const Tensor& gradient, const Tensor& hidden, double scale,
                              bool add) {
  const char* const op = "_bfloat16_weight_gradient: ";
  check_matrix(op, "gradient", gradient);
  check_matrix(op, "hidden", hidden);
  const int64_t rows = gradient.size(0), columns = gradient.size(1), features = hidden.size(1);
  check_bfloat16(op, {gradient, "gradient", rows, columns, Bfloat16Matrix::kEither});
  check_bfloat16(op, {hidden, "hidden", rows, features, Bfloat16Matrix::kLow});
  check_bfloat16(op, {total, "total", columns, features, Bfloat16Matrix::kWide});
  Backend::weight_gradient({total, gradient, hidden, float(scale), nullptr, add});
}

}  // namespace fastkd
