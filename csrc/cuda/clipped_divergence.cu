// clipped_divergence on CUDA: a row's loss and gradients in one launch.
//
// Memory: as in softmax_divergence, two reads and one write of a row where it fits into the shared memory of a block or
// cluster. There are three passes: the normalisers, the sums over the part between the edges, and the gradients. If
// edges are quantile levels, one more pass over the teacher's logits is added for each 8 bits in which they may differ;
// these passes, too, read shared memory if the row fits. Rows with a small mass (clipped_small.h) are left to a second
// kernel: they are rare, and double precision in the first kernel would cost registers in every row.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "../arguments/clipped_divergence_entry.h"
#include "clipped_divergence.cuh"
#include "common/register.h"

namespace fastkd::cuda {
namespace {

// A team's shared memory: [parameters][the leading thread's data][selection of quantiles][slots of the reductions]
// [student row][teacher row].
constexpr int kClipOrdersBytes = 256, kClipLeaderBytes = 512, kSelectBytes = ClipSelect<AnySource>::kBytes;
__host__ __device__ constexpr int64_t clip_team_bytes(bool warp, bool quantile) {
  return kClipOrdersBytes + kClipLeaderBytes + (quantile ? kSelectBytes : 0) + (warp ? 0 : Team::kSharedBytes);
}

constexpr int kSmallThreads = 192, kSmallBlocks = 264;

template <class Source>
struct ClipWorker {
  using Real = typename Source::Real;
  using Raw = typename Source::Raw;
  using Out = typename Source::Out;
  static constexpr int kSize = Source::kSize;

  static_assert(sizeof(ClipParameters<Real>) <= kClipOrdersBytes && sizeof(ClipLeader<Real>) <= kClipLeaderBytes &&
                ClipSelect<Source>::kBytes == kSelectBytes);

  const ClippedArguments& arguments;
  const Team& team;
  ClipParameters<Real>* shared_parameters;
  ClipLeader<Real>& leader;
  unsigned char* selection;

  __device__ ClipWorker(const ClippedArguments& a, const Team& t, unsigned char* shared)
      : arguments(a),
        team(t),
        shared_parameters(reinterpret_cast<ClipParameters<Real>*>(shared)),
        leader(*reinterpret_cast<ClipLeader<Real>*>(shared + kClipOrdersBytes)),
        selection(shared + kClipOrdersBytes + kClipLeaderBytes) {}

  __device__ __forceinline__ void run(int64_t row, const Source& source) const {
    const bool soft = arguments.softness != 0;
    ClipParameters<Real> parameters = after_leader([&] { open(row, source); });
    if (!parameters.read) {
      source.write_zeros(team);
      return;
    }
    source.start(team);
    const RowState<double> state = first_pass<Pass::kNormalizersOnly>(source, team, parameters);
    if (team.leads()) leader.state = state;
    bool backwards = true;
    if (arguments.quantile) backwards = find_quantiles(source, backwards);
    parameters = after_leader([&] { leader.begin(arguments.quantile, shared_parameters); });
    if constexpr (Source::kPacked) {
      if (!parameters.near) {
        sum_quickly(source, parameters, backwards);
        backwards = !backwards;
        parameters = finish(/*near=*/false);
      }
    }
    if (parameters.near || !Source::kPacked) {
      if (soft) {
        sum_part<true>(source, parameters, backwards);
      } else {
        sum_part<false>(source, parameters, backwards);
      }
      backwards = !backwards;
      parameters = finish(/*near=*/true);
    }
    if (team.leads() && team.rank == 0) put_results(row, parameters.small);
    if (parameters.small || (!parameters.student_gradient && !parameters.teacher_gradient)) return;
    if (soft) {
      write<true>(source, parameters, backwards);
    } else {
      write<false>(source, parameters, backwards);
    }
    zero_beyond_vocab(arguments, row, team);
  }

  // Computes a row that run() left, in double precision, with one block.
  __device__ void run_small(int64_t row, const Source& source, SmallRow& small) const {
    const ClipParameters<Real> parameters = after_leader([&] { open(row, source); });
    source.start(team);
    const RowState<double> state = first_pass<Pass::kNormalizersOnly>(source, team, parameters);
    if (team.leads()) leader.state = state;
    if (arguments.quantile) find_quantiles(source, false);
    after_leader([&] {
      leader.begin(arguments.quantile, shared_parameters);
      small.set(leader.task, leader.frame, leader.edges, arguments.renormalize);
    });
    sum_small(source, parameters.kept, small);
    if (team.leads()) put_results(row, false);
    if (!parameters.student_gradient && !parameters.teacher_gradient) return;
    write_small(source, small);
    zero_beyond_vocab(arguments, row, team);
  }

 private:
  // Calls publish() in the leading thread, between barriers, and returns the published parameters.
  template <class Publish>
  __device__ __forceinline__ ClipParameters<Real> after_leader(const Publish& publish) const {
    team.sync();
    if (team.leads()) publish();
    team.sync();
    return shared_load(shared_parameters);
  }

  __device__ __forceinline__ ClipParameters<Real> finish(bool near) const {
    return after_leader([&] { leader.finish(arguments.renormalize, arguments.lump, near, shared_parameters); });
  }

  // Reads the row's task, before its logits are read. Called by the leading thread.
  __device__ void open(int64_t row, const Source& source) const {
    const double scale = arguments.scale(row);
    const bool read = scale != 0;
    const int label = read ? arguments.read_task(row, scale, leader.task) : -1;
    leader.open(read, label, arguments.keep_label, shared_parameters);
    if (read) {
      leader.set_bounds(arguments.lower.number(row), arguments.upper.number(row), arguments.quantile,
                        arguments.softness);
      // Read now, since writing the gradient may overwrite it.
      leader.label_logit = leader.task.has_label ? double(source.student_logit(label)) : 0;
    } else if (team.rank == 0) {
      global_store(arguments.losses + row, 0.0);
      if (arguments.small) global_store(arguments.small + row, false);
      if (arguments.lower_gradient) put_bound_gradients(row, 0, 0);
    }
  }

  // Writes the row's results. small: they are left to clipped_divergence_small_kernel. Called by the leading thread.
  __device__ __forceinline__ void put_results(int64_t row, bool small) const {
    if (arguments.small) global_store(arguments.small + row, small);
    if (small) return;
    global_store(arguments.losses + row, arguments.row_weight(row) * leader.loss());
    if (arguments.lower_gradient) {
      leader.scale_bound_gradients(arguments.quantile, arguments.vocab);
      put_bound_gradients(row, leader.numbers.lower_gradient, leader.numbers.upper_gradient);
    }
  }

  __device__ void put_bound_gradients(int64_t row, double lower, double upper) const {
    arguments.lower_gradient.put(arguments.lower_gradient.at(row), lower);
    arguments.upper_gradient.put(arguments.upper_gradient.at(row), upper);
  }

  // Returns the direction of the next pass.
  __device__ bool find_quantiles(const Source& source, bool backwards) const {
    const ClipSelect<Source> selected(source, team, selection);
    if (team.leads()) selected.begin(leader.edges.lower, leader.edges.upper, leader.quantiles);
    backwards = selected.run(backwards);
    if (team.leads()) selected.finish(leader.quantiles);
    return backwards;
  }

  // The sums over the part between hard edges, inexact where student and teacher are close.
  __device__ void sum_quickly(const Source& source, const ClipParameters<Real>& parameters, bool backwards) const {
    ClipFast<Source> fast(source, parameters);
    ClipThread<false, Real> careful;
    RowPass<false, Source> pass(source, team, backwards);
    for_packs(
        pass, [&](int pack, const Raw& raw) { return fast.add(pack, raw); },
        [&](int pack, const Raw& raw) { add_part<false>(careful, source.column(pack), raw, parameters); });
    ClipInside mine = careful.inside();
    mine.add(fast.whole());
    put_inside(mine);
  }

  template <bool kSoft>
  __device__ __forceinline__ void add_part(ClipThread<kSoft, Real>& sums, int column, const Raw& raw,
                                           const ClipParameters<Real>& parameters) const {
    for_entries<kSoft>(
        raw, column, parameters,
        [&](Real, Real, const Outcome<Real>& o, const ClipShare<Real>& share, int, int) { sums.add(o, share); });
  }

  template <bool kSoft>
  __device__ void sum_part(const Source& source, const ClipParameters<Real>& parameters, bool backwards) const {
    ClipThread<kSoft, Real> mine;
    for_packs<false>(source, team, backwards,
                     [&](int pack, const Raw& raw) { add_part<kSoft>(mine, source.column(pack), raw, parameters); });
    put_inside(mine.inside());
    if constexpr (kSoft) {
      put_slope(mine.slope(mine.lower), leader.sums.lower);
      put_slope(mine.slope(mine.upper), leader.sums.upper);
      put_slope(mine.slope(mine.own), leader.sums.own);
    }
  }

  // Adds up all threads' sums into the leading thread's.
  __device__ __forceinline__ void put_inside(const ClipInside& mine) const {
    const ClipInside in = team.sum(mine, [](ClipInside& all, const ClipInside& next) { all.add(next); });
    if (team.leads()) leader.sums = {in.k, in.a, in.p, in.q, in.difference, in.p_rest, in.q_rest, {}, {}, {}};
  }
  __device__ __forceinline__ void put_slope(const ClipSlope& mine, double (&out)[3]) const {
    const ClipSlope slope = team.sum(mine, [](ClipSlope& all, const ClipSlope& next) { all.add(next); });
    if (team.leads()) out[0] = slope.a, out[1] = slope.p, out[2] = slope.q;
  }

  // See clipped_small.h: first the bases, then the sums relative to them.
  __device__ __forceinline__ void sum_small(const Source& source, int kept, SmallRow& small) const {
    SmallBases mine;
    for (int column = team.thread; column < arguments.vocab; column += team.threads) {
      const Raw raw = source.fetch(column);
      raise(mine, small.bases_of(Source::student_of(raw, 0), Source::teacher_of(raw, 0), column == kept));
    }
    const SmallBases bases = team.sum(mine, [](SmallBases& all, const SmallBases& next) { raise(all, next); });
    after_leader([&] { small.set_bases(bases); });
    ClipSums sums{};
    for (int column = team.thread; column < arguments.vocab; column += team.threads) {
      const Raw raw = source.fetch(column);
      add_entry(sums, small.entry(Source::student_of(raw, 0), Source::teacher_of(raw, 0), column == kept));
    }
    put_inside({sums.k, sums.a, sums.p, sums.q, 0, sums.p_rest, 0});
    if (arguments.softness != 0) {
      put_slope({sums.lower[0], sums.lower[1], sums.lower[2]}, leader.sums.lower);
      put_slope({sums.upper[0], sums.upper[1], sums.upper[2]}, leader.sums.upper);
      put_slope({sums.own[0], sums.own[1], sums.own[2]}, leader.sums.own);
    }
    after_leader([&] {
      small.finish(leader.sums);
      leader.numbers.value = small.numbers.value;
      leader.numbers.lower_gradient = small.numbers.lower_gradient;
      leader.numbers.upper_gradient = small.numbers.upper_gradient;
    });
  }

  __device__ __forceinline__ void write_small(const Source& source, const SmallRow& small) const {
    const ClipParameters<Real> parameters = shared_load(shared_parameters);
    for (int column = team.thread; column < arguments.vocab; column += team.threads) {
      const Raw raw = source.fetch(column);
      const double u = Source::student_of(raw, 0);
      const SmallEntry e = small.entry(u, Source::teacher_of(raw, 0), column == parameters.kept);
      if (parameters.teacher_gradient) {
        source.store_teacher(column, Real(parameters.factors.teacher * small.teacher_gradient(e)));
      }
      if (parameters.student_gradient) {
        double g = parameters.factors.student * small.student_gradient(e) + parameters.factors.label_q * e.q;
        if (parameters.label_scale != Real(0)) g += label_gradient(parameters, Real(u));
        source.store_student(column, Real(column == parameters.label ? g - parameters.factors.label : g));
      }
    }
  }

  // The gradient of the label's softmax, where that softmax is not q.
  static __device__ __forceinline__ Real label_gradient(const ClipParameters<Real>& parameters, Real u) {
    const Real x = (u - parameters.at.student_origin) * parameters.label_scale;
    return parameters.factors.label * exp2_of(x - parameters.label_shift);
  }

  template <bool kSoft>
  __device__ void write(const Source& source, const ClipParameters<Real>& parameters, bool backwards) const {
    const auto& gradients = source.gradients();
    const auto careful = [&](int pack, const Raw& raw) {
      const int column = source.column(pack);
      // The teacher's gradient is written first: writing the student's may overwrite the student's logits.
      if (parameters.teacher_gradient) {
        const auto gradient = [&](Real, const Outcome<Real>& o, const ClipShare<Real>& share, int) {
          return clip_teacher_gradient<kSoft>(parameters, o, share);
        };
        gradients.store_teacher(pack, map<kSoft>(raw, column, parameters, gradient));
      }
      if (parameters.student_gradient) {
        const int label = parameters.label - column;
        const auto gradient = [&](Real u, const Outcome<Real>& o, const ClipShare<Real>& share, int j) {
          Real g = clip_student_gradient<kSoft>(parameters, o, share);
          if (parameters.label_scale != Real(0)) g += label_gradient(parameters, u);
          return parameters.label >= 0 && j == label ? g - parameters.factors.label : g;
        };
        gradients.store_student(pack, map<kSoft>(raw, column, parameters, gradient));
      }
    };
    RowPass<false, Source> pass(source, team, backwards);
    if constexpr (Source::kPacked && !kSoft) {
      if (!parameters.near) {
        const ClipFast<Source> fast(source, parameters);
        return for_packs(
            pass,
            [&](int pack, const Raw& raw) {
              if (pack == fast.label_pack || !source.is_whole(pack)) return false;
              gradients.store_whole_student(pack, fast.gradient(raw));
              return true;
            },
            careful);
      }
    }
    for_packs(pass, careful);
  }

  // Calls f(student's logit, teacher's logit, outcome, share, where the entry's word begins in the pack, its place in
  // the word) for each entry of a pack. One word is processed at a time: a whole pack would need too many registers.
  template <bool kSoft, class Function>
  __device__ __forceinline__ void for_entries(Raw raw, int column, const ClipParameters<Real>& parameters,
                                              const Function& f) const {
    const int kept = parameters.kept - column;
#pragma unroll 1
    for (int first = 0; first < kSize; first += Source::kWord, Source::next_word(raw)) {
#pragma unroll
      for (int j = 0; j < Source::kWord; ++j) {
        const Real u = Source::student_of(raw, j), w = Source::teacher_of(raw, j);
        const Outcome<Real> o = parameters.at.template outcome<true>(u, w);
        f(u, w, o, clip_share<kSoft>(parameters, w, o.p, parameters.kept >= 0 && first + j == kept), first, j);
      }
    }
  }

  template <bool kSoft, class Function>
  __device__ __forceinline__ Out map(const Raw& raw, int column, const ClipParameters<Real>& parameters,
                                     const Function& f) const {
    Out out{};
    Real word[Source::kWord];
    for_entries<kSoft>(raw, column, parameters,
                       [&](Real u, Real, const Outcome<Real>& o, const ClipShare<Real>& share, int first, int j) {
                         word[j] = f(u, o, share, first + j);
                         if (j == Source::kWord - 1) Source::append(out, word);
                       });
    return out;
  }
};

template <class Source>
__global__ void __launch_bounds__(2 * kRowThreads, 1)
    clipped_divergence_kernel(const __grid_constant__ ClippedArguments arguments, const RowLaunch launch) {
  const bool by_warp = launch.warp_rows > 0;
  const int64_t team_bytes = clip_team_bytes(by_warp, arguments.quantile);
  unsigned char* shared = team_memory(launch, team_bytes + rows_bytes(launch, 2));
  const int slots = kClipOrdersBytes + kClipLeaderBytes + (arguments.quantile ? kSelectBytes : 0);
  const Team team(shared + slots, unsigned(launch.cluster), by_warp);
  const ClipWorker<Source> worker(arguments, team, shared);
  // With one teacher a source uses no shared memory besides its rows.
  for_rows(team, launch, arguments.rows, [&](int64_t row) FASTKD_INLINE_BODY {
    worker.run(row, Source(arguments, row, launch, team.rank, shared, shared + team_bytes));
  });
}

// Computes the rows that clipped_divergence_kernel left, one per block. For the other rows only the flag is read.
__global__ void __launch_bounds__(kSmallThreads, 1)
    clipped_divergence_small_kernel(const __grid_constant__ ClippedArguments arguments) {
  unsigned char* const shared = shared_memory();
  const int64_t team_bytes = clip_team_bytes(false, arguments.quantile), blocks = gridDim.x;
  const Team team(shared + team_bytes - Team::kSharedBytes, 1);
  const ClipWorker<AnySource> worker(arguments, team, shared);
  SmallRow& small = *reinterpret_cast<SmallRow*>(shared + team_bytes);
  for (int64_t first = blockIdx.x; first < arguments.rows; first += blocks * team.threads) {
    const int64_t mine = first + team.thread * blocks;
    const int flagged = mine < arguments.rows && global_load(arguments.small + mine);
    if (team.block_sum<true>(flagged, [](int& all, int next) { all += next; }) == 0) continue;
#pragma unroll 1
    for (int i = 0; i < team.threads; ++i) {
      const int64_t row = first + i * blocks;
      if (row >= arguments.rows || !global_load(arguments.small + row)) continue;
      worker.run_small(row, AnySource(arguments, row, RowLaunch{}, 0, shared, nullptr), small);
      team.sync();
    }
  }
}

template <class Source>
void launch_source(const Device& device, const ClippedArguments& arguments, int element_size) {
  const RowNeeds needs{clip_team_bytes(false, arguments.quantile), Source::kPacked};
  launch_teams(device, clipped_divergence_kernel<Source>, arguments, element_size, needs, [&](const RowLaunch& launch) {
    return clip_team_bytes(launch.warp_rows > 0, arguments.quantile) + rows_bytes(launch, 2);
  });
}

struct Cuda {
  static constexpr bool kValuesChecked = false;

  static std::tuple<Tensor, Tensor> solve(const ClippedProblem& problem, const ClippedGradients& wanted) {
    const Device device(problem.student_tensor, kClippedDivergence);
    const RowLosses losses(device, problem, {wanted.student, wanted.teacher, wanted.lower, wanted.upper});
    FASTKD_CHECK_VALUE(problem.teacher_width < kMaxColumns, kClippedDivergence,
                       "a vocabulary on CUDA must have fewer than 2^31 - 1024 columns, got ", problem.teacher_width);
    const auto rows_of = [&](const Tensor& x) { return device_rows(x, problem.leading, kClippedDivergence); };
    const auto wanted_rows = [&](const Tensor* x) { return x != nullptr ? rows_of(*x) : DeviceRows(); };
    ClippedArguments a{};
    static_cast<RowNumbers&>(a) = losses.numbers;
    a.teacher_width = int(problem.teacher_width);
    a.student = rows_of(problem.student_tensor);
    a.teachers[0] = rows_of(problem.teacher_tensor);
    a.teacher_count = 1;
    a.teacher_temperature = problem.teacher_temperature;
    if (const Tensor* each = problem.teacher_temperatures_tensor) a.teacher_temperatures = rows_of(*each);
    a.student_gradient = wanted_rows(wanted.student);
    a.teacher_gradient = wanted_rows(wanted.teacher);
    a.lower = rows_of(problem.lower_tensor);
    a.upper = rows_of(problem.upper_tensor);
    a.lower_gradient = wanted_rows(wanted.lower);
    a.upper_gradient = wanted_rows(wanted.upper);
    a.renormalize = problem.renormalize;
    a.keep_label = problem.keep_label;
    a.lump = problem.lump;
    a.quantile = problem.quantile;
    a.softness = problem.softness;
    std::optional<Tensor> small;
    if (a.lump || a.renormalize != Renormalize::kNone) {
      small = torch::stable::new_empty(problem.student_tensor, {problem.rows}, ScalarType::Bool);
      a.small = static_cast<bool*>(small->data_ptr());
    }
    with_source<true>(source_kind(a), [&](auto source, int element_size) {
      launch_source<typename decltype(source)::Type>(device, a, element_size);
    });
    if (small) {
      device.launch({"rows of small mass", "one block for each row that the first kernel left: double precision"},
                    clipped_divergence_small_kernel, problem.rows < kSmallBlocks ? problem.rows : kSmallBlocks,
                    kSmallThreads, clip_team_bytes(false, a.quantile) + int64_t(sizeof(SmallRow)), 1, a);
    }
    return losses.finish();
  }
};

}  // namespace

FASTKD_IMPL(m) { implement_loss<ClippedDivergence, Cuda>(m); }

}  // namespace fastkd::cuda
