// The divergences. To add one, write a struct here and name it in `Divergences`; nothing else in C++ changes.
//
// kAtZero and kAtOne name the divergence that is computed where beta is exactly 0 or 1: a mixture's ends are plain
// divergences. Empty: the divergence itself.
//
// A row's value is the sum over the vocabulary of a term f(p, q). With a = log q and b = log p, its gradients are
//   student logits  (df/da - q sum df/da) / temperature = q (g - mean_q g) / temperature,           g = (df/da) / q
//   teacher logits  (df/db - p sum df/db) / teacher_temperature = p (h - mean_p h) / teacher_temperature
// Adding a constant to g or h changes no gradient. Each struct returns those g and h that vanish where p = q, and
// writes f as a sum of terms that are never negative, so that nothing cancels as the student converges. Where the
// gradient, or a part of it, is a multiple of q - p in closed form, `student` or `teacher` holds that part, which needs
// no mean (kStudent, kTeacher).
//
// kPass names the sum that the first pass accumulates. For the KL divergences and the cross-entropy that sum gives both
// the value and the mean needed by the gradient of the side that weights. The other divergences take a second pass over
// f, g and h, which has p, q and their difference from the first; kUsesRatio: also d, log q and log p, from the logits.
//
// There are two ways to evaluate an entry, chosen row by row:
//   kNear = false  q - p by subtraction. Accurate enough while the row's value is not tiny. KL(q || p), for its
//                  gradient, gets only q and d.
//   kNear = true   everything from d = log q - log p, through e^d - 1 - d and x - log(1 + x), where |d| < 1/2.
#pragma once
#include "elementary.h"
#include "online_softmax.h"

namespace fastkd::FASTKD_ISA {

// Replaces an infinite log-ratio in gradients, as if the impossible entry had probability 2^-126.
inline constexpr double kLargestLogRatio = 126.0 * kLn2;
// Logits at least kDead below the largest have probability 0, as those of -inf have: masks often write the smallest
// finite number instead of -inf. Log-ratios beyond kInfiniteLogRatio count as infinite.
inline constexpr double kDead = 1e25;
// A weight below 2^-1075, which is 0 in double precision, contributes nothing, not even with an infinite log-ratio.
inline constexpr double kNoWeight = 1075;
inline constexpr double kInfiniteLogRatio = 1e20;

// Rows whose value is below this many nats are evaluated with kNear = true. The one-pass sums are accurate to about
// 3e-7 times 1 + |mean log-ratio|, sums of normalised terms to 3e-7. At these thresholds both leave relative errors
// well under 1e-4 in the value. q - p is then of the order of 0.2 p and is as accurate as its own rounding.
inline constexpr double kNearKl = 0.02, kNearSum = 0.005;

// One vocabulary entry under both distributions.
template <class Real>
struct Outcome {
  Real p, q;  // probabilities under teacher and student
  Real log2_p, log2_q;
  Real d;           // log q - log p, natural, finite
  Real difference;  // q - p, relatively accurate where kNear
  bool small;       // kNear and |d| < 1/2: the gap functions apply
  // Where d is a finite substitute: log q - log p up to the normalisers, as logits and what converts them to nats.
  Real logits_apart = 0, nats = 0;
};

// How a side's gradient is given: centred, q (g - mean of g), from g; closed, as it is; as the sum of both; or open, by
// g or, where q is so small that g would be too large, by q g in place of the closed part; product, always by q g.
enum class Form { kCentred, kClosed, kBoth, kOpen, kProduct };

template <class Real>
struct Terms {
  Real f;
  Real g, h;              // of the centred parts
  Real student, teacher;  // the closed parts; in the open form q g and p h, where g and h are then 0
  Real mass = 0;          // kByMass only: the sum's size, by which it is judged whether a row is near
};

// Probabilities below this have the closed part of the open form.
inline constexpr double kOpenBelow = 0x1p-60;

// Exchanges student and teacher: a reverse divergence is the forward one of mirrored outcomes.
template <class Real>
FASTKD_INLINE Outcome<Real> mirrored(const Outcome<Real>& o) {
  return {o.q, o.p, o.log2_q, o.log2_p, -o.d, -o.difference, o.small, -o.logits_apart, o.nats};
}
template <class Real>
FASTKD_INLINE Terms<Real> mirrored(const Terms<Real>& t) {
  return {t.f, t.h, t.g, t.teacher, t.student};
}

// p (e^d - 1 - d) = (q - p) - p d >= 0: one entry's term of KL(p || q).
template <bool kNear, class Real>
FASTKD_INLINE Real kl_term(const Outcome<Real>& o) {
  const Real direct = o.difference - o.p * o.d;
  if constexpr (kNear) return select(o.small, o.p * expm1_gap(o.d), direct);
  return direct;
}

// mass |log q - log p| where one side's mass meets a token that is impossible for the other, or has the smallest finite
// logit, so that d is a substitute; else 0. An underflow of the mass does not make it finite.
template <class Real>
FASTKD_INLINE Real lost_mass(const Outcome<Real>& o, Real mass) {
  constexpr Real kLargest = Real(sizeof(Real) == 8 ? 1.7976931348623157e308 : 3.4028234663852886e38);
  const bool some = at_least(o.log2_p, o.log2_q) > Real(-kNoWeight);
  const bool impossible = at_most(o.log2_p, o.log2_q) < Real(-kInfiniteLogRatio);
  const Real apart = magnitude(o.logits_apart), finite = at_most(kLargest, apart);
  return select(bool(some & impossible), (mass * finite) * o.nats + (apart - finite), Real(0));
}

// Compares a mixture of p and q with one of the two, `own`. `weight` is the other side's weight in the mixture, and
// gap = other / own - 1.
template <class Real>
struct Mixed {
  Real log_ratio;  // log(mixture / own)
  Real kl;         // own's term of KL(own || mixture), divided by own
};

template <class Real>
FASTKD_INLINE Real floored(Real probability) {
  return at_least(Real(1.17549435e-38), probability);
}

template <bool kNear, class Real>
FASTKD_INLINE Mixed<Real> mix(const Outcome<Real>& o, Real own, Log2<Real> mixture, Real gap, Real weight) {
  // With weight 0 the mixture is `own` bit for bit, and the result must be exactly 0.
  const Real unit = weight > Real(0) ? Real(kLn2) : Real(0);
  const Real direct = mixture.minus(log2_parts(floored(own))) * unit;
  if constexpr (kNear) {
    const Real y = weight * gap, rest = log1p_gap(y);
    return {select(o.small, y - rest, direct), rest};
  }
  return {direct, Real(0)};
}

// The other side's probability divided by this side's, minus one: e^d - 1 and e^-d - 1.
template <class Real>
FASTKD_INLINE Real student_gap(const Outcome<Real>& o) {
  return o.d + expm1_gap(o.d);
}
template <class Real>
FASTKD_INLINE Real teacher_gap(const Outcome<Real>& o) {
  return expm1_gap(-o.d) - o.d;
}

// What a divergence is unless it says otherwise: the same at the ends of beta, and without d in its second pass.
struct DivergenceDefaults {
  static constexpr const char *kAtZero = "", *kAtOne = "";
  static constexpr bool kUsesRatio = false;
  static constexpr bool kAnyBeta = false;          // beta may lie outside [0, 1]
  static constexpr bool kConstantTeacher = false;  // the teacher's gradient is 0, also at the ends of beta
  static constexpr bool kExcludesLabel = false;    // the terms are of all tokens but the label: see target_term.h
  static constexpr bool kByMass = false;           // kNearBelow is a share of the sum of Terms::mass
  double beta, alpha = 1;
};

// KL(p || q)
struct ForwardKl : DivergenceDefaults {
  static constexpr const char* kName = "forward_kl";
  static constexpr Pass kPass = Pass::kTeacherWeighted;
  static constexpr Form kStudent = Form::kClosed, kTeacher = Form::kCentred;
  static constexpr double kNearBelow = kNearKl;

  template <bool kNear, class Real>
  FASTKD_INLINE Terms<Real> operator()(const Outcome<Real>& o) const {
    return {kl_term<kNear>(o), Real(0), -o.d, o.difference, Real(0)};
  }
};

// beta KL(p' || q') + alpha KL((p_t, 1 - p_t) || (q_t, 1 - q_t)), t the label, p' and q' the distributions of the other
// tokens. All passes read the label's logits as -inf, so that the terms are those of KL(p' || q').
struct DecoupledKl : ForwardKl {
  static constexpr const char* kName = "decoupled_kl";
  static constexpr bool kAnyBeta = true, kExcludesLabel = true;
};

// KL(q || p)
struct ReverseKl : DivergenceDefaults {
  static constexpr const char* kName = "reverse_kl";
  static constexpr Pass kPass = Pass::kStudentWeighted;
  static constexpr Form kStudent = Form::kCentred, kTeacher = Form::kClosed;
  static constexpr double kNearBelow = kNearKl;

  template <bool kNear, class Real>
  FASTKD_INLINE Terms<Real> operator()(const Outcome<Real>& o) const {
    return mirrored(ForwardKl{beta}.template operator()<kNear>(mirrored(o)));
  }
};

// -sum p log q
struct CrossEntropy : DivergenceDefaults {
  static constexpr const char* kName = "cross_entropy";
  static constexpr Pass kPass = Pass::kTeacherCrossing;
  static constexpr Form kStudent = Form::kClosed, kTeacher = Form::kCentred;
  static constexpr double kNearBelow = kNearKl;

  template <bool kNear, class Real>
  FASTKD_INLINE Terms<Real> operator()(const Outcome<Real>& o) const {
    const Real dead = Real(-kLargestLogRatio);
    const Real log_q = o.log2_q < Real(-kInfiniteLogRatio) ? dead : o.log2_q * Real(kLn2);
    return {-o.p * log_q, Real(0), -log_q, o.difference, Real(0)};
  }
};

// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
struct Jsd : DivergenceDefaults {
  static constexpr const char* kName = "jsd";
  static constexpr const char *kAtZero = "forward_kl", *kAtOne = "reverse_kl";
  static constexpr Pass kPass = Pass::kNormalizersOnly;
  static constexpr Form kStudent = Form::kCentred, kTeacher = Form::kCentred;
  static constexpr double kNearBelow = kNearSum;

  template <bool kNear, class Real>
  FASTKD_INLINE Terms<Real> operator()(const Outcome<Real>& o) const {
    const Real b = Real(beta), c = Real(1 - beta);
    const Log2<Real> m = log2_parts(floored(b * o.p + c * o.q));
    const auto p_to_m = mix<kNear>(o, o.p, m, student_gap(o), c);
    const auto q_to_m = mix<kNear>(o, o.q, m, teacher_gap(o), b);
    const Real direct = -b * o.p * p_to_m.log_ratio - c * o.q * q_to_m.log_ratio;
    const Real f = kNear ? select(o.small, b * o.p * p_to_m.kl + c * o.q * q_to_m.kl, direct) : direct;
    return {f, -c * q_to_m.log_ratio, -b * p_to_m.log_ratio, Real(0), Real(0)};
  }
};

// beta KL(p || q) + (1 - beta) KL(q || p)
struct MixedKl : DivergenceDefaults {
  static constexpr const char* kName = "mixed_kl";
  static constexpr const char *kAtZero = "reverse_kl", *kAtOne = "forward_kl";
  static constexpr Pass kPass = Pass::kNormalizersOnly;
  static constexpr Form kStudent = Form::kBoth, kTeacher = Form::kBoth;
  static constexpr bool kUsesRatio = true;
  static constexpr double kNearBelow = kNearKl;

  template <bool kNear, class Real>
  FASTKD_INLINE Terms<Real> operator()(const Outcome<Real>& o) const {
    const Real b = Real(beta), c = Real(1 - beta);
    const Real f = b * kl_term<kNear>(o) + c * kl_term<kNear>(mirrored(o));
    const Real lost = kNear ? Real(0) : lost_mass(o, select(o.d > Real(0), c * o.q, b * o.p));
    return {f + lost, c * o.d, -b * o.d, b * o.difference, -c * o.difference};
  }
};

// One entry's term of KL(p || m), m = c q + (1 - c) p, and log(m / p).
template <class Real>
struct SkewTerm {
  Real f, log_ratio;
};
template <bool kNear, class Real>
FASTKD_INLINE SkewTerm<Real> skew_term(const Outcome<Real>& o, Real mixture, Real c) {
  const auto to_m = mix<kNear>(o, o.p, log2_parts(mixture), student_gap(o), c);
  const Real direct = c * o.difference - o.p * to_m.log_ratio;
  return {kNear ? select(o.small, o.p * to_m.kl, direct) : direct, to_m.log_ratio};
}

// KL(p || m), m = beta p + (1 - beta) q
struct SkewKl : DivergenceDefaults {
  static constexpr const char* kName = "skew_kl";
  static constexpr const char* kAtZero = "forward_kl";
  static constexpr Pass kPass = Pass::kNormalizersOnly;
  static constexpr Form kStudent = Form::kCentred, kTeacher = Form::kCentred;
  static constexpr double kNearBelow = kNearSum;

  template <bool kNear, class Real>
  FASTKD_INLINE Terms<Real> operator()(const Outcome<Real>& o) const {
    const Real b = Real(beta), c = Real(1 - beta);
    const Real mixture = floored(b * o.p + c * o.q);
    const SkewTerm<Real> term = skew_term<kNear>(o, mixture, c);
    const Real slope = c * o.difference / mixture;
    // g = c (c (q - p) / m). Where kNear is false and p is nearly 0, that form is nearly the constant c, and
    // subtracting the mean would cancel. The form -c p / m differs from it by the constant c only and does not cancel.
    const Real g = kNear ? c * slope : -c * (o.p / mixture);
    return {term.f, g, b * slope - term.log_ratio, Real(0), Real(0)};
  }
};

// KL(q || m), m = beta q + (1 - beta) p
struct SkewReverseKl : DivergenceDefaults {
  static constexpr const char* kName = "skew_reverse_kl";
  static constexpr const char* kAtZero = "reverse_kl";
  static constexpr Pass kPass = Pass::kNormalizersOnly;
  static constexpr Form kStudent = Form::kCentred, kTeacher = Form::kCentred;
  static constexpr double kNearBelow = kNearSum;

  template <bool kNear, class Real>
  FASTKD_INLINE Terms<Real> operator()(const Outcome<Real>& o) const {
    return mirrored(SkewKl{beta}.template operator()<kNear>(mirrored(o)));
  }
};

// KL(q || m), m = beta q + (1 - beta) p, whose gradient takes m for a constant
struct SkewReverseKlDetached : DivergenceDefaults {
  static constexpr const char* kName = "skew_reverse_kl_detached";
  static constexpr const char* kAtZero = "reverse_kl";
  static constexpr Pass kPass = Pass::kNormalizersOnly;
  static constexpr Form kStudent = Form::kCentred, kTeacher = Form::kClosed;
  static constexpr bool kConstantTeacher = true;
  static constexpr double kNearBelow = kNearSum;

  template <bool kNear, class Real>
  FASTKD_INLINE Terms<Real> operator()(const Outcome<Real>& o) const {
    const Real b = Real(beta), c = Real(1 - beta);
    const SkewTerm<Real> term = skew_term<kNear>(mirrored(o), floored(b * o.q + c * o.p), c);
    return {term.f, -term.log_ratio, Real(0), Real(0), Real(0) * o.difference};  // NaN where the row is
  }
};

// The Alpha-Beta divergence: with s = alpha + beta >= 0,
//   f = -(p^alpha q^beta - alpha / s p^s - beta / s q^s) / (alpha beta) = (w(s) - w(beta)) / alpha,
//   q g = s / alpha w(s) - beta / alpha w(beta),   p h = -w(beta),   w(c) = p^s (e^(c d) - 1) / c, w(0) = p^s d,
// where both sides and both numbers are exchanged if |alpha| < |beta|. No quotient then exceeds 2, and where c d is
// small, w(c) = p^s d (1 + c d e(c d)), e(x) = (e^x - 1 - x) / x^2, without a difference of equals:
//   f = p^s d^2 (s / alpha e(s d) - beta / alpha e(beta d)).
struct AlphaBeta : DivergenceDefaults {
  static constexpr const char* kName = "alpha_beta";
  static constexpr Pass kPass = Pass::kNormalizersOnly;
  static constexpr Form kStudent = Form::kOpen, kTeacher = Form::kOpen;
  static constexpr bool kUsesRatio = true, kAnyBeta = true, kByMass = true;
  static constexpr double kNearBelow = kNearKl;

  // Both sides are exchanged by products with these, which vectorise better than a choice: 1 and 0, or 0 and 1.
  double kept, exchanged;
  double large, small, sum;              // the numbers, by magnitude
  double of_small;                       // small / large; sum / large is 1 more
  double per_large, per_sum, per_small;  // reciprocals, 0 of 0
  // Log-probabilities below these are impossible, and make the value infinite where the other side has mass.
  double lost_below, other_lost_below;

  FASTKD_INLINE AlphaBeta(double b, double a)
      : DivergenceDefaults{b, a},
        kept(::fabs(a) < ::fabs(b) ? 0 : 1),
        exchanged(1 - kept),
        large(kept * a + exchanged * b),
        small(kept * b + exchanged * a),
        sum(a + b),
        of_small(large == 0 ? 0 : small / large),
        per_large(reciprocal(large)),
        per_sum(reciprocal(sum)),
        per_small(reciprocal(small)),
        lost_below(large > 0 && sum > 0 ? -2 * kDead : -kInfiniteLogRatio),
        other_lost_below(small > 0 && sum > 0 ? -2 * kDead : -kInfiniteLogRatio) {}

  template <bool kNear, class Real>
  FASTKD_INLINE Terms<Real> operator()(const Outcome<Real>& o) const {
    const Real m = Real(small), s = Real(sum), of_m = Real(of_small);
    const Real as_is = Real(kept), other = Real(exchanged), d = (as_is - other) * o.d;
    const Real log_p = as_is * o.log2_p + other * o.log2_q, log_q = as_is * o.log2_q + other * o.log2_p;
    // An impossible token has the power 0, or is 2^-126 times as likely as on the other side if that would be infinite.
    const bool lost_p = log_p < Real(lost_below), lost_q = log_q < Real(other_lost_below);
    const Real b = select(lost_p, at_least(log_p, log_q - Real(126)), log_p);
    const Real a = select(lost_q, at_least(log_q, log_p - Real(126)), log_q);
    const Real some = at_least(log_p, log_q) < Real(-kInfiniteLogRatio) ? Real(0) : Real(1);
    const Real p_power = some * exp2_of(s * b), q_power = some * exp2_of(s * a);
    const Real both = some * exp2_of(at_most(Real(sizeof(Real) == 8 ? 1000 : 120), s * b + m * (a - b)));
    const Real x = s * d, y = m * d, first = p_power * d;
    const bool small_x = magnitude(x) < Real(0.5), small_y = magnitude(y) < Real(0.5);
    const Real curve_x = expm1_curve(select(small_x, x, Real(0))), curve_y = expm1_curve(select(small_y, y, Real(0)));
    const Real w_x = select(small_x, first + first * x * curve_x, (q_power - p_power) * Real(per_sum));
    const Real w_y = select(small_y, first + first * y * curve_y, (both - p_power) * Real(per_small));
    const bool near = small_x & small_y;
    const Real near_f = first * d * (curve_x + of_m * (curve_x - curve_y)), far_f = (w_x - w_y) * Real(per_large);
    const Real lost = kNear ? Real(0) : lost_mass(o, select(o.d > Real(0), o.q, o.p));
    const Real f = select(near, near_f, far_f) + select(bool(lost_p | lost_q), lost, Real(0));
    // The gradients' quotients by q and p must be finite.
    constexpr Real kMost = Real(sizeof(Real) == 8 ? 0x1p900 : 0x1p60);
    const auto limited = [](Real value) { return at_most(kMost, at_least(-kMost, value)); };
    const Real of_q = limited(select(near, w_x + of_m * (w_x - w_y), (q_power - both) * Real(per_large)));
    const Real of_p = limited(-w_y), student = as_is * of_q + other * of_p, teacher = as_is * of_p + other * of_q;
    const bool open_q = o.q < Real(kOpenBelow), open_p = o.p < Real(kOpenBelow);
    return {f,
            select(open_q, Real(0), student / at_least(Real(kOpenBelow), o.q)),
            select(open_p, Real(0), teacher / at_least(Real(kOpenBelow), o.p)),
            select(open_q, student, Real(0)),
            select(open_p, teacher, Real(0)),
            at_least(p_power, q_power)};
  }

 private:
  static FASTKD_INLINE double reciprocal(double x) { return x == 0 ? 0 : 1 / x; }
};

// 1/2 sum |p - q|
struct Tvd : DivergenceDefaults {
  static constexpr const char* kName = "tvd";
  static constexpr Pass kPass = Pass::kNormalizersOnly;
  static constexpr Form kStudent = Form::kCentred, kTeacher = Form::kCentred;
  static constexpr double kNearBelow = kNearSum;

  template <bool kNear, class Real>
  FASTKD_INLINE Terms<Real> operator()(const Outcome<Real>& o) const {
    const Real half = Real(0.5) * sign_of(o.difference);
    return {half * o.difference, half, -half, Real(0), Real(0)};
  }
};

// Places in a list of divergences: of one, and of what it is at the ends of beta.
struct DivergencePlaces {
  int inside, at_zero, at_one;
  FASTKD_INLINE int at(double beta) const { return beta == 0 ? at_zero : beta == 1 ? at_one : inside; }
};

template <class...>
struct TypeList {};
template <class... Divergence>
constexpr int length(TypeList<Divergence...>) {
  return int(sizeof...(Divergence));
}
// The place of a divergence in a list.
template <class Which, class... Divergence>
constexpr int place_in(TypeList<Divergence...>) {
  int place = 0, found = -1;
  ((__is_same(Which, Divergence) ? void(found = place++) : void(place++)), ...);
  return found;
}
using Divergences = TypeList<ForwardKl, ReverseKl, Jsd, SkewKl, SkewReverseKl, Tvd, CrossEntropy, MixedKl,
                             SkewReverseKlDetached, AlphaBeta, DecoupledKl>;

}  // namespace fastkd::FASTKD_ISA

namespace fastkd {
inline constexpr int kDivergences = length(FASTKD_ISA::Divergences{});
}
