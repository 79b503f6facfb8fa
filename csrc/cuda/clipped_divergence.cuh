// The parts of clipped_divergence's passes over a row: entries' shares in the part between the edges, the sums over it,
// the leading thread's work between the passes, and the selection of quantiles.
#pragma once
#include <type_traits>

#include "../math/clipped_small.h"
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

// A quantile of a quantity that grows with the logits: its value at `below` plus `fraction` of the difference to that
// at `above`.
struct ClipQuantile {
  double below, above, fraction;
};

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
    ClipParameters<Real> parameters = shared_load(published);
    parameters.near = near || is_close(sums);
    if (parameters.near && !near) return shared_store(published, parameters);
    parameters.small = nan_or_zero == 0 && is_small(sums, renormalize, lump);
    numbers = clip_numbers(sums, renormalize, lump, nan_or_zero);
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

// The teacher's logits of a row as a source of their own. kBits: how many of a logit's leading bits may differ between
// logits of equal sign; all others follow from the sign.
template <class Source>
struct ClipTeacher;

template <class T>
struct ClipTeacher<PackedSource<T>> {
  using Rows = PackedSource<T, false>;
  static constexpr int kBits = sizeof(typename Rows::Item) == 4 ? 32 : std::is_same<T, BFloat16>::value ? 16 : 24;
  const Rows rows;

  __device__ explicit ClipTeacher(const PackedSource<T>& source) : rows(source.teacher_alone()) {}
  static __device__ __forceinline__ float logit(const typename Rows::Raw& raw, int j) {
    return Rows::student_of(raw, j);
  }
};

template <>
struct ClipTeacher<AnySource> {
  using Rows = AnySource;
  static constexpr int kBits = 32;
  const Rows& rows;

  __device__ explicit ClipTeacher(const AnySource& source) : rows(source) {}
  static __device__ __forceinline__ float logit(const AnySource::Raw& raw, int) { return raw.teacher; }
};

// Finds the teacher's logits between which a row's quantile levels lie, by their ranks. It is a radix search over bits
// that compare in the order of the numbers, 8 bits per pass, with a histogram for each of the four ranks (ranks with
// equal leading bits share one). The counts are integers, so the order of threads has no effect. A NaN is ordered
// beyond the infinities.
template <class Source>
struct ClipSelect {
  using Teacher = ClipTeacher<Source>;
  using Rows = typename Teacher::Rows;
  static constexpr int kTargets = 4, kBins = 256, kLaneBins = kBins / kWarp;
  struct Target {
    unsigned prefix;  // the leading bits known so far; the others are 0
    int rank;         // among the logits with this prefix
  };
  struct alignas(16) Bins {
    unsigned count[4];
  };
  static constexpr int kBytes = 2 * kTargets * int(sizeof(Target)) + kTargets * kBins * int(sizeof(unsigned));

  const Teacher teacher;
  const Team& team;
  const int vocab;
  Target* const targets;  // two sets: one is read while the other is written
  unsigned* const histograms;

  __device__ ClipSelect(const Source& source, const Team& t, unsigned char* shared)
      : teacher{source},
        team(t),
        vocab(source.arguments.vocab),
        targets(reinterpret_cast<Target*>(shared)),
        histograms(reinterpret_cast<unsigned*>(targets + 2 * kTargets)) {}

  // levels are in [0, 1]. begin() and finish() are called by the leading thread only.
  __device__ void begin(double lower_level, double upper_level, ClipQuantile (&quantiles)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const double place = (i == 0 ? lower_level : upper_level) * double(vocab - 1);
      const int below = int(place);
      quantiles[i].fraction = place - double(below);
      shared_store(targets + 2 * i, Target{0, below});
      shared_store(targets + 2 * i + 1, Target{0, below + 1 < vocab ? below + 1 : below});
    }
  }

  // Returns the direction of the next pass, the opposite of the last one's.
  __device__ bool run(bool backwards) const {
    int from = 0;
#pragma unroll 1
    for (int shift = 24; shift >= 32 - Teacher::kBits; shift -= 8, from ^= kTargets, backwards = !backwards) {
      for (int i = team.thread; i < kTargets * kBins; i += team.threads) shared_store(histograms + i, 0u);
      team.sync();
      count(targets + from, shift, backwards);
      sync_all();
      descend(targets + from, targets + (from ^ kTargets), shift);
      sync_all();
    }
    return backwards;
  }

  __device__ void finish(ClipQuantile (&quantiles)[2]) const {
    const Target* const found = targets + (Teacher::kBits / 8 % 2) * kTargets;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      quantiles[i].below = number_of(shared_load(found + 2 * i).prefix);
      quantiles[i].above = number_of(shared_load(found + 2 * i + 1).prefix);
    }
  }

 private:
  __device__ void sync_all() const {
    if (team.blocks > 1) {
      cluster_sync();
    } else {
      team.sync();
    }
  }

  // Bits that compare in the order of the numbers, and the inverse. A key's bits below the leading kBits are all 0 for
  // positive numbers and all 1 for negative ones.
  static __device__ __forceinline__ unsigned key_of(float x) {
    const unsigned bits = bit_cast<unsigned>(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  static __device__ float number_of(unsigned key) {
    return bit_cast<float>(key & 0x80000000u ? key ^ 0x80000000u
                                             : ~(key | unsigned((uint64_t(1) << (32 - Teacher::kBits)) - 1)));
  }

  static __device__ __forceinline__ bool shares(unsigned key, unsigned prefix, int shift) {
    return (key ^ prefix) >> shift >> 8 == 0;
  }

  static __device__ __forceinline__ void add_one(unsigned* to) {
    FASTKD_TWIN(, simt::shared_read(to, sizeof(*to)));  // 0 at the last barrier; only atomics since
    atomicAdd(to, 1u);
  }

  // Counts the next 8 bits of all logits that share a target's prefix.
  __device__ void count(const Target* now, int shift, bool backwards) const {
    unsigned prefix[kTargets];
    bool own[kTargets];
#pragma unroll
    for (int t = 0; t < kTargets; ++t) {
      prefix[t] = shared_load(now + t).prefix;
      own[t] = true;
#pragma unroll
      for (int s = 0; s < t; ++s) own[t] = own[t] && prefix[s] != prefix[t];
    }
    for_packs<false>(teacher.rows, team, backwards, [&](int pack, const typename Rows::Raw& raw) {
      const int column = teacher.rows.column(pack);
#pragma unroll
      for (int j = 0; j < Rows::kSize; ++j) {
        if (unsigned(column + j) >= unsigned(vocab)) continue;
        const unsigned key = key_of(Teacher::logit(raw, j));
#pragma unroll
        for (int t = 0; t < kTargets; ++t) {
          if (own[t] && shares(key, prefix[t], shift)) add_one(histograms + t * kBins + (key >> shift & (kBins - 1)));
        }
      }
    });
  }

  // Extends each target by its next 8 bits, from the histograms of all blocks. Each target is handled by one warp.
  __device__ void descend(const Target* now, Target* next, int shift) const {
    const int lane = team.thread % kWarp, warps = team.threads / kWarp;
#pragma unroll 1
    for (int t = team.thread / kWarp; t < kTargets; t += warps) {
      const Target target = shared_load(now + t);
      int at = 0;
      while (shared_load(now + at).prefix != target.prefix) ++at;
      unsigned* const first = histograms + at * kBins + lane * kLaneBins;
      unsigned bins[kLaneBins] = {};
#pragma unroll 1
      for (unsigned r = 0; r < team.blocks; ++r) {
        const Bins* const from = reinterpret_cast<const Bins*>(team.blocks > 1 ? in_peer(first, r) : first);
#pragma unroll
        for (int i = 0; i < kLaneBins; i += 4) {
          const Bins four = shared_load(from + i / 4);
#pragma unroll
          for (int k = 0; k < 4; ++k) bins[i + k] += four.count[k];
        }
      }
      unsigned all = 0, before = 0;  // all: of the lanes so far; before: of those before this lane
#pragma unroll
      for (int i = 0; i < kLaneBins; ++i) all += bins[i];
      const unsigned mine = all, rank = unsigned(target.rank);
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const unsigned other = shuffle_xor(all, step);
        if (lane & step) before += other;
        all += other;
      }
      if (rank < before || rank - before >= mine) continue;
#pragma unroll
      for (int i = 0; i < kLaneBins; ++i) {
        if (rank >= before && rank - before < bins[i]) {
          shared_store(next + t, Target{target.prefix | unsigned(lane * kLaneBins + i) << shift, int(rank - before)});
        }
        before += bins[i];
      }
    }
  }
};

}  // namespace fastkd::cuda
