// softmax_divergence on the GPU: a row's loss and gradients in one launch.
//
// Memory: where a row's two logit tensors fit into the shared memory of a block, or of a cluster of blocks (sm_90 and
// later), they are read once, and every further pass reads shared memory: two reads and one write in all, whatever the
// divergence. Longer rows are read again by each pass. The direction alternates from pass to pass, since the part read
// last is still in the L2. A row of a few KiB is processed by one warp.
//
// RowPlan determines the passes. The team's leading thread runs it and publishes the results to the other threads.
#pragma once
#include "../math/compensated_sum.h"
#include "../math/row_plan.h"
#include "common/block.cuh"
#include "common/far_sum.cuh"
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
  double teacher_temperature, beta;
  Normalized<Real> at;
  GradientFactors<Real> factors;
  Mean<Real> student_mean, teacher_mean;
  Real label_shift;
};

// A team's shared memory: [parameters][the leading thread's task and plan][the teachers' normalisers and rows][slots of
// the reductions][student row][teacher row].
inline constexpr int kParametersBytes = 256, kPlanBytes = 448;
inline constexpr int kTeachersBytes = kMaxTeachers * int(sizeof(OriginSum<double>) + sizeof(char*));
__host__ __device__ constexpr int64_t team_bytes(bool warp) {
  return kParametersBytes + kPlanBytes + kTeachersBytes + (warp ? 0 : Team::kSharedBytes);
}

// Sums of pass 1 relative to one pair of origins.
struct PassSums {
  double student, teacher, ratio, crossing, label;
  __device__ void add(const PassSums& x) {
    student += x.student;
    teacher += x.teacher;
    ratio += x.ratio;
    crossing += x.crossing;
    label += x.label;
  }
};

// A thread's share of pass 1, relative to origins of its own, near the thread's largest logits so far.
template <class Real, Pass kPass>
struct ThreadState {
  static constexpr bool kByStudent = kPass == Pass::kStudentWeighted, kRatio = kPass != Pass::kNormalizersOnly,
                        kCrossing = kPass == Pass::kTeacherCrossing;

  Real u_origin = Real(-INFINITY), w_origin = Real(-INFINITY);
  Real u_sum = 0, w_sum = 0, crossing = 0, label_sum = 0;
  CompensatedSum ratio;  // the student-weighted sum becomes a mean that the gradient subtracts
  FarSum<Real> far_ratio, far_crossing;

  template <int kSize>
  __device__ __forceinline__ void add(const Real (&u)[kSize], const Real (&w)[kSize],
                                      const RowParameters<Real>& parameters) {
    const Real us = parameters.student_scale, ws = parameters.teacher_scale, r = parameters.teacher_ratio;
    Real u_max = u[0], w_max = w[0];
#pragma unroll
    for (int j = 1; j < kSize; ++j) {
      u_max = u[j] > u_max ? u[j] : u_max;
      w_max = w[j] > w_max ? w[j] : w_max;
    }
    // The label's softmax uses another temperature on the same logits. Neither sum may overflow.
    const Real slack = Real(8), steepest = at_least(us, parameters.label_scale);
    if (u_origin == Real(-INFINITY) || w_origin == Real(-INFINITY) || (u_max - u_origin) * steepest > slack ||
        (w_max - w_origin) * ws > slack) {
      raise(at_least(u_origin, u_max), at_least(w_origin, w_max), parameters);
    }
    const Real u_zero = u_origin == Real(-INFINITY) ? Real(0) : u_origin;
    const Real w_zero = w_origin == Real(-INFINITY) ? Real(0) : w_origin;
    constexpr Real kFar = Real(kDead);
    Real farthest = 0;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const Real x = u[j] - u_zero, y = w[j] - w_zero;
      const Real e_u = exp2_of(x * us), e_w = exp2_of(y * ws);
      u_sum += e_u;
      w_sum += e_w;
      if constexpr (kRatio) {
        // Log-ratios below -kFar belong to entries without weight.
        const Real log_ratio = kByStudent ? x - y * r : y * r - x;
        farthest = log_ratio > farthest ? log_ratio : farthest;
        if constexpr (kByStudent) {
          if (magnitude(log_ratio) < kFar) ratio.add_product(e_u, log_ratio);
        } else {
          if (magnitude(log_ratio) < kFar) ratio.sum += e_w * log_ratio;
        }
      }
      if constexpr (kCrossing) {
        if (x > -kFar) crossing -= e_w * x;
      }
      if (parameters.label_scale != Real(0)) label_sum += exp2_of(x * parameters.label_scale);
    }
    if constexpr (kRatio) {
      if (farthest >= kFar) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          const Real x = u[j] - u_zero, y = w[j] - w_zero;
          far_ratio.add(kByStudent ? x * us : y * ws, kByStudent ? x - y * r : y * r - x);
          if constexpr (kCrossing) far_crossing.add(y * ws, -x);
        }
      }
    }
  }

  // Converts the sums to larger origins. If there was no origin yet, the sums are 0.
  __device__ void raise(Real u_new, Real w_new, const RowParameters<Real>& parameters) {
    const Real r = parameters.teacher_ratio;
    const Real u_step = u_origin == Real(-INFINITY) ? Real(0) : step_between(u_origin, u_new);
    const Real w_step = w_origin == Real(-INFINITY) ? Real(0) : step_between(w_origin, w_new);
    const Real u_shrink = u_step * parameters.student_scale, w_shrink = w_step * parameters.teacher_scale;
    const Real u_scale = exp2_of(-u_shrink), w_scale = exp2_of(-w_shrink);
    if constexpr (kRatio) {
      const Real weight = kByStudent ? u_sum : w_sum, shrink = kByStudent ? u_shrink : w_shrink;
      const Real scale = kByStudent ? u_scale : w_scale, step = kByStudent ? w_step * r - u_step : u_step - w_step * r;
      far_ratio.raise(weight, shrink, step);
      ratio.sum = carried(ratio.sum, weight, step < Real(kDead) ? step : Real(0), scale);
      ratio.rest *= scale;
    }
    if constexpr (kCrossing) {
      far_crossing.raise(w_sum, w_shrink, u_step);
      crossing = carried(crossing, w_sum, u_step < Real(kDead) ? u_step : Real(0), w_scale);
    }
    if (parameters.label_scale != Real(0)) label_sum *= exp2_of(-u_step * parameters.label_scale);
    u_sum *= u_scale;
    w_sum *= w_scale;
    u_origin = u_new;
    w_origin = w_new;
  }

  __device__ PassSums whole() const {
    return {double(u_sum), double(w_sum), ratio.value() + far_ratio.value(), double(crossing) + far_crossing.value(),
            double(label_sum)};
  }
};

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
      q.add(o.q);
    }
    if constexpr (Divergence::kTeacher != Form::kClosed) {
      if (teacher) ph.add_product(o.p, t.h);
    }
    if (kNear || (teacher && Divergence::kTeacher != Form::kClosed)) p.add(o.p);
    if constexpr (kNear) difference += o.difference;
  }

  __device__ Sums whole() const {
    return {double(f), qg.value(), ph.value(), q.value(), p.value(), double(difference)};
  }
};

// The largest logits; their maximum over a block's threads becomes the common origin.
template <class Real>
struct Largest {
  Real student, teacher;
};

// The data and work of the leading thread, in double precision, once per row. The data is in shared memory to save
// registers. The functions are not inlined: all kernels of a divergence use one copy.
template <class Real, class Divergence>
struct RowLeader {
  RowTask task;
  RowPlan<Real, Divergence> plan;
  RowState<double> state;
  Sums sums;
  double label_logit;

  // Publishes whether the row is read, and how its logits are scaled.
  __device__ __noinline__ void open(bool read, int label, RowParameters<Real>* published) {
    RowParameters<Real> parameters{};
    parameters.read = read;
    parameters.label = label;
    if (read) {
      plan.set_scales(task);
      parameters.student_scale = plan.student_scale;
      parameters.teacher_scale = plan.teacher_scale;
      parameters.teacher_ratio = plan.teacher_ratio;
      parameters.label_scale = plan.label_scale;
      parameters.teacher_temperature = task.teacher_temperature;
      parameters.beta = task.beta;
      parameters.student_gradient = task.student_gradient;
      parameters.teacher_gradient = task.teacher_gradient;
    }
    shared_store(published, parameters);
  }

  __device__ __noinline__ void begin() { plan.begin(task, state); }
  __device__ __noinline__ void add() { plan.add(task, sums); }

  // Publishes the present state of the plan.
  __device__ __noinline__ void publish(RowParameters<Real>* published) const {
    RowParameters<Real> parameters = shared_load(published);
    parameters.step = plan.step;
    parameters.near = plan.near;
    parameters.at = plan.normalized();
    parameters.factors = GradientFactors<Real>(task, plan);
    parameters.student_mean = Mean<Real>(plan.student_mean);
    parameters.teacher_mean = Mean<Real>(plan.teacher_mean);
    parameters.label_shift = Real(plan.label_lse);
    shared_store(published, parameters);
  }
};

// Pass 1: the states of both softmaxes, valid in the blocks' leading threads.
template <Pass kPass, class Source>
__device__ RowState<double> first_pass(const Source& source, const Team& team,
                                       const RowParameters<typename Source::Real>& parameters) {
  using Real = typename Source::Real;
  constexpr int kSize = Source::kSize;
  ThreadState<Real, kPass> mine;
  for_packs<true>(source, team, false, [&](int, const typename Source::Raw& raw) {
    Real u[kSize], w[kSize];
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      u[j] = Source::student_of(raw, j);
      w[j] = Source::teacher_of(raw, j);
    }
    mine.add(u, w, parameters);
  });
  // With the same origins in all threads, the sums can simply be added.
  const auto at_least_both = [](Largest<Real>& all, const Largest<Real>& x) {
    all = {at_least(all.student, x.student), at_least(all.teacher, x.teacher)};
  };
  const Largest<Real> largest =
      team.block_sum(Largest<Real>{mine.u_origin, mine.w_origin}, at_least_both, /*everywhere=*/true);
  mine.raise(largest.student, largest.teacher, parameters);
  const PassSums sums = team.block_sum(mine.whole(), [](PassSums& all, const PassSums& next) { all.add(next); });
  const double us = parameters.student_scale;
  const RowState<double> state{{double(largest.student), sums.student},
                               {double(largest.teacher), sums.teacher},
                               sums.ratio * us,
                               sums.crossing * us,
                               sums.label};
  const RowScales<double> scales{us, double(parameters.teacher_scale), double(parameters.label_scale)};
  return team.cluster_sum(state,
                          [&](RowState<double>& all, const RowState<double>& next) { all.merge(next, kPass, scales); });
}

template <class Divergence, class Source>
struct RowWorker {
  using Real = typename Source::Real;
  static constexpr int kSize = Source::kSize;

  static_assert(sizeof(RowParameters<Real>) <= kParametersBytes && sizeof(RowLeader<Real, Divergence>) <= kPlanBytes);

  const RowArguments& arguments;
  const Team& team;
  RowParameters<Real>* shared_parameters;
  RowLeader<Real, Divergence>& leader;

  __device__ RowWorker(const RowArguments& a, const Team& t, unsigned char* shared)
      : arguments(a),
        team(t),
        shared_parameters(reinterpret_cast<RowParameters<Real>*>(shared)),
        leader(*reinterpret_cast<RowLeader<Real, Divergence>*>(shared + kParametersBytes)) {}

  __device__ void run(int64_t row, Source& source) const {
    RowParameters<Real> parameters = opening(row, source);
    if (!parameters.read) {
      source.write_zeros(team);
      return;
    }
    source.normalize_teachers(team, parameters.teacher_temperature);
    const RowState<double> state = first_pass<Divergence::kPass>(source, team, parameters);
    if (team.leads()) {
      leader.state = state;
      leader.begin();
    }
    bool backwards = true;
    for (parameters = after_leader(); parameters.step != Step::kWrite; parameters = after_leader()) {
      const Sums sums = parameters.step == Step::kSumNear ? sum_terms<true>(source, parameters, backwards)
                                                          : sum_terms<false>(source, parameters, backwards);
      backwards = !backwards;
      if (team.leads()) {
        leader.sums = sums;
        leader.add();
      }
    }
    if (team.leads() && team.rank == 0) {
      const double loss = leader.plan.loss(leader.task, leader.label_logit);
      global_store(arguments.losses + row, arguments.row_weight(row) * loss);
    }
    if (parameters.student_gradient || parameters.teacher_gradient) {
      if (parameters.near) {
        write<true>(source, parameters, backwards);
      } else {
        write<false>(source, parameters, backwards);
      }
      zero_beyond_vocab(arguments, row, team);
    }
  }

 private:
  // Reads the row's task, before its logits are read.
  __device__ RowParameters<Real> opening(int64_t row, const Source& source) const {
    if (team.leads()) {
      int label = -1;
      const bool read = arguments.read_task(row, leader.task, label);
      if (read && leader.task.label_weight == 0) {
        leader.task.has_label = false;
        label = -1;
      }
      leader.open(read, label, shared_parameters);
      if (read) {
        // Read now, since writing the gradient may overwrite it.
        leader.label_logit = leader.task.has_label ? double(source.student_logit(label)) : 0;
      } else if (team.rank == 0) {
        global_store(arguments.losses + row, 0.0);
      }
    }
    team.sync();
    return shared_load(shared_parameters);
  }

  // Publishes the present state of the plan to all threads and returns it.
  __device__ __forceinline__ RowParameters<Real> after_leader() const {
    team.sync();
    if (team.leads()) leader.publish(shared_parameters);
    team.sync();
    return shared_load(shared_parameters);
  }

  template <bool kNear>
  __device__ Sums sum_terms(const Source& source, const RowParameters<Real>& parameters, bool backwards) const {
    const Divergence divergence{parameters.beta};
    ThreadSums<kNear, Divergence, Real> mine;
    for_packs<false>(source, team, backwards, [&](int, typename Source::Raw raw) {
      // A few entries are processed at a time: the logarithms of a whole pack would need too many registers.
#pragma unroll 1
      for (int words = kSize / Source::kWord; words > 0; --words, Source::next_word(raw)) {
#pragma unroll
        for (int j = 0; j < Source::kWord; ++j) {
          const Outcome<Real> o =
              parameters.at.template outcome<kNear>(Source::student_of(raw, j), Source::teacher_of(raw, j));
          mine.add(divergence, o, parameters.teacher_gradient);
        }
      }
    });
    return team.sum(mine.whole(), [](Sums& all, const Sums& next) { all.add(next); });
  }

  template <bool kNear>
  __device__ void write(const Source& source, const RowParameters<Real>& parameters, bool backwards) const {
    const Divergence divergence{parameters.beta};
    for_packs<false>(source, team, backwards, [&](int pack, const typename Source::Raw& raw) {
      // The teacher's gradient is written first: writing the student's may overwrite the student's logits.
      if (parameters.teacher_gradient) {
        const auto gradient = [&](Real, const Outcome<Real>& o, int) {
          return teacher_gradient<kNear>(divergence, o, parameters.teacher_mean, parameters.factors);
        };
        source.store_teacher(pack, map<kNear>(raw, parameters, gradient));
      }
      if (parameters.student_gradient) {
        const int label = parameters.label - source.column(pack);
        const auto gradient = [&](Real u, const Outcome<Real>& o, int j) {
          Real g = student_gradient<kNear>(divergence, o, parameters.student_mean, parameters.factors);
          if (parameters.label_scale != Real(0)) {
            const Real x = (u - parameters.at.student_origin) * parameters.label_scale;
            g += parameters.factors.label * exp2_of(x - parameters.label_shift);
          }
          return parameters.label >= 0 && j == label ? g - parameters.factors.label : g;
        };
        source.store_student(pack, map<kNear>(raw, parameters, gradient));
      }
    });
  }

  // The pack of f(student's logit, outcome, place in the pack) for each entry. A few entries are processed at a time:
  // the logarithms of a whole pack would need too many registers.
  template <bool kNear, class Function>
  __device__ __forceinline__ typename Source::Out map(typename Source::Raw raw, const RowParameters<Real>& parameters,
                                                      const Function& f) const {
    typename Source::Out out{};
#pragma unroll 1
    for (int first = 0; first < kSize; first += Source::kWord, Source::next_word(raw)) {
      Real word[Source::kWord];
#pragma unroll
      for (int j = 0; j < Source::kWord; ++j) {
        const Real u = Source::student_of(raw, j);
        const Outcome<Real> o = parameters.at.template outcome<kNear>(u, Source::teacher_of(raw, j));
        word[j] = f(u, o, first + j);
      }
      Source::append(out, word);
    }
    return out;
  }
};

template <class Divergence, class Source>
__global__ void __launch_bounds__(2 * kRowThreads, 1)
    softmax_divergence_kernel(const RowArguments arguments, const RowLaunch launch) {
  const bool by_warp = launch.warp_rows > 0;
  unsigned char* shared = team_memory(launch, team_bytes(by_warp) + 2 * launch.slice_bytes);
  const Team team(shared + kParametersBytes + kPlanBytes + kTeachersBytes, unsigned(launch.cluster), by_warp);
  const RowWorker<Divergence, Source> worker(arguments, team, shared);
  for_rows(team, launch, arguments.rows, [&](int64_t row) {
    if (!arguments.takes(row)) return;
    Source source(arguments, row, launch, team.rank, shared + kParametersBytes + kPlanBytes,
                  shared + team_bytes(by_warp));
    worker.run(row, source);
  });
}

}  // namespace fastkd::cuda
