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
#include "teachers.h"

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
  Teachers teachers;
  double beta;
  double temperature, teacher_temperature;
  int64_t label;  // -1: none
  double label_weight;
  double divergence_scale;                 // of the divergence's value: temperature^2 or 1
  double scale;                            // of the row's gradient: weight / denominator
  Row student_gradient, teacher_gradient;  // empty: not wanted
  int64_t student_width, teacher_width;    // columns of the gradients; those from vocab on are zero
  void* scratch;  // softmax_divergence_scratch(vocab, teachers, sizeof(Real)) bytes, aligned to 16
};

struct SoftmaxDivergenceKernel {
  const char* name;
  double (*float_row)(const SoftmaxDivergenceRow&, const SliceRunner&);
  double (*double_row)(const SoftmaxDivergenceRow&, const SliceRunner&);
};
inline constexpr int kDivergences = 7;

inline constexpr int64_t kPartialBytes = 64;  // what a pass keeps of a slice

inline int64_t softmax_divergence_scratch(int64_t vocab, int64_t teachers, int64_t real_size) {
  return teachers * 16 + (vocab + kSlice - 1) / kSlice * kPartialBytes + vocab * real_size;
}

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

// Over a slice or row. Products with g and h are exact and added in double: a mean must match the very values that it
// is subtracted from, whose own rounding then cancels.
struct Sums {
  double f, qg, ph, q, p, difference;

  void add(const Sums& o) {
    f += o.f;
    qg += o.qg;
    ph += o.ph;
    q += o.q;
    p += o.p;
    difference += o.difference;
  }
};

// What the gradient subtracts from g and h, as a float and the rest.
template <class Real>
struct Mean {
  Real high, low;
  explicit Mean(double mean) : high(Real(mean)), low(Real(mean - double(Real(mean)))) {}
};

// From logits to outcomes, once both normalisers are known. Logits are first taken relative to a value near the
// largest: what counts in a distribution is then exact to rounding, whatever constant the logits carry.
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

template <class Real, bool kDouble>
struct Accumulator {
  using Type = Real;
};
template <class Real>
struct Accumulator<Real, true> {
  using Type = double;
};

// A row between its passes.
template <class Real>
struct RowPasses {
  const SoftmaxDivergenceRow& row;
  const SliceRunner& runner;
  Real student_scale, teacher_scale, teacher_ratio;  // log2(e) / temperature, and teacher's over student's
  Real label_scale;                                  // log2(e), or 0 where pass 1 need not sum it separately
  MaxSum<double>* normalizers;                       // scratch: one a teacher,
  char* partials;                                    // one a slice,
  Real* slopes;                                      // and g of every entry, from the pass that sums it to the last
  TeacherBlocks<Real> teacher;
  Real student_origin = 0, teacher_origin = 0;             // logits near the largest
  double student_lse = 0, teacher_lse = 0, label_lse = 0;  // relative to the origins, base 2

  RowPasses(const SoftmaxDivergenceRow& r, const SliceRunner& s)
      : row(r),
        runner(s),
        student_scale(Real(kLog2E / r.temperature)),
        teacher_scale(Real(r.teachers.mix_probs ? 1.0 : kLog2E / r.teacher_temperature)),
        teacher_ratio(r.teachers.mix_probs || r.temperature != r.teacher_temperature ? teacher_scale / student_scale
                                                                                     : Real(1)),
        label_scale(r.label >= 0 && r.temperature != 1.0 ? Real(kLog2E) : Real(0)),
        normalizers(static_cast<MaxSum<double>*>(r.scratch)),
        partials(reinterpret_cast<char*>(normalizers + r.teachers.count)),
        slopes(reinterpret_cast<Real*>(partials + (r.vocab + kSlice - 1) / kSlice * kPartialBytes)),
        teacher{r.teachers, Real(kLog2E / r.teacher_temperature), normalizers} {}

  template <class Body>
  void for_blocks(int64_t slice, Body body) const {
    const int64_t first = slice * kSlice, last = first + kSlice < row.vocab ? first + kSlice : row.vocab;
    for (int64_t begin = first; begin < last; begin += kBlock)
      body(begin, last - begin < kBlock ? last - begin : kBlock);
  }

  // Runs body(slice) for every slice.
  template <class Body>
  void for_slices(const Body& body) const {
    runner.run(
        runner.self, (row.vocab + kSlice - 1) / kSlice,
        [](void* self, int64_t slice) { (*static_cast<const Body*>(self))(slice); }, const_cast<Body*>(&body));
  }

  // Sums up what body(slice) returns, in the order of the slices: merge(all, next).
  template <class Partial, class Body, class Merge>
  Partial reduce_slices(const Body& body, const Merge& merge) const {
    static_assert(sizeof(Partial) <= kPartialBytes);
    Partial* part = reinterpret_cast<Partial*>(partials);
    for_slices([&](int64_t slice) { part[slice] = body(slice); });
    Partial all = part[0];
    for (int64_t slice = 1; slice < (row.vocab + kSlice - 1) / kSlice; ++slice) merge(all, part[slice]);
    return all;
  }

  void normalize_teachers() const {
    using State = MaxSum<double>;
    for (int k = 0; row.teachers.mix_probs && k < row.teachers.count; ++k) {
      normalizers[k] = reduce_slices<State>(
          [&](int64_t slice) {
            State all = State::empty();
            for_blocks(slice, [&](int64_t begin, int64_t count) { all.merge(teacher.normalizer(k, begin, count)); });
            return all;
          },
          [](State& all, const State& next) { all.merge(next); });
    }
  }

  template <Pass kPass>
  RowState<double> accumulate() {
    normalize_teachers();
    using State = RowState<double>;
    const State all = reduce_slices<State>(
        [&](int64_t slice) {
          State sum = State::empty();
          Real u_origin = Real(-INFINITY), w_origin = Real(-INFINITY);
          for_blocks(slice,
                     [&](int64_t begin, int64_t count) { add_block<kPass>(sum, u_origin, w_origin, begin, count); });
          return sum;
        },
        [&](State& sum, const State& next) { sum.merge(next, kPass, row.temperature); });
    student_origin = Real(all.student.max / student_scale);
    teacher_origin = Real(all.teacher.max / teacher_scale);
    student_lse = all.student.log2() - double(student_origin) * student_scale;
    teacher_lse = all.teacher.log2() - double(teacher_origin) * teacher_scale;
    if (row.label >= 0) {
      label_lse = label_scale == Real(0) ? student_lse
                                         : ::log2(all.label_sum) + all.student.max * row.temperature -
                                               double(student_origin) * label_scale;
    }
    return all;
  }

  // Adds a block relative to the slice's origins, finding the block's own maxima on the way. Only where those turn out
  // much larger, or there was none yet, is the block added again relative to them: an origin is within 2^8 of the
  // maximum.
  template <Pass kPass>
  void add_block(RowState<double>& all, Real& u_origin, Real& w_origin, int64_t begin, int64_t count) const {
    alignas(64) Real student_buffer[kBlock], teacher_buffer[kBlock], spare[kBlock];
    const int64_t ahead = begin + kBlock, some = row.vocab - ahead < kBlock ? row.vocab - ahead : kBlock;
    if (some > 0) {
      prefetch(row.student, ahead, some);
      teacher.prefetch_block(ahead, some);
    }
    const Real* u = load(row.student, begin, count, student_buffer);
    const Real* w = teacher.load_block(begin, count, teacher_buffer, spare);
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
  RowState<double> block_state(const Real* u, const Real* w, int64_t count, Real u_origin, Real w_origin,
                               Real& u_largest, Real& w_largest) const {
    const Real us = student_scale, ws = teacher_scale, r = teacher_ratio;
    const Real u_zero = u_origin == Real(-INFINITY) ? Real(0) : u_origin;
    const Real w_zero = w_origin == Real(-INFINITY) ? Real(0) : w_origin;
    // A tiny weight instead of 0 lets an impossible entry make the sum infinite even where its mass underflows.
    constexpr Real kTiny = Real(1.17549435e-38), kLowest = Real(-3.4e38);
    // The student-weighted ratio becomes a mean that the gradient subtracts: see Sums.
    using Ratio = typename Accumulator<Real, kPass == Pass::kStudentWeighted>::Type;
    Ratio u_sum = 0, w_sum = 0, ratio = 0;
    Real crossing = 0, u_max = Real(-INFINITY), w_max = Real(-INFINITY);
    FASTKD_SIMD_WITH(reduction(+ : u_sum, w_sum, ratio, crossing) reduction(max : u_max, w_max))
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
        ratio += log_ratio > kLowest ? Ratio(at_least(kTiny, e_u)) * Ratio(log_ratio) : Ratio(0);
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
    return {{double(u_origin) * us, u_sum},
            {double(w_origin) * ws, w_sum},
            double(ratio) * us,
            double(crossing) * us,
            label_sum};
  }

  Normalized<Real> normalized() const {
    const double gap = double(student_origin) - double(teacher_ratio) * teacher_origin;
    return {student_scale,     teacher_scale,
            teacher_ratio,     student_origin,
            teacher_origin,    Real(student_lse),
            Real(teacher_lse), Real((student_lse - teacher_lse + (gap - Real(gap)) * student_scale) * kLn2),
            Real(gap)};
  }

  template <bool kNear, class Divergence>
  Sums sum_terms(const Divergence& divergence) const {
    return reduce_slices<Sums>(
        [&](int64_t slice) {
          Sums all{};
          for_blocks(slice, [&](int64_t begin, int64_t count) {
            alignas(64) Real student_buffer[kBlock], teacher_buffer[kBlock], spare[kBlock];
            const Real* u = load(row.student, begin, count, student_buffer);
            const Real* w = teacher.load_block(begin, count, teacher_buffer, spare);
            Real* keep = slopes + begin;
            all.add(row.teacher_gradient ? block_sums<kNear, true>(divergence, u, w, count, keep)
                                         : block_sums<kNear, false>(divergence, u, w, count, keep));
          });
          return all;
        },
        [](Sums& all, const Sums& next) { all.add(next); });
  }

  template <bool kNear, bool kTeacher, class Divergence>
  Sums block_sums(const Divergence divergence, const Real* u, const Real* w, int64_t count, Real* keep) const {
    const Normalized<Real> at = normalized();
    Real f = 0, difference = 0;
    double qg = 0, ph = 0, q = 0, p = 0;
    FASTKD_SIMD_REDUCE(+ : f, qg, ph, q, p, difference)
    for (int64_t i = 0; i < count; ++i) {
      const Outcome<Real> o = at.template outcome<kNear>(u[i], w[i]);
      const Terms<Real> t = divergence.template operator()<kNear>(o);
      f += t.f;
      if constexpr (!Divergence::kGIsGradient) {
        qg += double(o.q) * double(t.g);
        q += double(o.q);
        keep[i] = t.g;
      }
      if constexpr (kTeacher && !Divergence::kHIsGradient) ph += double(o.p) * double(t.h);
      if constexpr (kNear || (kTeacher && !Divergence::kHIsGradient)) p += double(o.p);
      if constexpr (kNear) difference += o.difference;
    }
    return {f, qg, ph, q, p, difference};
  }

  // student_lse - teacher_lse from the sums of a near pass: since sum q = 1, the log of sum p e^d / sum p is the error.
  void refine(const Sums& sums) { student_lse += ::log1p(sums.difference / sums.p) * kLog2E; }

  // student: scale T^2 q (g - mean g) / temperature + scale label_weight (softmax(u) - onehot(label)); teacher alike.
  template <bool kNear, class Divergence>
  void write_gradient(const Divergence& divergence, double mean_g, double mean_h) const {
    const double unit = row.scale * row.divergence_scale;
    const Real label_factor = Real(row.label >= 0 ? row.scale * row.label_weight : 0);
    const bool label_apart = row.label >= 0 && label_scale != Real(0);
    // At temperature 1 the label's softmax is q, and its share of the gradient one more multiple of it.
    const Real g_scale = Real(unit / row.temperature), q_scale = label_apart ? Real(0) : label_factor;
    const Real h_scale = Real(unit / row.teacher_temperature);
    const Mean<Real> g_mean(mean_g), h_mean(mean_h);
    const Normalized<Real> at = normalized();
    const Real label_shift = Real(label_lse), origin = student_origin, scale = label_scale;
    for_slices([&](int64_t slice) {
      for_blocks(slice, [&](int64_t begin, int64_t count) {
        alignas(64) Real student_buffer[kBlock], teacher_buffer[kBlock], spare[kBlock], out_buffer[kBlock];
        const Real* u = load(row.student, begin, count, student_buffer);
        const Real* w = teacher.load_block(begin, count, teacher_buffer, spare);
        if (row.teacher_gradient) {
          Real* out = destination(row.teacher_gradient, begin, out_buffer);
          teacher_block<kNear>(divergence, at, u, w, count, h_scale, h_mean, out);
          store(row.teacher_gradient, begin, count, out);
        }
        if (!row.student_gradient) return;
        alignas(64) Real label_part[kBlock];
        if (label_apart) {  // before the student's logits may be overwritten
          FASTKD_SIMD
          for (int64_t i = 0; i < count; ++i) {
            label_part[i] = label_factor * exp2_of((u[i] - origin) * scale - label_shift);
          }
        }
        Real* out = destination(row.student_gradient, begin, out_buffer);
        if constexpr (Divergence::kPass == Pass::kNormalizersOnly) {
          kept_block(at, u, slopes + begin, count, g_scale, g_mean, q_scale, out);
        } else {
          student_block<kNear>(divergence, at, u, w, count, g_scale, g_mean, q_scale, out);
        }
        if (label_apart) {
          FASTKD_SIMD
          for (int64_t i = 0; i < count; ++i) out[i] += label_part[i];
        }
        if (row.label >= begin && row.label < begin + count) out[row.label - begin] -= label_factor;
        store(row.student_gradient, begin, count, out);
      });
      finish_streaming(row.student_gradient);
      finish_streaming(row.teacher_gradient);
    });
  }

  template <bool kNear, class Divergence>
  static void student_block(const Divergence divergence, const Normalized<Real> at, const Real* u, const Real* w,
                            int64_t count, Real scale, const Mean<Real> mean, Real q_scale, Real* out) {
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) {
      const Outcome<Real> o = at.template outcome<kNear>(u[i], w[i]);
      const Real g = divergence.template operator()<kNear>(o).g;
      const Real gradient = Divergence::kGIsGradient ? g : o.q * ((g - mean.high) - mean.low);
      out[i] = scale * gradient + q_scale * o.q;
    }
  }

  // The same from the slopes of the pass before: one exponential an entry.
  static void kept_block(const Normalized<Real> at, const Real* u, const Real* g, int64_t count, Real scale,
                         const Mean<Real> mean, Real q_scale, Real* out) {
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) {
      const Real q = exp2_of((u[i] - at.student_origin) * at.student_scale - at.student_lse);
      out[i] = (scale * ((g[i] - mean.high) - mean.low) + q_scale) * q;
    }
  }

  template <bool kNear, class Divergence>
  static void teacher_block(const Divergence divergence, const Normalized<Real> at, const Real* u, const Real* w,
                            int64_t count, Real scale, const Mean<Real> mean, Real* out) {
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) {
      const Outcome<Real> o = at.template outcome<kNear>(u[i], w[i]);
      const Real h = divergence.template operator()<kNear>(o).h;
      out[i] = scale * (Divergence::kHIsGradient ? h : o.p * ((h - mean.high) - mean.low));
    }
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
  const bool wants_gradient = row.student_gradient || row.teacher_gradient;
  // The first pass already has the mean that the student's gradient needs, as long as it is finite.
  const bool needs_teacher_mean = row.teacher_gradient && !Divergence::kHIsGradient;
  const bool needs_student_mean = row.student_gradient && !Divergence::kGIsGradient;
  Sums sums{};
  double value, closeness, student_mean = 0;
  if constexpr (kOnePass) {
    closeness = state.kl(kPass);
    student_mean = closeness;
    value = kCrossing ? state.cross_entropy() : closeness;
    if (needs_teacher_mean || (needs_student_mean && value == double(INFINITY))) {
      sums = passes.template sum_terms<false>(divergence);
      student_mean = sums.qg / sums.q;
    }
  } else {
    sums = passes.template sum_terms<false>(divergence);
    closeness = value = sums.f;
    student_mean = sums.qg / sums.q;
  }
  const bool near = closeness < Divergence::kNearBelow * (1 + (kOnePass ? state.mean_ratio(kPass) : 0));
  if (near && (wants_gradient || !kCrossing)) {
    sums = passes.template sum_terms<true>(divergence);
    passes.refine(sums);
    if (needs_teacher_mean || needs_student_mean) sums = passes.template sum_terms<true>(divergence);
    if (!kCrossing) value = sums.f;
    student_mean = sums.qg / sums.q;
  }
  if (Divergence::kGIsGradient) student_mean = 0;
  double teacher_mean = needs_teacher_mean ? sums.ph / sums.p : 0;
  // A normaliser that is NaN makes the whole row so, whatever the logarithms made of it.
  const double poison = (passes.student_lse - passes.student_lse) + (passes.teacher_lse - passes.teacher_lse);
  value += poison;
  student_mean += poison;
  teacher_mean += poison;
  if (wants_gradient) {
    if (near) {
      passes.template write_gradient<true>(divergence, student_mean, teacher_mean);
    } else {
      passes.template write_gradient<false>(divergence, student_mean, teacher_mean);
    }
    fill_zero(row.student_gradient, row.vocab, row.student_width);
    fill_zero(row.teacher_gradient, row.vocab, row.teacher_width);
  }
  value *= row.divergence_scale;
  if (row.label >= 0)
    value += row.label_weight * (passes.label_lse * kLn2 - (double(label_logit) - double(passes.student_origin)));
  return value;
}

template <class... Divergence>
constexpr void list_kernels(SoftmaxDivergenceKernel* out, TypeList<Divergence...>) {
  static_assert(sizeof...(Divergence) == kDivergences);
  ((*out++ = {Divergence::kName, softmax_divergence_row<float, Divergence>,
              softmax_divergence_row<double, Divergence>}),
   ...);
}

}  // namespace fastkd::FASTKD_ISA
