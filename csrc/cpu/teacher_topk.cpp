// teacher_topk on the CPU: from tensors to rows, and the selection's bookkeeping.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../tensor/teacher_topk_entry.h"
#include "isa.h"
#include "parallel.h"

namespace fastkd {
namespace {

template <class Real>
bool before(const Candidate<Real>& a, const Candidate<Real>& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.column < b.column);
}

template <class Real>
void cut(Selection<Real>& s) {
  if (s.count < s.k) return;
  std::nth_element(s.items, s.items + s.k - 1, s.items + s.count, before<Real>);
  s.count = s.k;
  s.threshold = s.items[s.k - 1].logit;
  s.full = true;
}

template <class Real>
struct Scratch {
  SoftmaxSum* sums;
  Selection<Real>* selections;
  Candidate<Real>* items;
  static int64_t capacity(int64_t k) { return 2 * k + 64; }
  static int64_t bytes(int64_t slices, int64_t k) {
    return aligned(slices * sizeof(SoftmaxSum)) + aligned(slices * sizeof(Selection<Real>)) +
           slices * capacity(k) * int64_t(sizeof(Candidate<Real>));
  }
  Scratch(char* memory, int64_t slices)
      : sums(reinterpret_cast<SoftmaxSum*>(memory)),
        selections(reinterpret_cast<Selection<Real>*>(memory + aligned(slices * sizeof(SoftmaxSum)))),
        items(reinterpret_cast<Candidate<Real>*>(memory + aligned(slices * sizeof(SoftmaxSum)) +
                                                 aligned(slices * sizeof(Selection<Real>)))) {}
};

template <class Real>
void select_row(const Row& row, int64_t vocab, int64_t k, double temperature, TeacherTopkKernel<Real> kernel,
                const SliceRunner& runner, char* memory, float* log_probs, int32_t* columns) {
  const int64_t slices = slices_of(vocab);
  Scratch<Real> scratch(memory, slices);
  const int64_t capacity = Scratch<Real>::capacity(k);
  // One thread goes on with one selection; several have one a slice.
  const bool apart = &runner != &one_thread();
  for (int64_t i = 0; i < (apart ? slices : 1); ++i)
    scratch.selections[i] = {scratch.items + i * capacity, 0, capacity, k, Real(-INFINITY), false, cut<Real>};
  const portable::RowSlices all{vocab, runner, nullptr};
  all.for_slices([&](int64_t slice) {
    scratch.sums[slice] = kernel(row, vocab, slice, temperature, scratch.selections[apart ? slice : 0]);
  });

  std::vector<Candidate<Real>> best;
  portable::MaxSum<double> sum = portable::MaxSum<double>::empty();
  for (int64_t slice = 0; slice < slices; ++slice) sum.merge({scratch.sums[slice].max, scratch.sums[slice].sum});
  for (int64_t i = 0; i < (apart ? slices : 1); ++i)
    best.insert(best.end(), scratch.selections[i].items, scratch.selections[i].items + scratch.selections[i].count);
  const double lse = sum.log2();
  if (lse != lse) {  // NaN, or no finite logit: no order means anything
    for (int64_t i = 0; i < k; ++i) {
      log_probs[i] = NAN;
      columns[i] = int32_t(i);
    }
    return;
  }
  std::nth_element(best.begin(), best.begin() + (k - 1), best.end(), before<Real>);
  std::sort(best.begin(), best.begin() + k, before<Real>);
  for (int64_t i = 0; i < k; ++i) {
    log_probs[i] = float((double(best[i].logit) * (portable::kLog2E / temperature) - lse) * portable::kLn2);
    columns[i] = best[i].column;
  }
}

struct Cpu {
  static constexpr bool kValuesChecked = true;

  static void solve(const RowProblem& problem, int64_t k, float* log_probs, int32_t* columns) {
    const auto solve_as = [&](auto real, const auto kernel) {
      using Real = decltype(real);
      const int64_t bytes = Scratch<Real>::bytes(slices_of(problem.vocab), k);
      for_rows(problem.rows, problem.vocab, bytes, [&](int64_t row, const SliceRunner& runner, char* memory) {
        select_row<Real>(problem.student.row(row), problem.vocab, k, problem.temperature(row), kernel, runner, memory,
                         log_probs + row * k, columns + row * k);
      });
    };
    if (problem.float64) {
      solve_as(double(), kernels().teacher_topk_double);
    } else {
      solve_as(float(), kernels().teacher_topk_float);
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("_teacher_topk", TORCH_BOX(&teacher_topk<Cpu>)); }

}  // namespace fastkd
