// One row of softmax_divergence: its loss and its gradients.
//
// Memory: pass 1 reads student and teacher and accumulates the softmax states, with the log-ratio sum that is the whole
// value of the KL divergences; the last pass reads both again, from the cache while a row fits there, and writes the
// gradient. Divergences of a mixture need one more pass for their sums. Rows that came out nearly equal take a careful
// route (kNear): their value and gradient are differences too small for the sums of pass 1.
//
// A row is cut in slices of a fixed number of columns, whose states are merged in order: the result does not depend on
// which thread took which slice.
#pragma once
#include "../math/divergence.h"
#include "simd.h"

namespace fastkd {

inline constexpr int64_t kSlice = 8192;

// Calls body(context, slice) for every slice, in any order, on any threads.
struct SliceRunner {
  void (*run)(void* self, int64_t slices, void (*body)(void* context, int64_t slice), void* context);
  void* self;
};

struct SoftmaxDivergenceRow {
  int64_t vocab;
  Row student;
  const Row* teachers;
  const double* teacher_weights;  // one a teacher; ignored for a single teacher
  int teacher_count;
  bool mix_probs;                 // else logits
  double beta;
  double temperature, teacher_temperature;
  int64_t label;                  // -1: none
  double label_weight;
  double divergence_scale;        // of the divergence's value: temperature^2 or 1
  double scale;                   // of the row's gradient: weight / denominator
  Row student_gradient, teacher_gradient;  // empty: not wanted
  int64_t student_width, teacher_width;    // columns of the gradients; those from vocab on are zero
  void* scratch;                  // softmax_divergence_scratch(vocab, teacher_count) bytes, aligned to 16
};

struct SoftmaxDivergenceKernel {
  const char* name;
  double (*float_row)(const SoftmaxDivergenceRow&, const SliceRunner&);
  double (*double_row)(const SoftmaxDivergenceRow&, const SliceRunner&);
};
inline constexpr int kDivergences = 7;

inline int64_t softmax_divergence_scratch(int64_t vocab, int64_t teacher_count) {
  return ((vocab + kSlice - 1) / kSlice) * 64 + teacher_count * 16;
}

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

struct Sums {
  double f, g, h, p, difference;
};

// From logits to outcomes, once both normalisers are known. Logits are first taken relative to a value near the largest:
// what counts in a distribution is then exact to rounding, whatever constant the logits carry.
template <class Real>
struct Normalized {
  Real student_scale, teacher_scale, teacher_ratio;
  Real student_origin, teacher_origin;  // logits
  Real student_lse, teacher_lse;        // relative to the origins, base 2
  Real log_shift;                       // their difference, natural, with what origin_gap lost in rounding
  Real origin_gap;                      // student_origin - teacher_ratio teacher_origin

  template <bool kNear>
  FASTKD_INLINE Outcome<Real> outcome(Real u, Real w) const {
    const Real x = u - student_origin, y = w - teacher_origin;
    const Real a = x * student_scale - student_lse, b = y * teacher_scale - teacher_lse;
    // From the logits as they are: their difference is exact where student and teacher nearly agree.
    const Real alive_u = at_least(Real(-kDead), u), alive_w = at_least(Real(-kDead), w);
    const Real apart = (alive_u - alive_w * teacher_ratio) - origin_gap;
    const Real ratio = apart * student_scale * Real(kLn2) - log_shift;
    Outcome<Real> o;
    o.p = exp2_of(b);
    o.q = exp2_of(a);
    o.log2_p = at_least(Real(-kDead), b);
    o.log2_q = at_least(Real(-kDead), a);
    o.d = magnitude(ratio) > Real(kInfiniteLogRatio) ? with_sign(Real(kLargestLogRatio), ratio) : ratio;
    o.small = kNear && magnitude(o.d) < Real(0.5);
    o.difference = o.q - o.p;
    if constexpr (kNear) o.difference = select(o.small, o.p * (o.d + expm1_gap(o.d)), o.difference);
    return o;
  }
};

// A row between its passes.
template <class Real>
struct RowPasses {
  const SoftmaxDivergenceRow& row;
  const SliceRunner& runner;
  Real student_scale, teacher_scale, teacher_ratio;  // log2(e) / temperature, and teacher's over student's
  Real label_scale;                                  // log2(e), or 0 where pass 1 need not sum it separately
  MaxSum<double>* teacher_normalizers;               // of each teacher, for mix_probs
  Real student_origin = 0, teacher_origin = 0;             // logits near the largest
  double student_lse = 0, teacher_lse = 0, label_lse = 0;  // relative to the origins, base 2

  RowPasses(const SoftmaxDivergenceRow& r, const SliceRunner& s)
      : row(r),
        runner(s),
        student_scale(Real(kLog2E / r.temperature)),
        teacher_scale(Real(r.mix_probs ? 1.0 : kLog2E / r.teacher_temperature)),
        teacher_ratio(r.mix_probs || r.temperature != r.teacher_temperature ? teacher_scale / student_scale : Real(1)),
        label_scale(r.label >= 0 && r.temperature != 1.0 ? Real(kLog2E) : Real(0)),
        teacher_normalizers(static_cast<MaxSum<double>*>(r.scratch)) {}

  template <class Body>
  void for_blocks(int64_t slice, Body body) const {
    const int64_t first = slice * kSlice, last = first + kSlice < row.vocab ? first + kSlice : row.vocab;
    for (int64_t begin = first; begin < last; begin += kBlock) body(begin, last - begin < kBlock ? last - begin : kBlock);
  }

  // Runs body(slice, partial) for every slice and returns the partials, in scratch.
  template <class Partial, class Body>
  const Partial* for_slices(const Body& body, int64_t& slices) const {
    static_assert(sizeof(Partial) <= 64);
    struct Context {
      const Body* body;
      Partial* partial;
    } context{&body, reinterpret_cast<Partial*>(static_cast<char*>(row.scratch) + row.teacher_count * 16)};
    slices = (row.vocab + kSlice - 1) / kSlice;
    runner.run(
        runner.self, slices,
        [](void* self, int64_t slice) {
          const Context& c = *static_cast<Context*>(self);
          c.partial[slice] = (*c.body)(slice);
        },
        &context);
    return context.partial;
  }

  // The block's teacher logits (times teacher_scale: base 2), or the composite of several.
  const Real* load_teacher(int64_t begin, int64_t count, Real* buffer, Real* spare) const {
    if (row.teacher_count == 1) return load(row.teachers[0], begin, count, buffer);
    return row.mix_probs ? mix_probs(begin, count, buffer, spare) : mix_logits(begin, count, buffer, spare);
  }

  // sum_k w_k z_k, and -inf wherever one of the z_k that count is -inf.
  __attribute__((noinline)) const Real* mix_logits(int64_t begin, int64_t count, Real* mixed, Real* spare) const {
    alignas(64) Real dead[kBlock];
    for (int64_t i = 0; i < count; ++i) mixed[i] = dead[i] = Real(0);
    for (int k = 0; k < row.teacher_count; ++k) {
      const Real weight = Real(row.teacher_weights[k]);
      if (weight == Real(0)) continue;
      const Real* z = load(row.teachers[k], begin, count, spare);
      FASTKD_SIMD
      for (int64_t i = 0; i < count; ++i) {
        const bool gone = z[i] == Real(-INFINITY);
        mixed[i] += weight * (gone ? Real(0) : z[i]);
        dead[i] = gone ? Real(-INFINITY) : dead[i];
      }
    }
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) mixed[i] += dead[i];
    return mixed;
  }

  // log2 sum_k w_k softmax(z_k / teacher_temperature), relative to the largest member so that no tail underflows.
  __attribute__((noinline)) const Real* mix_probs(int64_t begin, int64_t count, Real* mixed, Real* spare) const {
    alignas(64) Real sum[kBlock];
    const Real scale = Real(kLog2E / row.teacher_temperature);
    for (int64_t i = 0; i < count; ++i) {
      mixed[i] = Real(-INFINITY);
      sum[i] = Real(0);
    }
    for (int k = 0; k < row.teacher_count; ++k) {
      if (row.teacher_weights[k] == 0) continue;
      const Real shift = Real(::log2(row.teacher_weights[k]) - teacher_normalizers[k].log2());
      const Real* z = load(row.teachers[k], begin, count, spare);
      FASTKD_SIMD
      for (int64_t i = 0; i < count; ++i) {
        const Real x = z[i] * scale + shift, top = at_least(mixed[i], x);
        const Real safe = top == Real(-INFINITY) ? Real(0) : top;
        sum[i] = sum[i] * exp2_of(mixed[i] - safe) + exp2_of(x - safe);
        mixed[i] = top;
      }
    }
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) mixed[i] += log2_of(at_least(Real(1), sum[i]));
    return mixed;
  }

  __attribute__((noinline)) void normalize_teachers() const {
    if (!row.mix_probs) return;
    const Real scale = Real(kLog2E / row.teacher_temperature);
    for (int k = 0; k < row.teacher_count; ++k) {
      int64_t slices;
      const MaxSum<double>* part = for_slices<MaxSum<double>>(
          [&](int64_t slice) {
            MaxSum<double> all = MaxSum<double>::empty();
            for_blocks(slice, [&](int64_t begin, int64_t count) {
              alignas(64) Real buffer[kBlock];
              const Real* z = load(row.teachers[k], begin, count, buffer);
              const Real top = largest(z, count) * scale, shift = top == Real(-INFINITY) ? Real(0) : top;
              Real sum = 0;
              FASTKD_SIMD_REDUCE(+ : sum)
              for (int64_t i = 0; i < count; ++i) sum += exp2_of(z[i] * scale - shift);
              all.merge({top, sum});
            });
            return all;
          },
          slices);
      teacher_normalizers[k] = part[0];
      for (int64_t s = 1; s < slices; ++s) teacher_normalizers[k].merge(part[s]);
    }
  }

  template <Pass kPass>
  RowState<double> accumulate() {
    normalize_teachers();
    int64_t slices;
    const RowState<double>* part = for_slices<RowState<double>>(
        [&](int64_t slice) {
          RowState<double> all = RowState<double>::empty();
          Real u_origin = Real(-INFINITY), w_origin = Real(-INFINITY);
          for_blocks(slice, [&](int64_t begin, int64_t count) {
            add_block<kPass>(all, u_origin, w_origin, begin, count);
          });
          return all;
        },
        slices);
    RowState<double> all = part[0];
    for (int64_t s = 1; s < slices; ++s) all.merge(part[s], kPass, row.temperature);
    student_origin = Real(all.student.max / student_scale);
    teacher_origin = Real(all.teacher.max / teacher_scale);
    student_lse = all.student.log2() - double(student_origin) * student_scale;
    teacher_lse = all.teacher.log2() - double(teacher_origin) * teacher_scale;
    if (row.label >= 0) {
      label_lse = label_scale == Real(0) ? student_lse : ::log2(all.label_sum) + all.student.max * row.temperature - double(student_origin) * label_scale;
    }
    return all;
  }

  // Adds a block relative to the slice's origins, finding the block's own maxima on the way. Only where those turn out
  // much larger, or there was none yet, is the block added again relative to them: an origin is within 2^8 of the maximum.
  template <Pass kPass>
  void add_block(RowState<double>& all, Real& u_origin, Real& w_origin, int64_t begin, int64_t count) const {
    alignas(64) Real student_buffer[kBlock], teacher_buffer[kBlock], spare[kBlock];
    const int64_t ahead = begin + kBlock, some = row.vocab - ahead < kBlock ? row.vocab - ahead : kBlock;
    if (some > 0) {
      prefetch(row.student, ahead, some);
      for (int k = 0; k < row.teacher_count; ++k) prefetch(row.teachers[k], ahead, some);
    }
    const Real* u = load(row.student, begin, count, student_buffer);
    const Real* w = load_teacher(begin, count, teacher_buffer, spare);
    if (u_origin == Real(-INFINITY)) u_origin = largest(u, count);
    if (w_origin == Real(-INFINITY)) w_origin = largest(w, count);
    const Real u_slack = Real(8) / student_scale, w_slack = Real(8) / teacher_scale;
    for (;;) {
      Real u_largest, w_largest;
      const RowState<double> block = block_state<kPass>(u, w, count, u_origin, w_origin, u_largest, w_largest);
      const bool fits = !(u_largest > u_origin + u_slack) && !(w_largest > w_origin + w_slack);
      if (fits) return all.merge(block, kPass, row.temperature);
      u_origin = at_least(u_largest, u_origin);
      w_origin = at_least(w_largest, w_origin);
    }
  }

  template <Pass kPass>
  RowState<double> block_state(const Real* u, const Real* w, int64_t count, Real u_origin, Real w_origin, Real& u_largest,
                               Real& w_largest) const {
    const Real us = student_scale, ws = teacher_scale, r = teacher_ratio;
    const Real u_zero = u_origin == Real(-INFINITY) ? Real(0) : u_origin;
    const Real w_zero = w_origin == Real(-INFINITY) ? Real(0) : w_origin;
    // A tiny weight instead of 0 lets an impossible entry make the sum infinite even where its mass underflows.
    constexpr Real kTiny = Real(1.17549435e-38), kLowest = Real(-3.4e38);
    Real u_sum = 0, w_sum = 0, ratio = 0, crossing = 0, u_max = Real(-INFINITY), w_max = Real(-INFINITY);
    _Pragma("omp simd reduction(+ : u_sum, w_sum, ratio, crossing) reduction(max : u_max, w_max)")
    for (int64_t i = 0; i < count; ++i) {
      u_max = u[i] > u_max ? u[i] : u_max;
      w_max = w[i] > w_max ? w[i] : w_max;
      const Real x = u[i] - u_zero, y = w[i] - w_zero;
      const Real e_u = exp2_of(x * us), e_w = exp2_of(y * ws);
      u_sum += e_u;
      w_sum += e_w;
      if constexpr (kPass == Pass::kTeacherWeighted || kPass == Pass::kTeacherCrossing) {
        const Real log_ratio = y * r - x;
        ratio += log_ratio > kLowest ? at_least(kTiny, e_w) * log_ratio : Real(0);
      }
      if constexpr (kPass == Pass::kStudentWeighted) {
        const Real log_ratio = x - y * r;
        ratio += log_ratio > kLowest ? at_least(kTiny, e_u) * log_ratio : Real(0);
      }
      if constexpr (kPass == Pass::kTeacherCrossing) {
        crossing -= y > kLowest ? at_least(kTiny, e_w) * x : Real(0);
      }
    }
    Real label_sum = 0;
    if (label_scale != Real(0)) {
      const Real scale = label_scale;
      FASTKD_SIMD_REDUCE(+ : label_sum)
      for (int64_t i = 0; i < count; ++i) label_sum += exp2_of((u[i] - u_zero) * scale);
    }
    u_largest = u_max;
    w_largest = w_max;
    return {{double(u_origin) * us, u_sum}, {double(w_origin) * ws, w_sum}, double(ratio) * us, double(crossing) * us,
            label_sum};
  }

  Normalized<Real> normalized() const {
    const double gap = double(student_origin) - double(teacher_ratio) * teacher_origin;
    return {student_scale, teacher_scale, teacher_ratio, student_origin, teacher_origin, Real(student_lse),
            Real(teacher_lse), Real((student_lse - teacher_lse + (gap - Real(gap)) * student_scale) * kLn2), Real(gap)};
  }

  template <bool kNear, class Divergence>
  Sums sum_terms(const Divergence& divergence) const {
    int64_t slices;
    const Sums* part = for_slices<Sums>(
        [&](int64_t slice) {
          Sums all{};
          for_blocks(slice, [&](int64_t begin, int64_t count) {
            alignas(64) Real student_buffer[kBlock], teacher_buffer[kBlock], spare[kBlock];
            const Real* u = load(row.student, begin, count, student_buffer);
            const Real* w = load_teacher(begin, count, teacher_buffer, spare);
            const Normalized<Real> at = normalized();
            const Divergence local = divergence;
            Real f = 0, g = 0, h = 0, p = 0, difference = 0;
            FASTKD_SIMD_REDUCE(+ : f, g, h, p, difference)
            for (int64_t i = 0; i < count; ++i) {
              const Outcome<Real> o = at.template outcome<kNear>(u[i], w[i]);
              const Terms<Real> t = local.template operator()<kNear>(o);
              f += t.f;
              g += t.g;
              h += t.h;
              p += o.p;
              difference += o.difference;
            }
            all = {all.f + f, all.g + g, all.h + h, all.p + p, all.difference + difference};
          });
          return all;
        },
        slices);
    Sums all = part[0];
    for (int64_t s = 1; s < slices; ++s) {
      const Sums& o = part[s];
      all = {all.f + o.f, all.g + o.g, all.h + o.h, all.p + o.p, all.difference + o.difference};
    }
    // Over what the computed q and p really sum to, so that a constant part of g or h cancels exactly.
    all.g /= all.p + all.difference;
    all.h /= all.p;
    return all;
  }

  // student_lse - teacher_lse from the sums of a near pass: since sum q = 1, the log of sum p e^d / sum p is the error.
  void refine(const Sums& sums) { student_lse += ::log1p(sums.difference / sums.p) * kLog2E; }

  // student: scale T^2 (g - q sum g) / temperature + scale label_weight (softmax(u) - onehot(label)); teacher alike.
  template <bool kNear, class Divergence>
  void write_gradient(const Divergence& divergence, double sum_g, double sum_h) const {
    const double unit = row.scale * row.divergence_scale, label_unit = row.label >= 0 ? row.scale * row.label_weight : 0;
    const double label_inside = label_scale == Real(0) ? label_unit : 0;  // the same softmax: one term less
    const Real g_scale = Real(unit / row.temperature), q_scale = Real(label_inside - unit / row.temperature * sum_g);
    const Real h_scale = Real(unit / row.teacher_temperature), p_scale = Real(-unit / row.teacher_temperature * sum_h);
    const bool label_outside = row.label >= 0 && label_scale != Real(0);
    const Normalized<Real> at = normalized();
    const Real label_shift = Real(label_lse), label_factor = Real(label_unit), origin = student_origin, l_scale = label_scale;
    int64_t slices;
    for_slices<char>(
        [&](int64_t slice) {
          for_blocks(slice, [&](int64_t begin, int64_t count) {
            alignas(64) Real student_buffer[kBlock], teacher_buffer[kBlock], spare[kBlock], out_buffer[kBlock];
            const Real* u = load(row.student, begin, count, student_buffer);
            const Real* w = load_teacher(begin, count, teacher_buffer, spare);
            if (row.teacher_gradient) {
              Real* out = destination(row.teacher_gradient, begin, out_buffer);
              FASTKD_SIMD
              for (int64_t i = 0; i < count; ++i) {
                const Outcome<Real> o = at.template outcome<kNear>(u[i], w[i]);
                out[i] = h_scale * divergence.template operator()<kNear>(o).h + p_scale * o.p;
              }
              store(row.teacher_gradient, begin, count, out);
            }
            if (!row.student_gradient) return;
            alignas(64) Real label_part[kBlock];
            if (label_outside) {  // before the student's logits may be overwritten
              FASTKD_SIMD
              for (int64_t i = 0; i < count; ++i) label_part[i] = label_factor * exp2_of((u[i] - origin) * l_scale - label_shift);
            }
            Real* out = destination(row.student_gradient, begin, out_buffer);
            FASTKD_SIMD
            for (int64_t i = 0; i < count; ++i) {
              const Outcome<Real> o = at.template outcome<kNear>(u[i], w[i]);
              out[i] = g_scale * divergence.template operator()<kNear>(o).g + q_scale * o.q;
            }
            if (label_outside) {
              FASTKD_SIMD
              for (int64_t i = 0; i < count; ++i) out[i] += label_part[i];
            }
            if (row.label >= begin && row.label < begin + count) out[row.label - begin] -= label_factor;
            store(row.student_gradient, begin, count, out);
          });
          return char();
        },
        slices);
  }
};

// The row's loss (divergence and label term, not weighted), its gradients written where wanted.
template <class Real, class Divergence>
double softmax_divergence_row(const SoftmaxDivergenceRow& row, const SliceRunner& runner) {
  constexpr Pass kPass = Divergence::kPass;
  constexpr bool kOnePass = kPass != Pass::kNormalizersOnly, kCrossing = kPass == Pass::kTeacherCrossing;
  const Divergence divergence{row.beta};
  RowPasses<Real> passes(row, runner);

  Real label_logit = 0;
  const Real* label_at = row.label < 0 ? &label_logit : load(row.student, row.label, 1, &label_logit);
  label_logit = *label_at;

  const RowState<double> state = passes.template accumulate<kPass>();
  const bool needs_sum = (row.student_gradient && !Divergence::kSumOfGIsZero) ||
                         (row.teacher_gradient && !Divergence::kSumOfHIsZero);
  Sums sums{};
  double value, closeness;
  if constexpr (kOnePass) {
    closeness = state.kl(kPass);
    value = kCrossing ? state.cross_entropy() : closeness;
    sums.g = sums.h = value;
    if (value == double(INFINITY) && needs_sum) sums = passes.template sum_terms<false>(divergence);
  } else {
    sums = passes.template sum_terms<false>(divergence);
    closeness = value = sums.f;
  }
  const bool near = closeness < Divergence::kNearBelow * (1 + (kOnePass ? state.mean_ratio(kPass) : 0));
  const bool wants_gradient = row.student_gradient || row.teacher_gradient;
  if (near && (wants_gradient || !kCrossing)) {
    sums = passes.template sum_terms<true>(divergence);
    passes.refine(sums);
    if (needs_sum) sums = passes.template sum_terms<true>(divergence);
    if (!kCrossing) value = sums.f;
  }
  if (Divergence::kSumOfGIsZero) sums.g = 0;
  if (Divergence::kSumOfHIsZero) sums.h = 0;
  if (wants_gradient) {
    if (near) {
      passes.template write_gradient<true>(divergence, sums.g, sums.h);
    } else {
      passes.template write_gradient<false>(divergence, sums.g, sums.h);
    }
    fill_zero(row.student_gradient, row.vocab, row.student_width);
    fill_zero(row.teacher_gradient, row.vocab, row.teacher_width);
  }
  value *= row.divergence_scale;
  if (row.label >= 0) value += row.label_weight * (passes.label_lse * kLn2 - (double(label_logit) - double(passes.student_origin)));
  return value;
}

template <class... Divergence>
constexpr void list_kernels(SoftmaxDivergenceKernel* out, TypeList<Divergence...>) {
  static_assert(sizeof...(Divergence) == kDivergences);
  ((*out++ = {Divergence::kName, softmax_divergence_row<float, Divergence>, softmax_divergence_row<double, Divergence>}),
   ...);
}

}  // namespace fastkd::FASTKD_ISA
