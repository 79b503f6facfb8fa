// token_stats on the GPU: a row's statistics in one launch.
//
// Memory: one read of each input. The first pass sums both softmaxes with their entropies and log-ratios, and finds
// both argmaxes; for the student alone, it is the only pass. The total variation distance needs the normalisers and
// therefore a second pass. It reads the rows from shared memory if they fit (into a block's or a cluster's), else the
// inputs again, in reverse. Divergences that are nearly 0 are also computed in that pass, by sums in which nothing
// cancels.
#pragma once
#include "token_stats_sums.cuh"

namespace fastkd::cuda {

// Row r's statistics: number i of them is written to place i rows + r.
struct StatsArguments : RowArguments {
  float* numbers;
  int64_t* argmax;
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
  return stats_overhead(launch.warp_rows > 0) + (kPair ? 2 : 1) * launch.slice_bytes;
}

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

  __device__ void run(int64_t row, const Source& source) const {
    if (team.leads()) leader.open(arguments.row_temperature(row), published);
    team.sync();
    StatsParameters parameters = shared_load(published);
    if (parameters.read) {
      const StatsSums found = stats_pass<kPair>(source, team, parameters.scale);
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
    token_stats_kernel(const StatsArguments arguments, const RowLaunch launch) {
  const bool by_warp = launch.warp_rows > 0;
  unsigned char* shared = team_memory(launch, stats_team_bytes<kPair>(launch));
  const Team team(shared + kStatsOrdersBytes + kStatsLeadBytes, unsigned(launch.cluster), by_warp);
  const StatsWorker<kPair, Source> worker(arguments, team, shared);
  for_rows(team, launch, arguments.rows, [&](int64_t row) {
    const Source source(arguments, row, launch, team.rank, shared, shared + stats_overhead(by_warp));
    worker.run(row, source);
  });
}

}  // namespace fastkd::cuda
