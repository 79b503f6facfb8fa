// The op _token_log_probs and its backward: checks and allocation for a backend.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "loss_op.h"
#include "row_problem.h"

namespace fastkd {

inline constexpr const char* kTokenLogProbs = "token_log_probs";

struct TokenLogProbsArguments {
  static constexpr const char* kName = kTokenLogProbs;

  Tensor logits, token_ids;
  std::optional<Tensor> mask;
  double temperature = 1;
  std::optional<Tensor> temperatures;
  int64_t shift = 0, vocab_size = -1;
  double logit_softcap = INFINITY;  // infinite: none
  bool entropy = false;             // whether the rows' entropies are wanted, too

  template <class Visitor>
  void fields(Visitor& v) {
    v("logits", logits), v("token_ids", token_ids), v("mask", mask), v("temperature", temperature);
    v("temperatures", temperatures), v("shift", shift), v("vocab_size", vocab_size);
    v("logit_softcap", logit_softcap), v("entropy", entropy);
  }

  RowOptions options() const {
    RowOptions out = plain_options(temperature, temperatures, token_ids, vocab_size);
    out.mask = mask;
    out.shift = shift;
    out.student_logit_softcap = logit_softcap;
    return out;
  }
};

// Rows that are not kept (RowProblem::kept: masked, ignored or without a token of their own) are not read.
struct TokenProblem : RowProblem {
  bool entropy;

  TokenProblem(const TokenLogProbsArguments& own, bool check_values)
      : RowProblem(kTokenLogProbs, own.logits, own.options(), check_values, {"logits", "token_ids"}),
        entropy(own.entropy) {}

  ScalarType result_type() const { return float64 ? ScalarType::Double : ScalarType::Float; }
};

// Results, one a row. numbers: for the backward, [3, rows] of the rows that were read: origin and log_sum of the
// normaliser (csrc/math/logit_sum.h), and the entropy where it is wanted. entropy: empty where it is not.
struct TokenOutput {
  Tensor log_probs, entropy, numbers;
};
inline constexpr int64_t kTokenNumbers = 3;

struct TokenLogProbs : TokenLogProbsArguments {
  static constexpr int kResults = 3;

  template <class Backend>
  std::tuple<Tensor, Tensor, Tensor> run() const {
    const TokenProblem problem(*this, Backend::kValuesChecked);
    const auto empty = [&](const std::vector<int64_t>& shape, ScalarType type) {
      return torch::stable::new_empty(logits, shape, type);
    };
    const std::vector<int64_t> shape = row_shape(logits);
    const ScalarType type = problem.result_type();
    TokenOutput out{empty(shape, type), empty(entropy ? shape : std::vector<int64_t>{0}, type),
                    empty({kTokenNumbers, problem.rows}, ScalarType::Double)};
    if (problem.rows > 0) Backend::solve(problem, out);
    return {out.log_probs, out.entropy, out.numbers};
  }
};

// The gradients of the results, and the numbers of the forward call.
struct TokenLogProbsBackward : TokenLogProbsArguments {
  Tensor numbers, log_probs_gradient, entropy_gradient;

  template <class Visitor>
  void fields(Visitor& v) {
    v("numbers", numbers), v("log_probs_gradient", log_probs_gradient), v("entropy_gradient", entropy_gradient);
    TokenLogProbsArguments::fields(v);
  }

  template <class Backend>
  void run(const Tensor& gradient) const {
    const TokenProblem problem(*this, Backend::kValuesChecked);
    check_gradient(problem, gradient);
    problem.check_stored(numbers, ScalarType::Double, kTokenNumbers * problem.rows, "numbers");
    problem.check_stored(log_probs_gradient, problem.result_type(), problem.rows, "log_probs_gradient");
    problem.check_stored(entropy_gradient, problem.result_type(), entropy ? problem.rows : 0, "entropy_gradient");
    if (problem.rows > 0) Backend::differentiate(problem, gradient, *this);
  }
};

}  // namespace fastkd
