// The passes of topk_divergence over one row of the student's logits. TopkPlan holds what happens between them.
//
// Memory: the first pass reads the logits, sums 2^x outside the support, and stores 2^x of every entry in the memory of
// the gradient (or in scratch, if the gradient has another type). The last pass scales what was stored. Uniform tails
// take one more pass in between, over logarithms. All passes treat the logits of the support as -inf: the plan handles
// their exact values.
#pragma once
#include "../math/topk_plan.h"
#include "common/row_slices.h"

namespace fastkd {

struct TopkRow {
  int64_t vocab, width;    // width: columns of the gradient; those from vocab on are set to 0
  Row student, gradient;   // gradient: empty if not requested
  const int64_t* support;  // columns, ascending
  int64_t count;
  double temperature;
  int64_t label;  // -1: none
  void* scratch;  // topk_divergence_scratch(...) bytes, aligned to 64
};

inline int64_t topk_divergence_scratch(int64_t vocab, int64_t real_size) {
  constexpr int64_t kOrigins = kSlice / kBlock * int64_t(sizeof(double));
  return slices_of(vocab) * (kPartialBytes + kOrigins) + aligned(vocab * real_size);
}

struct TopkKernel {
  RestSums (*sum_rest)(const TopkRow&, const SliceRunner&, bool label_apart);
  UnnormalizedSums (*uniform_terms)(const TopkRow&, const SliceRunner&, const TopkNumbers&);
  void (*write_rest)(const TopkRow&, const SliceRunner&, const TopkNumbers&);
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

template <class Real>
struct TopkPasses : RowSlices {
  const TopkRow& row;
  Real* origins;  // a block's 2^x are relative to this logit; -inf where all so far are
  Real* stored;
  Real scale, label_scale;  // log2(e) / temperature, log2(e)

  TopkPasses(const TopkRow& r, const SliceRunner& s)
      : RowSlices{r.vocab, s, static_cast<char*>(r.scratch)},
        row(r),
        origins(reinterpret_cast<Real*>(partials + slices_of(r.vocab) * kPartialBytes)),
        stored(reinterpret_cast<Real*>(reinterpret_cast<char*>(origins) +
                                       slices_of(r.vocab) * (kSlice / kBlock) * int64_t(sizeof(double)))),
        scale(Real(kLog2E / r.temperature)),
        label_scale(Real(kLog2E)) {
    // Until the gradient is written, its memory can hold `stored`.
    Real* const out = r.gradient ? destination<Real>(r.gradient, 0, nullptr) : nullptr;
    if (out != nullptr) stored = out;
  }

  // The index of the first support entry at or after this column.
  int64_t support_from(int64_t column) const {
    int64_t low = 0, high = row.count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (row.support[middle] < column) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Calls body(logits, begin, count) for each block, with the support's logits set to -inf.
  template <class Body>
  void for_rest(int64_t slice, const Body& body) const {
    int64_t next = support_from(slice * kSlice);
    for_blocks(slice, [&](int64_t begin, int64_t count) {
      alignas(64) Real buffer[kBlock];
      prefetch_next(row.student, begin, vocab);
      const Real* u = load(row.student, begin, count, buffer);
      if (next < row.count && row.support[next] < begin + count) {
        if (u != buffer) __builtin_memcpy(buffer, u, count * sizeof(Real));
        for (; next < row.count && row.support[next] < begin + count; ++next)
          buffer[row.support[next] - begin] = Real(-INFINITY);
        u = buffer;
      }
      body(u, begin, count);
    });
  }

  template <bool kKeep>
  StudentSums sum_rest(bool label_apart) const {
    const double to_base_2 = kLog2E / row.temperature;
    // The origin must stay close to the largest logit at both temperatures.
    const Real steepest = label_apart ? at_least(label_scale, scale) : scale;
    return reduce_slices<StudentSums>(
        [&](int64_t slice) {
          Origin<Real> origin;
          double sum = 0, label_sum = 0;
          for_rest(slice, [&](const Real* u, int64_t begin, int64_t count) {
            if (const double step = origin.raise_to(largest(u, count), steepest)) {
              sum *= ::exp2(-step * scale);
              label_sum *= ::exp2(-step * label_scale);
            }
            if constexpr (kKeep) origins[begin / kBlock] = origin.logit;
            add_block<kKeep>(u, begin, count, origin.zero(), label_apart, sum, label_sum);
          });
          return StudentSums{{double(origin.logit), sum, label_apart ? label_sum : sum}};
        },
        [&](StudentSums& all, const StudentSums& next) { all.merge(next, to_base_2); });
  }

  template <bool kKeep>
  void add_block(const Real* u, int64_t begin, int64_t count, Real origin, bool label_apart, double& all,
                 double& all_label) const {
    const Real us = scale;
    Real* const out = stored + begin;
    Real sum = 0, label_sum = 0;
    FASTKD_SIMD_REDUCE(+ : sum)
    for (int64_t i = 0; i < count; ++i) {
      const Real e = exp2_of((u[i] - origin) * us);
      sum += e;
      if constexpr (kKeep) out[i] = e;
    }
    all += sum;
    if (!label_apart) return;
    const Real ls = label_scale;
    FASTKD_SIMD_REDUCE(+ : label_sum)
    for (int64_t i = 0; i < count; ++i) label_sum += exp2_of((u[i] - origin) * ls);
    all_label += label_sum;
  }

  // The sums of the terms outside the support, where each token's teacher probability is its equal share of the tail.
  template <class Divergence>
  UnnormalizedSums uniform_terms(const TopkPlan& plan, const Divergence divergence) const {
    return reduce_slices<UnnormalizedSums>(
        [&](int64_t slice) {
          UnnormalizedSums all{};
          for_rest(slice, [&](const Real* u, int64_t begin, int64_t count) {
            all.add(uniform_block(plan, divergence, u, begin, count));
          });
          return all;
        },
        [](UnnormalizedSums& all, const UnnormalizedSums& next) { all.add(next); });
  }

  template <class Divergence>
  UnnormalizedSums uniform_block(const TopkPlan& plan, const Divergence divergence, const Real* u, int64_t begin,
                                 int64_t count) const {
    alignas(64) Real own[kBlock];
    for (int64_t i = 0; i < count; ++i) own[i] = Real(1);
    for (int64_t s = support_from(begin); s < row.count && row.support[s] < begin + count; ++s)
      own[row.support[s] - begin] = Real(0);
    const Real to_log = Real(1 / row.temperature), share = Real(plan.log_p_rest);
    const Real origin = Real(plan.student.origin), log_sum = Real(plan.student.log_sum);
    Real value = 0, excess = 0, g = 0, h = 0;
    FASTKD_SIMD_REDUCE(+ : value, excess, g, h)
    for (int64_t i = 0; i < count; ++i) {
      const UnnormalizedTerms<Real> t = plan.floored_terms(divergence, (u[i] - origin) * to_log - log_sum, share);
      // Selected, not multiplied by 0: the value of a support entry may be infinite here.
      value += own[i] == Real(0) ? Real(0) : t.value;
      excess += own[i] * t.excess;
      g += own[i] * t.g;
      h += own[i] * t.h;
    }
    return {double(value), double(excess), double(g), double(h)};
  }

  // Writes the gradient except for the support's entries.
  template <class Divergence>
  void write_rest(const TopkPlan& plan, const Divergence divergence) const {
    const bool label_apart = plan.task.has_label && row.temperature != 1;
    const double coefficient = plan.rest_coefficient(label_apart), log2_sum = plan.rest.log_sum * kLog2E;
    const Real label_factor = Real(plan.label_factor()), ls = label_scale;
    const Real label_origin = Real(plan.label.origin), label_shift = Real(plan.label.log_sum * kLog2E);
    const bool uniform = plan.task.tail == Tail::kUniform && plan.student_factor != 0;
    const double to_base_2 = kLog2E / row.temperature;
    for_slices([&](int64_t slice) {
      for_blocks(slice, [&](int64_t begin, int64_t count) {
        alignas(64) Real buffer[kBlock], label_part[kBlock], slopes[kBlock], logits[kBlock];
        const Real origin = origins[begin / kBlock];
        if (label_apart) {  // before the gradient may overwrite the logits
          const Real* u = load(row.student, begin, count, logits);
          FASTKD_SIMD
          for (int64_t i = 0; i < count; ++i)
            label_part[i] = label_factor * exp2_of((u[i] - label_origin) * ls - label_shift);
        }
        if (uniform) uniform_slopes(plan, divergence, begin, count, slopes);
        // The share of the rest that a token with the origin's logit has. 0 for a block without a finite logit, where
        // nothing was stored.
        const double at_origin =
            origin == Real(-INFINITY) ? 0 : ::exp2((double(origin) - plan.rest.origin) * to_base_2 - log2_sum);
        const Real factor = Real(at_origin * coefficient);
        Real* const out = destination(row.gradient, begin, buffer);
        const Real* const e = stored + begin;
        FASTKD_SIMD
        for (int64_t i = 0; i < count; ++i) out[i] = e[i] * factor;
        if (uniform) {
          FASTKD_SIMD
          for (int64_t i = 0; i < count; ++i) out[i] += slopes[i];
        }
        if (label_apart) {
          FASTKD_SIMD
          for (int64_t i = 0; i < count; ++i) out[i] += label_part[i];
        }
        if (row.label >= begin && row.label < begin + count) out[row.label - begin] -= label_factor;
        store(row.gradient, begin, count, out);
      });
      finish_streaming(row.gradient);
    });
  }

  template <class Divergence>
  void uniform_slopes(const TopkPlan& plan, const Divergence divergence, int64_t begin, int64_t count,
                      Real* slopes) const {
    alignas(64) Real logits[kBlock];
    const Real* u = load(row.student, begin, count, logits);
    const Real to_log = Real(1 / row.temperature), share = Real(plan.log_p_rest);
    const Real origin = Real(plan.student.origin), log_sum = Real(plan.student.log_sum);
    const Real factor = Real(plan.student_factor);
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) {
      slopes[i] = factor * plan.floored_terms(divergence, (u[i] - origin) * to_log - log_sum, share).g;
    }
  }
};

template <class Real>
RestSums sum_rest(const TopkRow& row, const SliceRunner& runner, bool label_apart) {
  const TopkPasses<Real> passes(row, runner);
  const StudentSums sums =
      row.gradient ? passes.template sum_rest<true>(label_apart) : passes.template sum_rest<false>(label_apart);
  return sums;
}

template <class Real>
UnnormalizedSums uniform_terms(const TopkRow& row, const SliceRunner& runner, const TopkNumbers& numbers) {
  const TopkPasses<Real> passes(row, runner);
  UnnormalizedSums sums;
  const TopkPlan plan{numbers};
  with_unnormalized_divergence(plan.task.divergence, plan.task.beta,
                               [&](const auto& divergence) { sums = passes.uniform_terms(plan, divergence); });
  return sums;
}

template <class Real>
void write_rest(const TopkRow& row, const SliceRunner& runner, const TopkNumbers& numbers) {
  const TopkPasses<Real> passes(row, runner);
  const TopkPlan plan{numbers};
  with_unnormalized_divergence(plan.task.divergence, plan.task.beta,
                               [&](const auto& divergence) { passes.write_rest(plan, divergence); });
}

extern const Precisions<TopkKernel> topk_kernels;

}  // namespace fastkd::FASTKD_ISA
