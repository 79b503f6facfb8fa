// The passes of teacher_topk over a row: one sums the softmax and stores the maxima of groups of columns; the other
// reads again the few blocks that can contain one of the k largest.
//
// Memory: one read. If k groups have a maximum of at least T, at least k columns are at least T: T is a lower bound of
// the k-th largest. Of n columns in g groups only about g log(g / (g - k)) exceed it, in at most as many blocks.
#pragma once
#include "../math/logit_sum.h"
#include "common/row_slices.h"

namespace fastkd {

template <class Real>
struct Candidate {
  Real logit;
  int32_t column;
};

// The softmax's sum of 2^((z - origin) log2(e) / temperature).
struct SoftmaxSum {
  double origin, sum;
};

// A block stores the maximum of each residue class of its columns, modulo kClasses.
inline constexpr int64_t kClasses = 16;

// Returns the softmax's sum over a slice; writes the maxima of its blocks to tops, and those of their classes to
// classes.
template <class Real>
using TeacherTopkScan = SoftmaxSum (*)(const Row& row, int64_t vocab, int64_t slice, double temperature, Real* tops,
                                       Real* classes);
// Writes the block's columns whose logit is at least `least` to out, in order, and returns their number.
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

extern const TeacherTopkKernel<float> teacher_topk_float;
extern const TeacherTopkKernel<double> teacher_topk_double;

}  // namespace fastkd::FASTKD_ISA
