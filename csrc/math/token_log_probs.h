// The log-probability of a row's token under q = softmax(z / temperature), the entropy H of q, and their gradients:
//   log q_token   (1[v = token] - q_v) / temperature
//   H             -q_v (log q_v + H) / temperature
#pragma once
#include "logit_sum.h"
#include "token_stats.h"

namespace fastkd {

// entropy: 0 where it is not wanted. A row without a valid softmax has NaN in all but the origin.
struct TokenNumbers {
  LogNormalizer normalizer;
  double log_prob, entropy;
};

// The gradient of entry v is q_v (constant + slope log2 q_v); the token's is `token` larger.
struct TokenFactors {
  double constant, slope, token;
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

// The sums of a part of a row, relative to its origin.
struct TokenSums {
  double origin;
  SideSums sums;

  FASTKD_INLINE void merge(const TokenSums& other, double scale) {
    SideSums next = other.sums;
    const double to = at_least(origin, other.origin);
    sums.raise(step_between(origin, to) * scale);
    next.raise(step_between(other.origin, to) * scale);
    sums.add(next);
    origin = to;
  }
};

// all: of the whole row; `weighted` is 0 where the entropy is not wanted. logit: the token's.
FASTKD_INLINE TokenNumbers token_numbers(double temperature, const TokenSums& all, bool entropy, double logit) {
  const SideSums& sums = all.sums;
  const double log_sum = ::log(sums.sum) + (all.origin - all.origin);  // NaN: no logit is finite, or one is +inf
  const double below = logit - all.origin;
  TokenNumbers out{{all.origin, log_sum}, log_share(below, below / temperature - log_sum), 0};
  if (entropy) out.entropy = at_least(0.0, log_sum - sums.weighted / sums.sum * kLn2) + (log_sum - log_sum);
  return out;
}

// From what flows into both results.
FASTKD_INLINE TokenFactors token_factors(double temperature, double entropy, double into_log_prob,
                                         double into_entropy) {
  const double per_logit = 1 / temperature, rest = into_entropy == 0 ? 0 : into_entropy * entropy;
  return {-(into_log_prob + rest) * per_logit, -into_entropy * kLn2 * per_logit, into_log_prob * per_logit};
}

}  // namespace fastkd::FASTKD_ISA
