// The normaliser of a softmax over a set of logits z, built piece by piece and merged in any association:
//   sum of 2^((z - origin) scale),  scale = log2(e) / temperature,
// with its origin, a logit near the largest, kept apart. A logit is taken relative to the origin before it is scaled,
// so that neither a constant that all of them carry nor their size (the smallest finite number, where a mask put it
// everywhere) costs the sum a digit.
#pragma once
#include "elementary.h"

namespace fastkd {

// Logits that lie this far below the largest are probability 0, as are those of -inf: the smallest finite number, which
// masks put there, is one of them.
inline constexpr double kImpossible = 1e25;

// A normaliser as an origin and the natural logarithm of the sum relative to it.
struct LogNormalizer {
  double origin, log_sum;
};

// The logarithm of a probability that is `log` relative to an origin `below` which its own is so many logits: not above
// 0, where rounding would take it.
FASTKD_INLINE double log_share(double below, double log) {
  if (log != log) return log;  // of a row that is no distribution
  return below < -kImpossible ? -INFINITY : log > 0 ? 0 : log;
}

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

// The factor that carries a sum relative to the origin `from` over to `to`. There is nothing relative to -inf.
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
  // NaN where no logit is finite, or one is +inf or NaN.
  FASTKD_INLINE double nan_or_zero() const { return (origin - origin) + (sum - sum); }
};

}  // namespace fastkd::FASTKD_ISA
