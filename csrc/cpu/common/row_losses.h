// The loss over all rows: which rows are read, the factors of their gradients, and the reduction.
#pragma once
#include <initializer_list>
#include <tuple>
#include <vector>

#include "../../arguments/allocate.h"
#include "../../arguments/row_problem.h"
#include "parallel.h"

namespace fastkd {

inline void put(Tensor& tensor, int64_t index, double value) {
  if (tensor.scalar_type() == ScalarType::Double) {
    static_cast<double*>(tensor.data_ptr())[index] = value;
  } else {
    static_cast<float*>(tensor.data_ptr())[index] = float(value);
  }
}

inline double number(const Tensor& tensor, int64_t index) {
  return tensor.scalar_type() == ScalarType::Double ? static_cast<const double*>(tensor.data_ptr())[index]
                                                    : static_cast<const float*>(tensor.data_ptr())[index];
}

// The gradient as rows to write. They are streamed where `gradient` is large and shares no memory with data still to be
// read.
inline Rows gradient_rows(const Tensor* gradient, const RowProblem& problem) {
  if (gradient == nullptr) return Rows();
  Rows rows(*gradient, problem.leading);
  const bool large = gradient->numel() * element_size(gradient->scalar_type()) >= kStreamedBytes;
  if (large && gradient->data_ptr() != problem.student_tensor.data_ptr()) rows.stream();
  return rows;
}

// The row to write the gradient of `logits` to; empty if it is not requested.
inline Row gradient_row(const Rows& gradients, int64_t index, const Row& logits) {
  if (!gradients) return Row();
  Row row = gradients.row(index);
  if (logits.map) row.logits = &logits;
  return row;
}

// Returns the loss, and the factor that the gradients are still to be multiplied by (empty: none). solve_row(row,
// scale, slice runner, scratch) returns the row's loss before its weight, and writes its gradients times scale.
// skip_row(row) writes zero gradients, for a row that is not read, so that a NaN in that row has no effect.
template <class SolveRow, class SkipRow>
std::tuple<Tensor, Tensor> solve_rows(const RowProblem& problem, std::initializer_list<const Tensor*> gradients,
                                      int64_t scratch_bytes, const SolveRow& solve_row, const SkipRow& skip_row) {
  const bool reduced = problem.options.reduced() != Reduction::kNone, wait = gradient_waits(problem, gradients);
  const double factor = reduced ? problem.factor() : 1;
  const double gradient_factor = wait && factor != 0 ? 1 : factor;

  std::vector<double> losses(problem.rows);
  for_rows(problem.rows, problem.vocab, scratch_bytes, [&](int64_t row, const SliceRunner& runner, char* scratch) {
    const double weight = problem.row_weight(row);
    if (weight == 0 || gradient_factor == 0) {
      skip_row(row);
    } else {
      losses[row] = weight * solve_row(row, weight * gradient_factor, runner, scratch);
    }
  });

  const ScalarType type = problem.float64 ? ScalarType::Double : ScalarType::Float;
  const Tensor& student = problem.student_tensor;
  Tensor loss = torch::stable::new_empty(student, loss_shape(problem), type);
  if (reduced) {
    double sum = 0;
    for (double row : losses) sum += row;
    put(loss, 0, factor == 0 ? 0 : sum * factor);
  } else {
    for (int64_t row = 0; row < problem.rows; ++row) put(loss, row, losses[row]);
  }
  Tensor pending = wait ? torch::stable::new_empty(student, std::vector<int64_t>{}, ScalarType::Float)
                        : torch::stable::new_empty(student, {0}, ScalarType::Float);
  if (wait) put(pending, 0, factor);
  return {loss, pending};
}

}  // namespace fastkd
