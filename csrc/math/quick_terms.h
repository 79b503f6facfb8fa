// Short formulas for the terms of divergences, for the GPU. They take a third of the instructions of those in
// divergence.h, and serve rows whose value is not tiny (kNear = false there), from logarithms in base 2 alone.
//
// With a = log2 q and b = log2 p, a divergence's value is
//   f_scale sum x y + f_from_g sum q g + f_apart sum (q - p),   where the last sum is 0 over a whole row,
// and the student's gradient before its factors is q (G - mean_q G), where G, the g of divergence.h, is
// g_scale g + g_offset; to it, closed (q - p) is added.
#pragma once
#include "divergence.h"

namespace fastkd::FASTKD_ISA {

// Probabilities below 2^kLeastLog2 are 0 in float. The caller raises logarithms to it, so that those of 0 may be
// subtracted.
inline constexpr float kLeastLog2 = -150;

template <class Real>
struct QuickTerms {
  Real q, g, x, y;
};

// What terms() is for: the sums, or the gradient, which needs only q and g (and x, where `closed` is not 0).
enum class QuickUse { kSums, kGradient };

template <class Real>
struct QuickPairTerms {
  QuickTerms<Real> first, second;
};

template <class Real>
struct QuickScales {
  Real f, f_from_g, g, g_offset, closed, f_apart;
};

FASTKD_INLINE float log2_fast(float x) {
#ifdef FASTKD_GPU_FUNCTIONS
  return gpu::log2_approx(x);
#else
  return log2_of(x);
#endif
}
FASTKD_INLINE float reciprocal_fast(float x) {
#ifdef FASTKD_GPU_FUNCTIONS
  return gpu::reciprocal_approx(x);
#else
  return 1 / x;
#endif
}

// x limited to [0, 1].
FASTKD_INLINE float saturated(float x) {
#ifdef __CUDA_ARCH__
  return __saturatef(x);
#else
  return at_most(1.0f, at_least(0.0f, x));
#endif
}

struct QuickPair {
  float q, p;
};

// The mixture m = by_p p + by_q q, relative to the larger of p and q, so that nothing cancels.
struct QuickMixture {
  float d;         // log2(q / p)
  bool student;    // q is the larger one
  float ratio;     // the smaller one divided by the larger one
  float of_large;  // m divided by the larger one

  FASTKD_INLINE QuickMixture(float a, float b, float by_q, float by_p)
      : d(a - b),
        student(d > 0),
        ratio(exp2_fast(-magnitude(d))),
        of_large(fused(ratio, student ? by_p : by_q, student ? by_q : by_p)) {}

  // q, and with it p where both are needed: one exponential and the ratio give both.
  template <QuickUse kUse>
  FASTKD_INLINE QuickPair sides(float a, float b) const {
    if constexpr (kUse == QuickUse::kGradient) return {exp2_fast(a), 0.0f};
    const float large = exp2_fast(at_least(a, b)), small = large * ratio;
    return {student ? large : small, student ? small : large};
  }

  FASTKD_INLINE float p_share() const { return reciprocal_fast(of_large) * (student ? ratio : 1.0f); }  // p / m
};

// None: the divergence is computed by divergence.h alone.
template <class Divergence>
struct Quick {
  static constexpr bool kExists = false, kFinite = false, kPairs = false, kBinary = false;
};

// The terms of two entries.
template <QuickUse kUse, class Quick>
FASTKD_INLINE QuickPairTerms<float> pair_terms(const Quick& quick, float a, float b, float next_a, float next_b) {
  if constexpr (Quick::kPairs) {
    return quick.template pair<kUse>(a, b, next_a, next_b);
  } else {
    return {quick.template terms<kUse>(a, b), quick.template terms<kUse>(next_a, next_b)};
  }
}

// kPairs: computes two entries together. Every row has then at least kLeastWeight of both sides in the mixture.
inline constexpr double kLeastWeight = 1e-15;

// kLogs: subtracts logarithms. kFinite: only for packs without masked logits, where no log-ratio is infinite.
// kBinary: g is 0 or 1 (1/2 of equal sides). The gradient may take 1 - g instead.
struct QuickOfMixture {
  static constexpr bool kExists = true, kLogs = true, kFinite = false, kPairs = false, kBinary = false;
  float by_p, by_q;
  FASTKD_INLINE QuickOfMixture(double p_weight, double q_weight) : by_p(float(p_weight)), by_q(float(q_weight)) {}
  FASTKD_INLINE QuickMixture mixture(float a, float b) const { return {a, b, by_q, by_p}; }
  // m / q, as far as it is a float: where it is not, q is 0.
  FASTKD_INLINE float over_student(float a, float b) const {
    return fused(exp2_fast(at_most(126.0f, b - a)), by_p, by_q);
  }
};

// g = log2(m / q)
template <>
struct Quick<Jsd> : QuickOfMixture {
  FASTKD_INLINE explicit Quick(double beta) : QuickOfMixture(beta, 1 - beta) {}

  template <QuickUse kUse>
  FASTKD_INLINE QuickTerms<float> terms(float a, float b) const {
    const QuickMixture m = mixture(a, b);
    const float to_large = log2_fast(m.of_large);
    const QuickPair sides = m.sides<kUse>(a, b);
    return {sides.q, to_large + at_least(0.0f, -m.d), sides.p, to_large + at_least(0.0f, m.d)};
  }
  FASTKD_INLINE QuickScales<double> scales() const { return {-by_p * kLn2, -by_q * kLn2, -by_q * kLn2, 0, 0, 0}; }
};

// g = p / m
template <>
struct Quick<SkewKl> : QuickOfMixture {
  FASTKD_INLINE explicit Quick(double beta) : QuickOfMixture(beta, 1 - beta) {}

  template <QuickUse kUse>
  FASTKD_INLINE QuickTerms<float> terms(float a, float b) const {
    const QuickMixture m = mixture(a, b);
    const QuickPair sides = m.sides<kUse>(a, b);
    return {sides.q, m.p_share(), sides.p, log2_fast(m.of_large) + at_least(0.0f, m.d)};
  }
  FASTKD_INLINE QuickScales<double> scales() const { return {-kLn2, 0, -double(by_q), 0, 0, 0}; }
};

// g = log2(m / q) + beta log2(e) q / m, with m = beta q + (1 - beta) p
template <>
struct Quick<SkewReverseKl> : QuickOfMixture {
  static constexpr bool kPairs = true;
  float of_share;
  FASTKD_INLINE explicit Quick(double beta) : QuickOfMixture(1 - beta, beta), of_share(float(beta * kLog2E)) {}

  // With one reciprocal, of the product: the special function unit is what binds.
  template <QuickUse kUse>
  FASTKD_INLINE QuickPairTerms<float> pair(float a, float b, float next_a, float next_b) const {
    const float over_q = over_student(a, b), next_over_q = over_student(next_a, next_b);
    // Beyond this, q / m is nothing beside log2(m / q).
    const float limit = 0x1p60f, x = at_most(limit, over_q), y = at_most(limit, next_over_q);
    const float of_both = reciprocal_fast(x * y);
    return {terms(a, over_q, of_both * y), terms(next_a, next_over_q, of_both * x)};
  }
  FASTKD_INLINE QuickScales<double> scales() const { return {-kLn2, 0, -kLn2, by_q, 0, 0}; }

 private:
  FASTKD_INLINE QuickTerms<float> terms(float a, float over_q, float q_share) const {
    const float q = exp2_fast(a), to_q = log2_fast(over_q);
    return {q, fused(q_share, of_share, to_q), q, to_q};
  }
};

// g = log2(m / q), with m = beta q + (1 - beta) p
template <>
struct Quick<SkewReverseKlDetached> : QuickOfMixture {
  FASTKD_INLINE explicit Quick(double beta) : QuickOfMixture(1 - beta, beta) {}

  template <QuickUse kUse>
  FASTKD_INLINE QuickTerms<float> terms(float a, float b) const {
    return {exp2_fast(a), log2_fast(over_student(a, b)), 0, 0};
  }
  FASTKD_INLINE QuickScales<double> scales() const { return {0, -kLn2, -kLn2, 0, 0, 0}; }
};

// g = log2(q / p), x = p
template <>
struct Quick<MixedKl> {
  static constexpr bool kExists = true, kLogs = false, kFinite = true, kPairs = false, kBinary = false;
  float by_forward, by_reverse;
  FASTKD_INLINE explicit Quick(double beta) : by_forward(float(beta)), by_reverse(float(1 - beta)) {}

  template <QuickUse kUse>
  FASTKD_INLINE QuickTerms<float> terms(float a, float b) const {
    return {exp2_fast(a), a - b, exp2_fast(b), a - b};
  }
  FASTKD_INLINE QuickScales<double> scales() const {
    return {-by_forward * kLn2, by_reverse * kLn2, by_reverse * kLn2, 0, by_forward, by_forward - by_reverse};
  }
};

// g = (1 + sign(q - p)) / 2 or, turned, (1 - sign(q - p)) / 2
template <>
struct Quick<Tvd> {
  static constexpr bool kExists = true, kLogs = false, kFinite = false, kPairs = false, kBinary = true;
  float steepness = 3e38f, p_unit = 1;
  FASTKD_INLINE explicit Quick(double) {}
  FASTKD_INLINE void turn() { steepness = -steepness; }

  // 2^b lacks p_unit.
  template <QuickUse kUse>
  FASTKD_INLINE QuickTerms<float> terms(float a, float b) const {
    const float q = exp2_fast(a), difference = fused(-exp2_fast(b), p_unit, q);
    return {q, saturated(fused(difference, steepness, 0.5f)), magnitude(difference), 1};
  }
  FASTKD_INLINE QuickScales<double> scales() const { return {0.5, 0, 1, -0.5, 0, 0}; }
};

}  // namespace fastkd::FASTKD_ISA
