// topk_divergence on the CPU: runs the row kernel over the rows of the tensors, and loops over a row's support.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>

#include "../arguments/topk_divergence_entry.h"
#include "common/row_losses.h"
#include "isa.h"

namespace fastkd {
namespace {

using namespace portable;

struct Entry {
  int64_t column, place;  // place: index among the k as given
  double z, l;            // the student's logit, the stored log-probability
  double g, h;            // the slopes of its term
};

double rounding_of(ScalarType type) {
  return rounding_of_bits(type == ScalarType::BFloat16 ? 7 : type == ScalarType::Half ? 10 : 23);
}

// A row's support, in ascending order of columns.
struct Support {
  std::vector<Entry> entries;
  std::vector<int64_t> columns;

  // Reads the row's support. Returns false if it is not valid; explain() then gives the reason.
  bool read(const TopkProblem& problem, int64_t row) {
    entries.clear();
    columns.clear();
    double mass = 0;
    for (int64_t j = 0; j < problem.k; ++j) {
      const int64_t column = problem.indices.integer(row, j);
      if (column == -1) continue;
      const double l = problem.log_probs.number(row, j);
      if (column < 0 || column >= problem.vocab || l > kLargestLogProb) return false;
      mass += std::exp(l);
      entries.push_back({column, j, 0, l, 0, 0});
    }
    if (mass > kMostMass) return false;
    std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.column < b.column; });
    if (!drop_padding()) return false;
    for (const Entry& entry : entries) columns.push_back(entry.column);
    return true;
  }

  // Of a column that occurs several times, removes the entries that are padding. Returns whether at most one is left.
  bool drop_padding() {
    const auto same = [](const Entry& a, const Entry& b) { return a.column == b.column; };
    if (std::adjacent_find(entries.begin(), entries.end(), same) == entries.end()) return true;
    std::vector<Entry> left;
    for (size_t begin = 0, end; begin < entries.size(); begin = end) {
      for (end = begin + 1; end < entries.size() && same(entries[begin], entries[end]);) ++end;
      const size_t before = left.size();
      for (size_t i = begin; i < end; ++i)
        if (end == begin + 1 || !(entries[i].l <= kPaddingLogProb)) left.push_back(entries[i]);
      if (left.size() > before + 1) return false;
    }
    entries = left;
    return true;
  }

  [[noreturn]] static void explain(const TopkProblem& problem, int64_t row) {
    double mass = 0;
    std::vector<int64_t> seen;
    for (int64_t j = 0; j < problem.k; ++j) {
      const int64_t column = problem.indices.integer(row, j);
      if (column == -1) continue;
      FASTKD_CHECK_INDEX(column >= 0 && column < problem.vocab, kTopkDivergence, "teacher_indices must lie in [0, ",
                         problem.vocab, ") or be -1, got ", column, " in row ", row);
      const double l = problem.log_probs.number(row, j);
      FASTKD_CHECK_VALUE(!(l > kLargestLogProb), kTopkDivergence,
                         "teacher_log_probs must be log-probabilities, 0 at most, got ", l, " in row ", row);
      FASTKD_CHECK_VALUE(l <= kPaddingLogProb || std::find(seen.begin(), seen.end(), column) == seen.end(),
                         kTopkDivergence, "teacher_indices must be distinct in a row, got ", column, " twice in row ",
                         row, "; use -1 to pad a short row");
      if (!(l <= kPaddingLogProb)) seen.push_back(column);
      mass += std::exp(l);
    }
    fail("ValueError", kTopkDivergence, "teacher_log_probs must have a mass of at most 1 in a row, got ", mass,
         " in row ", row);
  }
};

struct Cpu {
  static constexpr bool kValuesChecked = true;

  static std::tuple<Tensor, Tensor> solve(const TopkProblem& problem, const Tensor* student_gradient,
                                          const Tensor* teacher_gradient) {
    const TopkKernel& kernel = kernels().topk_divergence.at(problem.float64);
    const Rows gradients = gradient_rows(student_gradient, problem);
    const Rows teacher_gradients = teacher_gradient ? Rows(*teacher_gradient, problem.leading) : Rows();
    std::atomic<int64_t> first_bad{problem.rows};

    const auto skip_row = [&](int64_t index) {
      if (gradients) fill_zero(gradients.row(index), 0, problem.student_width);
      if (teacher_gradients) fill_zero(teacher_gradients.row(index), 0, problem.k);
    };
    const auto solve_row = [&](int64_t index, double scale, const SliceRunner& runner, char* scratch) -> double {
      thread_local Support support;
      if (!support.read(problem, index)) {
        int64_t seen = first_bad.load();
        while (index < seen && !first_bad.compare_exchange_weak(seen, index)) {
        }
        return 0;
      }
      TopkRow row{};
      row.vocab = problem.vocab;
      row.student = problem.student.row(index);
      row.gradient = gradient_row(gradients, index, row.student);
      row.support = support.columns.data();
      row.count = int64_t(support.columns.size());
      row.temperature = problem.temperature(index);
      row.scratch = scratch;
      TopkTask task = problem.task(index, scale);
      task.rounding = rounding_of(problem.log_probs_tensor.scalar_type());
      task.has_label = task.has_label && task.label_weight != 0;
      row.label = task.has_label ? problem.label(index) : -1;
      return run(problem, kernel, row, runner, support, task, teacher_gradients ? teacher_gradients.row(index) : Row());
    };
    const int64_t scratch = topk_divergence_scratch(problem.vocab, problem.float64 ? sizeof(double) : sizeof(float));
    auto out = solve_rows(problem, {student_gradient, teacher_gradient}, scratch, solve_row, skip_row);
    if (first_bad < problem.rows) Support::explain(problem, first_bad);
    return out;
  }

  static double run(const TopkProblem& problem, const TopkKernel& kernel, const TopkRow& row, const SliceRunner& runner,
                    Support& support, const TopkTask& task, const Row& teacher_gradient) {
    // In the kernel's precision, so that mapped logits are rounded as those of the passes over the row are.
    const auto logit = [&](int64_t column) {
      double value;
      float single;
      return problem.float64 ? *load(row.student, column, 1, &value) : double(*load(row.student, column, 1, &single));
    };
    TopkPlan plan{};
    plan.task = task;
    SupportSums sums = SupportSums::empty();
    for (Entry& entry : support.entries) {
      entry.z = logit(entry.column);
      plan.add(sums, plan.measure(entry.z, entry.l));
    }
    const double label_z = row.label >= 0 ? logit(row.label) : 0;
    const RestSums rest = kernel.sum_rest(row, runner, task.has_label && row.temperature != 1);
    plan.begin(sums, {rest}, double(row.vocab));

    with_unnormalized_divergence(task.divergence, task.beta, [&](const auto& divergence) {
      UnnormalizedSums all{};
      for (Entry& entry : support.entries) {
        const auto t = plan.floored_terms(divergence, plan.log_q(entry.z), plan.log_p(entry.l));
        all.add({t.value, t.excess, t.g, t.h});
        entry.g = t.g;
        entry.h = t.h;
      }
      const bool others = task.tail == Tail::kUniform && row.count < row.vocab;
      plan.finish(divergence, all, others ? kernel.uniform_terms(row, runner, plan) : UnnormalizedSums{});
    });

    if (row.gradient) {
      kernel.write_rest(row, runner, plan);
      for (const Entry& entry : support.entries) {
        const double value = plan.student_gradient(entry.z, entry.g, entry.column == row.label);
        put_element(row.gradient, entry.column, value);
      }
      fill_zero(row.gradient, row.vocab, problem.student_width);
    }
    if (teacher_gradient) {
      fill_zero(teacher_gradient, 0, problem.k);
      for (const Entry& entry : support.entries)
        put_element(teacher_gradient, entry.place, plan.teacher_gradient(entry.l, entry.h));
    }
    return plan.loss(label_z);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { implement_loss<TopkDivergence, Cpu>(m); }

}  // namespace fastkd
