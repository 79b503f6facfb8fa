// token_stats of one row.
//
// Memory: one read of each input. The first pass sums both softmaxes with their entropies and log-ratios, finds both
// argmaxes, and stores 2^x of every entry. The total variation distance needs the normalisers, so a second pass
// computes it from what was stored. Where the divergences are nearly 0, they are computed from the logits again, by
// sums in which nothing cancels.
#pragma once
#include "../math/normalized.h"
#include "../math/token_stats.h"
#include "common/row_slices.h"
#include "common/softmax_sums.h"

namespace fastkd {

struct StatsRow {
  int64_t vocab;
  Row student, teacher;  // teacher: empty if there is none
  double temperature;
  bool has_labels;
  int64_t label;  // -1: no label
  void* scratch;  // token_stats_scratch(...) bytes, aligned to 64
};

struct RowStats {
  SideStats student, teacher;
  PairStats both;
};

inline int64_t token_stats_scratch(int64_t vocab, int64_t real_size) {
  return slices_of(vocab) * (kPartialBytes + 64 + kSlice / kBlock * 16) + 2 * aligned(vocab * real_size);
}

using TokenStatsKernel = RowStats (*)(const StatsRow& row, const SliceRunner& runner);

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

template <class Real>
struct StatsPasses : RowSlices {
  const StatsRow& row;
  struct Found {
    Best<Real> student, teacher;
  };
  Found* found;               // one per slice
  Real* origins;              // two per block
  Real *stored_u, *stored_w;  // one per entry
  const Real scale;

  StatsPasses(const StatsRow& r, const SliceRunner& s)
      : RowSlices{r.vocab, s, static_cast<char*>(r.scratch)},
        row(r),
        found(reinterpret_cast<Found*>(partials + slices_of(r.vocab) * kPartialBytes)),
        origins(reinterpret_cast<Real*>(reinterpret_cast<char*>(found) + slices_of(r.vocab) * 64)),
        stored_u(
            reinterpret_cast<Real*>(reinterpret_cast<char*>(origins) + slices_of(r.vocab) * (kSlice / kBlock) * 16)),
        stored_w(stored_u + aligned(r.vocab * sizeof(Real)) / sizeof(Real)),
        scale(Real(kLog2E / r.temperature)) {}

  PairState accumulate() const {
    return reduce_slices<PairState>(
        [&](int64_t slice) {
          Origin<Real> u_origin, w_origin;
          PairSums sums{};
          Found best{{Real(-INFINITY), slice * kSlice}, {Real(-INFINITY), slice * kSlice}};
          for_blocks(slice, [&](int64_t begin, int64_t count) {
            alignas(64) Real u_buffer[kBlock], w_buffer[kBlock];
            prefetch_next(row.student, begin, vocab);
            if (row.teacher) prefetch_next(row.teacher, begin, vocab);
            const Real* u = load(row.student, begin, count, u_buffer);
            const Real u_top = largest(u, count);
            const double u_step = moved(u_origin, u_top);
            seek(u, u_top, begin, count, best.student);
            if (!row.teacher) {
              if (u_step != 0) sums.student.raise(u_step);
              sums.student.add(softmax_block<true>(u, count, u_origin.zero(), scale));
              return;
            }
            const Real* w = load(row.teacher, begin, count, w_buffer);
            const Real w_top = largest(w, count);
            sums.raise(u_step, moved(w_origin, w_top));
            seek(w, w_top, begin, count, best.teacher);
            sums.add(pair_block(u, w, begin, count, u_origin, w_origin));
          });
          found[slice] = best;
          return PairState{double(u_origin.logit), double(w_origin.logit), sums};
        },
        [&](PairState& all, const PairState& next) { all.merge(next, scale); });
  }

  // How far the origin moves, in base 2; 0 if there was no origin yet, since there were no sums either.
  double moved(Origin<Real>& origin, Real top) const {
    const bool first = origin.logit == Real(-INFINITY);
    const double step = origin.raise_to(top, scale);
    return first ? 0 : step * scale;
  }

  PairSums pair_block(const Real* u, const Real* w, int64_t begin, int64_t count, const Origin<Real>& u_origin,
                      const Origin<Real>& w_origin) const {
    // Log-ratios that are infinite, or come from the smallest finite number, are not summed here. far_sums adds them,
    // in the rare block that has one.
    constexpr Real kFar = Real(kDead);
    const Real us = scale;
    Real *const keep_u = stored_u + begin, *const keep_w = stored_w + begin;
    origins[begin / kBlock * 2] = u_origin.logit;
    origins[begin / kBlock * 2 + 1] = w_origin.logit;
    const Real u_zero = u_origin.zero(), w_zero = w_origin.zero();
    Real u_sum = 0, w_sum = 0, u_weighted = 0, w_weighted = 0, ratio = 0, reverse = 0, farthest = 0;
    FASTKD_SIMD_WITH(reduction(+ : u_sum, w_sum, u_weighted, w_weighted, ratio, reverse) reduction(max : farthest))
    for (int64_t i = 0; i < count; ++i) {
      const Real x = (u[i] - u_zero) * us, y = (w[i] - w_zero) * us;
      const Real apart = ((w[i] - w_zero) - (u[i] - u_zero)) * us;
      const Real e_u = exp2_of(x), e_w = exp2_of(y);
      keep_u[i] = e_u;
      keep_w[i] = e_w;
      u_sum += e_u;
      w_sum += e_w;
      u_weighted += x > Real(-kDead) ? e_u * x : Real(0);
      w_weighted += y > Real(-kDead) ? e_w * y : Real(0);
      const Real size = magnitude(apart);
      farthest = size > farthest ? size : farthest;
      ratio += apart > -kFar ? e_w * apart : Real(0);
      reverse -= apart < kFar ? e_u * apart : Real(0);
    }
    PairSums sums{
        {double(u_sum), double(u_weighted)}, {double(w_sum), double(w_weighted)}, double(ratio), double(reverse)};
    if (!(farthest < kFar)) far_sums(u, w, count, u_zero, w_zero, sums);
    return sums;
  }

  // The log-ratio sums of a block in which one is infinite or so large that its products overflow, in double precision.
  // An entry without weight contributes nothing, whatever its log-ratio.
  __attribute__((noinline)) void far_sums(const Real* u, const Real* w, int64_t count, double u_zero, double w_zero,
                                          PairSums& sums) const {
    sums.ratio = sums.reverse = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double x = (double(u[i]) - u_zero) * scale, y = (double(w[i]) - w_zero) * scale;
      if (!(y < -kNoWeight)) sums.ratio += ::exp2(y) * (y - x);
      if (!(x < -kNoWeight)) sums.reverse += ::exp2(x) * (x - y);
    }
  }

  // 1/2 sum |q - p|, from what pass 1 stored.
  double total_variation(const PairState& state) const {
    const double u_log = ::log2(state.sums.student.sum), w_log = ::log2(state.sums.teacher.sum);
    return reduce_slices<double>(
        [&](int64_t slice) {
          double all = 0;
          for_blocks(slice, [&](int64_t begin, int64_t count) {
            const Real* const at = origins + begin / kBlock * 2;
            const Real q = Real(::exp2((double(at[0]) - state.student_origin) * scale - u_log));
            const Real p = Real(::exp2((double(at[1]) - state.teacher_origin) * scale - w_log));
            const Real *const u = stored_u + begin, *const w = stored_w + begin;
            Real sum = 0;
            FASTKD_SIMD_REDUCE(+ : sum)
            for (int64_t i = 0; i < count; ++i) sum += magnitude(u[i] * q - w[i] * p);
            all += sum;
          });
          return all * 0.5;
        },
        [](double& all, double next) { all += next; });
  }

  // The total variation distance and both divergences, from the logits.
  PairStats near(const PairState& state) const {
    RowTask task{};
    task.temperature = task.teacher_temperature = row.temperature;
    RowFrame<Real> frame;
    frame.set_scales(task);
    frame.normalize(
        task,
        {{state.student_origin, state.sums.student.sum}, {state.teacher_origin, state.sums.teacher.sum}, 0, 0, 0});
    const Normalized<Real> at = frame.normalized();
    return reduce_slices<PairStats>(
        [&](int64_t slice) {
          PairStats all{};
          for_blocks(slice, [&](int64_t begin, int64_t count) {
            alignas(64) Real u_buffer[kBlock], w_buffer[kBlock];
            const Real* u = load(row.student, begin, count, u_buffer);
            const Real* w = load(row.teacher, begin, count, w_buffer);
            Real forward = 0, reverse = 0, apart = 0;
            FASTKD_SIMD_REDUCE(+ : forward, reverse, apart)
            for (int64_t i = 0; i < count; ++i) {
              const Outcome<Real> o = at.template outcome<true>(u[i], w[i]);
              forward += kl_term<true>(o);
              reverse += kl_term<true>(mirrored(o));
              apart += magnitude(o.difference);
            }
            all.forward_kl += forward;
            all.reverse_kl += reverse;
            all.tvd += 0.5 * double(apart);
          });
          return all;
        },
        [](PairStats& all, const PairStats& next) {
          all.forward_kl += next.forward_kl;
          all.reverse_kl += next.reverse_kl;
          all.tvd += next.tvd;
        });
  }

  double label_logit(const Row& logits) const {
    if (row.label < 0) return row.has_labels ? NAN : 0;
    Real value;
    return double(*load(logits, row.label, 1, &value));
  }

  RowStats run() const {
    const PairState state = accumulate();
    Found best = found[0];
    for (int64_t slice = 1; slice < slices_of(vocab); ++slice) {
      best.student.merge(found[slice].student);
      best.teacher.merge(found[slice].teacher);
    }
    RowStats out{};
    out.student = side_stats(row.temperature, state.student_origin, state.sums.student,
                             {double(best.student.logit), best.student.column}, label_logit(row.student));
    if (!row.teacher) return out;
    out.teacher = side_stats(row.temperature, state.teacher_origin, state.sums.teacher,
                             {double(best.teacher.logit), best.teacher.column}, label_logit(row.teacher));
    out.both = {state.forward_kl(), state.reverse_kl(), 0};
    const bool forward = out.both.forward_kl < state.forward_limit();
    const bool reverse = out.both.reverse_kl < state.reverse_limit();
    if (forward || reverse) {
      const PairStats again = near(state);
      if (forward) out.both.forward_kl = again.forward_kl;
      if (reverse) out.both.reverse_kl = again.reverse_kl;
      out.both.tvd = again.tvd;
    } else {
      out.both.tvd = total_variation(state) + state.nan_or_zero();
    }
    return out;
  }
};

template <class Real>
RowStats token_stats_row(const StatsRow& row, const SliceRunner& runner) {
  return StatsPasses<Real>(row, runner).run();
}

extern const Precisions<TokenStatsKernel> token_stats_kernels;

}  // namespace fastkd::FASTKD_ISA
