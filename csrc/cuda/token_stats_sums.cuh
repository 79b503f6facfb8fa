// The sums of token_stats' first pass over a row: of both softmaxes, with their entropies, log-ratios and argmaxes; of
// the student alone, of one softmax, with its entropy and argmax.
#pragma once
#include "../math/token_stats.h"
#include "common/far_sum.cuh"
#include "common/sources.cuh"

namespace fastkd::cuda {

// The most likely column of each side.
struct BestPair {
  Best<float, int> student, teacher;
  // Passed by value: what warp_reduce selects between two values stays in registers only if all of it is read.
  __device__ __forceinline__ void merge(BestPair o) {
    student.merge(o.student);
    teacher.merge(o.teacher);
  }
};

// The first pass's sums of a block or cluster, relative to its largest logits.
struct StatsSums {
  PairSums sums;
  BestPair best;

  __device__ PairState state() const { return {double(best.student.logit), double(best.teacher.logit), sums}; }
  __device__ void merge(const StatsSums& o, double scale) {
    PairState all = state();
    all.merge(o.state(), scale);
    sums = all.sums;
    best.merge(o.best);
  }
};

// A thread's share of the first pass, relative to origins of its own, near the thread's largest logits so far.
template <bool kPair>
struct StatsState {
  float u_origin = -INFINITY, w_origin = -INFINITY;
  PairSumsOf<float> sums{};
  FarSum<float> far_ratio, far_reverse;
  BestPair best{{-INFINITY, 0}, {-INFINITY, 0}};

  template <int kSize>
  __device__ __forceinline__ void add(const float (&u)[kSize], const float (&w)[kSize], int column, float scale) {
    const float u_top = top(u, column, best.student), w_top = kPair ? top(w, column, best.teacher) : 0;
    const float slack = 8;
    if (u_origin == -INFINITY || (u_top - u_origin) * scale > slack ||
        (kPair && (w_origin == -INFINITY || (w_top - w_origin) * scale > slack))) {
      raise(at_least(u_origin, u_top), at_least(w_origin, w_top), scale);
    }
    const float u_zero = u_origin == -INFINITY ? 0 : u_origin, w_zero = w_origin == -INFINITY ? 0 : w_origin;
    // Log-ratios from kFar on are summed separately: see FarSum.
    constexpr float kFar = float(kDead);
    float farthest = 0;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float x = u[j] - u_zero, e_u = side(sums.student, x * scale);
      if constexpr (kPair) {
        const float y = w[j] - w_zero, e_w = side(sums.teacher, y * scale);
        const float apart = (y - x) * scale, size = magnitude(apart);
        farthest = size > farthest ? size : farthest;
        if (size < kFar) {
          sums.ratio += e_w * apart;
          sums.reverse -= e_u * apart;
        }
      }
    }
    if constexpr (kPair) {
      if (farthest >= kFar) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          const float x = u[j] - u_zero, y = w[j] - w_zero;
          far_ratio.add(y * scale, y - x);
          far_reverse.add(x * scale, x - y);
        }
      }
    }
  }

  // Converts the sums to larger origins.
  __device__ __forceinline__ void raise(float u_new, float w_new, float scale) {
    const float u_step = step(u_origin, u_new);
    if constexpr (kPair) {
      const float w_step = step(w_origin, w_new), apart = u_step - w_step;
      far_ratio.raise(sums.teacher.sum, w_step * scale, apart);
      far_reverse.raise(sums.student.sum, u_step * scale, -apart);
      sums.raise(u_step * scale, w_step * scale, magnitude(apart) < float(kDead) ? apart * scale : 0);
    } else {
      sums.student.raise(u_step * scale);
    }
    u_origin = u_new;
    w_origin = w_new;
  }

  __device__ PairSums whole(float scale) const {
    return {{sums.student.sum, sums.student.weighted},
            {sums.teacher.sum, sums.teacher.weighted},
            sums.ratio + far_ratio.value() * scale,
            sums.reverse + far_reverse.value() * scale};
  }

 private:
  // The largest logit of a pack. Updates `best` with its first column.
  template <int kSize>
  static __device__ __forceinline__ float top(const float (&u)[kSize], int column, Best<float, int>& best) {
    float top = u[0];
#pragma unroll
    for (int j = 1; j < kSize; ++j) top = fmaxf(top, u[j]);
    if (top > best.logit) {
      best.logit = top;
#pragma unroll
      for (int j = kSize - 1; j >= 0; --j) best.column = u[j] == top ? column + j : best.column;
    }
    return top;
  }

  static __device__ __forceinline__ float side(SideSumsOf<float>& into, float x) {
    const float e = exp2_of(x);
    into.sum += e;
    into.weighted += e * fmaxf(-float(kDead), x);
    return e;
  }

  // How far an origin moves; 0 if there was no origin yet, since the sums are 0 then.
  static __device__ __forceinline__ float step(float from, float to) {
    return from == -INFINITY ? 0 : step_between(from, to);
  }
};

// Sums of the first pass over packs whose entries need no care: finite log-ratios, and no new largest logit. In base 2,
// relative to the origins of the StatsState beside it. Logits are taken relative to their origin before they are
// scaled: where the sides nearly agree, so do the rounding errors of their sums.
template <bool kPair, class Source>
struct FastStats {
  using Item = typename Source::Item;

  PairSumsOf<float> sums{};
  PackRange<Item> u_range, w_range;  // of the packs that may be added; at first none

  // Returns false for a pack that is not in the range.
  __device__ __forceinline__ bool add(const typename Source::Raw& raw, const StatsState<kPair>& all, float scale) {
    if (!(u_range.below(raw.student) && u_range.above(raw.student))) return false;
    if constexpr (kPair) {
      if (!(w_range.below(raw.teacher) && w_range.above(raw.teacher))) return false;
    }
#pragma unroll
    for (int j = 0; j < Source::kSize; ++j) {
      const float x = (Source::student_of(raw, j) - all.u_origin) * scale, e_u = exp2_fast(x);
      sums.student.sum += e_u;
      sums.student.weighted = fused(e_u, x, sums.student.weighted);
      if constexpr (kPair) {
        const float y = (Source::teacher_of(raw, j) - all.w_origin) * scale, e_w = exp2_fast(y), apart = y - x;
        sums.teacher.sum += e_w;
        sums.teacher.weighted = fused(e_w, y, sums.teacher.weighted);
        sums.ratio = fused(e_w, apart, sums.ratio);
        sums.reverse = fused(e_u, -apart, sums.reverse);
      }
    }
    return true;
  }

  // Adds these sums to `all` and begins again.
  __device__ __forceinline__ void move_to(StatsState<kPair>& all) {
    all.sums.student.sum += sums.student.sum;
    all.sums.student.weighted += sums.student.weighted;
    if constexpr (kPair) {
      all.sums.teacher.sum += sums.teacher.sum;
      all.sums.teacher.weighted += sums.teacher.weighted;
      all.sums.ratio += sums.ratio;
      all.sums.reverse += sums.reverse;
    }
    sums = {};
  }

  // Takes the origins of `all`, and its largest logits so far: a pack with a larger one may move an argmax.
  __device__ __forceinline__ void set_ranges(const StatsState<kPair>& all) {
    const float far = float(kFarLogit);
    u_range.clear();
    w_range.clear();
    if (all.u_origin == -INFINITY || (kPair && all.w_origin == -INFINITY)) return;
    u_range.set(all.u_origin - far, all.best.student.logit);
    if constexpr (kPair) w_range.set(all.w_origin - far, all.best.teacher.logit);
  }
};

// The first pass over a row. The result is valid in leading threads.
template <bool kPair, class Source>
__device__ StatsSums stats_pass(const Source& source, const Team& team, float scale) {
  constexpr int kSize = Source::kSize;
  StatsState<kPair> mine;
  const auto careful = [&](int pack, const typename Source::Raw& raw) {
    float u[kSize], w[kSize];
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      u[j] = Source::student_of(raw, j);
      w[j] = Source::teacher_of(raw, j);
    }
    mine.add(u, w, source.column(pack), scale);
  };
  source.start(team);
  RowPass<true, Source> pass(source, team, false);
  if constexpr (Source::kPacked) {
    FastStats<kPair, Source> fast;
    for_packs(
        pass, [&](int, const typename Source::Raw& raw) { return fast.add(raw, mine, scale); },
        [&](int pack, const typename Source::Raw& raw) {
          fast.move_to(mine);
          careful(pack, raw);
          fast.set_ranges(mine);
        });
    fast.move_to(mine);
  } else {
    for_packs(pass, careful);
  }
  // With the same origins in all threads, the sums can simply be added.
  StatsSums all;
  all.best = team.block_sum(mine.best, [](BestPair& a, const BestPair& b) { a.merge(b); }, /*everywhere=*/true);
  mine.raise(all.best.student.logit, all.best.teacher.logit, scale);
  if constexpr (kPair) {
    all.sums = team.block_sum(mine.whole(scale), [](PairSums& a, const PairSums& b) { a.add(b); });
  } else {
    all.sums = {team.block_sum(mine.whole(scale).student, [](SideSums& a, const SideSums& b) { a.add(b); }), {}, 0, 0};
  }
  return team.cluster_sum(all, [&](StatsSums& a, const StatsSums& b) { a.merge(b, scale); });
}

}  // namespace fastkd::cuda
