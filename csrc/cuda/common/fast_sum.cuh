// The sum of 2^((z - origin) scale) over a row's packs, relative to an origin near the largest logit so far.
#pragma once
#include "../../math/token_stats.h"
#include "vec.cuh"

namespace fastkd::cuda {

// How far above the origin a pack's logits may be, in base 2, to be added without a larger origin; and the largest
// shift whose rounding is not felt.
inline constexpr float kSlack = 8, kLargestShift = 4096;

// A normaliser such that a probability takes one multiply-add and one exponential: 2^(z scale - shift) unit, where unit
// is 2^-rest, near 1.
template <class Real>
struct NormalizerShift {
  Real shift, unit, rest;
  bool usable;  // the shift's rounding, up to half its last digit, is small
  NormalizerShift() = default;
  __device__ NormalizerShift(Real scale, Real origin, double lse) {
    const double exact = double(origin) * double(scale) + lse;
    shift = Real(exact);
    rest = Real(exact - double(shift));
    const double natural = double(rest) * kLn2;
    unit = Real(1 - natural + 0.5 * natural * natural);
    usable = magnitude(shift) < Real(kLargestShift);
  }
};

// A thread's share of the sum over a row of T, of the same sum at a second scale (0: not wanted), of the sum over
// marked columns and, if kWeighted, of the sum of 2^x x, x = (z - origin) scale.
//
// Packs whose logits are not far above the origin are added by add_fast, relative to a shift: the origin times the
// scale, rounded, so that an exponent takes one multiply-add. Other packs are added by add, which may raise the origin.
template <class T, bool kWeighted = false>
struct FastSum {
  float scale, second_scale;
  float origin = -INFINITY, sum = 0, second = 0, marked = 0, weighted = 0;

  __device__ __forceinline__ FastSum(float by, float second_by) : scale(by), second_scale(second_by) {}

  // Whether add_fast takes the pack.
  __device__ __forceinline__ bool takes(const uint4& pack) const { return range_.below(pack); }

  // Returns false for a pack that has to be added by add. marks: bit j says whether element j is marked.
  template <bool kMarks = false>
  __device__ __forceinline__ bool add_fast(const uint4& pack, unsigned marks = 0) {
    if (!takes(pack)) return false;
#pragma unroll
    for (int j = 0; j < Packed<T>::kSize; ++j) {
      const float x = fused(item_of<T>(pack, j), scale, -shift_), e = exp2_fast(x);
      fast_ += e;
      if constexpr (kWeighted) fast_weighted_ = fused(e, fmaxf(-float(kDead), x), fast_weighted_);
      if constexpr (kMarks) fast_marked_ += marks >> j & 1 ? e : 0;
    }
    if (second_scale != 0) {
#pragma unroll
      for (int j = 0; j < Packed<T>::kSize; ++j) second += exp2_fast((item_of<T>(pack, j) - origin) * second_scale);
    }
    return true;
  }

  template <int kSize>
  __device__ __forceinline__ void add(const float (&z)[kSize], unsigned marks = 0) {
    float top = z[0];
#pragma unroll
    for (int j = 1; j < kSize; ++j) top = z[j] > top ? z[j] : top;
    if (top > origin + kSlack / at_least(second_scale, scale)) raise(top);
    const float zero = origin == -INFINITY ? 0 : origin;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float x = (z[j] - zero) * scale, e = exp2_of(x);
      sum += e;
      if constexpr (kWeighted) weighted += e * fmaxf(-float(kDead), x);
      marked += marks >> j & 1 ? e : 0;
      if (second_scale != 0) second += exp2_of((z[j] - zero) * second_scale);
    }
  }

  // Converts the sums to a larger origin. To be called once after the row's last pack, too.
  __device__ __forceinline__ void raise(float to) {
    // The exponents of the fast sum lack the rounding of the shift.
    if (fast_ != 0) {
      const float lacking = fused(-origin, scale, shift_), factor = exp2_of(lacking);
      sum += fast_ * factor;
      if constexpr (kWeighted) weighted += fused(fast_, lacking, fast_weighted_) * factor;
      marked += fast_marked_ * factor;
    }
    fast_ = fast_marked_ = fast_weighted_ = 0;
    if (to != origin) {
      const float step = origin - to;  // -inf if there was no origin yet; the sums are 0 then
      if constexpr (kWeighted) weighted = carried(weighted, sum, step * scale, exp2_of(step * scale));
      sum *= exp2_of(step * scale);
      marked *= exp2_of(step * scale);
      second *= exp2_of(step * second_scale);
      origin = to;
    }
    shift_ = origin * scale;
    range_.clear();
    if (magnitude(shift_) < kLargestShift) range_.set(-INFINITY, origin + kSlack / at_least(second_scale, scale));
  }

 private:
  float fast_ = 0, fast_marked_ = 0, fast_weighted_ = 0, shift_ = 0;
  PackRange<T> range_;  // of the packs that add_fast takes; at first none
};

}  // namespace fastkd::cuda
