// cross_entropy of one row: its loss, and its gradient in a second pass. That pass takes the exponentials that the
// first one has stored, relative to an origin a block, and finds them and the row in the cache.
#pragma once
#include "../math/cross_entropy.h"
#include "common/row_slices.h"
#include "common/softmax_sums.h"

namespace fastkd {

struct CrossEntropyRow {
  int64_t vocab;
  Row logits, gradient;  // gradient: empty if it is not requested
  int64_t width;         // columns of the gradient; those from vocab on are set to 0
  CrossEntropyTask task;
  int64_t label;
  bool correct_only;  // the entropy's term only where the label is the likeliest token
  char* scratch;      // cross_entropy_scratch(...) bytes, aligned to 64
};

inline int64_t cross_entropy_scratch(int64_t vocab, int64_t real_size) {
  return slices_of(vocab) * (kPartialBytes + kSlice / kBlock * 8) + aligned(vocab * real_size);
}

using CrossEntropyKernel = double (*)(const CrossEntropyRow& row, const SliceRunner& runner);

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

template <class Real>
struct CrossEntropyPasses : RowSlices {
  const CrossEntropyRow& row;
  const Real scale, other_scale;  // other_scale: of the entropy
  const bool same, apart;         // whether the entropy's sums are taken with the others, or on their own
  const bool keep;                // whether there is a second pass
  Real* const origins;            // scratch: one per block
  Real* const kept;               // scratch: one per entry
  Real label_logit, reference;

  CrossEntropyPasses(const CrossEntropyRow& r, const SliceRunner& s)
      : RowSlices{r.vocab, s, r.scratch},
        row(r),
        scale(Real(kLog2E / r.task.temperature)),
        other_scale(Real(kLog2E / r.task.entropy_temperature)),
        same(r.task.entropy_weight != 0 && !r.task.apart),
        apart(r.task.apart),
        keep(bool(r.gradient)),
        origins(reinterpret_cast<Real*>(r.scratch + slices_of(r.vocab) * kPartialBytes)),
        kept(reinterpret_cast<Real*>(r.scratch + slices_of(r.vocab) * (kPartialBytes + kSlice / kBlock * 8))) {
    label_logit = *load(row.logits, row.label, 1, &label_logit);
    reference = Real(reference_of(double(label_logit)));
  }

  struct Partial {
    CrossEntropySums sums;
    Best<double> best;
  };

  Partial sum_slice(int64_t slice) const {
    const Real largest_scale = apart ? at_least(scale, other_scale) : scale;
    Origin<Real> origin;
    CrossEntropySums all{};
    Best<Real> best{Real(-INFINITY), slice * kSlice};
    for_blocks(slice, [&](int64_t begin, int64_t count) {
      alignas(64) Real buffer[kBlock];
      prefetch_next(row.logits, begin, vocab, kAhead);
      const Real* z = load(row.logits, begin, count, buffer);
      const Real top = largest(z, count);
      const bool first = origin.logit == Real(-INFINITY);
      const double step = origin.raise_to(top, largest_scale);
      if (!first && step != 0) {
        all.own.raise(step * scale);
        all.other.raise(step * other_scale);
      }
      if (row.correct_only) seek(z, top, begin, count, best);
      all.own.add(own_sums(z, begin, count, origin));
      if (apart) all.other.add(softmax_block<true>(z, count, origin.zero(), other_scale));
      if (row.task.label_smoothing != 0) all.rest += rest_block(z, count, reference);
    });
    all.origin = double(origin.logit);
    return {all, {double(best.logit), best.column}};
  }

  SideSums own_sums(const Real* z, int64_t begin, int64_t count, const Origin<Real>& origin) const {
    const Real zero = origin.zero();
    if (!keep) return same ? softmax_block<true>(z, count, zero, scale) : softmax_block<false>(z, count, zero, scale);
    origins[begin / kBlock] = origin.logit;  // -inf: all that was stored so far is 0
    return same ? softmax_block<true, true>(z, count, zero, scale, kept + begin)
                : softmax_block<false, true>(z, count, zero, scale, kept + begin);
  }

  static Real rest_block(const Real* z, int64_t count, Real reference) {
    Real sum = 0;
    FASTKD_SIMD_REDUCE(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += z[i] - reference;
    return sum;
  }

  // All parameters are passed by value: in a loop with stores the compiler must reload what it reads through
  // references. factor: what turns the stored exponentials into q, times the gradient's constant.
  static FASTKD_INLINE void write_block(const Real* e, int64_t count, Real factor, Real uniform, Real* out) {
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) out[i] = e[i] * factor - uniform;
  }
  static FASTKD_INLINE void write_block_same(const Real* z, const Real* e, int64_t count, Real factor, Real origin,
                                             Real scale, Real shift, Real constant, Real slope, Real uniform,
                                             Real* out) {
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) {
      const Real x = (z[i] - origin) * scale - shift;
      out[i] = e[i] * factor * (constant + slope * at_least(Real(-kDead), x)) - uniform;
    }
  }
  static FASTKD_INLINE void write_block_apart(const Real* z, const Real* e, int64_t count, Real factor, Real origin,
                                              Real uniform, Real other_scale, Real other_shift, Real other_constant,
                                              Real other_slope, Real* out) {
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) {
      const Real x = (z[i] - origin) * other_scale - other_shift, a = exp2_of(x);
      out[i] = e[i] * factor - uniform + a * (other_constant + other_slope * at_least(Real(-kDead), x));
    }
  }

  void write(const CrossEntropyPlan& plan) const {
    const Real origin = Real(plan.origin), shift = Real(plan.shift), other_shift = Real(plan.other_shift);
    const Real constant = Real(plan.constant), slope = Real(plan.slope), uniform = Real(plan.uniform);
    const Real other_constant = Real(plan.other_constant), other_slope = Real(plan.other_slope);
    for_slices([&](int64_t slice) {
      for_blocks(slice, [&](int64_t begin, int64_t count) {
        alignas(64) Real in_buffer[kBlock], out_buffer[kBlock];
        const Real* const e = kept + begin;
        Real* out = destination(row.gradient, begin, out_buffer);
        const double q = ::exp2((double(origins[begin / kBlock]) - plan.origin) * scale - plan.shift);
        if (plan.other_slope != 0) {
          write_block_apart(load(row.logits, begin, count, in_buffer), e, count, Real(q * plan.constant), origin,
                            uniform, other_scale, other_shift, other_constant, other_slope, out);
        } else if (plan.slope != 0) {
          write_block_same(load(row.logits, begin, count, in_buffer), e, count, Real(q), origin, scale, shift, constant,
                           slope, uniform, out);
        } else {
          write_block(e, count, Real(q * plan.constant), uniform, out);
        }
        if (row.label >= begin && row.label < begin + count) out[row.label - begin] -= Real(plan.label);
        store(row.gradient, begin, count, out);
      });
      finish_streaming(row.gradient);
    });
    fill_zero(row.gradient, vocab, row.width);
  }

  double run() const {
    const Partial found = reduce_slices<Partial>([&](int64_t slice) { return sum_slice(slice); },
                                                 [&](Partial& all, const Partial& next) {
                                                   all.sums.merge(next.sums, scale, other_scale);
                                                   all.best.merge(next.best);
                                                 });
    const bool entropy = !row.correct_only || found.best.column == row.label;
    const CrossEntropyPlan plan = cross_entropy_plan(row.task, found.sums, double(label_logit), entropy);
    if (row.gradient) write(plan);
    return plan.loss;
  }

 private:
  static constexpr int64_t kAhead = 8;  // blocks that are prefetched
};

template <class Real>
double cross_entropy_row(const CrossEntropyRow& row, const SliceRunner& runner) {
  return CrossEntropyPasses<Real>(row, runner).run();
}

extern const Precisions<CrossEntropyKernel> cross_entropy_kernels;

}  // namespace fastkd::FASTKD_ISA
