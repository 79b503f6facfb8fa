// topk_divergence: a student's row against a teacher of which only n tokens, the support, are stored. This file holds
// the arithmetic between the passes over the row. Every backend uses it and implements the loops itself: loops over the
// support call measure, floored_terms and the gradients of each entry; loops over the rest of the vocabulary sum 2^x,
// and write rest_coefficient times the softmax over the rest.
//
//   a_v = log q_v       of the student, over its whole vocabulary
//   b_v = r l_v - log Z of the teacher: stored l_v = log p_v, r = stored temperature / teacher temperature
//
// The teacher's mass outside the support is m = 1 - sum e^l. `tail` says how it is used:
//   lump         one outcome t, compared with the student's mass outside the support
//   uniform      an equal share for each token outside the support
//   drop         ignored
//   renormalize  both sides are renormalised inside the support
// At another temperature than the stored one, m counts as if it were spread evenly: (V - n) (m / (V - n))^r.
//
// Each set of tokens has its own normaliser, relative to a logit of its own, so that a set whose share of the row
// underflows still has a valid softmax.
#pragma once
#include "logit_sum.h"
#include "unnormalized_terms.h"

namespace fastkd {

enum class Tail : int { kLump, kUniform, kRenormalize, kDrop };

// The largest sum of probabilities, and the largest log-probability, that count as valid. Both exceed their exact
// limits, 1 and 0, to allow for the rounding of log-probabilities stored in 16 bits or fewer.
inline constexpr double kMostMass = 1.02, kLargestLogProb = 0.02;

// An index that occurs twice in a row is padding where its log-probability is at most this.
inline constexpr double kPaddingLogProb = -1e4;

// The largest relative error of rounding to a format with `bits` bits after the leading one. Stored log-probabilities
// are never assumed to be more accurate than float32.
constexpr double rounding_of_bits(int bits) { return 0.5 / double(int64_t(1) << (bits < 23 ? bits : 23)); }

// What to compute for a row.
struct TopkTask {
  int divergence;  // place in UnnormalizedDivergences
  double beta;
  Tail tail;
  double temperature, ratio;       // ratio: r above
  double floor;                    // of all log-probabilities, natural; -inf: none
  double cap;                      // of the divergence; inf: none
  double divergence_scale, scale;  // as in RowTask
  double label_weight;
  bool has_label;
  double rounding = 0;  // of the stored log-probabilities: rounding_of_bits of their format
};

// What is computed for a row between the passes.
struct TopkNumbers {
  TopkTask task;
  // Set by begin. Logarithms are natural.
  LogNormalizer student;          // of q: over the vocabulary; tail renormalize: over the support
  LogNormalizer rest, label;      // of the student's logits outside the support; of its softmax at temperature 1
  LogNormalizer teacher;          // of r l
  double nan_or_zero;             // NaN where a softmax is not valid, else 0
  double rest_mass;               // m
  double log_q_rest, log_p_rest;  // log mass outside the support; uniform: log_p_rest is of one token
  double p_rest;
  bool tail_outcome;  // tail lump, and there are tokens outside the support
  bool rest_fixed;    // m was replaced by the largest mass that rounding of the stored values may hide
  // Set by finish.
  double value, g, h, tail_g, tail_h;
  double student_factor;  // common factor of all gradients of the divergence
};

// Sums over a set of the student's logits, relative to `origin`: of its softmax, and of its softmax at temperature 1.
struct RestSums {
  double origin, sum, label_sum;
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

// RestSums that can be merged.
struct StudentSums : RestSums {
  static FASTKD_INLINE StudentSums empty() { return {{-INFINITY, 0, 0}}; }
  static FASTKD_INLINE StudentSums of(double z) {
    const double one = z == -INFINITY ? 0.0 : 1.0;
    return {{z, one, one}};
  }
  FASTKD_INLINE void merge(const RestSums& o, double scale) {
    const double all = at_least(origin, o.origin);
    sum = sum * origin_factor(origin, all, scale) + o.sum * origin_factor(o.origin, all, scale);
    label_sum = label_sum * origin_factor(origin, all, kLog2E) + o.label_sum * origin_factor(o.origin, all, kLog2E);
    origin = all;
  }
};

// Sums over the stored log-probabilities: the normaliser of r l, the sums of e^l and of -l e^l, and their number.
struct StoredSums {
  LogitSum weight;
  double mass, entropy, count;

  static FASTKD_INLINE StoredSums empty() { return {LogitSum::empty(), 0, 0, 0}; }
  FASTKD_INLINE void merge(const StoredSums& o, double ratio) {
    weight.merge(o.weight, ratio * kLog2E);
    mass += o.mass;
    entropy += o.entropy;
    count += o.count;
  }
};

struct SupportSums {
  StudentSums student;
  StoredSums stored;

  static FASTKD_INLINE SupportSums empty() { return {StudentSums::empty(), StoredSums::empty()}; }
};

struct TopkPlan : TopkNumbers {
  FASTKD_INLINE double scale() const { return kLog2E / task.temperature; }

  // z: the student's logit.
  FASTKD_INLINE SupportSums measure(double z, double l) const {
    const double p = ::exp(l);
    return {StudentSums::of(z), {LogitSum::of(l), p, p > 0 ? -l * p : p, 1}};
  }
  FASTKD_INLINE void add(SupportSums& all, const SupportSums& next) const {
    all.student.merge(next.student, scale());
    all.stored.merge(next.stored, task.ratio);
  }

  // Combines the sums of the support and of the rest of the vocabulary (others_sums).
  FASTKD_INLINE void begin(const SupportSums& support, const StudentSums& others_sums, double vocab) {
    const StoredSums& stored = support.stored;
    const bool renormalize = task.tail == Tail::kRenormalize;
    const double others = vocab - stored.count, r = task.ratio;
    StudentSums all = support.student;
    all.merge(others_sums, scale());
    const double log_all = ::log(all.sum);
    nan_or_zero = (all.origin - all.origin) + (all.sum - all.sum) + (stored.mass - stored.mass);
    if (renormalize && stored.count > 0 && (support.student.sum == 0 || stored.weight.sum == 0)) nan_or_zero = NAN;
    student = renormalize ? LogNormalizer{support.student.origin, ::log(support.student.sum)}
                          : LogNormalizer{all.origin, log_all};
    label = {all.origin, task.has_label ? ::log(all.label_sum) : 0};
    const bool some = others_sums.sum != 0;
    rest = {some ? others_sums.origin : 0, some ? ::log(others_sums.sum) : 0};
    log_q_rest = some ? (rest.origin - all.origin) / task.temperature + rest.log_sum - log_all : -INFINITY;
    rest_mass = others > 0 && stored.mass < 1 ? 1 - stored.mass : 0;
    // Here the last bit of the stored mass would decide whether KL(q || p) is infinite: use the mass that rounding may
    // hide.
    const double hidden = task.rounding * at_least(task.rounding, stored.entropy);
    rest_fixed = task.divergence == kReverseKl && others > 0 && rest_mass < hidden;
    if (rest_fixed) rest_mass = hidden;
    tail_outcome = task.tail == Tail::kLump && others > 0;
    const double log_rest = rest_mass > 0 ? r * ::log(rest_mass) + (1 - r) * ::log(others) : -INFINITY;
    // Stored probabilities whose sum with the rest is 1 are used as they are. So are those of a plain sum (drop),
    // always.
    const bool as_stored = r == 1 && !renormalize && (task.tail == Tail::kDrop || (others > 0 && stored.mass <= 1));
    teacher = as_stored ? LogNormalizer{0, 0} : with_rest(stored.weight, renormalize ? -INFINITY : log_rest);
    log_p_rest = log_rest - r * teacher.origin - teacher.log_sum;
    p_rest = ::exp(log_p_rest);
    if (task.tail == Tail::kUniform) log_p_rest -= ::log(others);
  }

  FASTKD_INLINE double log_q(double z) const { return (z - student.origin) / task.temperature - student.log_sum; }
  FASTKD_INLINE double log_p(double l) const { return task.ratio * (l - teacher.origin) - teacher.log_sum; }

  // The terms of one outcome. Logarithms below the floor are raised to it, and those get no gradient.
  template <class Divergence, class Real>
  FASTKD_INLINE UnnormalizedTerms<Real> floored_terms(const Divergence& divergence, Real a, Real b) const {
    const Real least = Real(task.floor);
    UnnormalizedTerms<Real> t = unnormalized_terms(divergence, outcome_of(at_least(least, a), at_least(least, b)));
    t.g = a < least ? Real(0) : t.g;
    t.h = b < least ? Real(0) : t.h;
    return t;
  }

  // support: sums of its terms. others: sums over the other tokens where the tail is uniform, else zeros.
  template <class Divergence>
  FASTKD_INLINE void finish(const Divergence& divergence, const UnnormalizedSums& support,
                            const UnnormalizedSums& others) {
    UnnormalizedSums all = support;
    all.add(others);
    tail_g = 0;
    tail_h = others.h;
    if (tail_outcome) {
      const UnnormalizedTerms<double> t = floored_terms(divergence, log_q_rest, log_p_rest);
      all.add({t.value, t.excess, t.g, t.h});
      tail_g = t.g;
      tail_h = t.h;
    }
    // Between two distributions the exact sum of the excesses is 0; the computed sum would only add rounding errors.
    const bool distributions = task.tail != Tail::kDrop && task.floor == -INFINITY;
    value = (distributions ? all.value : all.value + all.excess) * task.divergence_scale + nan_or_zero;
    g = all.g;
    h = all.h;
    student_factor = task.scale * task.divergence_scale / task.temperature;
    if (value > task.cap) {
      value = task.cap;
      student_factor = 0;
    }
  }

  // dz of a token outside the support is this coefficient times the token's share of the student's rest. It includes
  // the label's softmax where that is at the same temperature. With a uniform tail the token's own slope is added.
  FASTKD_INLINE double rest_coefficient(bool label_apart) const {
    const double q_rest = ::exp(log_q_rest);
    double out = nan_or_zero;
    if (task.tail != Tail::kRenormalize && student_factor != 0) out += student_factor * (tail_g - q_rest * g);
    return label_apart ? out : out + label_factor() * q_rest;
  }

  // dz of a support entry whose own term has the slope own_g. Includes the label's term.
  FASTKD_INLINE double student_gradient(double z, double own_g, bool is_label) const {
    double out = nan_or_zero;
    if (student_factor != 0) out += student_factor * (own_g - ::exp(log_q(z)) * g);
    if (task.has_label) out += label_factor() * (::exp((z - label.origin) - label.log_sum) - (is_label ? 1 : 0));
    return out;
  }
  FASTKD_INLINE double label_factor() const { return task.has_label ? task.scale * task.label_weight : 0; }

  // dl of a support entry whose own term has the slope own_h.
  FASTKD_INLINE double teacher_gradient(double l, double own_h) const {
    const double factor = task.temperature * student_factor;  // cancels the 1 / temperature of the student's factor
    if (factor == 0) return nan_or_zero;
    if (task.tail == Tail::kDrop && task.ratio == 1) return factor * own_h + nan_or_zero;
    double out = own_h - h * ::exp(log_p(l));
    if (task.tail != Tail::kRenormalize && rest_mass > 0 && !rest_fixed)
      out -= (tail_h - h * p_rest) * ::exp(l) / rest_mass;
    return factor * task.ratio * out + nan_or_zero;
  }

  // Divergence and label term, before the row's weight.
  FASTKD_INLINE double loss(double label_z) const {
    return value + (task.has_label ? task.label_weight * (label.log_sum - (label_z - label.origin)) : 0);
  }

 private:
  static constexpr int kReverseKl = 1;  // its place in UnnormalizedDivergences

  // The normaliser of the support's weights together with the rest's weight, e^log_rest.
  FASTKD_INLINE LogNormalizer with_rest(const LogitSum& weight, double log_rest) const {
    if (weight.sum == 0) return {0, log_rest > -INFINITY ? log_rest : 0};
    const double above = log_rest - task.ratio * weight.origin;
    return {weight.origin,
            above > 0 ? above + ::log(1 + weight.sum * ::exp(-above)) : ::log(weight.sum + ::exp(above))};
  }
};

}  // namespace fastkd::FASTKD_ISA
