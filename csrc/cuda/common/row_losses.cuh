// What every loss over rows asks of each row, and what comes before and after the rows: the denominator where only the
// device can count it, and the sum of the losses.
#pragma once
#include <initializer_list>
#include <tuple>

#include "../../arguments/row_problem.h"
#include "launch.h"
#include "rows.cuh"

namespace fastkd::cuda {

// Per-row numbers are optional.
struct RowNumbers {
  int64_t rows;
  int vocab, student_width;
  DeviceRows temperatures, weight, mask, labels;
  double temperature, label_weight;
  bool square_temperature;
  int64_t ignore_index;
  int64_t shift, sequence;         // see RowOptions and RowProblem
  double gradient_factor;          // 1 / denominator,
  const double* gradient_factors;  // or where it stands once the rows are counted
  double* losses;                  // weighted, one a row

  __device__ bool counts(int64_t row) const {
    if (shift != 0 && row % sequence + shift >= sequence) return false;
    const int64_t place = row + shift;
    return (!mask || mask.number(place) != 0) && (!labels || labels.integer(place) != ignore_index);
  }
  __device__ double row_weight(int64_t row) const { return !counts(row) ? 0 : weight ? weight.number(row + shift) : 1; }

  // Of the row's gradients; 0: the row is not read.
  __device__ double scale(int64_t row) const {
    return row_weight(row) * (gradient_factors != nullptr ? global_load(gradient_factors) : gradient_factor);
  }

  // Numbers that no check could see make a row NaN: a temperature that is not positive, a label outside.
  static __device__ double positive(double x) { return x > 0 && x < double(INFINITY) ? x : double(NAN); }
  __device__ double row_temperature(int64_t row) const {
    return positive(temperatures ? temperatures.number(row) : temperature);
  }
  // Task: RowTask and its like. -> the label's column, -1 for none.
  template <class Task>
  __device__ int read_label(int64_t row, Task& task) const {
    task.has_label = bool(labels);
    task.label_weight = label_weight;
    if (!labels) return -1;
    const int64_t label = labels.integer(row + shift);
    if (label >= 0 && label < vocab) return int(label);
    task.label_weight = NAN;
    return 0;
  }
};

// The losses of a call: begun before the rows are launched, finished after.
class RowLosses {
 public:
  // gradients: those asked for, or null.
  RowLosses(const Device& device, const RowProblem& problem, std::initializer_list<const Tensor*> gradients);

  RowNumbers numbers{};

  // -> the loss, and what is left to multiply the gradients by (empty: nothing).
  std::tuple<Tensor, Tensor> finish() const;

 private:
  const Device& device_;
  const RowProblem& problem_;
  bool wait_, counted_;
  double factor_;  // where it is known without asking the device
  Tensor losses_;  // one a row, and the counted factor
};

}  // namespace fastkd::cuda
