// A row whose vocabulary is split across processes: what a process computes from its own columns, its shard.
//
// A divergence's gradients are, with a = log q, b = log p and r = df/da (divergence.h: the closed part plus q g),
//   student logits   (r_v - q_v sum r) / temperature,      teacher logits   likewise, with h and p.
// The sums run over the whole vocabulary, so each process sums r over its shard, and the sums are added. They need no
// other sum: where the normalisers are off by rounding, so that the q sum to 1 + e, sum r contains what the gradient is
// off by, and subtracting q sum r removes it.
//
// A row's near and far forms (divergence.h) may differ by a constant in g and h. Each process chooses the form of its
// sums by its own terms, which are never more than the row's value. Its sums are converted to the near form.
#pragma once
#include "normalized.h"
#include "token_stats.h"

namespace fastkd {

// Sums over a shard, or over a row: of f, and of r for the student and for the teacher.
struct ShardSums {
  double value, student, teacher;
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

// Sums of one side's softmaxes over a shard, each relative to its origin, a logit near its largest; see SideSums. The
// second softmax may lack columns, and all that it has may be far below the first's.
// total: sum of z - origin over `columns` columns.
struct ShardState {
  double origin, second_origin;
  SideSums first, second;
  double total, columns;

  static FASTKD_INLINE ShardState empty() { return {-INFINITY, -INFINITY, {0, 0}, {0, 0}, 0, 0}; }
  FASTKD_INLINE void raise(double to, double scale) {
    const double step = step_between(origin, to);
    if (step == 0) return;
    // Without a finite origin, sums are 0 and `total` is relative to 0.
    first.raise(step * scale);
    total -= columns == 0 ? 0 : columns * (origin == -INFINITY ? to : step);
    origin = to;
  }
  FASTKD_INLINE void raise_second(double to, double scale) {
    second.raise(step_between(second_origin, to) * scale);
    second_origin = to;
  }
};

// Sums of a divergence's terms over columns, in one of the two forms.
template <class Sum>
struct ShardTermSums {
  Sum f, student, teacher, q, p;
  FASTKD_INLINE void add(const ShardTermSums& o) {
    f += o.f;
    student += o.student;
    teacher += o.teacher;
    q += o.q;
    p += o.p;
  }
};

// The cross-entropy's value is not small where the student is near the teacher. Both forms are exact: the near one is.
template <class Divergence>
inline constexpr bool kAlwaysNear = Divergence::kPass == Pass::kTeacherCrossing;

// f of the divergences whose first pass (softmax_divergence) finds infinite values lacks mass that meets an impossible
// token.
template <class Divergence, class Real>
FASTKD_INLINE Real lost_term(const Outcome<Real>& o) {
  constexpr Pass kPass = Divergence::kPass;
  if constexpr (kPass == Pass::kTeacherWeighted || kPass == Pass::kTeacherCrossing) {
    return select(o.d < Real(0), lost_mass(o, o.p), Real(0));
  } else if constexpr (kPass == Pass::kStudentWeighted) {
    return select(o.d > Real(0), lost_mass(o, o.q), Real(0));
  }
  return Real(0);
}

// What r is, as a part that a mean is subtracted from exactly: closed + own * centred.
template <Form kForm, class Sum, class Real>
FASTKD_INLINE Sum slope_of(Real centred, Real closed, Real own) {
  Sum all = Sum(0);
  if constexpr (kForm != Form::kCentred) all += Sum(closed);
  if constexpr (kForm != Form::kClosed) all += Sum(own) * Sum(centred);
  return all;
}

template <bool kNear, class Sum, class Divergence, class Real>
FASTKD_INLINE ShardTermSums<Sum> shard_terms(const Divergence& divergence, const Outcome<Real>& o) {
  const Terms<Real> t = divergence.template operator()<kNear>(o);
  return {Sum(t.f + lost_term<Divergence>(o)), slope_of<Divergence::kStudent, Sum>(t.g, t.student, o.q),
          slope_of<Divergence::kTeacher, Sum>(t.h, t.teacher, o.p), Sum(o.q), Sum(o.p)};
}

// g and h of the near form less those of the far form.
template <class Divergence>
FASTKD_INLINE ShardSums form_offsets(const Divergence& divergence) {
  Outcome<double> o{};
  o.p = o.q = 0.5;
  o.log2_p = o.log2_q = -1;
  o.small = true;
  const Terms<double> near = divergence.template operator()<true>(o), far = divergence.template operator()<false>(o);
  return {0, near.g - far.g, near.h - far.h};
}

// The sums of a shard, in the near form, from its sums in the far form.
template <class Divergence>
FASTKD_INLINE ShardSums converted(const Divergence& divergence, const ShardTermSums<double>& far) {
  const ShardSums offsets = form_offsets(divergence);
  return {far.f, far.student + offsets.student * far.q, far.teacher + offsets.teacher * far.p};
}

// A row's gradient of one side: which form, and the sum of r in that form.
struct ShardMean {
  bool near;
  double mean;
};
template <class Divergence>
FASTKD_INLINE ShardMean shard_mean(const Divergence& divergence, double value, double sum, bool of_teacher) {
  const ShardSums offsets = form_offsets(divergence);
  const bool near = kAlwaysNear<Divergence> || value < Divergence::kNearBelow;
  return {near, near ? sum : sum - (of_teacher ? offsets.teacher : offsets.student)};
}

template <Form kForm, class Real>
FASTKD_INLINE Real less_mean(Real centred, Real closed, Real own, const Mean<Real>& mean) {
  if constexpr (kForm == Form::kClosed) return (closed - own * mean.high) - own * mean.low;
  const Real part = own * ((centred - mean.high) - mean.low);
  if constexpr (kForm == Form::kBoth || kForm == Form::kOpen) return closed + part;
  return part;
}

// One entry's gradient by its logit, times temperature.
template <bool kNear, bool kTeacher, class Divergence, class Real>
FASTKD_INLINE Real shard_gradient(const Divergence& divergence, const Outcome<Real>& o, const Mean<Real>& mean) {
  const Terms<Real> t = divergence.template operator()<kNear>(o);
  if constexpr (kTeacher) return less_mean<Divergence::kTeacher>(t.h, t.teacher, o.p, mean);
  return less_mean<Divergence::kStudent>(t.g, t.student, o.q, mean);
}

}  // namespace fastkd::FASTKD_ISA
