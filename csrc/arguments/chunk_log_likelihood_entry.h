// The op _chunk_log_likelihood and its backward: checks and allocation for a backend.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "loss_op.h"
#include "row_problem.h"

namespace fastkd {

inline constexpr const char* kChunkLogLikelihood = "chunk_log_likelihood";

struct ChunkLogLikelihoodArguments {
  static constexpr const char* kName = kChunkLogLikelihood;

  Tensor logits, token_ids, chunk_ids;
  int64_t num_chunks = 0;
  std::optional<Tensor> boundary;
  double temperature = 1;

  template <class Visitor>
  void fields(Visitor& v) {
    v("logits", logits), v("token_ids", token_ids), v("chunk_ids", chunk_ids), v("num_chunks", num_chunks);
    v("boundary", boundary), v("temperature", temperature);
  }
};

// Logits [..., T, vocab] that score token_ids [..., T]. chunk_ids [..., T] name a chunk in [0, chunks), or -1 for none.
struct ChunkProblem : RowProblem {
  int64_t length, batch = 1, chunks;
  Rows ids, chunk_ids;
  const Tensor *ids_tensor, *chunk_ids_tensor;
  const bool* boundary = nullptr;  // one per column

  ChunkProblem(const ChunkLogLikelihoodArguments& own, bool check_values)
      : RowProblem(kChunkLogLikelihood, own.logits, plain_options(own.temperature), check_values, {"logits"}),
        chunks(own.num_chunks),
        ids_tensor(&own.token_ids),
        chunk_ids_tensor(&own.chunk_ids) {
    const Tensor& logits = own.logits;
    const std::optional<Tensor>& boundary_set = own.boundary;
    FASTKD_CHECK_VALUE(leading >= 1, function, "logits must have at least two dimensions, [tokens, vocab], got shape ",
                       shape_of(logits));
    length = logits.size(leading - 1);
    for (int64_t i = 0; i + 1 < leading; ++i) batch *= logits.size(i);
    const auto is_integer = [](ScalarType x) { return x == ScalarType::Long || x == ScalarType::Int; };
    ids = per_row(own.token_ids, "token_ids", is_integer, "int64 or int32");
    chunk_ids = per_row(own.chunk_ids, "chunk_ids", is_integer, "int64 or int32");
    FASTKD_CHECK_VALUE(chunks >= 0 && chunks < INT32_MAX, function, "num_chunks must lie in [0, 2^31), got ", chunks);
    if (boundary_set) {
      FASTKD_CHECK_TYPE(boundary_set->scalar_type() == ScalarType::Bool, function, "boundary must be bool, got ",
                        torch::headeronly::toString(boundary_set->scalar_type()));
      check_device(*boundary_set, "boundary");
      FASTKD_CHECK_VALUE(boundary_set->dim() == 1 && boundary_set->size(0) == vocab && boundary_set->is_contiguous(),
                         function, "boundary must have one entry a column, shape [", vocab, "], got shape ",
                         shape_of(*boundary_set));
      boundary = static_cast<const bool*>(boundary_set->data_ptr());
    }
    if (values_checked) check_chunks();
  }

  int64_t chunk(int64_t row) const { return chunk_ids.integer(row); }
  bool scored(int64_t row) const { return chunk(row) >= 0; }
  // The chunk that ended just before this row, whose boundary probability comes from this row's logits; -1: none.
  int64_t ended_before(int64_t row) const {
    if (boundary == nullptr || row % length == 0) return -1;
    const int64_t before = chunk(row - 1);
    return before != chunk(row) ? before : -1;
  }

 private:
  void check_chunks() const {
    int64_t last = -1;  // the last chunk id in this text
    for (int64_t row = 0; row < rows; ++row) {
      if (row % length == 0) last = -1;
      const int64_t id = chunk(row);
      FASTKD_CHECK_INDEX(id >= -1 && id < chunks, function, "chunk_ids must lie in [-1, num_chunks = ", chunks,
                         "), got ", id, " in row ", row);
      if (id < 0) continue;
      const bool goes_on = row % length != 0 && chunk(row - 1) == id;
      FASTKD_CHECK_VALUE(goes_on || id > last, function,
                         "the tokens of a chunk must be neighbours, and chunks in order; chunk_ids has ", id,
                         " in row ", row, " after ", last);
      last = id;
      const int64_t token = ids.integer(row);
      FASTKD_CHECK_INDEX(token >= 0 && token < vocab, function, "token_ids must lie in [0, ", vocab, "), got ", token,
                         " in row ", row);
    }
  }
};

// Results. log_likelihood, boundary_log_prob: [..., chunks], in the precision of results. numbers: for the backward,
// [4, rows]: for each row that was read, origin and log_sum of its normaliser, and the same two of its boundary set.
struct ChunkOutput {
  Tensor log_likelihood, boundary_log_prob, token_count, numbers;
};

struct ChunkLogLikelihood : ChunkLogLikelihoodArguments {
  static constexpr int kResults = 4;

  template <class Backend>
  std::tuple<Tensor, Tensor, Tensor, Tensor> run() const {
    const ChunkProblem problem(*this, Backend::kValuesChecked);
    std::vector<int64_t> shape;
    for (int64_t i = 0; i + 2 < logits.dim(); ++i) shape.push_back(logits.size(i));
    shape.push_back(num_chunks);
    const ScalarType type = problem.float64 ? ScalarType::Double : ScalarType::Float;
    const auto filled = [&](const std::vector<int64_t>& size, ScalarType dtype) {
      return torch::stable::new_zeros(logits, size, dtype);
    };
    ChunkOutput out{filled(shape, type), boundary ? filled(shape, type) : filled({0}, type),
                    filled(shape, ScalarType::Long), filled({4, problem.rows}, ScalarType::Double)};
    Backend::solve(problem, out);
    return {out.log_likelihood, out.boundary_log_prob, out.token_count, out.numbers};
  }
};

struct ChunkLogLikelihoodBackward : ChunkLogLikelihoodArguments {
  Tensor numbers, likelihood_gradient;
  std::optional<Tensor> boundary_gradient;  // defined if and only if boundary is

  template <class Visitor>
  void fields(Visitor& v) {
    v("numbers", numbers), v("likelihood_gradient", likelihood_gradient), v("boundary_gradient", boundary_gradient);
    ChunkLogLikelihoodArguments::fields(v);
  }

  template <class Backend>
  void run(const Tensor& gradient) const {
    const ChunkProblem problem(*this, Backend::kValuesChecked);
    check_gradient(problem, gradient);
    const ScalarType type = problem.float64 ? ScalarType::Double : ScalarType::Float;
    problem.check_stored(numbers, ScalarType::Double, 4 * problem.rows, "numbers");
    problem.check_stored(likelihood_gradient, type, problem.batch * num_chunks, "likelihood_gradient");
    if (boundary) {
      FASTKD_CHECK_VALUE(boundary_gradient, kName, "boundary_gradient must come with boundary");
      problem.check_stored(*boundary_gradient, type, problem.batch * num_chunks, "boundary_gradient");
    }
    if (problem.rows > 0) {
      Backend::differentiate(problem, gradient, numbers, likelihood_gradient, boundary ? &*boundary_gradient : nullptr);
    }
  }
};

}  // namespace fastkd
