// The sums of a softmax over one block of a row.
#pragma once
#include "../../math/token_stats.h"
#include "simd.h"

namespace fastkd::FASTKD_ISA {

// Sums of e = 2^x, x = (z - zero) scale, and, if kWeighted, of e x. kKeep: each e is stored in `kept`.
template <bool kWeighted, bool kKeep = false, class Real>
FASTKD_INLINE SideSums softmax_block(const Real* z, int64_t count, Real zero, Real scale, Real* kept = nullptr) {
  Real sum = 0, weighted = 0;
  FASTKD_SIMD_REDUCE(+ : sum, weighted)
  for (int64_t i = 0; i < count; ++i) {
    const Real x = (z[i] - zero) * scale, e = exp2_of(x);
    sum += e;
    if (kKeep) kept[i] = e;
    if (kWeighted) weighted += x > Real(-kDead) ? e * x : Real(0);
  }
  return {double(sum), double(weighted)};
}

// Sets `best` to the first column with the largest logit, if the block has a larger one than `best`.
template <class Real>
void seek(const Real* u, Real top, int64_t begin, int64_t count, Best<Real>& best) {
  if (!(top > best.logit)) return;
  for (int64_t i = 0; i < count; ++i) {
    if (u[i] == top) {
      best = {top, begin + i};
      return;
    }
  }
}

}  // namespace fastkd::FASTKD_ISA
