// The parts of clipped_divergence's passes over a row: entries' shares in the part between the edges, the sums over it,
// and the leading thread's work between the passes.
#pragma once
#include "../math/clipped_small.h"
#include "clipped_quantiles.cuh"
#include "softmax_divergence.cuh"

namespace fastkd::cuda {

struct ClippedArguments : RowArguments {
  DeviceRows lower, upper, lower_gradient, upper_gradient;
  Renormalize renormalize;
  bool keep_label, lump, quantile;
  double softness;
  bool* small;  // per row: a mass is too small for clipped_divergence_kernel's sums; null: never
};

// What the leading thread publishes to the others.
template <class Real>
struct ClipParameters : RowParameters<Real> {
  int kept;               // the label that is wholly in the part; -1: none
  bool small;             // see ClippedArguments
  Real low, high, sharp;  // hard edges are logits; soft ones probabilities, sharp = 1 / softness
  Real alpha, gamma, delta, by_a, by_p, by_own_p, by_q, mean;
};

// An entry's share in the part (own), its complement (rest), and the derivatives of the share by the edges.
template <class Real>
struct ClipShare {
  Real own, rest, by_lower, by_upper;
};

// Returns sigmoid(x). Sets `opposite` to e^-x: sigmoid(x) e^-x is sigmoid(-x).
template <class Real>
__device__ __forceinline__ Real clip_sigmoid(Real x, Real& opposite) {
  opposite = exp2_of(at_least(Real(-126), at_most(Real(126), -x * Real(kLog2E))));
  return Real(1) / (Real(1) + opposite);
}

template <bool kSoft, class Real>
__device__ __forceinline__ ClipShare<Real> clip_share(const ClipParameters<Real>& parameters, Real w, Real p,
                                                      bool kept) {
  if constexpr (kSoft) {
    Real to_a, to_b;
    const Real a = clip_sigmoid((p - parameters.low) * parameters.sharp, to_a);
    const Real b = clip_sigmoid((parameters.high - p) * parameters.sharp, to_b);
    if (kept) return {Real(1), Real(0), Real(0), Real(0)};
    const Real own = a * b, not_a = a * to_a, not_b = b * to_b;
    return {own, not_a + a * not_b, -own * not_a * parameters.sharp, own * not_b * parameters.sharp};
  }
  const Real own = kept || (w >= parameters.low && w <= parameters.high) ? Real(1) : Real(0);
  return {own, Real(1) - own, Real(0), Real(0)};
}

// ClipSums in parts small enough for the reductions.
struct ClipInside {
  double k, a, p, q, difference, p_rest, q_rest;
  __device__ void add(const ClipInside& o) {
    k += o.k;
    a += o.a;
    p += o.p;
    q += o.q;
    difference += o.difference;
    p_rest += o.p_rest;
    q_rest += o.q_rest;
  }
};
struct ClipSlope {
  double a, p, q;
  __device__ void add(const ClipSlope& o) {
    a += o.a;
    p += o.p;
    q += o.q;
  }
};

// A thread's share of the sums over the part.
template <bool kSoft, class Real>
struct ClipThread {
  Real lost = 0, k = 0, a = 0, p = 0, q = 0, difference = 0, p_rest = 0, q_rest = 0;
  Real lower[3] = {}, upper[3] = {}, own[3] = {};

  __device__ __forceinline__ void add(const Outcome<Real>& o, const ClipShare<Real>& share) {
    const Real s = share.own, rest = share.rest, term = -o.p * o.d;
    p_rest += rest * o.p;
    q_rest += rest * o.q;
    if (!kSoft && s == Real(0)) return;  // entries outside contribute only to p_rest and q_rest
    lost += o.log2_q < Real(-kInfiniteLogRatio) ? s * o.p : Real(0);
    k += s * kl_term<true>(o);
    a += s * term;
    p += s * o.p;
    q += s * o.q;
    difference += s * o.difference;
    if constexpr (kSoft) {
      const Real by_teacher = -(share.by_lower + share.by_upper) * o.p, x[3] = {term, o.p, o.q};
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        lower[i] += share.by_lower * x[i];
        upper[i] += share.by_upper * x[i];
        own[i] += by_teacher * x[i];
      }
    }
  }

  __device__ ClipInside inside() const {
    return {lost > Real(0) ? double(INFINITY) : double(k),
            double(a),
            double(p),
            double(q),
            double(difference),
            double(p_rest),
            double(q_rest)};
  }
  static __device__ ClipSlope slope(const Real (&x)[3]) { return {double(x[0]), double(x[1]), double(x[2])}; }
};

// Whether sums of p (log p - log q) have lost too many digits: they cancel where student and teacher are close.
__device__ __forceinline__ bool is_close(const ClipSums& sums) {
  return sums.k < kNearKl * (sums.p + sums.q + magnitude(sums.a));
}

// What packs with finite log-ratios and hard edges add to the sums, and their gradients: two exponentials an entry.
// The probabilities are relative to the shifts (NormalizerShift), log-ratios in base 2.
template <class Source>
struct ClipFast {
  using Real = typename Source::Real;
  using Item = typename Source::Item;
  using Raw = typename Source::Raw;

  const ClipParameters<Real>& parameters;
  const int label_pack;  // this block's pack with the label, which is left to the careful loop
  PackRange<Item> u_range, w_range;
  Real a = 0, p = 0, q = 0, p_rest = 0, q_rest = 0;

  __device__ __forceinline__ ClipFast(const Source& source, const ClipParameters<Real>& all)
      : parameters(all), label_pack(source.pack_of(all.label >= 0 ? all.label : all.kept) - source.begin) {
    const Real far = Real(kFarLogit);
    u_range.set(all.at.student_origin - far, Real(INFINITY));
    w_range.set(all.at.teacher_origin - far / at_least(Real(1), all.teacher_ratio), Real(INFINITY));
  }

  __device__ __forceinline__ bool inside(Real w) const { return w >= parameters.low && w <= parameters.high; }

  // Returns false for a pack that it does not take.
  __device__ __forceinline__ bool add(int pack, const Raw& raw) {
    if (pack == label_pack || !u_range.above(raw.student) || !w_range.above(raw.teacher)) return false;
#pragma unroll
    for (int j = 0; j < Source::kSize; ++j) {
      const Real u = Source::student_of(raw, j), w = Source::teacher_of(raw, j);
      const Real x = fused(u, parameters.student_scale, -parameters.student_shift.shift);
      const Real y = fused(w, parameters.teacher_scale, -parameters.teacher_shift.shift);
      const Real e_u = exp2_fast(x), e_w = exp2_fast(y);
      if (inside(w)) {
        a = fused(e_w, y - x, a);
        p += e_w;
        q += e_u;
      } else {
        p_rest += e_w;
        q_rest += e_u;
      }
    }
    return true;
  }
  __device__ ClipInside whole() const {
    const double u_unit = parameters.student_shift.unit, w_unit = parameters.teacher_shift.unit;
    const double rest = double(parameters.student_shift.rest) - double(parameters.teacher_shift.rest);
    const double mass = w_unit * double(p), own = u_unit * double(q);
    const double ratio = kLn2 * w_unit * (double(a) + rest * double(p));
    return {ratio + (own - mass), ratio, mass, own, own - mass, w_unit * double(p_rest), u_unit * double(q_rest)};
  }

  // The student's gradient in a whole pack without the label. An impossible token's is 0.
  __device__ __forceinline__ typename Source::Out gradient(const Raw& raw) const {
    const GradientFactors<Real>& factors = parameters.factors;
    const Real u_unit = parameters.student_shift.unit;
    const Real by_q = (factors.student * parameters.alpha + factors.label_q) * u_unit;
    const Real by_p = -factors.student * parameters.gamma * parameters.teacher_shift.unit;
    const Real outside_by_q = (factors.student * parameters.delta + factors.label_q) * u_unit;
    typename Source::Out out{};
#pragma unroll
    for (int k = 0; k < Source::kSize / Source::kWord; ++k) {
      Real word[Source::kWord];
#pragma unroll
      for (int j = 0; j < Source::kWord; ++j) {
        const Real u = Source::student_of(raw, k * Source::kWord + j),
                   w = Source::teacher_of(raw, k * Source::kWord + j);
        const Real e_u = exp2_fast(fused(u, parameters.student_scale, -parameters.student_shift.shift));
        const Real e_w = exp2_fast(fused(w, parameters.teacher_scale, -parameters.teacher_shift.shift));
        const bool in = inside(w);
        word[j] = fused(e_u, in ? by_q : outside_by_q, in ? e_w * by_p : Real(0));
      }
      set_word(out, k, word_from<Item>(word));
    }
    return out;
  }
};

// Gradients of an entry. The student's is without the label term's onehot.
template <bool kSoft, class Real>
__device__ __forceinline__ Real clip_student_gradient(const ClipParameters<Real>& parameters, const Outcome<Real>& o,
                                                      const ClipShare<Real>& share) {
  if (!kSoft && share.own == Real(0)) {
    const Real rest = parameters.factors.student * parameters.delta + parameters.factors.label_q;
    return rest == Real(0) ? rest : rest * o.q;
  }
  const Real part = select(o.small, parameters.alpha * o.difference + (parameters.alpha - parameters.gamma) * o.p,
                           parameters.alpha * o.q - parameters.gamma * o.p);
  return parameters.factors.student * (share.own * part + share.rest * parameters.delta * o.q) +
         parameters.factors.label_q * o.q;
}
template <bool kSoft, class Real>
__device__ __forceinline__ Real clip_teacher_gradient(const ClipParameters<Real>& parameters, const Outcome<Real>& o,
                                                      const ClipShare<Real>& share) {
  Real own = share.own * (parameters.by_own_p - parameters.by_a * o.d);
  if constexpr (kSoft) {
    const Real by_share = parameters.by_a * (-o.p * o.d) + parameters.by_p * o.p + parameters.by_q * o.q;
    own -= (share.by_lower + share.by_upper) * by_share;
  }
  return parameters.factors.teacher * o.p * (own - parameters.mean);
}

// The data and work of the leading thread, in double precision, once per row.
template <class Real>
struct ClipLeader {
  RowTask task;
  RowFrame<Real> frame;
  RowState<double> state;
  ClipEdges edges;
  ClipQuantile quantiles[2];  // of the lower and the upper edge
  ClipSums sums;
  ClipNumbers numbers;
  double label_logit, nan_or_zero;

  // Sets the bounds as given. Invalid values that the host could not check make the row NaN and are replaced by 0. A
  // label out of range shows as a NaN weight.
  __device__ __noinline__ void set_bounds(double low, double high, bool quantile, double softness) {
    const bool valid = low <= high && (!quantile || (low >= 0 && high <= 1));
    nan_or_zero = valid ? task.label_weight - task.label_weight : double(NAN);
    edges.lower = valid ? low : 0;
    edges.upper = valid ? high : 0;
    edges.softness = softness;
  }

  // Publishes whether the row is read, and how its logits are scaled.
  __device__ __noinline__ void open(bool read, int label, bool keep_label, ClipParameters<Real>* published) {
    ClipParameters<Real> parameters{};
    parameters.read = read;
    if (read) {
      parameters.kept = keep_label ? label : -1;
      task.has_label = task.has_label && task.label_weight != 0;
      parameters.label = task.has_label ? label : -1;
      frame.set_scales(task);
      parameters.student_scale = frame.student_scale;
      parameters.teacher_scale = frame.teacher_scale;
      parameters.label_scale = frame.label_scale;
      parameters.student_gradient = task.student_gradient;
      parameters.teacher_gradient = task.teacher_gradient;
    }
    shared_store(published, parameters);
  }

  // To be called after pass 1: computes where the edges lie.
  __device__ __noinline__ void begin(bool quantile, ClipParameters<Real>* published) {
    frame.normalize(task, state);
    nan_or_zero += (frame.student_lse - frame.student_lse) + (frame.teacher_lse - frame.teacher_lse);
    if (quantile) {
      edges.lower_logit = quantiles[0].fraction > 0 ? quantiles[0].above : quantiles[0].below;
      edges.upper_logit = quantiles[1].below;
      edges.lower = probability_at(quantiles[0]);
      edges.upper = probability_at(quantiles[1]);
    } else {
      edges.lower_logit = logit_of(edges.lower, /*upper=*/false);
      edges.upper_logit = logit_of(edges.upper, /*upper=*/true);
    }
    const bool soft = edges.softness != 0;
    ClipParameters<Real> parameters = shared_load(published);
    parameters.at = frame.normalized();
    parameters.factors = GradientFactors<Real>(task, frame);
    parameters.label_shift = Real(frame.label_lse);
    parameters.student_shift = {frame.student_scale, frame.student_origin, frame.student_lse};
    parameters.teacher_shift = {frame.teacher_scale, frame.teacher_origin, frame.teacher_lse};
    // ClipFast has formulas for hard edges and the student's gradient alone. Sums and gradients are computed alike, so
    // that their rounding errors cancel where they should: in a part of one token the gradient is 0.
    parameters.near = soft || parameters.teacher_gradient || parameters.label_scale != Real(0) ||
                      !parameters.student_shift.usable || !parameters.teacher_shift.usable;
    parameters.low = Real(soft ? edges.lower : edges.lower_logit);
    parameters.high = Real(soft ? edges.upper : edges.upper_logit);
    parameters.sharp = soft ? Real(1 / edges.softness) : Real(0);
    shared_store(published, parameters);
  }

  // To be called after pass 2: computes the value and the factors of the gradients. near: the sums are exact also where
  // student and teacher are close; else they may have to be computed again, and only `near` is published.
  __device__ __noinline__ void finish(Renormalize renormalize, bool lump, bool near, ClipParameters<Real>* published) {
    const bool close = is_close(sums), again = close && !near;
    const bool small = !again && nan_or_zero == 0 && is_small(sums, renormalize, lump);
    if (!again) numbers = clip_numbers(sums, renormalize, lump, nan_or_zero);
    ClipParameters<Real> parameters = shared_load(published);  // after these, which need many registers
    parameters.near = near || close;
    if (again) return shared_store(published, parameters);
    parameters.small = small;
    parameters.factors.teacher = Real(parameters.factors.teacher * numbers.gain);
    parameters.alpha = Real(numbers.alpha);
    parameters.gamma = Real(numbers.gamma);
    parameters.delta = Real(numbers.delta + nan_or_zero);  // the only factor used by entries outside the part
    parameters.by_a = Real(numbers.by_a);
    parameters.by_p = Real(numbers.by_p);
    parameters.by_own_p = Real(numbers.by_a + numbers.by_p);
    parameters.by_q = Real(numbers.by_q);
    parameters.mean = Real(numbers.mean);
    shared_store(published, parameters);
  }

  __device__ __noinline__ double loss() const {
    const double label = task.has_label ? frame.label_lse * kLn2 - (label_logit - double(frame.student_origin)) : 0;
    return numbers.value * task.divergence_scale + (task.has_label ? task.label_weight * label : 0);
  }

  // Scales the gradients of the bounds to the form in which they were given: for a quantile its level, not its
  // probability.
  __device__ __noinline__ void scale_bound_gradients(bool quantile, int vocab) {
    const double scale = task.scale * task.divergence_scale;
    numbers.lower_gradient *= scale;
    numbers.upper_gradient *= scale;
    if (!quantile) return;
    const double steps = vocab - 1;
    numbers.lower_gradient *= steps * (probability_of(quantiles[0].above) - probability_of(quantiles[0].below));
    numbers.upper_gradient *= steps * (probability_of(quantiles[1].above) - probability_of(quantiles[1].below));
  }

 private:
  __device__ double probability_of(double logit) const {
    return ::exp2((logit - frame.teacher_origin) * double(frame.teacher_scale) - frame.teacher_lse);
  }
  __device__ double probability_at(const ClipQuantile& x) const {
    const double below = probability_of(x.below);
    return below + x.fraction * (probability_of(x.above) - below);
  }
  __device__ double logit_of(double p, bool upper) const {
    return edge_logit<Real>(p, upper, frame.teacher_origin, frame.teacher_scale, frame.teacher_lse);
  }
};

}  // namespace fastkd::cuda
