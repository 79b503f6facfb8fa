// The kernels of one row of one process's columns, where the vocabulary is split across processes
// (csrc/math/shard_terms.h, csrc/arguments/shards_entry.h).
#pragma once
#include "../math/shard_terms.h"
#include "common/row_slices.h"
#include "common/softmax_sums.h"

namespace fastkd {

// One side's row.
struct ShardSideRow {
  int64_t vocab;
  Row logits;
  double temperature, second_temperature;
  int64_t token;         // -1: none
  const bool* columns;   // of the second softmax; null: all
  const int64_t* holes;  // columns in no softmax
  int64_t hole_count;
  bool entropy, second, best, total;  // what is wanted
};

struct ShardNumbers {
  double origin, sum, weighted, second_sum, second_weighted, token_logit, best_logit, total, columns, second_origin;
  int64_t best_column;
};

// The gradient is q (constant + slope log2 q) of both softmaxes, plus `each`; `token` is added to the token's.
struct ShardSoftmaxFactors {
  double origin, second_origin, first_log2_sum, second_log2_sum;
  double constant, slope, second_constant, second_slope, token, each;
  const double* holes;  // what is written to each hole
};

struct ShardPairRow {
  int64_t vocab;
  Row student, teacher;
  RowTask task;
  double student_origin, student_log2_sum, teacher_origin, teacher_log2_sum;
  int64_t token;  // -1: none
};

struct ShardGradientRow {
  bool of_teacher;
  double value, slope_sum;  // of the whole row
  double factor, own_factor, token_factor, label_factor, label_log2_sum;
};

struct ShardSideKernels {
  ShardNumbers (*statistics)(const ShardSideRow&, const SliceRunner&, char* partials);
  void (*gradient)(const ShardSideRow&, const SliceRunner&, const ShardSoftmaxFactors&, const Row& gradient);
};
struct ShardPairKernel {
  ShardSums (*sums)(const ShardPairRow&, const SliceRunner&, char* partials);
  void (*gradient)(const ShardPairRow&, const SliceRunner&, const ShardGradientRow&, const Row& gradient);
};
struct ShardPairKernels {
  ShardPairKernel of[kDivergences];
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

// --- One side -----------------------------------------------------------------------------------

// Sets the holes of a block to `value`. Returns the block, in `buffer` if it has a hole.
template <class Real>
const Real* without_holes(const ShardSideRow& row, int64_t begin, int64_t count, const Real* z, Real* buffer,
                          Real value, int64_t& found) {
  for (int64_t j = 0; j < row.hole_count; ++j) {
    const int64_t place = row.holes[j] - begin;
    if (place < 0 || place >= count) continue;
    if (z != buffer) {
      __builtin_memcpy(buffer, z, count * sizeof(Real));
      z = buffer;
    }
    buffer[place] = value;
    ++found;
  }
  return z;
}

// The block with -inf in the columns that the second softmax lacks.
template <class Real>
const Real* second_block(const Real* z, int64_t count, const bool* columns, Real* buffer) {
  const unsigned char* const own = reinterpret_cast<const unsigned char*>(columns);
  FASTKD_SIMD
  for (int64_t i = 0; i < count; ++i) buffer[i] = select(own[i] != 0, z[i], Real(-INFINITY));
  return buffer;
}

// The sum of logits less their origin.
template <class Real>
double total_block(const Real* z, int64_t count, Real zero) {
  double total = 0;
  FASTKD_SIMD_REDUCE(+ : total)
  for (int64_t i = 0; i < count; ++i) total += double(z[i] - zero);
  return total;
}

struct ShardSlice {
  ShardState state;
  double best_logit;
  int64_t best_column;
};

template <class Real>
ShardSlice shard_slice(const ShardSideRow& row, const RowSlices& slices, int64_t slice, Real scale, Real second_scale) {
  Origin<Real> origin, second;
  const bool apart = row.second && row.columns != nullptr;
  const Real steepest = row.second && !apart ? at_least(scale, second_scale) : scale;
  ShardState all = ShardState::empty();
  Best<Real> best{Real(-INFINITY), slice * kSlice};
  slices.for_blocks(slice, [&](int64_t begin, int64_t count) {
    alignas(64) Real buffer[kBlock];
    prefetch_next(row.logits, begin, row.vocab, 8);
    const Real* z = load(row.logits, begin, count, buffer);
    int64_t holes = 0;
    z = without_holes(row, begin, count, z, buffer, Real(-INFINITY), holes);
    const Real top = largest(z, count);
    origin.raise_to(top, steepest);
    all.raise(double(origin.logit), scale);
    all.first.add(row.entropy ? softmax_block<true>(z, count, origin.zero(), scale)
                              : softmax_block<false>(z, count, origin.zero(), scale));
    if (row.second) {
      alignas(64) Real subset[kBlock];
      const Real* own = apart ? second_block(z, count, row.columns + begin, subset) : z;
      if (apart) second.raise_to(largest(own, count), second_scale);
      const Origin<Real>& at = apart ? second : origin;
      all.raise_second(double(at.logit), second_scale);
      all.second.add(softmax_block<true>(own, count, at.zero(), second_scale));
    }
    if (row.best) seek(z, top, begin, count, best);
    all.columns += double(count - holes);
    if (row.total) {
      z = without_holes(row, begin, count, z, buffer, origin.zero(), holes);
      all.total += total_block(z, count, origin.zero());
    }
  });
  return {all, double(best.logit), best.column};
}

template <class Real>
ShardNumbers shard_statistics(const ShardSideRow& row, const SliceRunner& runner, char* partials) {
  const RowSlices slices{row.vocab, runner, partials};
  const Real scale = Real(kLog2E / row.temperature), second_scale = Real(kLog2E / row.second_temperature);
  const ShardSlice found = slices.template reduce_slices<ShardSlice>(
      [&](int64_t slice) { return shard_slice(row, slices, slice, scale, second_scale); },
      [&](ShardSlice& all, const ShardSlice& next) {
        ShardState other = next.state;
        const double to = at_least(all.state.origin, other.origin);
        const double second_to = at_least(all.state.second_origin, other.second_origin);
        all.state.raise(to, scale);
        other.raise(to, scale);
        all.state.raise_second(second_to, second_scale);
        other.raise_second(second_to, second_scale);
        all.state.first.add(other.first);
        all.state.second.add(other.second);
        all.state.total += other.total;
        all.state.columns += other.columns;
        if (next.best_logit > all.best_logit) {
          all.best_logit = next.best_logit;
          all.best_column = next.best_column;
        }
      });
  const ShardState& state = found.state;
  double token_logit = -INFINITY;
  if (row.token >= 0 && row.token < row.vocab) {
    Real token;
    token_logit = double(*load(row.logits, row.token, 1, &token));
  }
  return {state.origin,          state.first.sum,     state.first.weighted, state.second.sum,
          state.second.weighted, token_logit,         found.best_logit,     state.total,
          state.columns,         state.second_origin, found.best_column};
}

// All parameters are passed by value: in a loop with stores the compiler must reload what it reads through references.
template <bool kSlope, class Real>
FASTKD_INLINE void add_softmax_block(const Real* z, int64_t count, Real origin, Real scale, Real shift, Real constant,
                                     Real slope, const bool* columns, Real* out) {
  if (columns != nullptr) {
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) {
      const Real x = (columns[i] ? z[i] - origin : Real(-INFINITY)) * scale - shift, q = exp2_of(x);
      out[i] += q * (kSlope ? constant + slope * at_least(Real(-kDead), x) : constant);
    }
    return;
  }
  FASTKD_SIMD
  for (int64_t i = 0; i < count; ++i) {
    const Real x = (z[i] - origin) * scale - shift, q = exp2_of(x);
    out[i] += q * (kSlope ? constant + slope * at_least(Real(-kDead), x) : constant);
  }
}

template <class Real>
void add_softmax(const Real* z, int64_t count, Real origin, double temperature, double log2_sum, double constant,
                 double slope, const bool* columns, Real* out) {
  const Real scale = Real(kLog2E / temperature);
  if (slope != 0) {
    add_softmax_block<true>(z, count, origin, scale, Real(log2_sum), Real(constant), Real(slope), columns, out);
  } else if (constant != 0) {
    add_softmax_block<false>(z, count, origin, scale, Real(log2_sum), Real(constant), Real(0), columns, out);
  }
}

template <class Real>
void shard_softmax_gradient(const ShardSideRow& row, const SliceRunner& runner, const ShardSoftmaxFactors& factors,
                            const Row& gradient) {
  const RowSlices slices{row.vocab, runner, nullptr};
  const Real origin = Real(factors.origin);
  slices.for_slices([&](int64_t slice) {
    slices.for_blocks(slice, [&](int64_t begin, int64_t count) {
      alignas(64) Real buffer[kBlock], out[kBlock];
      prefetch_next(row.logits, begin, row.vocab, 8);
      const Real* z = load(row.logits, begin, count, buffer);
      int64_t holes = 0;
      z = without_holes(row, begin, count, z, buffer, Real(-INFINITY), holes);
      const Real each = Real(factors.each);
      for (int64_t i = 0; i < count; ++i) out[i] = each;
      add_softmax(z, count, origin, row.temperature, factors.first_log2_sum, factors.constant, factors.slope,
                  static_cast<const bool*>(nullptr), out);
      add_softmax(z, count, Real(factors.second_origin), row.second_temperature, factors.second_log2_sum,
                  factors.second_constant, factors.second_slope, row.columns == nullptr ? nullptr : row.columns + begin,
                  out);
      if (row.token >= begin && row.token < begin + count) out[row.token - begin] += Real(factors.token);
      for (int64_t j = 0; holes > 0 && j < row.hole_count; ++j) {
        const int64_t place = row.holes[j] - begin;
        if (place >= 0 && place < count) out[place] = Real(factors.holes[j]);
      }
      store(gradient, begin, count, out);
    });
    finish_streaming(gradient);
  });
}

// --- Student and teacher ------------------------------------------------------------------------

template <class Real>
RowFrame<Real> shard_frame(const ShardPairRow& row) {
  RowFrame<Real> frame;
  frame.set_scales(row.task);
  frame.student_origin = Real(row.student_origin);
  frame.teacher_origin = Real(row.teacher_origin);
  frame.student_lse = row.student_log2_sum;
  frame.teacher_lse = row.teacher_log2_sum;
  frame.label_lse = 0;
  return frame;
}

template <bool kNear, class Real, class Divergence>
FASTKD_INLINE ShardTermSums<double> shard_block_sums(const Divergence divergence, const Normalized<Real> at,
                                                     const Real* u, const Real* w, int64_t count) {
  Real f = 0;
  double student = 0, teacher = 0, q = 0, p = 0;
  FASTKD_SIMD_REDUCE(+ : f, student, teacher, q, p)
  for (int64_t i = 0; i < count; ++i) {
    const Outcome<Real> o = at.template outcome<kNear>(u[i], w[i]);
    const ShardTermSums<double> t = shard_terms<kNear, double>(divergence, o);
    f += Real(t.f);
    student += t.student;
    teacher += t.teacher;
    q += t.q;
    p += t.p;
  }
  return {double(f), student, teacher, q, p};
}

// A block of one side, in which the divergence's softmax lacks the label if it is of the other tokens.
template <class Divergence, class Real>
FASTKD_INLINE const Real* load_others(const Row& side, int64_t token, int64_t begin, int64_t count, Real* buffer) {
  const Real* z = load(side, begin, count, buffer);
  if (!Divergence::kExcludesLabel || token < begin || token >= begin + count) return z;
  if (z != buffer) __builtin_memcpy(buffer, z, count * sizeof(Real));
  buffer[token - begin] = Real(-INFINITY);
  return buffer;
}

template <bool kNear, class Real, class Divergence>
ShardTermSums<double> shard_row_sums(const ShardPairRow& row, const RowSlices& slices, const Divergence& divergence) {
  const Normalized<Real> at = shard_frame<Real>(row).normalized();
  return slices.template reduce_slices<ShardTermSums<double>>(
      [&](int64_t slice) {
        ShardTermSums<double> all{};
        slices.for_blocks(slice, [&](int64_t begin, int64_t count) {
          alignas(64) Real student_buffer[kBlock], teacher_buffer[kBlock];
          prefetch_next(row.student, begin, row.vocab, 2);
          prefetch_next(row.teacher, begin, row.vocab, 2);
          const Real* u = load_others<Divergence>(row.student, row.token, begin, count, student_buffer);
          const Real* w = load_others<Divergence>(row.teacher, row.token, begin, count, teacher_buffer);
          all.add(shard_block_sums<kNear>(divergence, at, u, w, count));
        });
        return all;
      },
      [](ShardTermSums<double>& all, const ShardTermSums<double>& next) { all.add(next); });
}

template <class Real, class Divergence>
ShardSums shard_sums(const ShardPairRow& row, const SliceRunner& runner, char* partials) {
  const RowSlices slices{row.vocab, runner, partials};
  const Divergence divergence{row.task.beta, row.task.alpha};
  if constexpr (!kAlwaysNear<Divergence>) {
    const ShardTermSums<double> far = shard_row_sums<false, Real>(row, slices, divergence);
    if (!(far.f < Divergence::kNearBelow)) return converted(divergence, far);
  }
  const ShardTermSums<double> near = shard_row_sums<true, Real>(row, slices, divergence);
  return {near.f, near.student, near.teacher};
}

template <bool kNear, bool kTeacher, class Real, class Divergence>
FASTKD_INLINE void shard_gradient_block(const Divergence divergence, const Normalized<Real> at, const Real* u,
                                        const Real* w, int64_t count, const Mean<Real> mean, Real factor, Real* out) {
  FASTKD_SIMD
  for (int64_t i = 0; i < count; ++i) {
    out[i] = factor * shard_gradient<kNear, kTeacher>(divergence, at.template outcome<kNear>(u[i], w[i]), mean);
  }
}

template <class Real>
FASTKD_INLINE void add_own(const Real* z, int64_t count, Real origin, Real scale, Real shift, Real factor, Real* out) {
  FASTKD_SIMD
  for (int64_t i = 0; i < count; ++i) out[i] += factor * exp2_of((z[i] - origin) * scale - shift);
}

template <bool kNear, bool kTeacher, class Real, class Divergence>
void write_shard_gradient(const ShardPairRow& row, const SliceRunner& runner, const ShardGradientRow& given,
                          double row_mean, const Divergence& divergence, const Row& gradient) {
  const RowSlices slices{row.vocab, runner, nullptr};
  const Normalized<Real> at = shard_frame<Real>(row).normalized();
  const Mean<Real> mean(row_mean);
  const Real factor = Real(given.factor / (kTeacher ? row.task.teacher_temperature : row.task.temperature));
  const Real own = Real(given.own_factor), own_origin = kTeacher ? at.teacher_origin : at.student_origin;
  const Real own_scale = kTeacher ? at.teacher_scale : at.student_scale;
  const Real own_shift = kTeacher ? at.teacher_lse : at.student_lse;
  const Real label = Real(given.label_factor), label_shift = Real(given.label_log2_sum), log2_e = Real(kLog2E);
  slices.for_slices([&](int64_t slice) {
    slices.for_blocks(slice, [&](int64_t begin, int64_t count) {
      alignas(64) Real student_buffer[kBlock], teacher_buffer[kBlock], out[kBlock];
      prefetch_next(row.student, begin, row.vocab, 2);
      prefetch_next(row.teacher, begin, row.vocab, 2);
      const Real* u = load_others<Divergence>(row.student, row.token, begin, count, student_buffer);
      const Real* w = load_others<Divergence>(row.teacher, row.token, begin, count, teacher_buffer);
      shard_gradient_block<kNear, kTeacher>(divergence, at, u, w, count, mean, factor, out);
      if (given.own_factor != 0) {
        add_own(kTeacher ? w : u, count, own_origin, own_scale, own_shift, own, out);
      }
      if (given.label_factor != 0) {
        add_own(u, count, at.student_origin, log2_e, label_shift, label, out);
      }
      if (row.token >= begin && row.token < begin + count) out[row.token - begin] += Real(given.token_factor);
      store(gradient, begin, count, out);
    });
    finish_streaming(gradient);
  });
}

template <class Real, class Divergence>
void shard_gradient_row(const ShardPairRow& row, const SliceRunner& runner, const ShardGradientRow& given,
                        const Row& gradient) {
  const Divergence divergence{row.task.beta, row.task.alpha};
  const ShardMean at = shard_mean(divergence, given.value, given.slope_sum, given.of_teacher);
  const auto write = given.of_teacher ? (at.near ? write_shard_gradient<true, true, Real, Divergence>
                                                 : write_shard_gradient<false, true, Real, Divergence>)
                                      : (at.near ? write_shard_gradient<true, false, Real, Divergence>
                                                 : write_shard_gradient<false, false, Real, Divergence>);
  write(row, runner, given, at.mean, divergence, gradient);
}

template <class Real, class... Divergence>
constexpr ShardPairKernels list_shard_kernels(TypeList<Divergence...>) {
  return {{{shard_sums<Real, Divergence>, shard_gradient_row<Real, Divergence>}...}};
}

extern const Precisions<ShardSideKernels> shard_side_kernels;
extern const ShardPairKernels shard_pair_float, shard_pair_double;

}  // namespace fastkd::FASTKD_ISA
