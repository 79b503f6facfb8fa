// chunk_log_likelihood of one row: the log-sum-exp of all logits and of those in the boundary set, and the gradient.
//
// Memory: the forward reads the row once; the backward reads it once and writes the gradient once. One byte per entry
// of the boundary set is read from the cache.
#pragma once
#include "../math/logit_sum.h"
#include "common/row_slices.h"
#include "common/softmax_sums.h"

namespace fastkd {

struct ChunkRow {
  int64_t vocab;
  Row logits;
  const bool* boundary;  // null: none
  double temperature;
};

// Normalisers of e^(logits / temperature), over all columns and over the boundary set. The logarithm of an empty sum is
// -inf; that of a row without a valid softmax is NaN.
struct ChunkRowSums {
  LogNormalizer all, boundary;

  // The logarithm of the boundary set's share of the row.
  double boundary_share(double temperature) const {
    const double below = boundary.origin - all.origin;
    return log_share(below, below / temperature + (boundary.log_sum - all.log_sum));
  }
};

// partials: kPartialBytes per slice.
using ChunkSumKernel = ChunkRowSums (*)(const ChunkRow& row, const SliceRunner& runner, char* partials);

// The factors of a row's gradient. Entry v gets `rest` times its probability in the softmax over all columns. Entries
// of the boundary set get `boundary` times their probability in the softmax over the set in addition. The label gets
// `label` in addition.
struct ChunkFactors {
  double rest, boundary, label;
};

using ChunkGradientKernel = void (*)(const ChunkRow& row, const SliceRunner& runner, const ChunkRowSums& sums,
                                     const ChunkFactors& factors, int64_t label, const Row& gradient);

struct ChunkKernels {
  ChunkSumKernel sum;
  ChunkGradientKernel gradient;
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

// Sums of 2^((z - origin) scale).
struct ChunkPartial {
  double origin, all, boundary;
  FASTKD_INLINE void merge(const ChunkPartial& other, double scale) {
    const double to = at_least(origin, other.origin);
    const double mine = origin_factor(origin, to, scale), others = origin_factor(other.origin, to, scale);
    all = all * mine + other.all * others;
    boundary = boundary * mine + other.boundary * others;
    origin = to;
  }
};

template <class Real>
FASTKD_INLINE void chunk_block(const Real* u, const bool* in, int64_t count, Real zero, Real scale, ChunkPartial& out) {
  const unsigned char* const own = reinterpret_cast<const unsigned char*>(in);
  Real all = 0, boundary = 0;
  FASTKD_SIMD_REDUCE(+ : all, boundary)
  for (int64_t i = 0; i < count; ++i) {
    const Real e = exp2_of((u[i] - zero) * scale);
    all += e;
    boundary += select(own[i] != 0, e, Real(0));
  }
  out.all += all;
  out.boundary += boundary;
}

// The boundary set's sum relative to the set's own largest logit. Used where the set's share of the row underflows.
template <class Real>
LogNormalizer rare_boundary(const ChunkRow& row, double to_base_2) {
  double top = -INFINITY, sum = 0;
  const auto for_set = [&](const auto& body) {
    for (int64_t begin = 0; begin < row.vocab; begin += kBlock) {
      alignas(64) Real buffer[kBlock];
      const int64_t count = row.vocab - begin < kBlock ? row.vocab - begin : kBlock;
      const Real* u = load(row.logits, begin, count, buffer);
      for (int64_t i = 0; i < count; ++i) {
        if (row.boundary[begin + i]) body(double(u[i]));
      }
    }
  };
  for_set([&](double z) { top = at_least(top, z); });
  if (top == -INFINITY) return {top, top};
  for_set([&](double z) { sum += ::exp2((z - top) * to_base_2); });
  return {top, ::log(sum)};
}

template <class Real>
ChunkRowSums chunk_sums(const ChunkRow& row, const SliceRunner& runner, char* partials) {
  const RowSlices slices{row.vocab, runner, partials};
  const double to_base_2 = kLog2E / row.temperature;
  const Real scale = Real(to_base_2);
  const ChunkPartial sums = slices.template reduce_slices<ChunkPartial>(
      [&](int64_t slice) {
        Origin<Real> origin;
        ChunkPartial all{};
        slices.for_blocks(slice, [&](int64_t begin, int64_t count) {
          alignas(64) Real buffer[kBlock];
          prefetch_next(row.logits, begin, row.vocab);
          const Real* u = load(row.logits, begin, count, buffer);
          if (const double step = origin.raise_to(largest(u, count), scale)) {
            const double factor = ::exp2(-step * scale);
            all.all = all.all == 0 ? 0 : all.all * factor;
            all.boundary = all.boundary == 0 ? 0 : all.boundary * factor;
          }
          if (row.boundary) {
            chunk_block(u, row.boundary + begin, count, origin.zero(), scale, all);
          } else {
            all.all += softmax_block<false>(u, count, origin.zero(), scale).sum;
          }
        });
        all.origin = double(origin.logit);
        return all;
      },
      [&](ChunkPartial& all, const ChunkPartial& next) { all.merge(next, scale); });
  // NaN if there is no finite logit.
  const double nan_or_zero = (sums.origin - sums.origin) + (sums.all - sums.all);
  const bool rare = row.boundary != nullptr && sums.boundary < 0x1p-100;
  LogNormalizer boundary =
      rare ? rare_boundary<Real>(row, to_base_2) : LogNormalizer{sums.origin, ::log(sums.boundary)};
  boundary.log_sum += nan_or_zero;
  return {{sums.origin, ::log(sums.all) + nan_or_zero}, boundary};
}

// All parameters are passed by value: in a loop with stores the compiler must reload what it reads through references.
template <class Real>
FASTKD_INLINE void chunk_gradient_block(const Real* u, int64_t count, Real origin, Real scale, Real shift, Real factor,
                                        Real* out) {
  FASTKD_SIMD
  for (int64_t i = 0; i < count; ++i) out[i] = factor * exp2_of((u[i] - origin) * scale - shift);
}

template <class Real>
FASTKD_INLINE void chunk_gradient_block(const Real* u, const bool* in, int64_t count, Real origin, Real scale,
                                        Real shift, Real factor, Real own_origin, Real own_shift, Real own_factor,
                                        Real* out) {
  const unsigned char* const own = reinterpret_cast<const unsigned char*>(in);
  FASTKD_SIMD
  for (int64_t i = 0; i < count; ++i) {
    const bool is = own[i] != 0;
    const Real x = u[i] - select(is, own_origin, origin);
    out[i] = select(is, own_factor, factor) * exp2_of(x * scale - select(is, own_shift, shift));
  }
}

template <class Real>
void chunk_gradient(const ChunkRow& row, const SliceRunner& runner, const ChunkRowSums& sums,
                    const ChunkFactors& factors, int64_t label, const Row& gradient) {
  const RowSlices slices{row.vocab, runner, nullptr};
  const Real scale = Real(kLog2E / row.temperature);
  // In the boundary set the two softmaxes differ by a constant factor only. 2^x is computed relative to the set's own
  // sum, since relative to the row's it might underflow.
  const bool apart = row.boundary != nullptr && factors.boundary != 0;
  const double share = apart ? ::exp(sums.boundary_share(row.temperature)) : 0;
  const Real origin = Real(sums.all.origin), own_origin = apart ? Real(sums.boundary.origin) : Real(0);
  const Real all_shift = Real(sums.all.log_sum * kLog2E);
  const Real own_shift = apart ? Real(sums.boundary.log_sum * kLog2E) : Real(0);
  const Real rest = Real(factors.rest), own = Real(factors.boundary + factors.rest * share);
  slices.for_slices([&](int64_t slice) {
    slices.for_blocks(slice, [&](int64_t begin, int64_t count) {
      alignas(64) Real in_buffer[kBlock], out_buffer[kBlock];
      prefetch_next(row.logits, begin, row.vocab);
      const Real* u = load(row.logits, begin, count, in_buffer);
      Real* out = destination(gradient, begin, out_buffer);
      if (apart) {
        chunk_gradient_block(u, row.boundary + begin, count, origin, scale, all_shift, rest, own_origin, own_shift, own,
                             out);
      } else {
        chunk_gradient_block(u, count, origin, scale, all_shift, rest, out);
      }
      if (label >= begin && label < begin + count) out[label - begin] += Real(factors.label);
      store(gradient, begin, count, out);
    });
    finish_streaming(gradient);
  });
}

extern const Precisions<ChunkKernels> chunk_kernels;

}  // namespace fastkd::FASTKD_ISA
