// The label's own part of decoupled_kl: the divergence between "it is the label" and "it is another token",
//   TCKD = KL((p_t, 1 - p_t) || (q_t, 1 - q_t)),  t the label.
// It is computed from the log-odds of the label, log q_t / (1 - q_t) = z_t - lse of the other logits, so that nothing
// cancels where the label is certain. With x the student's log-odds and y the teacher's:
//   d TCKD / dx = q_t - p_t,   d TCKD / dy = p_t (1 - p_t) (h_t - h_o),   h = log p / q of the label and of the others.
#pragma once
#include "divergence.h"

namespace fastkd {

// The label's logits on both sides.
struct LabelLogits {
  double student = 0, teacher = 0;
};

// What the label adds to a row whose other tokens have a divergence of their own.
struct TargetTerm {
  double value, student, teacher;  // its loss, and its gradients by the log-odds
  double share;                    // the factor of the others' divergence
  double others;                   // their probability in the label's softmax
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

FASTKD_INLINE double sigmoid(double x) { return 1 / (1 + ::exp(-x)); }
FASTKD_INLINE double log_sigmoid(double x) { return at_most(0.0, x) - ::log1p(::exp(-magnitude(x))); }

// log q - log p of the label, from both log-odds; of the others from the negative log-odds.
FASTKD_INLINE double log_ratio_of_odds(double x, double y) {
  const double apart = x == y ? 0 : x - y;
  return magnitude(apart) < 1 ? ::log1p(sigmoid(-x) * ::expm1(apart)) : log_sigmoid(x) - log_sigmoid(y);
}

// p (e^d - 1 - d), d = log q - log p, written so that it needs no e^d where p is 0.
FASTKD_INLINE double odds_term(double p, double q, double d) {
  if (p == 0) return q;
  return magnitude(d) < 0.5 ? p * expm1_gap(d) : (q - p) - p * d;
}

// TCKD and its gradients, each times alpha. Mass where the other side has none gives an infinite value and the
// gradient of kLargestLogRatio, as everywhere.
FASTKD_INLINE void set_target(TargetTerm& term, double x, double y, double alpha) {
  const double p = sigmoid(y), p_others = sigmoid(-y), q = sigmoid(x), q_others = sigmoid(-x);
  const double d = log_ratio_of_odds(x, y), d_others = log_ratio_of_odds(-x, -y);
  const double value = odds_term(p, q, d) + odds_term(p_others, q_others, d_others);
  const auto limited = [](double ratio) {
    return magnitude(ratio) > kInfiniteLogRatio ? with_sign(kLargestLogRatio, ratio) : ratio;
  };
  // sigmoid(x) - sigmoid(y) without a difference of equals.
  const double apart = x == y ? 0 : magnitude(x - y);
  const double gap = -::expm1(-apart) * (x > y ? q * p_others : -q_others * p);
  term.value = alpha == 0 && value == double(INFINITY) ? 0 : alpha * value;
  term.student = alpha * gap;
  term.teacher = alpha * (p * p_others * (limited(d_others) - limited(d)));
}

}  // namespace fastkd::FASTKD_ISA
