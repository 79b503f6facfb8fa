// The teacher of one row: a single tensor, or a mixture of several that is computed block by block and never stored.
#pragma once
#include "../../math/online_softmax.h"
#include "simd.h"

namespace fastkd {

// Where all logits of a block are below this, they are probably masked, and none of them is near the largest of the
// row.
inline constexpr double kMasked = -1000;

struct Teachers {
  const Row* rows;
  const double* weights;  // one per teacher; null: a single teacher, unweighted
  int count;
  bool mix_probs;  // true: the mixture is of probabilities; false: of logits
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

template <class Real>
struct TeacherBlocks {
  const Teachers& teachers;
  Real scale;                            // log2(e) / teacher_temperature
  const OriginSum<double>* normalizers;  // one per teacher; for a mixture of logits only the origin is used

  // Whether the teacher is one tensor whose logits are used unchanged.
  bool alone() const { return teachers.weights == nullptr || (teachers.count == 1 && teachers.weights[0] == 1); }

  // A block of the teacher's logits, to be divided by the temperature. For mixed probabilities: their log2, not to be
  // divided. Both are determined up to a constant.
  const Real* load_block(int64_t begin, int64_t count, Real* buffer, Real* spare) const {
    if (alone()) return load(teachers.rows[0], begin, count, buffer);
    return teachers.mix_probs ? mix_probs(begin, count, buffer, spare) : mix_logits(begin, count, buffer, spare);
  }

  void prefetch_block(int64_t begin, int64_t count) const {
    for (int k = 0; k < teachers.count; ++k) prefetch(teachers.rows[k], begin, count);
  }

  // The largest logit of teacher k in its first block that is not masked entirely; 0 if there is none.
  Real some_logit(int k, int64_t vocab) const {
    alignas(64) Real buffer[kBlock];
    Real top = Real(-INFINITY);
    for (int64_t begin = 0; begin < vocab && !(top > Real(kMasked)); begin += kBlock) {
      const int64_t count = vocab - begin < kBlock ? vocab - begin : kBlock;
      top = at_least(top, largest(load(teachers.rows[k], begin, count, buffer), count));
    }
    return top > Real(-INFINITY) ? top : Real(0);
  }

  // Origin and sum of teacher k over [begin, begin + count).
  __attribute__((noinline)) OriginSum<double> normalizer(int k, int64_t begin, int64_t count) const {
    alignas(64) Real buffer[kBlock];
    const Real* z = load(teachers.rows[k], begin, count, buffer);
    const Real top = largest(z, count), zero = top == Real(-INFINITY) ? Real(0) : top, factor = scale;
    Real sum = 0;
    FASTKD_SIMD_REDUCE(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += exp2_of((z[i] - zero) * factor);
    return {double(top), sum};
  }

 private:
  // sum_k w_k (z_k - origin_k), or -inf where z_k is impossible for a teacher with a weight other than 0.
  __attribute__((noinline)) const Real* mix_logits(int64_t begin, int64_t count, Real* mixed, Real* spare) const {
    if (teachers.count == 2 && teachers.weights[0] != 0 && teachers.weights[1] != 0) {
      return mix_two(begin, count, mixed, spare);
    }
    alignas(64) Real dead[kBlock];
    for (int64_t i = 0; i < count; ++i) mixed[i] = dead[i] = Real(0);
    for (int k = 0; k < teachers.count; ++k) {
      const Real weight = Real(teachers.weights[k]), origin = Real(normalizers[k].origin);
      if (weight == Real(0)) continue;
      const Real* z = load(teachers.rows[k], begin, count, spare);
      FASTKD_SIMD
      for (int64_t i = 0; i < count; ++i) {
        const Real x = z[i] - origin;
        const bool gone = x < Real(-kDead);
        mixed[i] += weight * (gone ? Real(0) : x);
        dead[i] = gone ? Real(-INFINITY) : dead[i];
      }
    }
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) mixed[i] += dead[i];
    return mixed;
  }

  const Real* mix_two(int64_t begin, int64_t count, Real* mixed, Real* spare) const {
    const Real* const first = load(teachers.rows[0], begin, count, mixed);
    const Real* const second = load(teachers.rows[1], begin, count, spare);
    const Real by_first = Real(teachers.weights[0]), by_second = Real(teachers.weights[1]), dead = Real(-kDead);
    const Real first_origin = Real(normalizers[0].origin), second_origin = Real(normalizers[1].origin);
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) {
      const Real x = first[i] - first_origin, y = second[i] - second_origin;
      const Real sum = by_first * (x < dead ? Real(0) : x) + by_second * (y < dead ? Real(0) : y);
      mixed[i] = sum + (at_most(x, y) < dead ? Real(-INFINITY) : Real(0));
    }
    return mixed;
  }

  // log2 of a teacher's weight divided by its sum of 2^x.
  double log2_share(int k) const { return ::log2(teachers.weights[k]) - normalizers[k].log2(); }

  // log2 sum_k w_k softmax(z_k / teacher_temperature). It is computed relative to the largest term, so that no small
  // probability underflows. The largest share is subtracted, which moves the values that matter near 0, where a float
  // is most accurate.
  __attribute__((noinline)) const Real* mix_probs(int64_t begin, int64_t count, Real* mixed, Real* spare) const {
    alignas(64) Real sum[kBlock];
    for (int64_t i = 0; i < count; ++i) {
      mixed[i] = Real(-INFINITY);
      sum[i] = Real(0);
    }
    double largest_share = -INFINITY;
    for (int k = 0; k < teachers.count; ++k) {
      if (teachers.weights[k] != 0) largest_share = at_least(largest_share, log2_share(k));
    }
    for (int k = 0; k < teachers.count; ++k) {
      if (teachers.weights[k] == 0) continue;
      const Real shift = Real(log2_share(k) - largest_share), origin = Real(normalizers[k].origin);
      const Real* z = load(teachers.rows[k], begin, count, spare);
      FASTKD_SIMD
      for (int64_t i = 0; i < count; ++i) {
        const Real x = (z[i] - origin) * scale + shift, before = mixed[i], apart = x - before;
        const Real smaller = exp2_of(x == before ? Real(0) : -magnitude(apart));
        sum[i] = apart > Real(0) ? sum[i] * smaller + Real(1) : sum[i] + smaller;
        mixed[i] = at_least(before, x);
      }
    }
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i)
      mixed[i] += log2_of(at_least(Real(1), sum[i])) + (sum[i] - sum[i]);  // keeps NaN
    return mixed;
  }
};

}  // namespace fastkd::FASTKD_ISA
