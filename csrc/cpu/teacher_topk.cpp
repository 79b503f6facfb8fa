// teacher_topk on the CPU: runs the kernels over the rows of the tensors and selects among the candidates.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "../arguments/teacher_topk_entry.h"
#include "common/parallel.h"
#include "isa.h"

namespace fastkd {
namespace {

template <class Real>
bool before(const Candidate<Real>& a, const Candidate<Real>& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.column < b.column);
}

// The results of the scan over a row.
template <class Real>
struct Scan {
  SoftmaxSum* sums;  // one per slice
  Real* tops;        // one per block
  Real* classes;     // kClasses per block
  int64_t slices, blocks;

  static int64_t blocks_of(int64_t vocab) { return (vocab + kBlock - 1) / kBlock; }
  static int64_t bytes(int64_t vocab) {
    return aligned(slices_of(vocab) * sizeof(SoftmaxSum)) + 2 * aligned(blocks_of(vocab) * sizeof(Real)) +
           aligned(blocks_of(vocab) * kClasses * sizeof(Real));
  }
  Scan(char* memory, int64_t vocab)
      : sums(reinterpret_cast<SoftmaxSum*>(memory)),
        tops(reinterpret_cast<Real*>(memory + aligned(slices_of(vocab) * sizeof(SoftmaxSum)))),
        classes(tops + 2 * aligned(blocks_of(vocab) * sizeof(Real)) / sizeof(Real)),
        slices(slices_of(vocab)),
        blocks(blocks_of(vocab)) {}

  portable::LogitSum sum(double temperature) const {
    portable::LogitSum all = portable::LogitSum::empty();
    for (int64_t slice = 0; slice < slices; ++slice)
      all.merge({sums[slice].origin, sums[slice].sum}, portable::kLog2E / temperature);
    return all;
  }

  // A lower bound of the k-th largest logit. It is computed from as few groups as suffice, which is faster.
  Real bound(int64_t k) {
    const auto kth = [&](Real* maxima, int64_t count) {
      std::nth_element(maxima, maxima + (k - 1), maxima + count, std::greater<Real>());
      return maxima[k - 1];
    };
    if (2 * k <= blocks) {
      Real* const copy = tops + (classes - tops) / 2;
      std::copy(tops, tops + blocks, copy);
      return kth(copy, blocks);
    }
    return 2 * k <= blocks * kClasses ? kth(classes, blocks * kClasses) : Real(-INFINITY);
  }
};

template <class Real>
void select_row(const Row& row, int64_t vocab, int64_t k, double temperature, TeacherTopkKernel<Real> kernel,
                const SliceRunner& runner, char* memory, float* log_probs, int32_t* columns) {
  Scan<Real> scan(memory, vocab);
  portable::RowSlices{vocab, runner, nullptr}.for_slices(
      [&](int64_t slice) { scan.sums[slice] = kernel.scan(row, vocab, slice, temperature, scan.tops, scan.classes); });
  const portable::LogitSum sum = scan.sum(temperature);
  if (sum.nan_or_zero() != 0) {  // NaN, or no finite logit: the row has no order
    for (int64_t i = 0; i < k; ++i) {
      log_probs[i] = NAN;
      columns[i] = int32_t(i);
    }
    return;
  }
  const Real least = scan.bound(k);
  thread_local std::vector<Candidate<Real>> best;
  best.clear();
  for (int64_t block = 0; block < scan.blocks; ++block) {
    if (!(scan.tops[block] >= least)) continue;
    Candidate<Real> found[kBlock];
    best.insert(best.end(), found, found + kernel.collect(row, vocab, block, least, found));
  }
  std::nth_element(best.begin(), best.begin() + (k - 1), best.end(), before<Real>);
  std::sort(best.begin(), best.begin() + k, before<Real>);
  const double log_sum = std::log(sum.sum);
  for (int64_t i = 0; i < k; ++i) {
    const double step = double(best[i].logit) - sum.origin;
    log_probs[i] = step < -kImpossible ? -INFINITY : float(step / temperature - log_sum);
    columns[i] = best[i].column;
  }
}

struct Cpu {
  static constexpr bool kValuesChecked = true;

  static void solve(const RowProblem& problem, int64_t k, float* log_probs, int32_t* columns) {
    const auto solve_as = [&](auto real, const auto kernel) {
      using Real = decltype(real);
      const int64_t bytes = Scan<Real>::bytes(problem.vocab);
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

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { implement_op<TeacherTopk, Cpu>(m); }

}  // namespace fastkd
