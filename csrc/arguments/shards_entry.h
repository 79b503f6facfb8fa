// The ops on one process's columns of logits whose vocabulary is split across processes: declarations, checks,
// allocation. fastkd/_ops/shards.py calls them and merges their numbers.
//
//   _shard_statistics         one read: per row the origin and sums of one side's softmaxes, its token's logit
//   _shard_sums               one read of both sides, their normalisers known: sums of a divergence's terms
//   _shard_gradient           one read of both and one write: the gradient of one side
//   _shard_softmax_gradient   one read and one write: the gradient of numbers that depend on softmaxes of one side
//
// What a row needs is in a table, float64 [numbers, rows], so that no number is a constant of a compiled graph. `keep`
// 0: the row is not read. A token is a local column; one outside [0, vocab_size) is none.
#pragma once
#include <tuple>

#include "find_divergence.h"
#include "loss_op.h"
#include "row_problem.h"

namespace fastkd {

// The rows of each table.
enum StatisticsIn { kKeep, kTemperature, kSecondTemperature, kSoftcap, kStatisticsIn };
enum StatisticsOut {
  kOrigin,
  kSum,             // of e = exp((z - origin) / temperature)
  kWeighted,        // of e log2(e)
  kSecondSum,       // the same at the second temperature, over `columns` if there are any, relative to kSecondOrigin
  kSecondWeighted,  //
  kTokenLogit,      // -inf: the token is not in this shard
  kBestLogit,
  kBestColumn,
  kTotal,    // of z - origin
  kColumns,  // of the softmax
  kSecondOrigin,
  kStatisticsOut
};
enum PairIn {  // the first is kKeep
  kStudentTemperature = 1,
  kTeacherTemperature,
  kBeta,
  kAlpha,
  kStudentSoftcap,
  kTeacherSoftcap,
  kStudentOrigin,
  kStudentLog2Sum,
  kTeacherOrigin,
  kTeacherLog2Sum,
  kSumsIn,
  kValue = kSumsIn,  // of the row's divergence
  kSlopeSum,         // of r (csrc/math/shard_terms.h)
  kFactor,           // of the divergence
  kOwnFactor,        // of the side's softmax
  kTokenFactor,      // of the token
  kLabelFactor,      // of the student's softmax at temperature 1
  kLabelLog2Sum,
  kPairIn
};
enum SumsOut { kValueSum, kStudentSlopeSum, kTeacherSlopeSum, kSumsOut };
enum SoftmaxIn {  // the first four are StatisticsIn's
  kSoftmaxOrigin = kStatisticsIn,
  kSoftmaxSecondOrigin,
  kFirstLog2Sum,
  kSecondLog2Sum,
  kFirstConstant,  // q (constant + slope log2 q), of both softmaxes
  kFirstSlope,
  kSecondConstant,
  kSecondSlope,
  kSoftmaxTokenFactor,
  kEachColumn,
  kSoftmaxIn
};
// Bits of `wanted`.
enum StatisticsWanted { kWantEntropy = 1, kWantSecond = 2, kWantBest = 4, kWantTotal = 8 };

// The options of a call of which only the number of columns matters here.
inline RowOptions of_columns(int64_t vocab_size) {
  RowOptions options;
  options.vocab_size = vocab_size;
  return options;
}

// Rows of logits, and the table.
struct ShardProblem : RowProblem {
  const double* numbers;

  ShardProblem(const char* name, const Tensor& logits, const Tensor& table, int64_t count, int64_t vocab_size,
               bool values_checked)
      : RowProblem(name, logits, of_columns(vocab_size), values_checked, {"logits", "labels"}),
        numbers(static_cast<const double*>(table.data_ptr())) {
    check_stored(table, ScalarType::Double, count * rows, "numbers");
  }
  double at(int place, int64_t row) const { return numbers[place * rows + row]; }
  Row row_at(const Rows& of, int softcap, int64_t row) const {
    Row out = of.row(row);
    out.map = {at(softcap, row)};
    return out;
  }
  // One integer a row or, `each` of them.
  const int64_t* integers(const Tensor& x, int64_t each, const char* argument) const {
    check_stored(x, ScalarType::Long, each * rows, argument);
    return static_cast<const int64_t*>(x.data_ptr());
  }
};

// One side, its token, and columns that are left out.
struct ShardSide {
  Tensor logits, numbers, token_ids;
  std::optional<Tensor> columns;  // bool, [columns]: those of the second softmax
  std::optional<Tensor> holes;    // int64, [rows, holes]: columns that no softmax has
  int64_t vocab_size = -1;

  template <class Visitor>
  void fields(Visitor& v) {
    v("logits", logits), v("numbers", numbers), v("token_ids", token_ids), v("columns", columns);
    v("holes", holes), v("vocab_size", vocab_size);
  }
};

struct ShardSideProblem : ShardProblem {
  const int64_t* tokens;
  const bool* columns = nullptr;
  const int64_t* holes = nullptr;
  int64_t hole_count = 0;

  ShardSideProblem(const char* name, const ShardSide& own, int64_t count, bool values_checked)
      : ShardProblem(name, own.logits, own.numbers, count, own.vocab_size, values_checked),
        tokens(integers(own.token_ids, 1, "token_ids")) {
    if (own.columns) {
      check_stored(*own.columns, ScalarType::Bool, vocab, "columns");
      columns = static_cast<const bool*>(own.columns->data_ptr());
    }
    if (own.holes) {
      FASTKD_CHECK_VALUE(own.holes->dim() == 2 && own.holes->size(0) == rows, name, "holes must have shape [", rows,
                         ", holes], got shape ", shape_of(*own.holes));
      hole_count = own.holes->size(1);
      holes = integers(*own.holes, hole_count, "holes");
    }
  }
};

struct ShardStatistics : ShardSide {
  static constexpr const char* kName = "shard_statistics";
  static constexpr int kResults = 1;
  int64_t wanted = 0;

  template <class Visitor>
  void fields(Visitor& v) {
    ShardSide::fields(v), v("wanted", wanted);
  }

  template <class Backend>
  std::tuple<Tensor> run() const {
    const ShardSideProblem problem(kName, *this, kStatisticsIn, Backend::kValuesChecked);
    Tensor out = torch::stable::new_empty(logits, {kStatisticsOut, problem.rows}, ScalarType::Double);
    if (problem.rows > 0) Backend::statistics(problem, wanted, out);
    return {out};
  }
};

// The gradient by the logits. hole_gradients: float64, what is written to each hole.
struct ShardSoftmaxGradient : ShardSide {
  static constexpr const char* kName = "shard_softmax_gradient";
  std::optional<Tensor> hole_gradients;

  template <class Visitor>
  void fields(Visitor& v) {
    ShardSide::fields(v), v("hole_gradients", hole_gradients);
  }

  template <class Backend>
  void run(const Tensor& gradient) const {
    const ShardSideProblem problem(kName, *this, kSoftmaxIn, Backend::kValuesChecked);
    check_gradient(problem, gradient);
    FASTKD_CHECK_VALUE(bool(holes) == bool(hole_gradients), kName, "holes and hole_gradients must be given together");
    if (hole_gradients) {
      problem.check_stored(*hole_gradients, ScalarType::Double, problem.rows * problem.hole_count, "hole_gradients");
    }
    const double* const of_holes = hole_gradients ? static_cast<const double*>(hole_gradients->data_ptr()) : nullptr;
    if (problem.rows > 0) Backend::softmax_gradient(problem, of_holes, gradient);
  }
};

// A student and a teacher. token_ids: the labels, which no softmax has if the divergence is of the other tokens.
struct ShardPairFields {
  Tensor student_logits, teacher_logits, numbers, token_ids;
  Choice<DivergenceNames<portable::Divergences>> divergence;
  int64_t vocab_size = -1;

  template <class Visitor>
  void fields(Visitor& v) {
    v("student_logits", student_logits), v("teacher_logits", teacher_logits), v("numbers", numbers);
    v("token_ids", token_ids), v("divergence", divergence), v("vocab_size", vocab_size);
  }
};

struct ShardPairProblem : ShardProblem {
  const Tensor& teacher_tensor;
  Rows teacher;
  const int64_t* tokens;
  portable::DivergencePlaces divergence;
  bool constant_teacher;

  ShardPairProblem(const char* name, const ShardPairFields& own, int64_t count, bool values_checked)
      : ShardProblem(name, own.student_logits, own.numbers, count, own.vocab_size, values_checked),
        teacher_tensor(own.teacher_logits),
        teacher(teacher_rows(own.teacher_logits)),
        tokens(integers(own.token_ids, 1, "token_ids")),
        divergence(find_divergence<portable::Divergences>(own.divergence)),
        constant_teacher(DivergenceNames<portable::Divergences>::constant_teacher()[size_t(own.divergence.place)]) {
    float64 = float64 || own.teacher_logits.scalar_type() == ScalarType::Double;
  }
};

struct ShardSumsOp : ShardPairFields {
  static constexpr const char* kName = "shard_sums";
  static constexpr int kResults = 1;

  template <class Backend>
  std::tuple<Tensor> run() const {
    const ShardPairProblem problem(kName, *this, kSumsIn, Backend::kValuesChecked);
    Tensor out = torch::stable::new_empty(student_logits, {kSumsOut, problem.rows}, ScalarType::Double);
    if (problem.rows > 0) Backend::sums(problem, out);
    return {out};
  }
};

// The gradient of the side that of_teacher names.
struct ShardGradient : ShardPairFields {
  static constexpr const char* kName = "shard_gradient";
  bool of_teacher = false;

  template <class Visitor>
  void fields(Visitor& v) {
    ShardPairFields::fields(v), v("of_teacher", of_teacher);
  }
  const Tensor& differentiated() const { return of_teacher ? teacher_logits : student_logits; }

  template <class Backend>
  void run(const Tensor& gradient) const {
    const ShardPairProblem problem(kName, *this, kPairIn, Backend::kValuesChecked);
    const Tensor& like = differentiated();
    problem.check_device(gradient, "gradient");
    FASTKD_CHECK_VALUE(gradient.dim() == like.dim() && same_leading(gradient, like, like.dim()) &&
                           gradient.scalar_type() == like.scalar_type(),
                       kName, "gradient must be like the logits, shape ", shape_of(like), ", got shape ",
                       shape_of(gradient));
    if (problem.rows > 0) Backend::gradient(problem, of_teacher, gradient);
  }
};
inline const Tensor& differentiated(const ShardGradient& arguments) { return arguments.differentiated(); }
inline const Tensor& differentiated(const ShardSoftmaxGradient& arguments) { return arguments.logits; }

// _name(fields) -> Tensor and _name_into(Tensor(a!) gradient, fields) -> ()
template <class Arguments>
void define_shard_gradient(torch::stable::detail::StableLibrary& m) {
  const std::string name = Arguments::kName, fields = schema_fields<Arguments>();
  m.def(("_" + name + "(" + fields + ") -> Tensor").c_str());
  m.def(("_" + name + "_into(Tensor(a!) gradient, " + fields + ") -> ()").c_str());
}

template <class Arguments, class Backend, bool kInto>
void boxed_shard_gradient(StableIValue* stack, uint64_t, uint64_t) {
  StableIValue* next = stack;
  Tensor gradient;
  if constexpr (kInto) gradient = torch::stable::detail::to<Tensor>(*next++);
  Arguments arguments{};
  unbox(arguments, next);
  if constexpr (!kInto) gradient = gradient_like(differentiated(arguments));
  arguments.template run<Backend>(gradient);
  if constexpr (!kInto) stack[0] = torch::stable::detail::from<Tensor>(gradient);
}

template <class Arguments, class Backend>
void implement_shard_gradient(torch::stable::detail::StableLibrary& m) {
  const std::string name = Arguments::kName;
  m.impl(("_" + name).c_str(), &boxed_shard_gradient<Arguments, Backend, false>);
  m.impl(("_" + name + "_into").c_str(), &boxed_shard_gradient<Arguments, Backend, true>);
}

inline void define_shard_ops(torch::stable::detail::StableLibrary& m) {
  define_op<ShardStatistics>(m);
  define_op<ShardSumsOp>(m);
  define_shard_gradient<ShardGradient>(m);
  define_shard_gradient<ShardSoftmaxGradient>(m);
}

template <class Backend>
void implement_shard_ops(torch::stable::detail::StableLibrary& m) {
  implement_op<ShardStatistics, Backend>(m);
  implement_op<ShardSumsOp, Backend>(m);
  implement_shard_gradient<ShardGradient, Backend>(m);
  implement_shard_gradient<ShardSoftmaxGradient, Backend>(m);
}

}  // namespace fastkd
