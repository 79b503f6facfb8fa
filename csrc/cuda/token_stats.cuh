// token_stats on the GPU: a row's statistics in one launch.
//
// Memory: one read of each input. The first pass sums both softmaxes with their entropies and log-ratios, and finds
// both argmaxes; for the student alone, it is the only pass. The total variation distance needs the normalisers and
// therefore a second pass. It reads the rows from shared memory if they fit (into a block's or a cluster's), else the
// inputs again, in reverse. Divergences that are nearly 0 are also computed in that pass, by sums in which nothing
// cancels.
#pragma once
#include "../math/token_stats.h"
#include "common/far_sum.cuh"
#include "common/sources.cuh"

namespace fastkd::cuda {

// Row r's statistics: number i of them is written to place i rows + r.
struct StatsArguments : RowArguments {
  float* numbers;
  int64_t* argmax;
};

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

// What the leading thread publishes to the others.
struct StatsParameters {
  bool read, near;
  float scale;  // log2(e) / temperature
  Normalized<float> at;
};

// The data and work of the leading thread, in double precision, once per row. The data is in shared memory to save
// registers.
struct StatsLeader {
  double temperature;
  StatsSums found;
  PairStats both;
  bool forward_near, reverse_near;  // computed in the second pass

  __device__ __noinline__ void open(double row_temperature, StatsParameters* published) {
    temperature = row_temperature;
    StatsParameters parameters{};
    parameters.read = temperature == temperature;
    parameters.scale = float(kLog2E / temperature);
    shared_store(published, parameters);
  }

  // To be called after the first pass, if there is a teacher.
  __device__ __noinline__ void plan(StatsParameters* published) {
    StatsParameters parameters = shared_load(published);
    const PairState state = found.state();
    both = {state.forward_kl(), state.reverse_kl(), 0};
    forward_near = both.forward_kl < state.forward_limit();
    reverse_near = both.reverse_kl < state.reverse_limit();
    parameters.near = forward_near || reverse_near;
    RowTask task{};
    task.temperature = task.teacher_temperature = temperature;
    RowFrame<float> frame;
    frame.set_scales(task);
    frame.normalize(
        task,
        {{state.student_origin, state.sums.student.sum}, {state.teacher_origin, state.sums.teacher.sum}, 0, 0, 0});
    parameters.at = frame.normalized();
    shared_store(published, parameters);
  }

  // To be called after the second pass.
  __device__ __forceinline__ void add(const PairStats& sums) {
    if (forward_near) both.forward_kl = sums.forward_kl;
    if (reverse_near) both.reverse_kl = sums.reverse_kl;
    both.tvd = sums.tvd;
  }

  // Sets the results of a row whose temperature is not positive: everything becomes NaN.
  __device__ __forceinline__ void refuse() {
    found = {};
    found.best = {{NAN, 0}, {NAN, 0}};
    both = {NAN, NAN, NAN};
  }

  // Writes the row's statistics, `rows` places apart. student_label, teacher_label: the label's logits.
  __device__ __noinline__ void write(float* numbers, int64_t* argmax, int64_t rows, double student_label,
                                     double teacher_label, bool pair) const {
    const PairState state = found.state();
    const auto put = [&](double value) {
      global_store(numbers, float(value));
      numbers += rows;
    };
    const auto put_side = [&](const SideSums& sums, double top, int column, double label) {
      const SideStats stats = side_stats(temperature, top, sums, {top, column}, label);
      put(stats.lse);
      put(stats.entropy);
      put(stats.top_prob);
      put(stats.label_log_prob);
      global_store(argmax, stats.argmax);
      argmax += rows;
    };
    put_side(state.sums.student, state.student_origin, found.best.student.column, student_label);
    if (!pair) return;
    put_side(state.sums.teacher, state.teacher_origin, found.best.teacher.column, teacher_label);
    put(both.forward_kl);
    put(both.reverse_kl);
    put(both.tvd + state.nan_or_zero());
  }
};

// A team's shared memory: [parameters][the leading thread's data][slots of the reductions][student row][teacher row].
inline constexpr int kStatsOrdersBytes = 64, kStatsLeadBytes = 128;
static_assert(sizeof(StatsParameters) <= kStatsOrdersBytes && sizeof(StatsLeader) <= kStatsLeadBytes);
__host__ __device__ constexpr int64_t stats_overhead(bool warp) {
  return kStatsOrdersBytes + kStatsLeadBytes + (warp ? 0 : Team::kSharedBytes);
}
template <bool kPair>
__host__ __device__ constexpr int64_t stats_team_bytes(const RowLaunch& launch) {
  return stats_overhead(launch.warp_rows > 0) + rows_bytes(launch, kPair ? 2 : 1);
}

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

template <bool kPair, class Source>
struct StatsWorker {
  static constexpr int kSize = Source::kSize;

  const StatsArguments& arguments;
  const Team& team;
  StatsParameters* const published;
  StatsLeader& leader;

  __device__ StatsWorker(const StatsArguments& a, const Team& t, unsigned char* shared)
      : arguments(a),
        team(t),
        published(reinterpret_cast<StatsParameters*>(shared)),
        leader(*reinterpret_cast<StatsLeader*>(shared + kStatsOrdersBytes)) {}

  __device__ __forceinline__ void run(int64_t row, const Source& source) const {
    if (team.leads()) leader.open(arguments.row_temperature(row), published);
    team.sync();
    StatsParameters parameters = shared_load(published);
    if (parameters.read) {
      const StatsSums found = first_pass(source, parameters.scale);
      if (team.leads()) leader.found = found;
      if constexpr (kPair) {
        team.sync();
        if (team.leads()) leader.plan(published);
        team.sync();
        parameters = shared_load(published);
        const PairStats sums =
            parameters.near ? second_pass<true>(source, parameters.at) : quick_pass(source, parameters.at);
        if (team.leads()) leader.add(sums);
      }
    } else if (team.leads()) {
      leader.refuse();
    }
    if (team.leads() && team.rank == 0) {
      leader.write(arguments.numbers + row, arguments.argmax + row, arguments.rows, label_logit(arguments.student, row),
                   kPair ? label_logit(arguments.teachers[0], row) : 0, kPair);
    }
  }

 private:
  // The label's logit; NaN if the row has no label, or one out of range.
  __device__ double label_logit(const DeviceRows& logits, int64_t row) const {
    if (!arguments.labels) return 0;
    const int64_t label = arguments.labels.integer(row);
    return label >= 0 && label < arguments.vocab ? double(logits.float_at(logits.at(row, label))) : double(NAN);
  }

  // The first pass. The result is valid in leading threads.
  __device__ StatsSums first_pass(const Source& source, float scale) const {
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
    all.best = team.block_sum<true>(mine.best, [](BestPair& a, const BestPair& b) { a.merge(b); });
    mine.raise(all.best.student.logit, all.best.teacher.logit, scale);
    if constexpr (kPair) {
      all.sums = team.block_sum(mine.whole(scale), [](PairSums& a, const PairSums& b) { a.add(b); });
    } else {
      all.sums = {
          team.block_sum(mine.whole(scale).student, [](SideSums& a, const SideSums& b) { a.add(b); }), {}, 0, 0};
    }
    return team.cluster_sum(all, [&](StatsSums& a, const StatsSums& b) { a.merge(b, scale); });
  }

  // The second pass where no divergence is nearly 0: the total variation distance.
  __device__ PairStats quick_pass(const Source& source, const Normalized<float>& at) const {
    float apart = 0;
    for_packs<false>(source, team, /*backwards=*/true, [&](int, const typename Source::Raw& raw) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float x = Source::student_of(raw, j) - at.student_origin,
                    y = Source::teacher_of(raw, j) - at.teacher_origin;
        const float q = exp2_fast(fused(x, at.student_scale, -at.student_lse));
        apart += magnitude(q - exp2_fast(fused(y, at.teacher_scale, -at.teacher_lse)));
      }
    });
    return team.sum(PairStats{0, 0, 0.5 * double(apart)}, added);
  }
  static __device__ __forceinline__ void added(PairStats& all, const PairStats& next) {
    all = {all.forward_kl + next.forward_kl, all.reverse_kl + next.reverse_kl, all.tvd + next.tvd};
  }

  // The second pass: the total variation distance and, where kNear, both divergences.
  template <bool kNear>
  __device__ PairStats second_pass(const Source& source, const Normalized<float>& at) const {
    float forward = 0, reverse = 0, apart = 0;
    for_packs<false>(source, team, /*backwards=*/true, [&](int, typename Source::Raw raw) {
#pragma unroll
      for (int words = kSize / Source::kWord; words > 0; --words, Source::next_word(raw)) {
#pragma unroll
        for (int j = 0; j < Source::kWord; ++j) {
          const Outcome<float> o = at.outcome<kNear>(Source::student_of(raw, j), Source::teacher_of(raw, j));
          apart += magnitude(o.difference);
          if constexpr (kNear) {
            forward += kl_term<true>(o);
            reverse += kl_term<true>(mirrored(o));
          }
        }
      }
    });
    return team.sum(PairStats{forward, reverse, 0.5 * apart}, added);
  }
};

template <bool kPair, class Source>
__global__ void __launch_bounds__(2 * kRowThreads, 1)
    token_stats_kernel(const __grid_constant__ StatsArguments arguments, const RowLaunch launch) {
  const bool by_warp = launch.warp_rows > 0;
  unsigned char* shared = team_memory(launch, stats_team_bytes<kPair>(launch));
  const Team team(shared + kStatsOrdersBytes + kStatsLeadBytes, unsigned(launch.cluster), by_warp);
  const StatsWorker<kPair, Source> worker(arguments, team, shared);
  for_rows(team, launch, arguments.rows, [&](int64_t row) FASTKD_INLINE_BODY {
    const Source source(arguments, row, launch, team.rank, shared, shared + stats_overhead(by_warp));
    worker.run(row, source);
  });
}

}  // namespace fastkd::cuda
