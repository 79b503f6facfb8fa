// clipped_divergence of one row: its loss and gradients.
//
// Memory: pass 1 reads student and teacher, computes their normalisers, and stores 2^x of every entry. Pass 2 sums over
// the part between the edges, from the logits, which are in the cache by then. The last pass writes the gradients. A
// label belongs to the part wholly, whatever its probability.
#pragma once
#include "../math/clipped_small.h"
#include "softmax_divergence_passes.h"

namespace fastkd {

// An edge given as a quantile level: the two logits that it lies between, and the fraction of the way.
struct QuantileEdge {
  double below, above, fraction;
};

struct ClippedRow {
  SoftmaxDivergenceRow base;  // one teacher
  int64_t kept_label;         // -1: none
  Renormalize renormalize;
  bool lump, quantile;
  double lower, upper;  // probabilities, where the edges are not quantiles
  QuantileEdge lower_quantile, upper_quantile;
  double softness;
  // Results besides the value: gradients of the edges in the form given (level or probability), times the row's scale.
  double lower_gradient, upper_gradient;
};

using ClippedKernel = double (*)(ClippedRow& row, const SliceRunner& runner);

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

// The entries of a block: probabilities from what pass 1 stored, log-ratios from the logits.
template <class Real>
struct StoredAndLogits {
  Normalized<Real> at;
  const Real *student, *teacher;
  Stored<Real, Pass::kNormalizersOnly> stored;
  FASTKD_INLINE Outcome<Real> outcome(int64_t i) const {
    Outcome<Real> o = at.template outcome<true>(student[i], teacher[i]);
    const Outcome<Real> probabilities = stored.outcome(i);
    o.p = probabilities.p;
    o.q = probabilities.q;
    o.difference = select(o.small, o.p * (o.d + expm1_gap(o.d)), o.q - o.p);
    return o;
  }
};

// The share of each entry of a block in the part (own), its complement (rest), and the derivatives of the share by the
// edges.
template <class Real>
struct Shares {
  alignas(64) Real own[kBlock], rest[kBlock], by_lower[kBlock], by_upper[kBlock];
};

template <class Real>
struct ClippedPasses : RowPasses<Real> {
  using Base = RowPasses<Real>;
  using Base::frame;
  using Base::vocab;
  const ClippedRow& clip;
  ClipEdges edges;

  ClippedPasses(const ClippedRow& r, const SliceRunner& s, const RowFrame<Real>& f) : Base(r.base, s, f), clip(r) {}

  double probability_of(double logit) const {
    return ::exp2((logit - frame.teacher_origin) * double(frame.teacher_scale) - frame.teacher_lse);
  }
  double logit_of(double p, bool upper) const {
    return edge_logit<Real>(p, upper, frame.teacher_origin, frame.teacher_scale, frame.teacher_lse);
  }

  void set_edges() {
    edges.softness = clip.softness;
    if (clip.quantile) {
      const auto between = [&](const QuantileEdge& q) {
        const double below = probability_of(q.below);
        return below + q.fraction * (probability_of(q.above) - below);
      };
      edges.lower = between(clip.lower_quantile);
      edges.upper = between(clip.upper_quantile);
      edges.lower_logit = clip.lower_quantile.fraction > 0 ? clip.lower_quantile.above : clip.lower_quantile.below;
      edges.upper_logit = clip.upper_quantile.below;
    } else {
      edges.lower = clip.lower;
      edges.upper = clip.upper;
      edges.lower_logit = logit_of(clip.lower, /*upper=*/false);
      edges.upper_logit = logit_of(clip.upper, /*upper=*/true);
    }
  }

  // Returns sigmoid(x). Sets `opposite` to e^-x: sigmoid(x) e^-x is sigmoid(-x).
  static Real sigmoid(Real x, Real& opposite) {
    constexpr Real kMost = sizeof(Real) == sizeof(double) ? 1000 : 126;
    opposite = exp2_of(at_least(-kMost, at_most(kMost, -x * Real(kLog2E))));
    return Real(1) / (Real(1) + opposite);
  }

  // w: the teacher's logits.
  void fill_shares(const Real* w, int64_t begin, int64_t count, Shares<Real>& out) const {
    if (edges.softness == 0) {
      const Real low = Real(edges.lower_logit), high = Real(edges.upper_logit);
      FASTKD_SIMD
      for (int64_t i = 0; i < count; ++i) {
        out.own[i] = w[i] >= low && w[i] <= high ? Real(1) : Real(0);
        out.rest[i] = Real(1) - out.own[i];
      }
    } else {
      const Real origin = frame.teacher_origin, scale = frame.teacher_scale, lse = Real(frame.teacher_lse);
      const Real low = Real(edges.lower), high = Real(edges.upper), sharp = Real(1 / edges.softness);
      FASTKD_SIMD
      for (int64_t i = 0; i < count; ++i) {
        const Real p = exp2_of((w[i] - origin) * scale - lse);
        Real to_a, to_b;
        const Real a = sigmoid((p - low) * sharp, to_a), b = sigmoid((high - p) * sharp, to_b);
        const Real own = a * b, not_a = a * to_a, not_b = b * to_b;
        out.own[i] = own;
        out.rest[i] = not_a + a * not_b;
        out.by_lower[i] = -own * not_a * sharp;
        out.by_upper[i] = own * not_b * sharp;
      }
    }
    if (has_kept_label(begin, count)) {
      out.own[clip.kept_label - begin] = Real(1);
      out.rest[clip.kept_label - begin] = Real(0);
      out.by_lower[clip.kept_label - begin] = out.by_upper[clip.kept_label - begin] = Real(0);
    }
  }

  // With hard edges the short sums are tried first, in which K is a difference of sums. K is summed directly where that
  // difference cancels or is not finite.
  ClipSums sum_part() const {
    if (edges.softness == 0) {
      const ClipSums sums =
          sum_blocks([&](ClipSums& all, int64_t begin, int64_t count) { add_hard_block(all, begin, count); });
      if (sums.k >= kNearSum * sums.p && sums.k < INFINITY) return sums;
    }
    return sum_blocks([&](ClipSums& all, int64_t begin, int64_t count) { add_block(all, begin, count); });
  }

  template <class AddBlock>
  ClipSums sum_blocks(const AddBlock& add) const {
    return this->template reduce_slices<ClipSums>(
        [&](int64_t slice) {
          ClipSums all{};
          this->for_blocks(slice, [&](int64_t begin, int64_t count) { add(all, begin, count); });
          return all;
        },
        [](ClipSums& all, const ClipSums& next) { all.add(next); });
  }

  void add_hard_block(ClipSums& all, int64_t begin, int64_t count) const {
    if (has_kept_label(begin, count)) return add_block(all, begin, count);
    alignas(64) Real u_buffer[kBlock], w_buffer[kBlock];
    const Real* u = load(this->row.student, begin, count, u_buffer);
    const Real* w = load(this->row.teachers.rows[0], begin, count, w_buffer);
    const Stored<Real, Pass::kNormalizersOnly> stored = this->template from_stored<Pass::kNormalizersOnly>(begin, 0);
    const Real u_zero = frame.student_origin, w_zero = frame.teacher_origin, teacher_ratio = frame.teacher_ratio;
    const Real low = Real(edges.lower_logit), high = Real(edges.upper_logit);
    const Real *const keep_u = stored.student, *const keep_w = stored.teacher;
    Real p = 0, q = 0, p_rest = 0, q_rest = 0, ratio = 0;
    FASTKD_SIMD_REDUCE(+ : p, q, p_rest, q_rest, ratio)
    for (int64_t i = 0; i < count; ++i) {
      const bool own = w[i] >= low && w[i] <= high;
      const Real e_w = keep_w[i], e_u = keep_u[i];
      const Real own_w = select(own, e_w, Real(0)), own_u = select(own, e_u, Real(0));
      const Real apart = (w[i] - w_zero) * teacher_ratio - (u[i] - u_zero);
      p += own_w;
      q += own_u;
      p_rest += e_w - own_w;
      q_rest += e_u - own_u;
      ratio += own_w * select(own_w > Real(0), apart, Real(0));
    }
    const double p_factor = stored.teacher_factor, q_factor = stored.student_factor;
    ClipSums block{};
    block.p = p * p_factor;
    block.q = q * q_factor;
    block.p_rest = p_rest * p_factor;
    block.q_rest = q_rest * q_factor;
    block.a =
        ratio * p_factor * (frame.student_scale * kLn2) + block.p * ((frame.student_lse - frame.teacher_lse) * kLn2);
    block.difference = block.q - block.p;
    block.k = block.a + block.difference;
    all.add(block);
  }

  StoredAndLogits<Real> entries_of(const Real* u, const Real* w, int64_t begin) const {
    return {frame.normalized(), u, w, this->template from_stored<Pass::kNormalizersOnly>(begin, 0)};
  }

  void add_block(ClipSums& all, int64_t begin, int64_t count) const {
    alignas(64) Real u_buffer[kBlock], w_buffer[kBlock];
    Shares<Real> shares;
    const Real* u = load(this->row.student, begin, count, u_buffer);
    const Real* w = load(this->row.teachers.rows[0], begin, count, w_buffer);
    fill_shares(w, begin, count, shares);
    const StoredAndLogits<Real> entries = entries_of(u, w, begin);
    Real lost = 0, k = 0, a = 0, p = 0, q = 0, difference = 0, p_rest = 0, q_rest = 0;
    const Real *const share = shares.own, *const rests = shares.rest;
    FASTKD_SIMD_REDUCE(+ : lost, k, a, p, q, difference, p_rest, q_rest)
    for (int64_t i = 0; i < count; ++i) {
      const Real s = share[i], rest = rests[i];
      const Outcome<Real> o = entries.outcome(i);
      lost += o.log2_q < Real(-kInfiniteLogRatio) ? s * o.p : Real(0);
      k += s * kl_term<true>(o);
      a -= s * o.p * o.d;
      p += s * o.p;
      q += s * o.q;
      difference += s * o.difference;
      p_rest += rest * o.p;
      q_rest += rest * o.q;
    }
    ClipSums block{lost > Real(0) ? double(INFINITY) : double(k),
                   double(a),
                   double(p),
                   double(q),
                   double(difference),
                   double(p_rest),
                   double(q_rest),
                   {},
                   {},
                   {}};
    if (edges.softness != 0) add_edges(block, entries, shares, count);
    all.add(block);
  }

  void add_edges(ClipSums& all, const StoredAndLogits<Real> entries, const Shares<Real>& shares, int64_t count) const {
    Real l0 = 0, l1 = 0, l2 = 0, u0 = 0, u1 = 0, u2 = 0, o0 = 0, o1 = 0, o2 = 0;
    FASTKD_SIMD_REDUCE(+ : l0, l1, l2, u0, u1, u2, o0, o1, o2)
    for (int64_t i = 0; i < count; ++i) {
      const Outcome<Real> o = entries.outcome(i);
      const Real lower = shares.by_lower[i], upper = shares.by_upper[i], own = -(lower + upper) * o.p;
      const Real term = -o.p * o.d;
      l0 += lower * term;
      l1 += lower * o.p;
      l2 += lower * o.q;
      u0 += upper * term;
      u1 += upper * o.p;
      u2 += upper * o.q;
      o0 += own * term;
      o1 += own * o.p;
      o2 += own * o.q;
    }
    const double lower[3] = {l0, l1, l2}, upper[3] = {u0, u1, u2}, own[3] = {o0, o1, o2};
    for (int i = 0; i < 3; ++i) {
      all.lower[i] = lower[i];
      all.upper[i] = upper[i];
      all.own[i] = own[i];
    }
  }

  // All parameters are passed by value: in a loop with stores the compiler must reload what it reads through
  // references.
  template <class AnyEntries>
  static void student_block(const AnyEntries entries, const Real* share, const Real* rest, int64_t count,
                            const GradientFactors<Real> factors, Real alpha, Real gamma, Real delta, Real* out) {
    const Real surplus = alpha - gamma;
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) {
      const Outcome<Real> o = entries.outcome(i);
      const Real part = select(o.small, alpha * o.difference + surplus * o.p, alpha * o.q - gamma * o.p);
      out[i] = factors.student * (share[i] * part + rest[i] * delta * o.q) + factors.label_q * o.q;
    }
  }

  // The same for hard edges, from what pass 1 stored.
  static void hard_block(const Stored<Real, Pass::kNormalizersOnly> stored, const Real* w, Real low, Real high,
                         int64_t count, const GradientFactors<Real> factors, Real alpha, Real gamma, Real delta,
                         Real* out) {
    const Real own_q = (factors.student * alpha + factors.label_q) * stored.student_factor;
    const Real own_p = factors.student * gamma * stored.teacher_factor;
    const Real rest_q = (factors.student * delta + factors.label_q) * stored.student_factor;
    const Real *const q = stored.student, *const p = stored.teacher;
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) {
      const bool own = w[i] >= low && w[i] <= high;
      out[i] = q[i] * select(own, own_q, rest_q) - p[i] * select(own, own_p, Real(0));
    }
  }

  bool has_kept_label(int64_t begin, int64_t count) const {
    return clip.kept_label >= begin && clip.kept_label < begin + count;
  }

  // The label's softmax times its factor.
  void label_block(const Real* u, int64_t count, Real factor, Real* out) const {
    const Real origin = frame.student_origin, scale = frame.label_scale, shift = Real(frame.label_lse);
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) out[i] = factor * exp2_of((u[i] - origin) * scale - shift);
  }

  // near: student and teacher nearly agree in the part, and q - p by subtraction would not be accurate.
  void write_student(const ClipNumbers& numbers, const GradientFactors<Real>& factors, bool near) const {
    const bool label_apart = frame.label_scale != Real(0);
    const Real alpha = Real(numbers.alpha), gamma = Real(numbers.gamma), delta = Real(numbers.delta);
    this->for_slices([&](int64_t slice) {
      this->for_blocks(slice, [&](int64_t begin, int64_t count) {
        alignas(64) Real u_buffer[kBlock], w_buffer[kBlock], buffer[kBlock], label_part[kBlock];
        const Real* u = load(this->row.student, begin, count, u_buffer);
        const Real* w = load(this->row.teachers.rows[0], begin, count, w_buffer);
        // Computed now, since writing the gradient may overwrite the student's logits.
        if (label_apart) label_block(u, count, factors.label, label_part);
        Real* out = destination(this->row.student_gradient, begin, buffer);
        if (edges.softness == 0 && !near && !has_kept_label(begin, count)) {
          const auto stored = this->template from_stored<Pass::kNormalizersOnly>(begin, 0);
          hard_block(stored, w, Real(edges.lower_logit), Real(edges.upper_logit), count, factors, alpha, gamma, delta,
                     out);
        } else {
          Shares<Real> shares;
          fill_shares(w, begin, count, shares);
          if (near) {
            student_block(entries_of(u, w, begin), shares.own, shares.rest, count, factors, alpha, gamma, delta, out);
          } else {
            const auto stored = this->template from_stored<Pass::kNormalizersOnly>(begin, 0);
            student_block(stored, shares.own, shares.rest, count, factors, alpha, gamma, delta, out);
          }
        }
        if (label_apart) {
          FASTKD_SIMD
          for (int64_t i = 0; i < count; ++i) out[i] += label_part[i];
        }
        const int64_t label = this->row.label;
        if (label >= begin && label < begin + count) out[label - begin] -= factors.label;
        store(this->row.student_gradient, begin, count, out);
      });
      finish_streaming(this->row.student_gradient);
    });
  }

  static void teacher_block(const StoredAndLogits<Real> entries, const Shares<Real>& shares, int64_t count, Real factor,
                            Real by_a, Real by_p, Real by_own_p, Real by_q, Real mean, Real* out) {
    const Real *const share = shares.own, *const lower = shares.by_lower, *const upper = shares.by_upper;
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) {
      const Outcome<Real> o = entries.outcome(i);
      const Real by_share = by_a * (-o.p * o.d) + by_p * o.p + by_q * o.q;
      const Real own = share[i] * (by_own_p - by_a * o.d) - (lower[i] + upper[i]) * by_share;
      out[i] = factor * o.p * (own - mean);
    }
  }

  void write_teacher(const ClipNumbers& numbers, const GradientFactors<Real>& factors) const {
    this->for_slices([&](int64_t slice) {
      this->for_blocks(slice, [&](int64_t begin, int64_t count) {
        alignas(64) Real u_buffer[kBlock], w_buffer[kBlock], buffer[kBlock];
        Shares<Real> shares;
        const Real* u = load(this->row.student, begin, count, u_buffer);
        const Real* w = load(this->row.teachers.rows[0], begin, count, w_buffer);
        fill_shares(w, begin, count, shares);
        if (edges.softness == 0) {
          for (int64_t i = 0; i < count; ++i) shares.by_lower[i] = shares.by_upper[i] = Real(0);
        }
        Real* out = destination(this->row.teacher_gradient, begin, buffer);
        teacher_block(entries_of(u, w, begin), shares, count, Real(factors.teacher * numbers.gain), Real(numbers.by_a),
                      Real(numbers.by_p), Real(numbers.by_a + numbers.by_p), Real(numbers.by_q), Real(numbers.mean),
                      out);
        store(this->row.teacher_gradient, begin, count, out);
      });
      finish_streaming(this->row.teacher_gradient);
    });
  }
};

// The passes over a row in which a mass is too small: see clipped_small.h.
template <class Real>
struct SmallPasses {
  const ClippedPasses<Real>& passes;
  SmallRow small;

  SmallPasses(const ClippedPasses<Real>& p, const RowFrame<Real>& frame) : passes(p) {
    small.set(p.row.task, frame, p.edges, p.clip.renormalize);
  }

  // Calls body(column, student's logit, teacher's logit, whether it is the kept label) for a block's entries.
  template <class Body>
  void for_entries(int64_t begin, int64_t count, const Body& body) const {
    alignas(64) Real u_buffer[kBlock], w_buffer[kBlock];
    const Real* u = load(passes.row.student, begin, count, u_buffer);
    const Real* w = load(passes.row.teachers.rows[0], begin, count, w_buffer);
    for (int64_t i = 0; i < count; ++i) body(i, double(u[i]), double(w[i]), begin + i == passes.clip.kept_label);
  }

  void sum() {
    small.set_bases(passes.template reduce_slices<SmallBases>(
        [&](int64_t slice) {
          SmallBases mine;
          passes.for_blocks(slice, [&](int64_t begin, int64_t count) {
            for_entries(begin, count,
                        [&](int64_t, double u, double w, bool kept) { raise(mine, small.bases_of(u, w, kept)); });
          });
          return mine;
        },
        [](SmallBases& all, const SmallBases& next) { raise(all, next); }));
    small.finish(passes.sum_blocks([&](ClipSums& all, int64_t begin, int64_t count) {
      for_entries(begin, count,
                  [&](int64_t, double u, double w, bool kept) { add_entry(all, small.entry(u, w, kept)); });
    }));
  }

  template <class Function>
  void write(const Row& gradient, const Function& function) const {
    passes.for_slices([&](int64_t slice) {
      passes.for_blocks(slice, [&](int64_t begin, int64_t count) {
        alignas(64) Real buffer[kBlock];
        Real* out = destination(gradient, begin, buffer);
        for_entries(begin, count, [&](int64_t i, double u, double w, bool kept) {
          out[i] = Real(function(begin + i, u, small.entry(u, w, kept)));
        });
        store(gradient, begin, count, out);
      });
      finish_streaming(gradient);
    });
  }

  void write_teacher(double factor) const {
    write(passes.row.teacher_gradient,
          [&](int64_t, double, const SmallEntry& e) { return factor * small.teacher_gradient(e); });
  }
  void write_student(const GradientFactors<Real>& factors) const {
    const RowFrame<Real>& frame = passes.frame;
    const double label_scale = frame.label_scale, label_factor = label_scale != 0 ? factors.label : 0;
    write(passes.row.student_gradient, [&](int64_t column, double u, const SmallEntry& e) {
      double g = factors.student * small.student_gradient(e) + factors.label_q * e.q;
      if (label_factor != 0) g += label_factor * ::exp2((u - frame.student_origin) * label_scale - frame.label_lse);
      return column == passes.row.label ? g - factors.label : g;
    });
  }
};

template <class Real>
double clipped_row(ClippedRow& row, const SliceRunner& runner) {
  const RowTask& task = row.base.task;
  RowFrame<Real> frame;
  frame.set_scales(task);
  ClippedPasses<Real> passes(row, runner, frame);
  Real label_logit = 0;
  if (task.has_label) label_logit = *load(row.base.student, row.base.label, 1, &label_logit);
  frame.normalize(task, passes.template accumulate<Pass::kNormalizersOnly, true>());
  passes.set_edges();
  const ClipSums sums = passes.sum_part();
  const double nan_or_zero = (frame.student_lse - frame.student_lse) + (frame.teacher_lse - frame.teacher_lse);
  const GradientFactors<Real> factors(task, frame);
  double value, lower_gradient, upper_gradient;
  SmallPasses<Real> small(passes, frame);
  if (nan_or_zero == 0 && is_small(sums, row.renormalize, row.lump)) {
    small.sum();
    const SmallNumbers& numbers = small.small.numbers;
    value = numbers.value, lower_gradient = numbers.lower_gradient, upper_gradient = numbers.upper_gradient;
    if (row.base.teacher_gradient) small.write_teacher(factors.teacher);
    if (row.base.student_gradient) small.write_student(factors);
  } else {
    const ClipNumbers numbers = clip_numbers(sums, row.renormalize, row.lump, nan_or_zero);
    value = numbers.value, lower_gradient = numbers.lower_gradient, upper_gradient = numbers.upper_gradient;
    if (row.base.teacher_gradient) passes.write_teacher(numbers, factors);
    if (row.base.student_gradient) passes.write_student(numbers, factors, sums.k < kNearSum * sums.p);
  }
  if (row.base.teacher_gradient) fill_zero(row.base.teacher_gradient, row.base.vocab, row.base.teacher_width);
  if (row.base.student_gradient) fill_zero(row.base.student_gradient, row.base.vocab, row.base.student_width);
  const double scale = task.scale * task.divergence_scale;
  row.lower_gradient = lower_gradient * scale;
  row.upper_gradient = upper_gradient * scale;
  if (row.quantile) {  // gradients by the level, not by the probability at that level
    const auto slope = [&](const QuantileEdge& q) {
      return double(row.base.vocab - 1) * (passes.probability_of(q.above) - passes.probability_of(q.below));
    };
    row.lower_gradient *= slope(row.lower_quantile);
    row.upper_gradient *= slope(row.upper_quantile);
  }
  const double label = task.has_label ? frame.label_lse * kLn2 - (label_logit - double(frame.student_origin)) : 0;
  return value * task.divergence_scale + (task.has_label ? task.label_weight * label : 0);
}

extern const Precisions<ClippedKernel> clipped_kernels;

}  // namespace fastkd::FASTKD_ISA
