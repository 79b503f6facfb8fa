// topk_divergence on the GPU: a row's loss and gradients in one launch.
//
// Memory: the student's row is read once if it fits into shared memory (a block's or a cluster's), else read again, in
// reverse, for the gradient. Uniform tails add a pass. The k entries of the support are gathered into the shared memory
// of every block of the team, and into a hash table by their columns (support_table.cuh). The sums over the rest treat
// the logits of the support as -inf: TopkPlan handles their exact values, in double precision. Where the row stays in
// shared memory, these logits are replaced by -inf there, before the first pass; else packs with an entry are found by
// a map of bits. The gradients of the support are written after all others.
#pragma once
#include "../math/topk_plan.h"
#include "common/fast_sum.cuh"
#include "common/sources.cuh"
#include "common/support_table.cuh"

namespace fastkd::cuda {

inline constexpr int kMaxTopk = 1024;
inline constexpr int kTopkBits = 1 << 15;  // bits in the map of groups

struct TopkArguments : RowArguments {
  DeviceRows log_probs, indices, log_probs_gradient;
  int k, group_shift;
  DivergencePlaces divergence;
  Tail tail;
  double stored_temperature, floor, cap, rounding;
};

// One stored token, in the team's shared memory.
struct TopkEntry {
  int column;  // -1: none
  bool padding;
  float z, l;  // the student's logit, the stored log-probability
  float gradient;
};

// What the leading thread publishes to the others.
struct TopkParameters {
  TopkPlan plan;
  bool read;
  int label;
  double label_z;
};

// A team's shared memory: [parameters][entries][table][map of groups][slots of the reductions][row].
inline constexpr int kTopkOrdersBytes = 512;
static_assert(sizeof(TopkParameters) <= kTopkOrdersBytes);
__host__ __device__ constexpr int64_t topk_team_bytes(bool warp, int k) {
  return kTopkOrdersBytes + (int64_t(k) * int(sizeof(TopkEntry)) + 15) / 16 * 16 + SupportTable::bytes(k) +
         kTopkBits / 8 + (warp ? 0 : Team::kSharedBytes);
}

struct RestBoth {
  double sum, label_sum;
};

template <class Source>
struct TopkWorker {
  static constexpr int kSize = Source::kSize;
  const TopkArguments& arguments;
  const Team& team;
  TopkParameters* published;
  TopkEntry* entries;
  SupportTable table;
  unsigned* groups;

  __device__ TopkWorker(const TopkArguments& a, const Team& t, unsigned char* shared)
      : arguments(a),
        team(t),
        published(reinterpret_cast<TopkParameters*>(shared)),
        entries(reinterpret_cast<TopkEntry*>(shared + kTopkOrdersBytes)),
        table(shared + kTopkOrdersBytes + (a.k * int(sizeof(TopkEntry)) + 15) / 16 * 16, a.k),
        groups(reinterpret_cast<unsigned*>(table.end())) {}

  __device__ __forceinline__ void run(int64_t row, Source& source) const {
    open(row, source);
    const TopkParameters start = shared_load(published);
    if (!start.read) {
      source.write_zeros(team);
      if (team.rank == 0) write_log_probs_zeros(row);
      return;
    }
    source.start(team);  // while the support is gathered
    const SupportSums support = gather(row, source, start.plan);
    drop_support(source);
    const StudentSums rest = sum_rest(source, start);
    if (team.leads()) {
      TopkParameters& parameters = *published;
      parameters.plan.begin(support, rest, double(arguments.vocab));
    }
    team.sync();
    finish(source);
    team.sync();
    const TopkPlan plan = shared_load(&published->plan);
    if (team.leads() && team.rank == 0) {
      const double loss = plan.loss(start.label_z);
      global_store(arguments.losses + row, arguments.row_weight(row) * loss);
    }
    write_gradients(row, source, plan, start.label);
  }

 private:
  // Reads the row's task, before its logits are read, and clears the map.
  __device__ void open(int64_t row, const Source& source) const {
    for (int i = team.thread; i < kTopkBits / 32; i += team.threads) shared_store(groups + i, 0u);
    table.clear(team);
    if (team.leads()) {
      TopkParameters parameters{};
      TopkTask& task = parameters.plan.task;
      task.scale = arguments.scale(row);
      parameters.read = task.scale != 0;
      parameters.label = -1;
      if (parameters.read) {
        task.beta = arguments.row_beta(row);
        task.divergence = arguments.divergence.at(task.beta);
        task.tail = arguments.tail;
        task.temperature = arguments.temperature_with(task.beta, row);
        task.ratio = arguments.stored_temperature / arguments.row_teacher_temperature(row);
        task.floor = arguments.floor;
        task.cap = arguments.cap;
        task.divergence_scale = arguments.square_temperature ? task.temperature * task.temperature : 1;
        task.rounding = arguments.rounding;
        parameters.label = arguments.read_label(row, task);
        task.has_label = task.has_label && task.label_weight != 0;
        if (!task.has_label) parameters.label = -1;
        // Read here, although nothing overwrites it before the end: it is a single element.
        if (task.has_label) parameters.label_z = source.student_logit(parameters.label);
      } else if (team.rank == 0) {
        global_store(arguments.losses + row, 0.0);
      }
      shared_store(published, parameters);
    }
    team.sync();
  }

  // Reads the support: checks its entries, enters them in the map, and computes their sums. An invalid row becomes NaN.
  __device__ SupportSums gather(int64_t row, const Source& source, const TopkPlan& plan) const {
    bool bad = false;
    for (int e = team.thread; e < arguments.k; e += team.threads) {
      const int64_t index = arguments.indices.integer_at(arguments.indices.at(row, e));
      TopkEntry entry{-1, false, 0, 0, 0};
      if (index >= 0 && index < arguments.vocab) {
        entry.column = int(index);
        entry.z = source.student_logit(entry.column);
        entry.l = float(arguments.log_probs.number_at(arguments.log_probs.at(row, e)));
        bad = bad || entry.l > float(kLargestLogProb);
      } else {
        bad = bad || index != -1;
      }
      shared_store(entries + e, entry);
    }
    team.sync();
    for (int e = team.thread; e < arguments.k; e += team.threads) {
      const TopkEntry entry = shared_load(entries + e);
      if (entry.column >= 0) table.insert(e, entry.column, may_pad(entry), column_of());
    }
    team.sync();
    SupportSums mine = SupportSums::empty();
    for (int e = team.thread; e < arguments.k; e += team.threads) {
      const TopkEntry entry = shared_load(entries + e);
      if (entry.column < 0) continue;
      // Where a column has a second entry, those of low log-probability are padding. A second one of others is an
      // error: it leaves out both, and makes the row NaN.
      const SupportTable::Count count = table.find(entry.column, column_of());
      bad = bad || count.others() > 1;
      if (count.others() > 1 || (may_pad(entry) && count.all() > 1)) {
        shared_store(&entries[e].padding, true);
        continue;
      }
      plan.add(mine, plan.measure(entry.z, entry.l));
      const int group = source.pack_of(entry.column) >> arguments.group_shift;
      shared_or(groups + group / 32, 1u << group % 32);
    }
    team.sync();
    if (bad) mine.stored.mass = NAN;
    // Two reductions, since one value of this size would not fit the registers of a shuffle.
    const double scale = plan.scale(), ratio = plan.task.ratio;
    SupportSums all;
    all.student = team.block_sum(mine.student, [&](StudentSums& x, const StudentSums& next) { x.merge(next, scale); });
    all.stored = team.block_sum(mine.stored, [&](StoredSums& x, const StoredSums& next) { x.merge(next, ratio); });
    if (all.stored.mass > kMostMass) all.stored.mass = NAN;
    return all;
  }

  static __device__ __forceinline__ bool may_pad(const TopkEntry& entry) { return entry.l <= float(kPaddingLogProb); }
  struct ColumnOf {
    const TopkEntry* entries;
    __device__ __forceinline__ int operator()(int e) const { return shared_load(&entries[e].column); }
  };
  __device__ __forceinline__ ColumnOf column_of() const { return {entries}; }
  // Whether an entry counts: it has a column, and is not padding.
  static __device__ __forceinline__ bool counts(const TopkEntry& entry) { return entry.column >= 0 && !entry.padding; }

  // Replaces the support's logits by -inf in the row's copy in shared memory, if the row stays there.
  __device__ void drop_support(const Source& source) const {
    if constexpr (Source::kPacked) {
      if (!source.resident) return;
      source.finish_copies(team);
      team.sync();
      for (int e = team.thread; e < arguments.k; e += team.threads) {
        const TopkEntry entry = shared_load(entries + e);
        if (counts(entry)) source.drop(entry.column);
      }
      team.sync();
    }
  }

  // Replaces the pack's logits that belong to the support by -inf.
  __device__ __forceinline__ void without_support(const Source& source, int pack, float (&u)[kSize]) const {
    if (!flagged(source, pack)) return;
    const int first = source.column(pack);
    // Rotated, so that no register array is indexed.
#pragma unroll 1
    for (int j = 0; j < kSize; ++j) {
      if (inside(first + j) && in_support(first + j)) u[0] = -INFINITY;
      rotate(u);
    }
  }
  __device__ __forceinline__ bool flagged(const Source& source, int pack) const {
    const int group = source.whole_pack(pack) >> arguments.group_shift;
    return shared_load(groups + group / 32) >> group % 32 & 1;
  }
  __device__ __forceinline__ bool in_support(int column) const {
    const SupportTable::Count count = table.find(column, column_of());
    return count.all() == 1 || count.others() == 1;
  }

  static __device__ __forceinline__ void widen(const typename Source::Raw& raw, float (&u)[kSize]) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) u[j] = Source::student_of(raw, j);
  }

  __device__ StudentSums sum_rest(const Source& source, const TopkParameters& start) const {
    const double temperature = start.plan.task.temperature;
    const float scale = float(kLog2E / temperature);
    const bool apart = start.plan.task.has_label && temperature != 1;
    const float label_scale = apart ? float(kLog2E) : 0;
    FastSum<typename Source::Item> mine(scale, label_scale);
    const bool search = !source.resident;  // else drop_support() has replaced the support
    const auto careful = [&](int pack, const typename Source::Raw& raw) {
      float u[kSize];
      widen(raw, u);
      if (search) without_support(source, pack, u);
      mine.add(u);
    };
    RowPass<true, Source> pass(source, team, false);
    if constexpr (Source::kPacked) {
      for_packs(
          pass,
          [&](int pack, const typename Source::Raw& raw) {
            return !(search && flagged(source, pack)) && mine.add_fast(raw.student);
          },
          careful);
    } else {
      for_packs(pass, careful);
    }
    const float top = team.block_sum<true>(mine.origin, [](float& all, float next) { all = at_least(all, next); });
    mine.raise(top);
    const RestBoth sums = team.block_sum(RestBoth{mine.sum, mine.second}, [](RestBoth& all, const RestBoth& next) {
      all.sum += next.sum;
      all.label_sum += next.label_sum;
    });
    const StudentSums block{{double(top), sums.sum, apart ? sums.label_sum : sums.sum}};
    const double to_base_2 = start.plan.scale();
    return team.cluster_sum(block, [&](StudentSums& all, const StudentSums& next) { all.merge(next, to_base_2); });
  }

  // Completes the plan: sums the terms and computes the value.
  __device__ void finish(const Source& source) const {
    const TopkPlan plan = shared_load(&published->plan);
    const auto add = [](UnnormalizedSums& all, const UnnormalizedSums& next) { all.add(next); };
    UnnormalizedSums mine{};
    with_unnormalized_divergence(plan.task.divergence, plan.task.beta, [&](const auto& divergence) {
#pragma unroll 1
      for (int e = team.thread; e < arguments.k; e += team.threads) {
        const TopkEntry entry = shared_load(entries + e);
        if (!counts(entry)) continue;
        const auto t = plan.floored_terms(divergence, plan.log_q(entry.z), plan.log_p(entry.l));
        mine.add({t.value, t.excess, t.g, t.h});
      }
    });
    const UnnormalizedSums support = team.block_sum(mine, add);
    UnnormalizedSums rest{};
    if (plan.task.tail == Tail::kUniform) {
      with_unnormalized_divergence(plan.task.divergence, plan.task.beta,
                                   [&](const auto& divergence) { rest = uniform_sums(source, plan, divergence); });
      rest = team.sum(rest, add);
    }
    if (team.leads()) {
      TopkPlan& leader = published->plan;
      with_unnormalized_divergence(plan.task.divergence, plan.task.beta,
                                   [&](const auto& divergence) { leader.finish(divergence, support, rest); });
    }
  }

  template <class Divergence>
  __device__ UnnormalizedSums uniform_sums(const Source& source, const TopkPlan& plan,
                                           const Divergence& divergence) const {
    const float to_log = float(1 / plan.task.temperature), share = float(plan.log_p_rest);
    const float origin = float(plan.student.origin), log_sum = float(plan.student.log_sum);
    float value = 0, excess = 0, g = 0, h = 0;
    for_packs<false>(source, team, true, [&](int pack, const typename Source::Raw& raw) {
      float u[kSize], own[kSize];
      widen(raw, u);
#pragma unroll
      for (int j = 0; j < kSize; ++j) own[j] = inside(source.column(pack) + j) ? 0.0f : -INFINITY;
      without_support(source, pack, own);
#pragma unroll 1
      for (int j = 0; j < kSize; ++j) {
        const auto t = plan.floored_terms(divergence, (u[0] - origin) * to_log - log_sum, share);
        if (own[0] == 0) {
          value += t.value;
          excess += t.excess;
          g += t.g;
          h += t.h;
        }
        rotate(u);
        rotate(own);
      }
    });
    return {value, excess, g, h};
  }

  __device__ __forceinline__ bool inside(int column) const { return column >= 0 && column < arguments.vocab; }

  // Rotates the elements by one place, so that no register array is indexed.
  static __device__ __forceinline__ void rotate(float (&x)[kSize]) {
    const float first = x[0];
#pragma unroll
    for (int j = 0; j + 1 < kSize; ++j) x[j] = x[j + 1];
    x[kSize - 1] = first;
  }

  __device__ void write_log_probs_zeros(int64_t row) const {
    if (!arguments.log_probs_gradient) return;
    for (int e = team.thread; e < arguments.k; e += team.threads)
      arguments.log_probs_gradient.put(arguments.log_probs_gradient.at(row, e), 0);
  }

  // Computes the gradients of the support's entries. The teacher's are written to memory; the student's are stored for
  // the pass over the row.
  __device__ void write_gradients(int64_t row, const Source& source, const TopkPlan& plan, int label) const {
    if (!arguments.student_gradient && !arguments.log_probs_gradient) return;
    with_unnormalized_divergence(plan.task.divergence, plan.task.beta, [&](const auto& divergence) {
#pragma unroll 1
      for (int e = team.thread; e < arguments.k; e += team.threads) {
        TopkEntry entry = shared_load(entries + e);
        double of_teacher = plan.nan_or_zero;
        if (counts(entry)) {
          const auto t = plan.floored_terms(divergence, plan.log_q(entry.z), plan.log_p(entry.l));
          entry.gradient = float(plan.student_gradient(entry.z, t.g, entry.column == label));
          of_teacher = plan.teacher_gradient(entry.l, t.h);
          shared_store(&entries[e].gradient, entry.gradient);
        }
        if (team.rank == 0 && arguments.log_probs_gradient)
          arguments.log_probs_gradient.put(arguments.log_probs_gradient.at(row, e), of_teacher);
      }
    });
    team.sync();
    if (!arguments.student_gradient) return;
    if (plan.task.tail == Tail::kUniform && plan.student_factor != 0) {
      with_unnormalized_divergence(plan.task.divergence, plan.task.beta, [&](const auto& divergence) {
        const float to_log = float(1 / plan.task.temperature), share = float(plan.log_p_rest);
        const float origin = float(plan.student.origin), log_sum = float(plan.student.log_sum);
        const float factor = float(plan.student_factor);
        write_rest<true>(source, plan, label, /*backwards=*/false, [&](float u) {
          return factor * plan.floored_terms(divergence, (u - origin) * to_log - log_sum, share).g;
        });
      });
    } else {
      write_rest<false>(source, plan, label, /*backwards=*/true, [](float) { return 0.0f; });
    }
    zero_beyond_vocab(arguments, row, team);
  }

  // slope(u): what a token of a uniform tail adds to its gradient besides the common part.
  template <bool kSlope, class Slope>
  __device__ void write_rest(const Source& source, const TopkPlan& plan, int label, bool backwards,
                             const Slope& slope) const {
    const double temperature = plan.task.temperature;
    const bool apart = plan.task.has_label && temperature != 1;
    const float scale = float(kLog2E / temperature), label_factor = float(plan.label_factor());
    const float q_factor = float(plan.rest_coefficient(apart));
    const float origin = float(plan.rest.origin), log_sum = float(plan.rest.log_sum * kLog2E);
    const float label_origin = float(plan.label.origin), label_sum = float(plan.label.log_sum * kLog2E);
    const auto& gradients = source.gradients();
    const int label_pack = label >= 0 ? source.pack_of(label) : INT32_MAX;
    const auto careful = [&](int pack, typename Source::Raw raw) {
      const int first = source.column(pack);
      // With a map of logits a gradient must be written once: writing it may overwrite the logit that it needs.
      if (!Source::kPacked && flagged(source, pack) && in_support(first)) return;
      typename Source::Out out{};
#pragma unroll 1
      for (int begin = 0; begin < kSize; begin += Source::kWord, Source::next_word(raw)) {
        float word[Source::kWord];
#pragma unroll
        for (int j = 0; j < Source::kWord; ++j) {
          const float u = Source::student_of(raw, j);
          float g = q_factor * exp2_of((u - origin) * scale - log_sum) + slope(u);
          if (apart) g += label_factor * exp2_of((u - label_origin) * float(kLog2E) - label_sum);
          word[j] = first + begin + j == label ? g - label_factor : g;
        }
        Source::append(out, word);
      }
      gradients.store_student(pack, out);
    };
    RowPass<false, Source> pass(source, team, backwards);
    if constexpr (Source::kPacked && !kSlope) {
      const NormalizerShift<float> of_q(scale, origin, plan.rest.log_sum * kLog2E);
      if (of_q.usable) {
        const float by_q = q_factor * of_q.unit;
        const auto fast = [&](auto label_apart, int pack, const typename Source::Raw& raw) {
          if (source.whole_pack(pack) == label_pack || !source.is_whole(pack)) return false;
          typename Source::Out out{};
#pragma unroll
          for (int k = 0; k < kSize / Source::kWord; ++k) {
            float word[Source::kWord];
#pragma unroll
            for (int j = 0; j < Source::kWord; ++j) {
              const float u = Source::student_of(raw, k * Source::kWord + j);
              word[j] = by_q * exp2_fast(fused(u, scale, -of_q.shift));
              if constexpr (decltype(label_apart)::value) {
                word[j] += label_factor * exp2_fast((u - label_origin) * float(kLog2E) - label_sum);
              }
            }
            set_word(out, k, word_from<typename Source::Item>(word));
          }
          gradients.store_whole_student(pack, out);
          return true;
        };
        const auto together = [&](int pack, const typename Source::Raw& raw) {
          return fast(std::false_type(), pack, raw);
        };
        const auto separately = [&](int pack, const typename Source::Raw& raw) {
          return fast(std::true_type(), pack, raw);
        };
        if (apart) {
          for_packs(pass, separately, careful);
        } else {
          for_packs(pass, together, careful);
        }
        return write_support(gradients, source);
      }
    }
    for_packs(pass, careful);
    write_support(gradients, source);
  }

  // Over what the pass wrote for the support's columns.
  template <class Gradients>
  __device__ __forceinline__ void write_support(const Gradients& gradients, const Source& source) const {
    team.sync();
    for (int e = team.thread; e < arguments.k; e += team.threads) {
      const TopkEntry entry = shared_load(entries + e);
      if (counts(entry) && source.has(entry.column)) gradients.store_column(entry.column, entry.gradient);
    }
  }
};

template <class Source>
__global__ void __launch_bounds__(2 * kRowThreads, 1)
    topk_divergence_kernel(const __grid_constant__ TopkArguments arguments, const RowLaunch launch) {
  const bool by_warp = launch.warp_rows > 0;
  const int64_t own = topk_team_bytes(by_warp, arguments.k);
  unsigned char* shared = team_memory(launch, own + rows_bytes(launch, 1));
  const Team team(shared + own - (by_warp ? 0 : Team::kSharedBytes), unsigned(launch.cluster), by_warp);
  const TopkWorker<Source> worker(arguments, team, shared);
  for_rows(team, launch, arguments.rows, [&](int64_t row) FASTKD_INLINE_BODY {
    Source source(arguments, row, launch, team.rank, shared, shared + own);
    worker.run(row, source);
  });
}

}  // namespace fastkd::cuda
