// A student's row against a teacher of which only n tokens, the support, are stored: what happens between the passes
// over the row. The same for every backend, which owns the loops: those over the support call measure, floored_terms
// and the gradients of each entry; those over the rest of the vocabulary sum 2^x, and write rest_coefficient x q.
//
//   a_v = log q_v       of the student, over its whole vocabulary
//   b_v = r l_v - log Z of the teacher: stored l_v = log p_v, r = stored temperature / teacher temperature
//
// The rest of the teacher, m = 1 - sum e^l, becomes by `tail` one outcome t against the student's rest (lump), an equal
// share of each other token (uniform), nothing (drop), or vanishes from both sides (renormalize). At another
// temperature than the stored one it counts as if it were spread evenly: (V - n) (m / (V - n))^r.
#pragma once
#include "bare.h"

namespace fastkd {

enum class Tail : int { kLump, kUniform, kRenormalize, kDrop };

// What no probability may exceed, for rounding's sake: log-probabilities stored in 16 bits, or fewer, sum up to this.
inline constexpr double kMostMass = 1.02, kLargestLogProb = 0.02;

// What is asked of a row.
struct TopkTask {
  int divergence;  // place in BareDivergences
  double beta;
  Tail tail;
  double temperature, ratio;       // ratio: r above
  double floor;                    // of all log-probabilities, natural; -inf: none
  double cap;                      // of the divergence; inf: none
  double divergence_scale, scale;  // as in RowTask
  double label_weight;
  bool has_label;
};

// What is known of a row.
struct TopkNumbers {
  TopkTask task;
  // Set by begin; logarithms are natural.
  double lse, label_lse, poison;  // of the student's softmaxes; NaN where there is none
  double log_z, rest_mass;        // of Z; m
  double log_q_rest, log_p_rest;  // of the rest; uniform: log_p_rest is of one token
  double p_rest, log_q_support;
  bool tail_outcome;  // lump: there is a rest
  // Set by finish.
  double value, g, h, tail_g, tail_h;
  double student_factor;  // of all the divergence's gradients
};

// Of a set of the student's logits x (base 2): of 2^x, and of 2^(x temperature), the softmax that a label sees; each
// sum relative to a maximum.
struct RestSums {
  double max, sum, label_max, label_sum;
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

// RestSums that can be merged.
struct StudentSums {
  MaxSum<double> student, label;

  static FASTKD_INLINE StudentSums empty() { return {MaxSum<double>::empty(), MaxSum<double>::empty()}; }
  FASTKD_INLINE void merge(const StudentSums& o) {
    student.merge(o.student);
    label.merge(o.label);
  }
};

struct SupportSums {
  StudentSums student;
  double mass, weight, count;  // sums of e^l and e^(r l)

  static FASTKD_INLINE SupportSums empty() { return {StudentSums::empty(), 0, 0, 0}; }
  FASTKD_INLINE void add(const SupportSums& o) {
    student.merge(o.student);
    mass += o.mass;
    weight += o.weight;
    count += o.count;
  }
};

struct TopkPlan : TopkNumbers {
  FASTKD_INLINE SupportSums measure(double x, double l) const {
    const double one = x == -INFINITY ? 0.0 : 1.0;
    return {{{x, one}, {x * task.temperature, one}}, ::exp(l), ::exp(task.ratio * l), 1};
  }

  // rest: of the vocabulary outside the support.
  FASTKD_INLINE void begin(const SupportSums& support, const StudentSums& rest, double vocab) {
    const double others = vocab - support.count, r = task.ratio;
    StudentSums all = support.student;
    all.merge(rest);
    lse = all.student.log2() * kLn2;
    label_lse = task.has_label ? all.label.log2() * kLn2 : 0;
    poison = lse - lse;
    log_q_rest = natural_log(rest.student) - lse;
    log_q_support = natural_log(support.student.student) - lse;
    if (task.tail != Tail::kRenormalize || log_q_support == -INFINITY) log_q_support = 0;
    rest_mass = others > 0 && support.mass < 1 ? 1 - support.mass : 0;
    const double log_rest = rest_mass > 0 ? r * ::log(rest_mass) + (1 - r) * ::log(others) : -INFINITY;
    // Stored probabilities that with their rest make 1 stay as they are. A bare sum leaves them in any case.
    const bool as_stored = r == 1 && (task.tail == Tail::kDrop || (others > 0 && support.mass <= 1));
    const double whole = support.weight + (task.tail == Tail::kRenormalize ? 0 : ::exp(log_rest));
    log_z = whole == 0 || (as_stored && task.tail != Tail::kRenormalize) ? 0 : ::log(whole);
    p_rest = ::exp(log_rest - log_z);
    log_p_rest = log_rest - log_z - (task.tail == Tail::kUniform ? ::log(others) : 0);
    tail_outcome = task.tail == Tail::kLump && others > 0;
  }

  FASTKD_INLINE double log_q(double x) const { return x * kLn2 - lse - log_q_support; }
  FASTKD_INLINE double log_p(double l) const { return task.ratio * l - log_z; }

  // The terms of one outcome, its logarithms raised to the floor; what was raised takes no gradient.
  template <class Divergence, class Real>
  FASTKD_INLINE BareTerms<Real> floored_terms(const Divergence& divergence, Real a, Real b) const {
    const Real least = Real(task.floor);
    BareTerms<Real> t = bare(divergence, outcome_of(at_least(least, a), at_least(least, b)));
    t.g = a < least ? Real(0) : t.g;
    t.h = b < least ? Real(0) : t.h;
    return t;
  }

  // support: the sums of its terms; rest: those of the other tokens (uniform), else nothing.
  template <class Divergence>
  FASTKD_INLINE void finish(const Divergence& divergence, const BareSums& support, const BareSums& rest) {
    BareSums all = support;
    all.add(rest);
    tail_g = 0;
    tail_h = rest.h;
    if (tail_outcome) {
      const BareTerms<double> t = floored_terms(divergence, log_q_rest, log_p_rest);
      all.add({t.value, t.excess, t.g, t.h});
      tail_g = t.g;
      tail_h = t.h;
    }
    // Between two distributions the excesses cancel; their sum would be rounding.
    const bool distributions = task.tail != Tail::kDrop && task.floor == -INFINITY;
    value = (distributions ? all.value : all.value + all.excess) * task.divergence_scale + poison;
    g = all.g;
    h = all.h;
    student_factor = task.scale * task.divergence_scale / task.temperature;
    if (value > task.cap) {
      value = task.cap;
      student_factor = 0;
    }
  }

  // dz of a token outside the support is this times its q. (Uniform: of its own slope -q g is added to.)
  FASTKD_INLINE double rest_coefficient() const {
    if (task.tail == Tail::kRenormalize || student_factor == 0) return poison;
    const double of_tail = tail_outcome && log_q_rest > -INFINITY ? tail_g * ::exp(-log_q_rest) : 0;
    return student_factor * (of_tail - g) + poison;
  }

  // dz of an entry of the support whose own term has the slope own_g, with the label's term.
  FASTKD_INLINE double student_gradient(double x, double own_g, bool is_label) const {
    double out = poison;
    if (student_factor != 0) out += student_factor * (own_g - ::exp(log_q(x)) * g);
    if (task.has_label) out += label_factor() * (::exp(x * task.temperature * kLn2 - label_lse) - (is_label ? 1 : 0));
    return out;
  }
  FASTKD_INLINE double label_factor() const { return task.has_label ? task.scale * task.label_weight : 0; }

  // dl of an entry whose own term has the slope own_h.
  FASTKD_INLINE double teacher_gradient(double l, double own_h) const {
    const double factor = task.temperature * student_factor;  // without the student's 1 / temperature
    if (factor == 0) return poison;
    if (task.tail == Tail::kDrop && task.ratio == 1) return factor * own_h + poison;
    double out = own_h - h * ::exp(log_p(l));
    if (task.tail != Tail::kRenormalize && rest_mass > 0) out -= (tail_h - h * p_rest) * ::exp(l) / rest_mass;
    return factor * task.ratio * out + poison;
  }

  // Divergence and label term, not weighted.
  FASTKD_INLINE double loss(double label_x) const {
    return value + (task.has_label ? task.label_weight * (label_lse - label_x * task.temperature * kLn2) : 0);
  }

 private:
  static FASTKD_INLINE double natural_log(const MaxSum<double>& x) {
    return x.sum == 0 ? -INFINITY : (x.max + ::log2(x.sum)) * kLn2;
  }
};

}  // namespace fastkd::FASTKD_ISA
