// The passes of teacher_topk over a row: one sums the softmax and keeps the maxima of groups of columns, one looks
// again at the few blocks that can hold one of the k largest.
//
// Memory: one read. Where k groups have a maximum of at least T, so have k columns: T bounds the k-th largest from
// below, and of n columns in g groups only some g log(g / (g - k)) exceed it, in no more blocks than that.
#pragma once
#include "../math/logit_sum.h"
#include "common/row_slices.h"

namespace fastkd {

template <class Real>
struct Candidate {
  Real logit;
  int32_t column;
};

// Of 2^((z - origin) log2(e) / temperature).
struct SoftmaxSum {
  double origin, sum;
};

// A block's maxima: of the columns of each residue class.
inline constexpr int64_t kClasses = 16;

// -> the softmax's sum over a slice; the maxima of its blocks to tops, and those of their classes to classes.
template <class Real>
using TeacherTopkScan = SoftmaxSum (*)(const Row& row, int64_t vocab, int64_t slice, double temperature, Real* tops,
                                       Real* classes);
// The block's columns with at least that logit, to out, in order -> how many.
template <class Real>
using TeacherTopkCollect = int64_t (*)(const Row& row, int64_t vocab, int64_t block, Real least, Candidate<Real>* out);

template <class Real>
struct TeacherTopkKernel {
  TeacherTopkScan<Real> scan;
  TeacherTopkCollect<Real> collect;
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

template <class Real>
FASTKD_INLINE Real class_maxima(const Real* u, int64_t count, Real* classes) {
  alignas(64) Real top[kClasses];
  for (int64_t j = 0; j < kClasses; ++j) top[j] = Real(-INFINITY);
  int64_t i = 0;
  for (; i + kClasses <= count; i += kClasses) {
    FASTKD_SIMD
    for (int64_t j = 0; j < kClasses; ++j) top[j] = u[i + j] > top[j] ? u[i + j] : top[j];
  }
  for (int64_t j = 0; i + j < count; ++j) top[j] = u[i + j] > top[j] ? u[i + j] : top[j];
  for (int64_t j = 0; j < kClasses; ++j) classes[j] = top[j];
  return largest(top, kClasses);
}

template <class Real>
SoftmaxSum scan_slice(const Row& row, int64_t vocab, int64_t slice, double temperature, Real* tops, Real* classes) {
  static const SliceRunner none{};
  const Real scale = Real(kLog2E / temperature);
  Origin<Real> origin;
  double all = 0;
  RowSlices{vocab, none, nullptr}.for_blocks(slice, [&](int64_t begin, int64_t count) {
    alignas(64) Real buffer[kBlock];
    const int64_t block = begin / kBlock;
    prefetch_next(row, begin, vocab);
    const Real* u = load(row, begin, count, buffer);
    tops[block] = class_maxima(u, count, classes + block * kClasses);
    if (const double step = origin.raise_to(tops[block], scale)) all *= ::exp2(-step * scale);
    const Real zero = origin.zero();
    Real sum = 0;
    FASTKD_SIMD_REDUCE(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += exp2_of((u[i] - zero) * scale);
    all += sum;
  });
  return {double(origin.logit), all};
}

template <class Real>
int64_t collect_block(const Row& row, int64_t vocab, int64_t block, Real least, Candidate<Real>* out) {
  alignas(64) Real buffer[kBlock];
  const int64_t begin = block * kBlock, count = vocab - begin < kBlock ? vocab - begin : kBlock;
  const Real* u = load(row, begin, count, buffer);
  int64_t found = 0;
  for (int64_t group = 0; group < count; group += kClasses) {
    const int64_t size = count - group < kClasses ? count - group : kClasses;
    int hits = 0;
    FASTKD_SIMD_REDUCE(+ : hits)
    for (int64_t j = 0; j < size; ++j) hits += u[group + j] >= least ? 1 : 0;
    for (int64_t j = 0; hits > 0; ++j) {
      if (!(u[group + j] >= least)) continue;
      out[found++] = {u[group + j], int32_t(begin + group + j)};
      --hits;
    }
  }
  return found;
}

}  // namespace fastkd::FASTKD_ISA
