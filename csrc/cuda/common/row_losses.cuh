// The arguments of one row that all losses have in common, and the kernels run before and after the rows: counting the
// denominator where it depends on values on the device, and summing the losses.
#pragma once
#include <initializer_list>
#include <tuple>

#include "../../arguments/row_problem.h"
#include "launch.h"
#include "rows.cuh"

namespace fastkd::cuda {

// Tensors with one number per row; all of them are optional.
struct RowNumbers {
  int64_t rows;
  int vocab, student_width;
  DeviceRows temperatures, weight, mask, labels, label_weights, teacher_places;
  double temperature, label_weight;
  LogitFunction<float> student_map, teacher_map;
  bool square_temperature;
  int64_t ignore_index;
  int64_t shift, sequence;         // see RowOptions and RowProblem
  double gradient_factor;          // 1 / denominator
  const double* gradient_factors;  // or a pointer to it, where the rows are counted on the device
  double* losses;                  // weighted, one per row

  __device__ bool counts(int64_t row) const {
    if (shift != 0 && row % sequence + shift >= sequence) return false;
    const int64_t place = row + shift;
    return (!mask || mask.number(place) != 0) && (!labels || labels.integer(place) != ignore_index) &&
           (!teacher_places || teacher_places.integer(row) >= 0);
  }
  __device__ double row_weight(int64_t row) const { return !counts(row) ? 0 : weight ? weight.number(row + shift) : 1; }

  // The factor of the row's gradients. 0: the row is not read.
  __device__ double scale(int64_t row) const { return scale_of(row_weight(row)); }
  __device__ double scale_of(double weight) const {
    return weight * (gradient_factors != nullptr ? global_load(gradient_factors) : gradient_factor);
  }

  // Invalid values that the host could not check make a row NaN: a temperature that is not positive, a label out of
  // range, an infinite weight of a label.
  static __device__ double positive(double x) { return x > 0 && x < double(INFINITY) ? x : double(NAN); }
  __device__ double row_temperature(int64_t row) const {
    return positive(temperatures ? temperatures.number(row) : temperature);
  }
  // Whether rows count, and with which weight, is known without reading anything.
  __host__ __device__ bool count_all() const { return !mask && !labels && !weight && !teacher_places && shift == 0; }
  // The label's column, -1: none or out of range.
  __device__ int label_column(int64_t row) const {
    const int64_t label = labels ? labels.integer(row + shift) : -1;
    return label >= 0 && label < vocab ? int(label) : -1;
  }

  // Task: RowTask or a similar struct. Returns the label's column, or -1 if there is none.
  template <class Task>
  __device__ int read_label(int64_t row, Task& task) const {
    task.has_label = bool(labels);
    task.label_weight = label_weight;
    if (!labels) return -1;
    if (label_weights) {
      const double x = label_weights.number(row + shift);
      task.label_weight = x + (x - x);
    }
    const int64_t label = labels.integer(row + shift);
    if (label >= 0 && label < vocab) return int(label);
    task.label_weight = NAN;
    return 0;
  }
};

// The losses of a call. Constructed before the rows' kernel is launched; finish() is called after it.
class RowLosses {
 public:
  // gradients: those requested; null: not requested.
  RowLosses(const Device& device, const RowProblem& problem, std::initializer_list<const Tensor*> gradients);

  RowNumbers numbers{};

  // Returns the loss, and the factor that the gradients are still to be multiplied by (empty: none).
  std::tuple<Tensor, Tensor> finish() const;

 private:
  const Device& device_;
  const RowProblem& problem_;
  bool wait_, counted_;
  double factor_;  // where it is known without reading data from the device
  Tensor losses_;  // one per row, then the factor counted on the device
};

}  // namespace fastkd::cuda
