// The passes over one row of softmax_divergence (softmax_divergence.h says which run when).
#pragma once
#include "../math/short_terms.h"
#include "common/row_slices.h"
#include "common/teachers.h"

namespace fastkd {

struct SoftmaxDivergenceRow {
  int64_t vocab;
  Row student;
  Teachers teachers;
  int64_t label;                // -1: none
  bool excludes_label = false;  // the divergence is of all tokens but the label
  RowTask task;
  Row student_gradient, teacher_gradient;  // empty: not requested
  int64_t student_width, teacher_width;    // columns of the gradients; those from vocab on are set to 0
  void* scratch;                           // softmax_divergence_scratch(...) bytes, aligned to 64
};

using SoftmaxDivergenceKernel = double (*)(const SoftmaxDivergenceRow&, const SliceRunner&);
struct SoftmaxDivergenceKernels {
  SoftmaxDivergenceKernel of[kDivergences];
  SoftmaxDivergenceKernel teachers_apart;
};

// What a pass stores besides a slice's partial sums. For each block: the logits that its 2^x are relative to. For each
// entry: one number for each side and, where the teacher's gradient is requested too, g.
inline constexpr int64_t kOriginBytes = 16;

inline int64_t softmax_divergence_scratch(int64_t vocab, int64_t teachers, int64_t real_size, bool teacher_gradient) {
  return slices_of(vocab) * (kPartialBytes + kSlice / kBlock * kOriginBytes) + aligned(teachers * 16) +
         (teacher_gradient ? 3 : 2) * aligned(vocab * real_size);
}

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

template <class Real, bool kDouble>
struct Accumulator {
  using Type = Real;
};
template <class Real>
struct Accumulator<Real, true> {
  using Type = double;
};

// One row's storage between its passes, and the passes.
template <class Real>
struct RowPasses : RowSlices {
  const SoftmaxDivergenceRow& row;
  const RowFrame<Real>& frame;                     // its scales are set at the start, the rest after pass 1
  Origins<Real>* origins;                          // scratch: one per block
  OriginSum<double>* normalizers;                  // scratch: one per teacher
  Real *student_stored, *teacher_stored, *slopes;  // scratch: one per entry; see Stored; slopes: g
  TeacherBlocks<Real> teacher;

  RowPasses(const SoftmaxDivergenceRow& r, const SliceRunner& s, const RowFrame<Real>& f)
      : RowSlices{r.vocab, s, static_cast<char*>(r.scratch)},
        row(r),
        frame(f),
        origins(reinterpret_cast<Origins<Real>*>(partials + slices_of(r.vocab) * kPartialBytes)),
        normalizers(reinterpret_cast<OriginSum<double>*>(reinterpret_cast<char*>(origins) +
                                                         slices_of(r.vocab) * (kSlice / kBlock) * kOriginBytes)),
        student_stored(reinterpret_cast<Real*>(reinterpret_cast<char*>(normalizers) + aligned(r.teachers.count * 16))),
        teacher_stored(student_stored + aligned(r.vocab * sizeof(Real)) / sizeof(Real)),
        // Only the teacher's gradient still needs teacher_stored beside g; without it, g may overwrite teacher_stored.
        slopes(r.teacher_gradient ? teacher_stored + (teacher_stored - student_stored) : teacher_stored),
        teacher{r.teachers, Real(kLog2E / r.task.teacher_temperature), normalizers} {
    // Until the gradient is written, its memory can hold student_stored.
    Real* const out = r.student_gradient ? destination<Real>(r.student_gradient, 0, nullptr) : nullptr;
    if (out != nullptr && out != r.student.data) student_stored = out;
  }

  // Blocks of both sides' logits. The label's are -inf where the divergence excludes it.
  const Real* student_block(int64_t begin, int64_t count, Real* buffer) const {
    return without_label(load(row.student, begin, count, buffer), begin, count, buffer);
  }
  const Real* teacher_block(int64_t begin, int64_t count, Real* buffer, Real* spare) const {
    return without_label(teacher.load_block(begin, count, buffer, spare), begin, count, buffer);
  }
  const Real* without_label(const Real* block, int64_t begin, int64_t count, Real* buffer) const {
    if (!row.excludes_label || row.label < begin || row.label >= begin + count) return block;
    for (int64_t i = 0; i < count; ++i) buffer[i] = block[i];
    buffer[row.label - begin] = Real(-INFINITY);
    return buffer;
  }

  void normalize_teachers() const {
    using State = OriginSum<double>;
    if (teacher.alone()) return;
    for (int k = 0; k < row.teachers.count; ++k) {
      if (!row.teachers.mix_probs) {
        normalizers[k] = {double(teacher.some_logit(k, vocab)), 1};
        continue;
      }
      normalizers[k] = reduce_slices<State>(
          [&](int64_t slice) {
            State all = State::empty();
            for_blocks(slice, [&](int64_t begin, int64_t count) {
              all.merge(teacher.normalizer(k, begin, count), teacher.scale);
            });
            return all;
          },
          [&](State& all, const State& next) { all.merge(next, teacher.scale); });
    }
  }

  template <Pass kPass, bool kKeep>
  RowState<double> accumulate() const {
    normalize_teachers();
    using State = RowState<double>;
    return reduce_slices<State>(
        [&](int64_t slice) {
          State sum = State::empty();
          Real u_origin = Real(-INFINITY), w_origin = Real(-INFINITY);
          for_blocks(slice, [&](int64_t begin, int64_t count) {
            add_block<kPass, kKeep>(sum, u_origin, w_origin, begin, count);
          });
          return sum;
        },
        [&](State& sum, const State& next) { sum.merge(next, kPass, frame.template scales<double>()); });
  }

  // Adds a block relative to the slice's origins, and finds the block's own maxima at the same time. Only if those are
  // much larger than the origins, or there was no origin yet, is the block added again relative to the maxima. An
  // origin is therefore within a factor of 2^8 of the maximum.
  template <Pass kPass, bool kKeep>
  void add_block(RowState<double>& all, Real& u_origin, Real& w_origin, int64_t begin, int64_t count) const {
    alignas(64) Real student_buffer[kBlock], teacher_buffer[kBlock], spare[kBlock];
    const int64_t ahead = begin + kBlock, some = vocab - ahead < kBlock ? vocab - ahead : kBlock;
    if (some > 0) {
      prefetch(row.student, ahead, some);
      teacher.prefetch_block(ahead, some);
    }
    const Real* u = student_block(begin, count, student_buffer);
    const Real* w = teacher_block(begin, count, teacher_buffer, spare);
    if (u_origin == Real(-INFINITY)) u_origin = largest(u, count);
    if (w_origin == Real(-INFINITY)) w_origin = largest(w, count);
    // The label's softmax uses another temperature on the same logits. Neither sum may overflow.
    const Real u_slack = Real(8) / at_least(frame.label_scale, frame.student_scale);
    const Real w_slack = Real(8) / frame.teacher_scale;
    for (;;) {
      Real u_largest, w_largest;
      const RowState<double> block =
          block_state<kPass, kKeep>(u, w, count, u_origin, w_origin, begin, u_largest, w_largest);
      const bool fits = !(u_largest > u_origin + u_slack) && !(w_largest > w_origin + w_slack);
      if (fits) return all.merge(block, kPass, frame.template scales<double>());
      u_origin = at_least(u_largest, u_origin);
      w_origin = at_least(w_largest, w_origin);
    }
  }

  template <Pass kPass, bool kKeep>
  RowState<double> block_state(const Real* u, const Real* w, int64_t count, Real u_origin, Real w_origin, int64_t begin,
                               Real& u_largest, Real& w_largest) const {
    const Real us = frame.student_scale, ws = frame.teacher_scale, r = frame.teacher_ratio;
    const Real u_zero = u_origin == Real(-INFINITY) ? Real(0) : u_origin;
    const Real w_zero = w_origin == Real(-INFINITY) ? Real(0) : w_origin;
    // Log-ratios that are infinite, or come from the smallest finite number, are not summed here. far_sums adds them,
    // in the rare block that has one. Log-ratios below kLowest belong to entries without weight.
    constexpr Real kLowest = Real(-kDead);
    // The student-weighted sum becomes a mean that the gradient subtracts, hence the type: see Sums.
    using Ratio = typename Accumulator<Real, kPass == Pass::kStudentWeighted>::Type;
    Ratio u_sum = 0, w_sum = 0, ratio = 0;
    Real crossing = 0, u_max = Real(-INFINITY), w_max = Real(-INFINITY), farthest = 0;
    Real *keep_u = student_stored + begin, *keep_w = teacher_stored + begin;
    if constexpr (kKeep) origins[begin / kBlock] = {u_origin, w_origin};
    FASTKD_SIMD_WITH(reduction(+ : u_sum, w_sum, ratio, crossing) reduction(max : u_max, w_max, farthest))
    for (int64_t i = 0; i < count; ++i) {
      u_max = u[i] > u_max ? u[i] : u_max;
      w_max = w[i] > w_max ? w[i] : w_max;
      const Real x = u[i] - u_zero, y = w[i] - w_zero;
      const Real e_u = exp2_of(x * us), e_w = exp2_of(y * ws);
      u_sum += e_u;
      w_sum += e_w;
      if constexpr (kKeep) keep_u[i] = e_u;
      if constexpr (kKeep && kPass != Pass::kStudentWeighted) keep_w[i] = e_w;
      if constexpr (kPass == Pass::kTeacherWeighted || kPass == Pass::kTeacherCrossing) {
        const Real whole = y * r - x, log_ratio = whole > kLowest ? whole : Real(0);
        ratio += e_w * log_ratio;
        farthest = log_ratio > farthest ? log_ratio : farthest;
      }
      if constexpr (kPass == Pass::kStudentWeighted) {
        const Real whole = x - y * r, log_ratio = whole > kLowest ? whole : Real(0);
        ratio += Ratio(e_u) * Ratio(log_ratio);
        farthest = log_ratio > farthest ? log_ratio : farthest;
        if constexpr (kKeep) keep_w[i] = log_ratio;
      }
      if constexpr (kPass == Pass::kTeacherCrossing) {
        const Real cross = y > kLowest ? x : Real(0);
        crossing -= e_w * cross;
      }
    }
    Real label_sum = 0;
    if (frame.label_scale != Real(0)) {
      const Real scale = frame.label_scale;
      FASTKD_SIMD_REDUCE(+ : label_sum)
      for (int64_t i = 0; i < count; ++i) label_sum += exp2_of((u[i] - u_zero) * scale);
    }
    u_largest = u_max;
    w_largest = w_max;
    FarSums far{double(ratio), double(crossing)};
    if (kPass != Pass::kNormalizersOnly && !(farthest < Real(kDead))) {
      far = far_sums<kPass>(u, w, count, u_zero, w_zero, kKeep ? keep_w : nullptr);
    }
    return {{double(u_origin), u_sum}, {double(w_origin), w_sum}, far.ratio * us, far.crossing * us, label_sum};
  }

  // The sums of a block in which a log-ratio is infinite or so large that its products overflow, in double precision.
  // An entry without weight contributes nothing, whatever its log-ratio.
  struct FarSums {
    double ratio, crossing;
  };
  template <Pass kPass>
  __attribute__((noinline)) FarSums far_sums(const Real* u, const Real* w, int64_t count, double u_zero, double w_zero,
                                             Real* keep) const {
    constexpr bool kByStudent = kPass == Pass::kStudentWeighted;
    FarSums all{0, 0};
    for (int64_t i = 0; i < count; ++i) {
      const double x = double(u[i]) - u_zero, y = double(w[i]) - w_zero, own = kByStudent ? x : y;
      const double log_weight = own * (kByStudent ? frame.student_scale : frame.teacher_scale);
      if (log_weight < -kNoWeight) {
        if (kByStudent && keep != nullptr) keep[i] = Real(0);
        continue;
      }
      const double weight = ::exp2(log_weight), apart = y * double(frame.teacher_ratio) - x;
      const double log_ratio = kByStudent ? -apart : apart;
      all.ratio += weight * log_ratio;
      if (kPass == Pass::kTeacherCrossing) all.crossing -= weight * x;
      // Gradients use a finite substitute: see RowPlan::kept.
      if (kByStudent && keep != nullptr) keep[i] = at_most(Real(kDead), Real(log_ratio));
    }
    return all;
  }

  template <bool kNear>
  FromLogits<Real, kNear> from_logits(const Real* u, const Real* w) const {
    return {frame.normalized(), u, w};
  }

  // The block that begins at `begin`, as pass 1 stored it. Log-ratios are relative to `centre`.
  template <Pass kPass>
  Stored<Real, kPass> from_stored(int64_t begin, double centre) const {
    const Origins<Real> at = origins[begin / kBlock];
    const double u_step = (double(at.student) - frame.student_origin) * frame.student_scale;
    const double w_step = (double(at.teacher) - frame.teacher_origin) * frame.teacher_scale;
    const double u_factor = probability(u_step - frame.student_lse), w_factor = probability(w_step - frame.teacher_lse);
    // Where all of a block's probabilities are 0, its log-ratios are arbitrary.
    const double shift = kPass == Pass::kStudentWeighted && u_factor != 0 ? -log_shift(at) - centre : 0;
    return {student_stored + begin,
            teacher_stored + begin,
            Real(u_factor),
            Real(w_factor),
            Mean<Real>(frame.student_scale * kLn2),
            Mean<Real>(shift)};
  }
  // The log(p / q) of an entry whose two logits equal these origins; 0 where a side has no origin.
  double log_shift(const Origins<Real>& at) const {
    if (at.student == Real(-INFINITY) || at.teacher == Real(-INFINITY)) return 0;
    const double gap = (double(at.student) - frame.student_origin) -
                       double(frame.teacher_ratio) * (double(at.teacher) - frame.teacher_origin);
    return ((frame.student_lse - frame.teacher_lse) - gap * frame.student_scale) * kLn2;
  }
  // 2^x, or 0 where subnormal arithmetic would be slow: products with such a factor are below 2^-118.
  static double probability(double x) { return x < -126 ? 0 : ::exp2(x); }

  // Calls body(entries, begin, count) for every block of a slice. The entries' outcomes come from what pass 1 stored,
  // or from the logits, or from both.
  template <bool kNear, bool kStored, class Divergence, class Body>
  void for_outcomes(int64_t slice, double centre, const Body& body) const {
    constexpr Pass kPass = Divergence::kPass;
    for_blocks(slice, [&](int64_t begin, int64_t count) {
      if constexpr (kStored && !Divergence::kUsesRatio) {
        body(from_stored<kPass>(begin, centre), begin, count);
      } else {
        alignas(64) Real student_buffer[kBlock], teacher_buffer[kBlock], spare[kBlock];
        const Real* u = student_block(begin, count, student_buffer);
        const Real* w = teacher_block(begin, count, teacher_buffer, spare);
        if constexpr (kStored) {
          body(StoredWithRatio<Real, kPass>{from_stored<kPass>(begin, centre), from_logits<false>(u, w)}, begin, count);
        } else {
          body(from_logits<kNear>(u, w), begin, count);
        }
      }
    });
  }

  template <bool kNear, class Divergence>
  Sums sum_terms(const Divergence& divergence) const {
    constexpr bool kStored = !kNear && Divergence::kPass == Pass::kNormalizersOnly;
    return reduce_slices<Sums>(
        [&](int64_t slice) {
          Sums all{};
          for_outcomes<kNear, kStored, Divergence>(slice, 0, [&](const auto& entries, int64_t begin, int64_t count) {
            Real* keep = slopes + begin;
            all.add(row.teacher_gradient ? block_sums<kNear, true>(divergence, entries, count, keep)
                                         : block_sums<kNear, false>(divergence, entries, count, keep));
          });
          return all;
        },
        [](Sums& all, const Sums& next) { all.add(next); });
  }

  template <bool kNear, bool kTeacher, class Divergence, class Entries>
  Sums block_sums(const Divergence divergence, const Entries entries, int64_t count, Real* keep) const {
    Real f = 0, difference = 0;
    double qg = 0, ph = 0, q = 0, p = 0;
    FASTKD_SIMD_REDUCE(+ : f, qg, ph, q, p, difference)
    for (int64_t i = 0; i < count; ++i) {
      const Outcome<Real> o = entries.outcome(i);
      const Terms<Real> t = divergence.template operator()<kNear>(o);
      f += t.f;
      if constexpr (Divergence::kStudent != Form::kClosed) {
        if constexpr (Divergence::kStudent != Form::kProduct) qg += double(o.q) * double(t.g);
        if constexpr (Divergence::kStudent == Form::kOpen || Divergence::kStudent == Form::kProduct) {
          qg += double(t.student);
        }
        q += double(o.q);
        keep[i] = Divergence::kStudent == Form::kOpen      ? t.student + t.g
                  : Divergence::kStudent == Form::kProduct ? t.student
                  : Divergence::kStudent == Form::kBoth    ? t.student + o.q * t.g
                                                           : t.g;
      }
      if constexpr (kTeacher && Divergence::kTeacher != Form::kClosed) {
        if constexpr (Divergence::kTeacher != Form::kProduct) ph += double(o.p) * double(t.h);
        if constexpr (Divergence::kTeacher == Form::kOpen || Divergence::kTeacher == Form::kProduct) {
          ph += double(t.teacher);
        }
      }
      if constexpr (kNear || (kTeacher && Divergence::kTeacher != Form::kClosed)) p += double(o.p);
      if constexpr (kNear) difference += o.difference;
      if constexpr (!kNear && Divergence::kByMass) difference += t.mass;
    }
    return {f, qg, ph, q, p, difference};
  }

  // The total variation distance, from the logits: two more exponentials cost less than storing them.
  template <bool kNear>
  double total_variation() const {
    return reduce_slices<double>(
        [&](int64_t slice) {
          double all = 0;
          for_outcomes<kNear, false, Tvd>(
              slice, 0, [&](const auto& entries, int64_t, int64_t count) { all += total_variation(entries, count); });
          return all;
        },
        [](double& all, double next) { all += next; });
  }
  template <class Entries>
  static double total_variation(const Entries entries, int64_t count) {
    Real sum = 0;
    FASTKD_SIMD_REDUCE(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += magnitude(entries.outcome(i).difference);
    return 0.5 * double(sum);
  }

  // What the student's gradient needs of the entries beside the stored slopes: q alone.
  template <class Divergence>
  struct StudentEntries {
    static constexpr Pass kPass = Divergence::kPass;
    static constexpr bool kUsesRatio = Divergence::kUsesRatio && kPass != Pass::kNormalizersOnly;
  };

  template <bool kNear, bool kStored, class Divergence>
  void write_student_gradient(const Divergence& divergence, const RowPlan<Real, Divergence>& plan) const {
    const auto factors = GradientFactors<Real>::of(row.task, plan);
    // In that case g is the log-ratio, from which its mean is subtracted before rounding.
    constexpr bool kCentred = kStored && Divergence::kPass == Pass::kStudentWeighted;
    const double centre = kCentred ? plan.student_mean : 0;
    const Mean<Real> mean(plan.student_mean - centre);
    const bool label_apart = frame.label_scale != Real(0);
    const Real label_shift = Real(frame.label_lse), origin = frame.student_origin, scale = frame.label_scale;
    for_slices([&](int64_t slice) {
      for_outcomes<kNear, kStored, StudentEntries<Divergence>>(
          slice, centre, [&](const auto& entries, int64_t begin, int64_t count) {
            alignas(64) Real buffer[kBlock], label_part[kBlock];
            if (label_apart) {  // before the student's logits may be overwritten
              const Real* u = student_block(begin, count, buffer);
              FASTKD_SIMD
              for (int64_t i = 0; i < count; ++i) {
                label_part[i] = factors.label * exp2_of((u[i] - origin) * scale - label_shift);
              }
            }
            Real* out = destination(row.student_gradient, begin, buffer);
            if constexpr (Divergence::kPass == Pass::kNormalizersOnly) {
              write_student_block<Divergence::kStudent>(entries, slopes + begin, count, factors, mean, out);
            } else {
              write_student_block<kNear>(divergence, entries, count, factors, mean, out);
            }
            if (label_apart) {
              FASTKD_SIMD
              for (int64_t i = 0; i < count; ++i) out[i] += label_part[i];
            }
            if (row.label >= begin && row.label < begin + count) out[row.label - begin] += factors.at_label;
            store(row.student_gradient, begin, count, out);
          });
      finish_streaming(row.student_gradient);
    });
  }

  template <bool kNear, class Divergence, class Entries>
  static void write_student_block(const Divergence divergence, const Entries entries, int64_t count,
                                  const GradientFactors<Real> factors, const Mean<Real> mean, Real* out) {
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) {
      out[i] = student_gradient<kNear>(divergence, entries.outcome(i), mean, factors);
    }
  }

  // The same from the slopes that the pass before stored: g or, where the gradient has another form, what the mean
  // times q is subtracted from.
  template <Form kForm, class Entries>
  static void write_student_block(const Entries entries, const Real* stored, int64_t count,
                                  const GradientFactors<Real> factors, const Mean<Real> mean, Real* out) {
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) {
      const Real q = entries.outcome(i).q, s = stored[i];
      if constexpr (kForm == Form::kOpen) {
        const Real part = q < Real(kOpenBelow) ? (s - q * mean.high) - q * mean.low : q * ((s - mean.high) - mean.low);
        out[i] = factors.student * part + factors.label_q * q;
      } else if constexpr (kForm == Form::kBoth || kForm == Form::kProduct) {
        out[i] = factors.student * ((s - q * mean.high) - q * mean.low) + factors.label_q * q;
      } else {
        out[i] = (factors.student * ((s - mean.high) - mean.low) + factors.label_q) * q;
      }
    }
  }

  template <bool kNear, class Divergence>
  void write_teacher_gradient(const Divergence& divergence, const RowPlan<Real, Divergence>& plan) const {
    constexpr bool kStored = !kNear && Divergence::kPass == Pass::kNormalizersOnly;
    const auto factors = GradientFactors<Real>::of(row.task, plan);
    const Mean<Real> mean(plan.teacher_mean);
    for_slices([&](int64_t slice) {
      for_outcomes<kNear, kStored, Divergence>(slice, 0, [&](const auto& entries, int64_t begin, int64_t count) {
        alignas(64) Real buffer[kBlock];
        Real* out = destination(row.teacher_gradient, begin, buffer);
        write_teacher_block<kNear>(divergence, entries, count, factors, mean, out);
        if (row.excludes_label && row.label >= begin && row.label < begin + count) {
          out[row.label - begin] += factors.teacher_at_label;
        }
        store(row.teacher_gradient, begin, count, out);
      });
      finish_streaming(row.teacher_gradient);
    });
  }

  template <bool kNear, class Divergence, class Entries>
  static void write_teacher_block(const Divergence divergence, const Entries entries, int64_t count,
                                  const GradientFactors<Real> factors, const Mean<Real> mean, Real* out) {
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) {
      out[i] = teacher_gradient<kNear>(divergence, entries.outcome(i), mean, factors);
    }
  }
};

}  // namespace fastkd::FASTKD_ISA
