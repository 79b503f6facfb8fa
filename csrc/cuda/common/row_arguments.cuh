// The arguments of a call with a student's and a teacher's rows, as kernels read them.
#pragma once
#include "../../math/adaptive_mix.h"
#include "../../math/row_plan.h"
#include "row_losses.cuh"
#include "teams.cuh"

namespace fastkd::cuda {

inline constexpr int kMaxTeachers = 16;
// Rows by their beta, as bits of a set.
enum BetaKind : int { kBetaInside = 1, kBetaZero = 2, kBetaOne = 4, kAnyBeta = 7 };

// The arguments of a call, the same for all rows. Without a teacher (teacher_count 0) sources read only the student's
// logits, and return them as the teacher's, too.
struct RowArguments : RowNumbers {
  int teacher_width;
  DeviceRows student, student_gradient, teacher_gradient;
  DeviceRows teachers[kMaxTeachers];
  int teacher_count;
  int64_t teacher_row_count = 0;  // with teacher_places
  bool mix_probs, constant_teacher = false, any_beta = false;
  double beta, teacher_temperature, alpha = 1;
  DeviceRows betas, alphas, teacher_temperatures, teacher_weights;
  double* distances = nullptr;  // one per row: the weights of two teachers depend on it, see adaptive_mix.h
  bool contrast = false;
  int beta_kinds = kAnyBeta;  // the launch computes rows with such a beta; other launches do the others

  // The teacher's row; any where there is none.
  __device__ __forceinline__ int64_t teacher_row(int64_t row) const {
    if (!teacher_places) return row;
    const int64_t place = teacher_places.integer(row);
    return uint64_t(place) < uint64_t(teacher_row_count) ? place : 0;
  }

  // Whether the launch computes this row.
  __device__ __forceinline__ bool takes(int64_t row) const {
    if (beta_kinds == kAnyBeta) return true;
    const double x = betas.number(row);
    return (beta_kinds & (x == 0 ? kBetaZero : x == 1 ? kBetaOne : kBetaInside)) != 0;
  }
  // NaN, as an invalid temperature is, where it is not in [0, 1]; see any_beta in RowProblem.
  __device__ double row_beta(int64_t row) const {
    const double x = betas ? betas.number(row) : beta;
    return any_beta || (x >= 0 && x <= 1) ? x : double(NAN);
  }
  __device__ double row_alpha(int64_t row) const { return alphas ? alphas.number(row) : alpha; }
  // The student's temperature, NaN also where beta is: the row is NaN then.
  __device__ double temperature_with(double row_beta, int64_t row) const {
    return row_temperature(row) + (row_beta - row_beta);
  }

  __device__ double row_teacher_temperature(int64_t row) const {
    return positive(teacher_temperatures ? teacher_temperatures.number(row) : teacher_temperature);
  }

  __device__ double given_teacher_weight(int64_t row, int k) const {
    return teacher_weights ? teacher_weights.number(row, k) : 1.0 / teacher_count;
  }
  __device__ AdaptiveMix adapted(int64_t row) const {
    return adaptive_mix(contrast, global_load(distances + row), given_teacher_weight(row, 0),
                        given_teacher_weight(row, 1));
  }
  __device__ double teacher_weight(int64_t row, int k) const {
    if (distances == nullptr) return given_teacher_weight(row, k);
    const AdaptiveMix mix = adapted(row);
    return k == 0 ? mix.first : mix.second;
  }

  // Whether all rows with the same weight, and a label or none, have the same task.
  __host__ __device__ bool alike() const {
    return !temperatures && !teacher_temperatures && !betas && !alphas && !label_weights && !teacher_weights &&
           !teacher_places && distances == nullptr;
  }

  // Fills in the task of a row with this scale and returns the label's column, or -1 if there is none.
  __device__ int read_task(int64_t row, double scale, RowTask& task) const {
    task.scale = scale;
    task.beta = row_beta(row);
    task.alpha = row_alpha(row);
    const double sum = task.beta + task.alpha;
    task.temperature = temperature_with(any_beta && !(sum >= 0) ? double(NAN) : sum, row);
    task.teacher_temperature = row_teacher_temperature(row);
    if (teacher_places && teacher_places.integer(row) >= teacher_row_count) task.temperature = NAN;
    task.divergence_scale = square_temperature ? task.temperature * task.temperature : 1;
    if (distances != nullptr) task.divergence_scale *= adapted(row).scale;
    const int label = read_label(row, task);
    task.mix_probs = mix_probs;
    task.teacher_weight = teacher_count == 1 && teacher_weights ? teacher_weights.number(row) : 1;
    if (constant_teacher) task.teacher_weight = 0;
    task.student_gradient = bool(student_gradient);
    task.teacher_gradient = bool(teacher_gradient);
    return label;
  }
};

// Writes zeros to columns [begin, end) of a gradient. Columns beyond the vocabulary belong to no token.
inline __device__ void zero_columns(const DeviceRows& gradient, int64_t row, int begin, int end, const Team& team) {
  if (!gradient) return;
  const int threads = team.threads * int(team.blocks);
  if (begin >= end) return;
  char* const first = gradient.at(row);
  for (int column = begin + int(team.rank) * team.threads + team.thread; column < end; column += threads) {
    gradient.put(first + column * gradient.column_stride * gradient.element_size, 0);
  }
}

inline __device__ void zero_beyond_vocab(const RowArguments& arguments, int64_t row, const Team& team) {
  zero_columns(arguments.student_gradient, row, arguments.vocab, arguments.student_width, team);
  zero_columns(arguments.teacher_gradient, row, arguments.vocab, arguments.teacher_width, team);
}

// A thread's packs in one pass over a source's row; kFirst: in the row's first pass.
//   pack              the present one
//   more(), more(end) whether there is one, or one below `end`
//   take()            its logits; once for each pack
//   advance()         to the next
template <bool kFirst, class Source>
class RowPass;

}  // namespace fastkd::cuda
