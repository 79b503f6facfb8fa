// The op _token_stats: checks and allocation. The backend computes the statistics.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../math/token_stats.h"
#include "row_problem.h"

namespace fastkd {

inline constexpr const char* kTokenStats = "token_stats";

// Where a row's numbers are written: number i of row r goes to [i rows + r].
struct StatsOutput {
  void* numbers;  // 4 of the student, 4 of the teacher, 3 of both together
  int64_t* argmax;
  int64_t rows;
  bool float64;
};
inline constexpr int64_t kSideNumbers = 4, kPairNumbers = 3;

struct TokenStats {
  static constexpr const char* kName = kTokenStats;
  static constexpr int kResults = 2;

  Tensor student_logits;
  std::optional<Tensor> teacher_logits, labels;
  double temperature = 1;
  std::optional<Tensor> temperatures;
  int64_t vocab_size = -1;

  template <class Visitor>
  void fields(Visitor& v) {
    v("student_logits", student_logits), v("teacher_logits", teacher_logits), v("labels", labels);
    v("temperature", temperature), v("temperatures", temperatures), v("vocab_size", vocab_size);
  }

  // Returns [11, ...] numbers (of the student, of the teacher, of both) and [2, ...] argmaxes, in the order of
  // TokenStats in Python; without a teacher [4, ...] and [1, ...].
  template <class Backend>
  std::tuple<Tensor, Tensor> run() const {
    RowProblem problem(kName, student_logits, plain_options(temperature, temperatures, labels, vocab_size),
                       Backend::kValuesChecked);
    if (teacher_logits) {
      problem.check_teacher(*teacher_logits);
      problem.float64 = problem.float64 || teacher_logits->scalar_type() == ScalarType::Double;
    }
    const int64_t sides = teacher_logits ? 2 : 1;
    std::vector<int64_t> shape = row_shape(student_logits);
    shape.insert(shape.begin(), sides * kSideNumbers + (teacher_logits ? kPairNumbers : 0));
    Tensor numbers =
        torch::stable::new_empty(student_logits, shape, problem.float64 ? ScalarType::Double : ScalarType::Float);
    shape[0] = sides;
    Tensor argmax = torch::stable::new_empty(student_logits, shape, ScalarType::Long);
    Backend::solve(problem, teacher_logits ? &*teacher_logits : nullptr,
                   {numbers.data_ptr(), static_cast<int64_t*>(argmax.data_ptr()), problem.rows, problem.float64});
    return {numbers, argmax};
  }
};

}  // namespace fastkd
