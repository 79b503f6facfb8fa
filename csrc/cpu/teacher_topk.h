// The pass of teacher_topk over a slice of a row: it sums the softmax and picks what may be among the k largest.
//
// Memory: one read. Of n values in random order some k log(n / k) exceed the k-th largest so far. Those are collected,
// and when the list is full it is cut back to the k best.
#pragma once
#include "../math/online_softmax.h"
#include "row_slices.h"

namespace fastkd {

template <class Real>
struct Candidate {
  Real logit;
  int32_t column;
};

// The k largest so far among `count`; a later column never replaces an equal one.
template <class Real>
struct Selection {
  Candidate<Real>* items;
  int64_t count, capacity, k;
  Real threshold;           // the k-th largest as of the last cut
  bool full;                // there was one
  void (*cut)(Selection&);  // back to the k best
};

struct SoftmaxSum {
  double max, sum;  // base 2
};

template <class Real>
using TeacherTopkKernel = SoftmaxSum (*)(const Row& row, int64_t vocab, int64_t slice, double temperature,
                                         Selection<Real>& selection);

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

template <class Real>
FASTKD_INLINE void offer(Selection<Real>& selection, Real logit, int64_t column) {
  if (selection.count == selection.capacity) selection.cut(selection);
  selection.items[selection.count++] = {logit, int32_t(column)};
}

// The largest of each residue class of columns: no more than a look at these tells which columns to look at.
inline constexpr int64_t kClasses = 64;

template <class Real>
FASTKD_INLINE Real class_maxima(const Real* u, int64_t count, Real* classes) {
  if (count == kBlock) {
    FASTKD_SIMD
    for (int64_t j = 0; j < kClasses; ++j) {
      Real top = u[j];
#pragma GCC unroll 8
      for (int64_t i = kClasses; i < kBlock; i += kClasses) top = u[i + j] > top ? u[i + j] : top;
      classes[j] = top;
    }
  } else {
    for (int64_t j = 0; j < kClasses; ++j) {
      classes[j] = Real(-INFINITY);
      for (int64_t i = j; i < count; i += kClasses) classes[j] = u[i] > classes[j] ? u[i] : classes[j];
    }
  }
  return largest(classes, kClasses);
}

// The threshold of the block's beginning serves the whole block, whose columns do not come in order: none of it may be
// taken for an equal one's successor.
template <class Real>
void select_block(const Real* u, int64_t begin, int64_t first, int64_t count, const Real* classes,
                  Selection<Real>& selection) {
  const Real least = selection.threshold;
  constexpr int64_t kGroup = 16;
  for (int64_t group = 0; group < kClasses; group += kGroup) {
    int hits = 0;
    FASTKD_SIMD_REDUCE(+ : hits)
    for (int64_t j = 0; j < kGroup; ++j) hits += classes[group + j] > least ? 1 : 0;
    for (int64_t j = group; hits > 0; ++j) {
      if (!(classes[j] > least)) continue;
      --hits;
      for (int64_t i = j; i < count; i += kClasses) {
        if (u[i] > least && i >= first) offer(selection, u[i], begin + i);
      }
    }
  }
}

template <class Real>
SoftmaxSum scan_slice(const Row& row, int64_t vocab, int64_t slice, double temperature, Selection<Real>& selection) {
  static const SliceRunner none{};
  const double to_base_2 = kLog2E / temperature;
  const Real scale = Real(to_base_2);
  Origin<Real> origin;
  double all = 0;
  RowSlices{vocab, none, nullptr}.for_blocks(slice, [&](int64_t begin, int64_t count) {
    alignas(64) Real buffer[kBlock], classes[kClasses];
    const int64_t ahead = begin + kBlock;
    if (ahead < vocab) prefetch(row, ahead, vocab - ahead < kBlock ? vocab - ahead : kBlock);
    const Real* u = load(row, begin, count, buffer);
    const Real top = class_maxima(u, count, classes);
    if (const double step = origin.follow(top, scale)) all *= ::exp2(-step * scale);
    const Real zero = origin.zero();
    Real sum = 0;
    FASTKD_SIMD_REDUCE(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += exp2_of((u[i] - zero) * scale);
    all += sum;
    int64_t first = 0;
    // The first k count whatever they are.
    for (; first < count && selection.count < selection.k && !selection.full; ++first)
      offer(selection, u[first], begin + first);
    if (selection.count >= selection.k && !selection.full) selection.cut(selection);
    if (top > selection.threshold) select_block(u, begin, first, count, classes, selection);
  });
  return {double(origin.logit) * to_base_2, all};
}

}  // namespace fastkd::FASTKD_ISA
