// The normaliser of a softmax over a set of logits z, accumulated piece by piece; pieces may be merged in any grouping:
//   sum of 2^((z - origin) scale),  scale = log2(e) / temperature.
// The origin is a logit near the largest and is stored beside the sum. It is subtracted from a logit before scaling, so
// that neither a constant added to all logits nor very large logits (a mask may set all of them to the smallest finite
// number) reduce the sum's accuracy.
#pragma once
#include "elementary.h"

namespace fastkd {

// Logits at least this far below the largest have probability 0, as those of -inf have: masks often write the smallest
// finite number instead of -inf.
inline constexpr double kImpossible = 1e25;

// A normaliser: its origin, and the natural logarithm of the sum relative to it.
struct LogNormalizer {
  double origin, log_sum;
};

// `log`, the logarithm of a set's share of a row, corrected: -inf where the set's origin lies too far from the row's,
// and at most 0, which rounding could exceed. `below` is the set's origin minus the row's, in logits.
FASTKD_INLINE double log_share(double below, double log) {
  if (log != log) return log;  // NaN: the row has no valid softmax
  return below < -kImpossible ? -INFINITY : log > 0 ? 0 : log;
}

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

// The factor that converts a sum relative to the origin `from` to one relative to `to`. A sum relative to -inf is
// empty.
FASTKD_INLINE double origin_factor(double from, double to, double scale) {
  return from == to ? 1.0 : ::exp2((from - to) * scale);
}

struct LogitSum {
  double origin, sum;

  static FASTKD_INLINE LogitSum empty() { return {-INFINITY, 0}; }
  static FASTKD_INLINE LogitSum of(double z) { return {z, z == -INFINITY ? 0.0 : 1.0}; }

  FASTKD_INLINE void merge(const LogitSum& other, double scale) {
    const double all = at_least(origin, other.origin);
    sum = sum * origin_factor(origin, all, scale) + other.sum * origin_factor(other.origin, all, scale);
    origin = all;
  }
  // NaN where no logit is finite, or where one is +inf or NaN.
  FASTKD_INLINE double nan_or_zero() const { return (origin - origin) + (sum - sum); }
};

}  // namespace fastkd::FASTKD_ISA
