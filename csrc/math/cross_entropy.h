// The loss of a row from its label alone, and its gradient. With q = softmax(z / temperature), a = softmax(z /
// entropy_temperature), lse the log-sum-exp of z / temperature, s the label smoothing and V columns:
//   (1 - s) (-log q_label) + s (-sum_v log q_v / V) + entropy_weight H(a) + z_loss_weight lse^2
// The gradient of entry v is
//   (q_v (1 + 2 z_loss_weight lse) - s / V - (1 - s) 1[v = label]) / temperature
//     - entropy_weight a_v (log a_v + H) / entropy_temperature
#pragma once
#include "token_log_probs.h"

namespace fastkd {

// scale: of the gradient. smoothed: whether `rest` is summed.
struct CrossEntropyTask {
  double temperature, entropy_temperature, label_smoothing, entropy_weight, z_loss_weight, scale;
  int64_t vocab;
  bool apart;  // the entropy has sums of its own: it may have another temperature
};

// What the gradient is computed from. With q_v = 2^((z_v - origin) scale - shift), and a_v likewise, entry v gets
// q_v (constant + slope log2 q_v) + a_v (other_constant + other_slope log2 a_v) - uniform, and the label -label too.
// Without an entropy of its own temperature the numbers of a are 0.
struct CrossEntropyPlan {
  double loss, origin, shift, other_shift, constant, slope, other_constant, other_slope, uniform, label;
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

// The sums of a part of a row: at the temperature, at the entropy's if that is another, and of z - reference. The
// reference is the label's logit, or 0 where that is infinite.
struct CrossEntropySums {
  double origin;
  SideSums own, other;
  double rest;

  FASTKD_INLINE void merge(const CrossEntropySums& more, double scale, double other_scale) {
    TokenSums mine{origin, own}, theirs{origin, other};
    mine.merge({more.origin, more.own}, scale);
    theirs.merge({more.origin, more.other}, other_scale);
    origin = mine.origin;
    own = mine.sums;
    other = theirs.sums;
    rest += more.rest;
  }
};

FASTKD_INLINE double reference_of(double label_logit) { return label_logit - label_logit == 0 ? label_logit : 0; }

// logit: the label's. entropy: whether the row gets the entropy's term.
FASTKD_INLINE CrossEntropyPlan cross_entropy_plan(const CrossEntropyTask& task, const CrossEntropySums& all,
                                                  double logit, bool entropy) {
  const double smoothing = task.label_smoothing, per_logit = 1 / task.temperature, vocab = double(task.vocab);
  const TokenNumbers own =
      token_numbers(task.temperature, {all.origin, all.own}, task.entropy_weight != 0 && !task.apart, logit);
  const double log_sum = own.normalizer.log_sum, lse = all.origin * per_logit + log_sum;
  CrossEntropyPlan out{};
  out.origin = all.origin;
  out.shift = log_sum * kLog2E;
  out.loss = (smoothing == 1 ? 0 : (smoothing - 1) * own.log_prob) + (log_sum - log_sum);
  if (smoothing != 0) {
    out.loss += smoothing * (log_sum - (all.rest / vocab + (reference_of(logit) - all.origin)) * per_logit);
  }
  if (task.z_loss_weight != 0) out.loss += task.z_loss_weight * lse * lse;
  out.constant = task.scale * (1 + (task.z_loss_weight == 0 ? 0 : 2 * task.z_loss_weight * lse)) * per_logit;
  out.uniform = task.scale * smoothing / vocab * per_logit;
  out.label = task.scale * (1 - smoothing) * per_logit;
  if (!entropy || task.entropy_weight == 0) return out;
  const TokenNumbers other =
      task.apart ? token_numbers(task.entropy_temperature, {all.origin, all.other}, true, logit) : own;
  out.loss += task.entropy_weight * other.entropy;
  const TokenFactors factors =
      token_factors(task.entropy_temperature, other.entropy, 0, task.scale * task.entropy_weight);
  if (task.apart) {
    out.other_shift = other.normalizer.log_sum * kLog2E;
    out.other_constant = factors.constant;
    out.other_slope = factors.slope;
  } else {
    out.constant += factors.constant;
    out.slope = factors.slope;
  }
  return out;
}

}  // namespace fastkd::FASTKD_ISA
