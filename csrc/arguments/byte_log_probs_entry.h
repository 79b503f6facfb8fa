// The op _byte_log_probs and its backward: checks and allocation for a backend.
//
// A vocabulary is passed as ByteVocab lays it out. order: the ids, sorted so that for any prefix the ids of a column
// are contiguous. columns: each id's column for the empty prefix. segments [prefixes, columns, 2]: where in `order` the
// ids of a column begin and end. Rows whose prefix number is `whole` have the empty prefix, that is, all ids count.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "loss_op.h"
#include "row_problem.h"

namespace fastkd {

inline constexpr const char* kByteLogProbs = "byte_log_probs";
inline constexpr int64_t kMaxColumns = 1024;

struct ByteLogProbsArguments {
  static constexpr const char* kName = kByteLogProbs;

  Tensor logits, order, columns, segments;
  std::optional<Tensor> prefix;
  int64_t whole = 0;
  std::optional<Tensor> valid;

  template <class Visitor>
  void fields(Visitor& v) {
    v("logits", logits), v("order", order), v("columns", columns), v("segments", segments), v("prefix", prefix);
    v("whole", whole), v("valid", valid);
  }
};

struct ByteProblem : RowProblem {
  int64_t ids, columns, prefixes, whole;
  const int32_t* order;
  const int16_t* column_of;
  const int32_t* segments;
  Rows prefix, valid;  // prefix undefined: all rows have prefix 0; valid undefined: all ids count
  const Tensor *prefix_tensor = nullptr, *valid_tensor = nullptr;

  ByteProblem(const ByteLogProbsArguments& own, bool check_values)
      : RowProblem(kByteLogProbs, own.logits, plain_options(1), check_values, {"logits"}), whole(own.whole) {
    const Tensor &logits = own.logits, &order_tensor = own.order, &column_tensor = own.columns;
    const Tensor& segment_tensor = own.segments;
    const std::optional<Tensor>&prefix_of_row = own.prefix, &valid_ids = own.valid;
    check_table(order_tensor, ScalarType::Int, 1, "order");
    check_table(column_tensor, ScalarType::Short, 1, "columns");
    check_table(segment_tensor, ScalarType::Int, 3, "segments");
    ids = order_tensor.size(0);
    prefixes = segment_tensor.size(0);
    columns = segment_tensor.size(1);
    FASTKD_CHECK_VALUE(ids <= vocab, function, "vocab has ", ids, " ids, logits has only ", vocab, " columns");
    FASTKD_CHECK_VALUE(column_tensor.size(0) == ids && segment_tensor.size(2) == 2 && columns >= 257, function,
                       "segments must have shape [prefixes, 257 or more, 2], got ", shape_of(segment_tensor));
    FASTKD_CHECK_VALUE(columns <= kMaxColumns, function, "vocab may have at most ", kMaxColumns - 257,
                       " classes of special ids, got ", columns - 257);
    order = static_cast<const int32_t*>(order_tensor.data_ptr());
    column_of = static_cast<const int16_t*>(column_tensor.data_ptr());
    segments = static_cast<const int32_t*>(segment_tensor.data_ptr());
    prefix = per_row(
        prefix_of_row, "prefix", [](ScalarType x) { return x == ScalarType::Long || x == ScalarType::Int; },
        "int64 or int32");
    if (prefix) prefix_tensor = &*prefix_of_row;
    FASTKD_CHECK_VALUE(prefix || prefixes == 1 || rows == 0, function, "prefix must say which of ", prefixes,
                       " prefixes each row has");
    if (valid_ids) {
      FASTKD_CHECK_TYPE(valid_ids->scalar_type() == ScalarType::Bool, function, "valid must be bool, got ",
                        torch::headeronly::toString(valid_ids->scalar_type()));
      check_device(*valid_ids, "valid");
      FASTKD_CHECK_VALUE(valid_ids->dim() == logits.dim() && same_leading(*valid_ids, logits, logits.dim()), function,
                         "valid must have logits' shape ", shape_of(logits), ", got shape ", shape_of(*valid_ids));
      valid = Rows(*valid_ids, leading);
      valid_tensor = &*valid_ids;
    }
    if (values_checked) check_tables();
  }

  // How many numbers of a row the forward stores for the backward: for each column and for all together, the logarithm
  // of the sum of e^(logit - origin), and the origin, a logit near the row's largest.
  int64_t sums_per_row() const { return columns + 2; }
  int64_t prefix_of(int64_t row) const { return prefix ? prefix.integer(row) : 0; }

 private:
  void check_table(const Tensor& x, ScalarType type, int64_t dimensions, const char* argument) const {
    check_device(x, argument);
    FASTKD_CHECK_VALUE(x.scalar_type() == type && x.dim() == dimensions && x.is_contiguous(), function, argument,
                       " must be a contiguous table of a ByteVocab, got shape ", shape_of(x));
  }

  void check_tables() const {
    int32_t least = 0, most = -1;
    for (int64_t i = 0; i < ids; ++i) {
      least = order[i] < least ? order[i] : least;
      most = order[i] > most ? order[i] : most;
    }
    int16_t first = 0, last = -1;
    for (int64_t i = 0; i < ids; ++i) {
      first = column_of[i] < first ? column_of[i] : first;
      last = column_of[i] > last ? column_of[i] : last;
    }
    bool inside = least >= 0 && most < ids && first >= 0 && last < columns;
    for (int64_t i = 0; i < 2 * columns * prefixes; i += 2)
      inside = inside && segments[i] >= 0 && segments[i] <= segments[i + 1] && segments[i + 1] <= ids;
    for (int64_t row = 0; prefix && row < rows; ++row) {
      const int64_t index = prefix.integer(row);
      inside = inside && index >= 0 && index < prefixes;
    }
    FASTKD_CHECK_INDEX(inside, function, "order, columns, segments and prefix must come from one ByteVocab");
  }
};

struct ByteLogProbs : ByteLogProbsArguments {
  static constexpr int kResults = 2;

  // Returns [..., columns] log-probabilities, and [rows, sums_per_row()] numbers for the backward.
  template <class Backend>
  std::tuple<Tensor, Tensor> run() const {
    const ByteProblem problem(*this, Backend::kValuesChecked);
    std::vector<int64_t> shape = row_shape(logits);
    shape.push_back(problem.columns);
    const ScalarType type = problem.float64 ? ScalarType::Double : ScalarType::Float;
    Tensor out = torch::stable::new_empty(logits, shape, type);
    Tensor sums = torch::stable::new_empty(logits, {problem.rows, problem.sums_per_row()}, ScalarType::Double);
    if (problem.rows > 0) Backend::solve(problem, out, sums);
    return {out, sums};
  }
};

struct ByteLogProbsBackward : ByteLogProbsArguments {
  Tensor sums, grad_output;

  template <class Visitor>
  void fields(Visitor& v) {
    v("sums", sums), v("grad_output", grad_output);
    ByteLogProbsArguments::fields(v);
  }

  template <class Backend>
  void run(const Tensor& gradient) const {
    const ByteProblem problem(*this, Backend::kValuesChecked);
    check_gradient(problem, gradient);
    const ScalarType type = problem.float64 ? ScalarType::Double : ScalarType::Float;
    problem.check_stored(sums, ScalarType::Double, problem.rows * problem.sums_per_row(), "sums");
    problem.check_stored(grad_output, type, problem.rows * problem.columns, "grad_output");
    if (problem.rows > 0) Backend::differentiate(problem, gradient, sums, grad_output);
  }
};

}  // namespace fastkd
