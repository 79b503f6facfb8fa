// softmax_divergence's leading thread: what it computes for a row between the passes, and publishes to its team.
#pragma once
#include "../math/quick_terms.h"
#include "softmax_divergence_sums.cuh"

namespace fastkd::cuda {

// A team's shared memory: [parameters][the leading thread's task and plan][the teachers' normalisers and rows][slots of
// the reductions][barriers of the copies][student row][teacher row].
inline constexpr int kParametersBytes = 256, kPlanBytes = 448;
inline constexpr int kTeachersBytes = kMaxTeachers * int(sizeof(OriginSum<double>) + sizeof(char*));
__host__ __device__ constexpr int64_t team_bytes(bool warp) {
  return kParametersBytes + kPlanBytes + kTeachersBytes + (warp ? 0 : Team::kSharedBytes);
}

// The data and work of the leading thread, in double precision, once per row. The data is in shared memory to save
// registers. The functions are not inlined: all kernels of a divergence use one copy.
template <class Real, class Divergence>
struct RowLeader {
  RowTask task;
  RowPlan<Real, Divergence> plan;
  RowState<double> state;  // of pass 1
  RowLses lses;
  Sums sums;  // of the last pass
  LabelLogits label;
  double weight;  // of the row's loss
  bool kept;      // whether the task, and what open() published, may serve the next row too

  // Publishes what the task determines.
  __device__ __noinline__ void open(RowParameters<Real>* published) {
    RowParameters<Real> parameters{};
    plan.set_scales(task);
    parameters.student_scale = plan.student_scale;
    parameters.teacher_scale = plan.teacher_scale;
    parameters.teacher_ratio = plan.teacher_ratio;
    parameters.label_scale = plan.label_scale;
    parameters.teacher_temperature = task.teacher_temperature;
    parameters.beta = task.beta;
    parameters.alpha = task.alpha;
    parameters.student_gradient = task.student_gradient;
    parameters.teacher_gradient = task.teacher_gradient;
    parameters.factors = GradientFactors<Real>(task, plan);
    if constexpr (Quick<Divergence>::kExists) {
      parameters.by_scale = 1 / Quick<Divergence>(task.beta).scales().g;
    }
    shared_store(published, parameters);
  }

  // To be called after pass 1. Publishes the present state of the plan, as add() does.
  __device__ __noinline__ void begin(RowParameters<Real>* published) {
    plan.begin(task, state, lses, label);
    shared_store(&published->at, plan.normalized(plan.near));
    shared_store(&published->student_shift,
                 NormalizerShift<Real>(plan.student_scale, plan.student_origin, plan.student_lse));
    shared_store(&published->teacher_shift,
                 NormalizerShift<Real>(plan.teacher_scale, plan.teacher_origin, plan.teacher_lse));
    publish(published);
  }

  // To be called after each pass that sums the terms.
  __device__ __noinline__ void add(RowParameters<Real>* published) {
    plan.add(task, sums);
    if (plan.near) shared_store(&published->at, plan.normalized());
    publish(published);
  }

 private:
  __device__ __forceinline__ void publish(RowParameters<Real>* published) const {
    shared_store(&published->step, plan.step);
    shared_store(&published->near, plan.near);
    shared_store(&published->student_mean, Mean<Real>(plan.student_mean));
    shared_store(&published->teacher_mean, Mean<Real>(plan.teacher_mean));
    shared_store(&published->label_shift, Real(plan.label_lse));
    if constexpr (Divergence::kPass == Pass::kStudentWeighted) {
      shared_store(&published->centre, Mean<Real>((plan.student_mean * kLog2E + (plan.student_lse - plan.teacher_lse)) /
                                                  double(plan.student_scale)));
    }
    if constexpr (Divergence::kExcludesLabel) {
      shared_store(&published->factors, GradientFactors<Real>::of(task, plan));
    }
  }
};

}  // namespace fastkd::cuda
