// The teacher of one row: one tensor, or a composite of several that is made block by block and never stored.
#pragma once
#include "../math/online_softmax.h"
#include "simd.h"

namespace fastkd {

struct Teachers {
  const Row* rows;
  const double* weights;  // one each; ignored for a single teacher
  int count;
  bool mix_probs;  // else logits
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

template <class Real>
struct TeacherBlocks {
  const Teachers& teachers;
  Real scale;                         // log2(e) / teacher_temperature
  const MaxSum<double>* normalizers;  // of each teacher, for mix_probs

  // Logits, to be divided by the temperature; of mixed probabilities log2, to be taken as they are.
  const Real* load_block(int64_t begin, int64_t count, Real* buffer, Real* spare) const {
    if (teachers.count == 1) return load(teachers.rows[0], begin, count, buffer);
    return teachers.mix_probs ? mix_probs(begin, count, buffer, spare) : mix_logits(begin, count, buffer, spare);
  }

  void prefetch_block(int64_t begin, int64_t count) const {
    for (int k = 0; k < teachers.count; ++k) prefetch(teachers.rows[k], begin, count);
  }

  // max and sum of teacher k over [begin, begin + count)
  __attribute__((noinline)) MaxSum<double> normalizer(int k, int64_t begin, int64_t count) const {
    alignas(64) Real buffer[kBlock];
    const Real* z = load(teachers.rows[k], begin, count, buffer);
    const Real top = largest(z, count), zero = top == Real(-INFINITY) ? Real(0) : top, factor = scale;
    Real sum = 0;
    FASTKD_SIMD_REDUCE(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += exp2_of((z[i] - zero) * factor);
    return {double(top) * scale, sum};
  }

 private:
  // sum_k w_k z_k, and -inf wherever one of the z_k that count is -inf.
  __attribute__((noinline)) const Real* mix_logits(int64_t begin, int64_t count, Real* mixed, Real* spare) const {
    alignas(64) Real dead[kBlock];
    for (int64_t i = 0; i < count; ++i) mixed[i] = dead[i] = Real(0);
    for (int k = 0; k < teachers.count; ++k) {
      const Real weight = Real(teachers.weights[k]);
      if (weight == Real(0)) continue;
      const Real* z = load(teachers.rows[k], begin, count, spare);
      FASTKD_SIMD
      for (int64_t i = 0; i < count; ++i) {
        const bool gone = z[i] == Real(-INFINITY);
        mixed[i] += weight * (gone ? Real(0) : z[i]);
        dead[i] = gone ? Real(-INFINITY) : dead[i];
      }
    }
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) mixed[i] += dead[i];
    return mixed;
  }

  // log2 sum_k w_k softmax(z_k / teacher_temperature), relative to the largest member so that no tail underflows.
  __attribute__((noinline)) const Real* mix_probs(int64_t begin, int64_t count, Real* mixed, Real* spare) const {
    alignas(64) Real sum[kBlock];
    for (int64_t i = 0; i < count; ++i) {
      mixed[i] = Real(-INFINITY);
      sum[i] = Real(0);
    }
    for (int k = 0; k < teachers.count; ++k) {
      if (teachers.weights[k] == 0) continue;
      const Real shift = Real(::log2(teachers.weights[k]) - normalizers[k].log2());
      const Real* z = load(teachers.rows[k], begin, count, spare);
      FASTKD_SIMD
      for (int64_t i = 0; i < count; ++i) {
        const Real x = z[i] * scale + shift, top = at_least(mixed[i], x);
        const Real safe = top == Real(-INFINITY) ? Real(0) : top;
        sum[i] = sum[i] * exp2_of(mixed[i] - safe) + exp2_of(x - safe);
        mixed[i] = top;
      }
    }
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i)
      mixed[i] += log2_of(at_least(Real(1), sum[i])) + (sum[i] - sum[i]);  // NaN stays
    return mixed;
  }
};

}  // namespace fastkd::FASTKD_ISA
