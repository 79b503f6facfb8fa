// cross_entropy on the GPU: a row's loss and gradient in one launch.
//
// Memory: the row is read once if it fits into shared memory (a block's or a cluster's), else read again, in reverse,
// for the gradient, which is written once.
#pragma once
#include "../math/cross_entropy.h"
#include "common/fast_sum.cuh"
#include "common/sources.cuh"

namespace fastkd::cuda {

struct CrossEntropyArgumentsOnDevice : RowArguments {
  double label_smoothing, entropy_weight, entropy_temperature, z_loss_weight;
  DeviceRows entropy_mask;
  bool entropy_correct;

  __device__ double row_entropy_weight(int64_t row) const {
    return entropy_mask && entropy_mask.number(row + shift) == 0 ? 0 : entropy_weight;
  }
};

// Which sums the entropy needs: none, those at the temperature, or some at its own.
enum class EntropySums { kNone, kSame, kApart };

// What the leading thread publishes to the others.
struct CrossEntropyParameters {
  CrossEntropyTask task;
  CrossEntropyPlan plan;
  bool read, correct_only;
  int label;
  float label_logit, reference, scale, other_scale;
};

// A team's shared memory: [parameters][slots of the reductions][row].
inline constexpr int kCrossEntropyOrdersBytes = 192;
static_assert(sizeof(CrossEntropyParameters) <= kCrossEntropyOrdersBytes);
__host__ __device__ constexpr int64_t cross_entropy_overhead(bool warp) {
  return kCrossEntropyOrdersBytes + (warp ? 0 : Team::kSharedBytes);
}
__host__ __device__ constexpr int64_t cross_entropy_team_bytes(const RowLaunch& launch) {
  return cross_entropy_overhead(launch.warp_rows > 0) + rows_bytes(launch, 1);
}

// The sums of a part of a row. beaten: another token is likelier than the label, or as likely with a lower id.
struct CrossEntropyPart {
  CrossEntropySums sums;
  int64_t beaten;
};

template <EntropySums kEntropy, class Source>
struct CrossEntropyWorker {
  static constexpr int kSize = Source::kSize;
  static constexpr bool kApart = kEntropy == EntropySums::kApart;

  const CrossEntropyArgumentsOnDevice& arguments;
  const Team& team;
  CrossEntropyParameters* const published;

  __device__ __forceinline__ void run(int64_t row, const Source& source) const {
    if (team.leads()) open(row);
    team.sync();
    if (!shared_load(&published->read)) {
      if (team.leads() && team.rank == 0) global_store(arguments.losses + row, 0.0);
      return source.write_zeros(team);
    }
    const CrossEntropyPart found = sum(source);
    if (team.leads()) {
      const CrossEntropyPlan plan =
          cross_entropy_plan(shared_load(&published->task), found.sums, shared_load(&published->label_logit),
                             !shared_load(&published->correct_only) || found.beaten == 0);
      shared_store(&published->plan, plan);
      if (team.rank == 0) global_store(arguments.losses + row, arguments.row_weight(row) * plan.loss);
    }
    team.sync();
    if (arguments.student_gradient) write(source, row);
  }

 private:
  __device__ __forceinline__ void open(int64_t row) const {
    CrossEntropyParameters out{};
    CrossEntropyTask& task = out.task;
    task.scale = arguments.scale(row);
    out.read = task.scale != 0;
    if (out.read) {
      task.temperature = arguments.row_temperature(row);
      task.entropy_temperature = arguments.entropy_temperature;
      task.label_smoothing = arguments.label_smoothing;
      task.entropy_weight = arguments.row_entropy_weight(row);
      task.z_loss_weight = arguments.z_loss_weight;
      task.vocab = arguments.vocab;
      task.apart = kApart;
      const int64_t label = arguments.labels.integer(row + arguments.shift);
      const bool valid = label >= 0 && label < arguments.vocab;
      out.label = valid ? int(label) : 0;
      const DeviceRows& logits = arguments.student;
      const float z = logits.float_at(logits.at(row, out.label));
      out.label_logit = arguments.student_map ? mapped_logit(arguments.student_map, z) : z;
      if (!valid) {  // no check could see it: the row becomes NaN
        out.label_logit = NAN;
        task.scale = NAN;
      }
      out.reference = float(reference_of(out.label_logit));
      out.correct_only = arguments.entropy_correct;
      out.scale = float(kLog2E / task.temperature);
      out.other_scale = float(kLog2E / task.entropy_temperature);
    }
    shared_store(published, out);
  }

  // The row's sums, valid in leading threads.
  __device__ CrossEntropyPart sum(const Source& source) const {
    using Item = typename Source::Item;
    const float scale = shared_load(&published->scale);
    const float other_scale = kApart ? shared_load(&published->other_scale) : 0;
    const float reference = shared_load(&published->reference), label_logit = shared_load(&published->label_logit);
    const int label = shared_load(&published->label);
    const bool smoothed = arguments.label_smoothing != 0;
    const bool correct = kEntropy != EntropySums::kNone && shared_load(&published->correct_only);
    FastSum<Item, kEntropy == EntropySums::kSame> own(scale, 0);
    FastSum<Item, true> other(other_scale, 0);
    float rest = 0;
    bool beaten = false;
    source.start(team);
    RowPass<true, Source> pass(source, team, false);
    // What takes a look at every logit. In packs that extend beyond the row, some are not the row's.
    const auto look = [&](int column, float z) {
      if (smoothed) rest += z - reference;
      if (correct) beaten = beaten || z > label_logit || (z == label_logit && column < label);
    };
    const auto careful = [&](int pack, const typename Source::Raw& raw) {
      const int first = source.column(pack);
      float z[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j) z[j] = Source::student_of(raw, j);
      own.add(z);
      if constexpr (kApart) other.add(z);
      if (!smoothed && !correct) return;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        if (unsigned(first + j) < unsigned(arguments.vocab)) look(first + j, z[j]);
      }
    };
    if constexpr (Source::kPacked) {
      for_packs(
          pass,
          [&](int pack, const typename Source::Raw& raw) {
            if ((smoothed || correct) && !source.is_whole(pack)) return false;
            if constexpr (kApart) {
              if (!other.takes(raw.student)) return false;
            }
            if (!own.add_fast(raw.student)) return false;
            if constexpr (kApart) other.add_fast(raw.student);
            if (smoothed || correct) {
              const int first = source.column(pack);
#pragma unroll
              for (int j = 0; j < kSize; ++j) look(first + j, Source::student_of(raw, j));
            }
            return true;
          },
          careful);
    } else {
      for_packs(pass, careful);
    }
    const float top = team.block_sum<true>(own.origin, [](float& a, float next) { a = at_least(a, next); });
    own.raise(top);
    if constexpr (kApart) {
      other.raise(team.block_sum<true>(other.origin, [](float& a, float next) { a = at_least(a, next); }));
      // The origins differ where one scale is larger: both sums relative to the same one.
      const float both = at_least(top, other.origin);
      own.raise(both);
      other.raise(both);
    }
    CrossEntropyPart part{{double(own.origin), {own.sum, own.weighted}, {other.sum, other.weighted}, rest}, beaten};
    part = team.block_sum(part, [](CrossEntropyPart& a, const CrossEntropyPart& b) {
      a.sums.own.add(b.sums.own);
      a.sums.other.add(b.sums.other);
      a.sums.rest += b.sums.rest;
      a.beaten |= b.beaten;
    });
    return team.cluster_sum(part, [&](CrossEntropyPart& a, const CrossEntropyPart& b) {
      a.sums.merge(b.sums, scale, other_scale);
      a.beaten |= b.beaten;
    });
  }

  __device__ void write(const Source& source, int64_t row) const {
    const CrossEntropyPlan plan = shared_load(&published->plan);
    const float origin = float(plan.origin), shift = float(plan.shift), constant = float(plan.constant);
    const float slope = float(plan.slope), uniform = float(plan.uniform), of_label = float(plan.label);
    const float other_shift = float(plan.other_shift), other_constant = float(plan.other_constant);
    const float other_slope = float(plan.other_slope);
    const float scale = shared_load(&published->scale), other_scale = shared_load(&published->other_scale);
    const int label_column = shared_load(&published->label);
    const auto& gradients = source.gradients();
    for_packs<false>(source, team, /*backwards=*/true, [&](int pack, const typename Source::Raw& raw) {
      float gradient[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float below = Source::student_of(raw, j) - origin, x = fused(below, scale, -shift), q = exp2_fast(x);
        gradient[j] = q * (kEntropy == EntropySums::kSame ? fused(slope, fmaxf(-float(kDead), x), constant) : constant);
        gradient[j] -= uniform;
        if constexpr (kApart) {
          const float y = fused(below, other_scale, -other_shift);
          gradient[j] += exp2_fast(y) * fused(other_slope, fmaxf(-float(kDead), y), other_constant);
        }
      }
      const int label = label_column - source.column(pack);
      if (unsigned(label) < unsigned(kSize)) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) gradient[j] -= j == label ? of_label : 0;
      }
      typename Source::Out out{};
#pragma unroll
      for (int first = 0; first < kSize; first += Source::kWord) {
        float word[Source::kWord];
#pragma unroll
        for (int j = 0; j < Source::kWord; ++j) word[j] = gradient[first + j];
        Source::append(out, word);
      }
      gradients.store_student(pack, out);
    });
    zero_beyond_vocab(arguments, row, team);
  }
};

template <EntropySums kEntropy, class Source>
__global__ void __launch_bounds__(2 * kRowThreads, 1)
    cross_entropy_kernel(const __grid_constant__ CrossEntropyArgumentsOnDevice arguments, const RowLaunch launch) {
  const bool by_warp = launch.warp_rows > 0;
  unsigned char* const shared = team_memory(launch, cross_entropy_team_bytes(launch));
  const Team team(shared + kCrossEntropyOrdersBytes, unsigned(launch.cluster), by_warp);
  const CrossEntropyWorker<kEntropy, Source> worker{arguments, team, reinterpret_cast<CrossEntropyParameters*>(shared)};
  for_rows(team, launch, arguments.rows, [&](int64_t row) FASTKD_INLINE_BODY {
    worker.run(row, Source(arguments, row, launch, team.rank, shared, shared + cross_entropy_overhead(by_warp)));
  });
}

}  // namespace fastkd::cuda
