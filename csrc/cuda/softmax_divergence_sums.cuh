// softmax_divergence's sums: of the first pass over a row, those of both softmaxes and of the log-ratios by one side's
// weights; of later passes, those of the terms.
#pragma once
#include "../math/compensated_sum.h"
#include "../math/row_plan.h"
#include "common/block.cuh"
#include "common/far_sum.cuh"
#include "common/fast_sum.cuh"
#include "common/policy.cuh"
#include "common/sources.cuh"

namespace fastkd::cuda {

// What the leading thread publishes to the others: numbers of the row in the precision of the logits.
template <class Real>
struct RowParameters {
  Step step;
  bool read, near, student_gradient, teacher_gradient;
  int label;  // -1: none
  Real student_scale, teacher_scale, teacher_ratio, label_scale;
  double teacher_temperature, beta, alpha;
  Normalized<Real> at;
  GradientFactors<Real> factors;
  Mean<Real> student_mean, teacher_mean;
  Mean<Real> centre;  // student_mean as a difference of logits less their origins
  NormalizerShift<Real> student_shift, teacher_shift;
  Real label_shift;
  double by_scale;  // 1 / QuickScales::g
};

// Sums of pass 1 relative to one pair of origins: the student's, the teacher's, ratio, crossing; only those that the
// pass needs, since each takes shuffles.
template <Pass kPass>
struct PassSums {
  static constexpr bool kRatio = kPass != Pass::kNormalizersOnly, kCrossing = kPass == Pass::kTeacherCrossing;
  LaneSums<2 + kRatio + kCrossing> numbers;

  static __device__ __forceinline__ PassSums of(double student, double teacher, double ratio, double crossing) {
    PassSums sums{{{student, teacher}}};
    if constexpr (kRatio) sums.numbers.each[2] = ratio;
    if constexpr (kCrossing) sums.numbers.each[3] = crossing;
    return sums;
  }
  __device__ __forceinline__ double student() const { return numbers.each[0]; }
  __device__ __forceinline__ double teacher() const { return numbers.each[1]; }
  __device__ __forceinline__ double ratio() const {
    if constexpr (kRatio) return numbers.each[2];
    return 0;
  }
  __device__ __forceinline__ double crossing() const {
    if constexpr (kCrossing) return numbers.each[3];
    return 0;
  }
};

// The same of a block, with its origins.
template <class Real, Pass kPass>
struct BlockSums {
  Real student_origin, teacher_origin;
  PassSums<kPass> sums;
  double label;

  __device__ __forceinline__ RowState<double> state() const {
    return {{double(student_origin), sums.student()},
            {double(teacher_origin), sums.teacher()},
            sums.ratio(),
            sums.crossing(),
            label};
  }
  // No row.
  static __device__ __forceinline__ BlockSums empty() { return {Real(-INFINITY), Real(-INFINITY), {}, 0}; }

  // The sums over blocks, in a warp whose lane has the sums of block lane % kMostBlocks.
  __device__ __forceinline__ BlockSums over_blocks(const RowScales<double>& scales) const {
    BlockSums all = *this;
#pragma unroll
    for (int step = kMostBlocks / 2; step > 0; step /= 2) {
      all.student_origin = at_least(shuffle_xor(all.student_origin, step), all.student_origin);
      all.teacher_origin = at_least(shuffle_xor(all.teacher_origin, step), all.teacher_origin);
    }
    RowState<double> moved = state();
    // Both factors in float: an error of a factor is a slightly larger or smaller block.
    moved.raise(double(all.student_origin), double(all.teacher_origin), kPass, scales, [](double x, double y) {
      return RowFactors<double>{double(exp2_of(float(x))), double(exp2_of(float(y)))};
    });
    all.sums.numbers =
        PassSums<kPass>::of(moved.student.sum, moved.teacher.sum, moved.ratio, moved.crossing).numbers.over_half();
    all.label = scales.label != 0 ? LaneSums<1>{{moved.label_sum}}.over_half().each[0] : 0;
    return all;
  }
};

// A thread's share of pass 1, relative to origins of its own, near the thread's largest logits so far.
template <class Real, Pass kPass>
struct ThreadState {
  static constexpr bool kByStudent = kPass == Pass::kStudentWeighted, kRatio = kPass != Pass::kNormalizersOnly,
                        kCrossing = kPass == Pass::kTeacherCrossing;

  Real u_origin = Real(-INFINITY), w_origin = Real(-INFINITY);
  Real crossing = 0, label_sum = 0;
  // Where the student weights, its sum and the ratio become a mean that the gradient subtracts: beside a token of
  // nearly all the mass, the others keep their digits. Both sides are summed alike: equal sides have equal sums.
  CompensatedSum u_sum, w_sum;
  CompensatedSum ratio;
  FarSum<Real> far_ratio, far_crossing;

  static __device__ __forceinline__ void add_to(CompensatedSum& all, Real weight) {
    if constexpr (kByStudent) {
      all.add(weight);
    } else {
      all.sum += weight;
    }
  }
  static __device__ __forceinline__ void scale(CompensatedSum& all, Real by) {
    all.sum *= by;
    all.rest *= by;
  }

  // Adds a pack of any logits.
  template <class Source>
  __device__ __forceinline__ void add(typename Source::Raw raw, const RowParameters<Real>& parameters) {
    const Real us = parameters.student_scale, ws = parameters.teacher_scale, r = parameters.teacher_ratio;
    Real u_max = Source::student_of(raw, 0), w_max = Source::teacher_of(raw, 0);
    for_entries<Source>(raw, [&](Real u, Real w) {
      u_max = u > u_max ? u : u_max;
      w_max = w > w_max ? w : w_max;
    });
    // The label's softmax uses another temperature on the same logits. Neither sum may overflow.
    const Real steepest = at_least(us, parameters.label_scale);
    if (u_origin == Real(-INFINITY) || w_origin == Real(-INFINITY) || (u_max - u_origin) * steepest > Real(kSlack) ||
        (w_max - w_origin) * ws > Real(kSlack)) {
      raise(at_least(u_origin, u_max), at_least(w_origin, w_max), parameters);
    }
    const Real u_zero = u_origin == Real(-INFINITY) ? Real(0) : u_origin;
    const Real w_zero = w_origin == Real(-INFINITY) ? Real(0) : w_origin;
    constexpr Real kFar = Real(kDead);
    for_entries<Source>(raw, [&](Real u, Real w) {
      const Real x = u - u_zero, y = w - w_zero;
      const Real e_u = exp2_of(x * us), e_w = exp2_of(y * ws);
      add_to(u_sum, e_u);
      add_to(w_sum, e_w);
      if constexpr (kRatio) {
        // Log-ratios below -kFar belong to entries without weight.
        const Real log_ratio = kByStudent ? x - y * r : y * r - x;
        if constexpr (kByStudent) {
          if (magnitude(log_ratio) < kFar) ratio.add_product(e_u, log_ratio);
        } else {
          if (magnitude(log_ratio) < kFar) ratio.sum += e_w * log_ratio;
        }
        if (log_ratio >= kFar) {
          far_ratio.add(kByStudent ? x * us : y * ws, log_ratio);
        }
        if (kCrossing && -x >= kFar) far_crossing.add(y * ws, -x);
      }
      if constexpr (kCrossing) {
        if (x > -kFar) crossing -= e_w * x;
      }
      if (parameters.label_scale != Real(0)) label_sum += exp2_of(x * parameters.label_scale);
    });
  }

  // Converts the sums to larger origins. If there was no origin yet, the sums are 0.
  __device__ void raise(Real u_new, Real w_new, const RowParameters<Real>& parameters) {
    const Real r = parameters.teacher_ratio;
    const Real u_step = u_origin == Real(-INFINITY) ? Real(0) : step_between(u_origin, u_new);
    const Real w_step = w_origin == Real(-INFINITY) ? Real(0) : step_between(w_origin, w_new);
    const Real u_shrink = u_step * parameters.student_scale, w_shrink = w_step * parameters.teacher_scale;
    const Real u_scale = exp2_of(-u_shrink), w_scale = exp2_of(-w_shrink);
    if constexpr (kRatio) {
      const Real weight = kByStudent ? u_sum.sum : w_sum.sum, shrink = kByStudent ? u_shrink : w_shrink;
      const Real scale = kByStudent ? u_scale : w_scale, step = kByStudent ? w_step * r - u_step : u_step - w_step * r;
      far_ratio.raise(weight, shrink, step);
      if (kByStudent && weight > Real(0) && magnitude(step) < Real(kDead)) {
        // The mean keeps its digits where one entry has nearly all the weight.
        const double exact = double(w_step) * double(r) - double(u_step);
        ratio.add_product(weight, Real(exact));
        ratio.add_product(weight, Real(exact - double(Real(exact))));
        ratio.add_product(u_sum.rest, Real(exact));
        ratio.sum = carried(ratio.sum, Real(0), Real(0), scale);
      } else {
        ratio.sum = carried(ratio.sum, weight, step < Real(kDead) ? step : Real(0), scale);
      }
      ratio.rest *= scale;
    }
    if constexpr (kCrossing) {
      far_crossing.raise(w_sum.sum, w_shrink, u_step);
      crossing = carried(crossing, w_sum.sum, u_step < Real(kDead) ? u_step : Real(0), w_scale);
    }
    if (parameters.label_scale != Real(0)) label_sum *= exp2_of(-u_step * parameters.label_scale);
    scale(u_sum, u_scale);
    scale(w_sum, w_scale);
    u_origin = u_new;
    w_origin = w_new;
  }

  __device__ PassSums<kPass> whole() const {
    return PassSums<kPass>::of(u_sum.value(), w_sum.value(), ratio.value() + far_ratio.value(),
                               double(crossing) + far_crossing.value());
  }

 private:
  // A word at a time: a whole pack would need too many registers.
  template <class Source, class Body>
  static __device__ __forceinline__ void for_entries(typename Source::Raw raw, const Body& body) {
#pragma unroll 1
    for (int words = Source::kSize / Source::kWord; words > 0; --words, Source::next_word(raw)) {
#pragma unroll
      for (int j = 0; j < Source::kWord; ++j) body(Source::student_of(raw, j), Source::teacher_of(raw, j));
    }
  }
};

// Sums of pass 1 over packs whose entries need no care: finite log-ratios, and logits not far above the origins. They
// are relative to shifts, the origins times their scales rounded, so that an exponent takes one multiply-add. In
// base 2.
template <class Source, Pass kPass>
struct FastSums {
  using Real = typename Source::Real;
  using Item = typename Source::Item;
  using State = ThreadState<Real, kPass>;

  Real u_sum = 0, w_sum = 0, ratio = 0, crossing = 0, label_sum = 0;
  Real u_shift = 0, w_shift = 0;
  PackRange<Item> u_range, w_range;  // of the packs that may be added; at first none

  // Returns false for a pack that is not in the range.
  __device__ __forceinline__ bool add(const typename Source::Raw& raw, const State& all,
                                      const RowParameters<Real>& parameters) {
    if (!(u_range.below(raw.student) && w_range.below(raw.teacher))) return false;
    if (State::kRatio && !(u_range.above(raw.student) && w_range.above(raw.teacher))) return false;
#pragma unroll
    for (int j = 0; j < Source::kSize; ++j) {
      const Real x = fused(Source::student_of(raw, j), parameters.student_scale, -u_shift);
      const Real y = fused(Source::teacher_of(raw, j), parameters.teacher_scale, -w_shift);
      const Real e_u = exp2_fast(x), e_w = exp2_fast(y);
      u_sum += e_u;
      w_sum += e_w;
      if constexpr (State::kRatio) ratio = State::kByStudent ? fused(e_u, x - y, ratio) : fused(e_w, y - x, ratio);
      if constexpr (State::kCrossing) crossing = fused(e_w, -x, crossing);
    }
    if (parameters.label_scale != Real(0)) {
#pragma unroll
      for (int j = 0; j < Source::kSize; ++j) {
        label_sum += exp2_fast((Source::student_of(raw, j) - all.u_origin) * parameters.label_scale);
      }
    }
    return true;
  }

  // Adds these sums to `all`, which has the same origins, and begins again.
  __device__ __forceinline__ void move_to(State& all, const RowParameters<Real>& parameters) {
    if (u_sum == Real(0) && w_sum == Real(0)) return;  // perhaps there is no origin yet
    // What the rounding of the shifts adds to the exponents.
    const Real u_rest = fused(-all.u_origin, parameters.student_scale, u_shift);
    const Real w_rest = fused(-all.w_origin, parameters.teacher_scale, w_shift);
    const Real u_factor = exp2_of(u_rest), w_factor = exp2_of(w_rest), unit = Real(1) / parameters.student_scale;
    const Real u = u_sum * u_factor, w = w_sum * w_factor;
    if constexpr (State::kRatio) {
      const Real moved =
          State::kByStudent ? ratio * u_factor + u * (u_rest - w_rest) : ratio * w_factor + w * (w_rest - u_rest);
      all.ratio.add(moved * unit);
    }
    if constexpr (State::kCrossing) all.crossing += (crossing * w_factor - w * u_rest) * unit;
    State::add_to(all.u_sum, u);
    State::add_to(all.w_sum, w);
    all.label_sum += label_sum;
    u_sum = w_sum = ratio = crossing = label_sum = 0;
  }

  // Takes the origins of `all`.
  __device__ __forceinline__ void set_origins(const State& all, const RowParameters<Real>& parameters) {
    const Real us = parameters.student_scale, ws = parameters.teacher_scale;
    u_shift = all.u_origin * us;
    w_shift = all.w_origin * ws;
    u_range.clear();
    w_range.clear();
    // The rounding of larger shifts would be felt. False also where there is no origin yet.
    if (!(magnitude(u_shift) < Real(kLargestShift) && magnitude(w_shift) < Real(kLargestShift))) return;
    const Real far = Real(kFarLogit);
    u_range.set(all.u_origin - far, all.u_origin + Real(kSlack) / at_least(us, parameters.label_scale));
    w_range.set(all.w_origin - far / at_least(Real(1), parameters.teacher_ratio), all.w_origin + Real(kSlack) / ws);
  }
};

// The largest logits; their maximum over a block's threads becomes the common origin.
template <class Real>
struct Largest {
  Real student, teacher;
};

// The pack with the label's logits replaced by -inf, where the divergence excludes it.
template <bool kExcludes, class Source>
__device__ __forceinline__ typename Source::Raw without_label(const Source& source, int pack,
                                                              const typename Source::Raw& raw, int label) {
  if constexpr (!kExcludes) return raw;
  const int place = label - source.column(pack);
  return unsigned(place) < unsigned(Source::kSize) ? Source::without(raw, place) : raw;
}

// Pass 1: the states of both softmaxes, valid in the blocks' first warps. kExcludes: of all tokens but the label.
template <Pass kPass, bool kExcludes = false, class Source>
__device__ __forceinline__ RowState<double> first_pass(const Source& source, const Team& team,
                                                       const RowParameters<typename Source::Real>& parameters) {
  using Real = typename Source::Real;
  ThreadState<Real, kPass> mine;
  RowPass<true, Source> pass(source, team, false);
  if constexpr (Source::kPacked) {
    FastSums<Source, kPass> fast;
    for_packs(
        pass,
        [&](int pack, const typename Source::Raw& raw) {
          if (kExcludes && source.column(pack) <= parameters.label &&
              parameters.label < source.column(pack) + Source::kSize) {
            return false;
          }
          return fast.add(raw, mine, parameters);
        },
        [&](int pack, const typename Source::Raw& raw) {
          fast.move_to(mine, parameters);
          mine.template add<Source>(without_label<kExcludes>(source, pack, raw, parameters.label), parameters);
          fast.set_origins(mine, parameters);
        });
    fast.move_to(mine, parameters);
  } else {
    for_packs(pass, [&](int pack, const typename Source::Raw& raw) {
      mine.template add<Source>(without_label<kExcludes>(source, pack, raw, parameters.label), parameters);
    });
  }
  // With the same origins in all threads, the sums can simply be added.
  const auto at_least_both = [](Largest<Real>& all, const Largest<Real>& x) {
    all = {at_least(all.student, x.student), at_least(all.teacher, x.teacher)};
  };
  const Largest<Real> largest = team.block_sum<true>(Largest<Real>{mine.u_origin, mine.w_origin}, at_least_both);
  mine.raise(largest.student, largest.teacher, parameters);
  const PassSums<kPass> sums{team.block_sum(mine.whole().numbers)};
  double label = 0;
  if (parameters.label_scale != Real(0)) label = team.block_sum(LaneSums<1>{{double(mine.label_sum)}}).each[0];
  const double us = parameters.student_scale;
  using Block = BlockSums<Real, kPass>;
  Block block{largest.student, largest.teacher,
              PassSums<kPass>::of(sums.student(), sums.teacher(), sums.ratio() * us, sums.crossing() * us), label};
  if (team.blocks > 1) {
    block = team.each_block(block, Block::empty());
    if (team.thread < kWarp) {
      block = block.over_blocks({us, double(parameters.teacher_scale), double(parameters.label_scale)});
    }
  }
  return block.state();
}

// A thread's share of a pass that sums the terms.
template <bool kNear, class Divergence, class Real>
struct ThreadSums {
  Real f = 0, difference = 0;
  CompensatedSum qg, ph, q, p;

  __device__ __forceinline__ void add(const Divergence& divergence, const Outcome<Real>& o, bool teacher) {
    const Terms<Real> t = divergence.template operator()<kNear>(o);
    f += t.f;
    if constexpr (Divergence::kStudent != Form::kClosed) {
      qg.add_product(o.q, t.g);
      if constexpr (Divergence::kStudent == Form::kOpen) qg.add(t.student);
      q.add(o.q);
    }
    if constexpr (Divergence::kTeacher != Form::kClosed) {
      if (teacher) ph.add_product(o.p, t.h);
      if (Divergence::kTeacher == Form::kOpen && teacher) ph.add(t.teacher);
    }
    if (kNear || (teacher && Divergence::kTeacher != Form::kClosed)) p.add(o.p);
    if constexpr (kNear) difference += o.difference;
    if constexpr (!kNear && Divergence::kByMass) difference += t.mass;
  }

  __device__ Sums whole() const {
    return {double(f), qg.value(), ph.value(), q.value(), p.value(), double(difference)};
  }
};

}  // namespace fastkd::cuda
