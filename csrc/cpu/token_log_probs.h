// token_log_probs of one row: log q of its token and the entropy of q = softmax(z / temperature), and their gradients.
//
// Memory: the forward reads the row once; the backward reads it once and writes the gradient once.
#pragma once
#include "../math/token_log_probs.h"
#include "common/row_slices.h"
#include "common/softmax_sums.h"

namespace fastkd {

struct TokenRow {
  int64_t vocab;
  Row logits;
  double temperature;
  int64_t token;
  bool entropy;  // whether it is wanted
};

// partials: kPartialBytes per slice.
using TokenSumKernel = TokenNumbers (*)(const TokenRow& row, const SliceRunner& runner, char* partials);

using TokenGradientKernel = void (*)(const TokenRow& row, const SliceRunner& runner, const LogNormalizer& normalizer,
                                     const TokenFactors& factors, const Row& gradient);

struct TokenKernels {
  TokenSumKernel sum;
  TokenGradientKernel gradient;
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

inline constexpr int64_t kTokenAhead = 8;  // blocks

template <bool kEntropy, class Real>
TokenSums token_slice(const TokenRow& row, const RowSlices& slices, int64_t slice, Real scale) {
  Origin<Real> origin;
  SideSums all{};
  slices.for_blocks(slice, [&](int64_t begin, int64_t count) {
    alignas(64) Real buffer[kBlock];
    prefetch_next(row.logits, begin, row.vocab, kTokenAhead);
    const Real* z = load(row.logits, begin, count, buffer);
    const bool first = origin.logit == Real(-INFINITY);
    const double step = origin.raise_to(largest(z, count), scale);
    if (!first && step != 0) all.raise(step * scale);
    all.add(softmax_block<kEntropy>(z, count, origin.zero(), scale));
  });
  return {double(origin.logit), all};
}

template <class Real>
TokenNumbers token_sums(const TokenRow& row, const SliceRunner& runner, char* partials) {
  const RowSlices slices{row.vocab, runner, partials};
  const Real scale = Real(kLog2E / row.temperature);
  const TokenSums found = slices.template reduce_slices<TokenSums>(
      [&](int64_t slice) {
        return row.entropy ? token_slice<true>(row, slices, slice, scale)
                           : token_slice<false>(row, slices, slice, scale);
      },
      [&](TokenSums& all, const TokenSums& next) { all.merge(next, scale); });
  Real token;
  const double logit = double(*load(row.logits, row.token, 1, &token));
  return token_numbers(row.temperature, found, row.entropy, logit);
}

// All parameters are passed by value: in a loop with stores the compiler must reload what it reads through references.
template <bool kEntropy, class Real>
FASTKD_INLINE void token_gradient_block(const Real* z, int64_t count, Real origin, Real scale, Real shift,
                                        Real constant, Real slope, Real* out) {
  FASTKD_SIMD
  for (int64_t i = 0; i < count; ++i) {
    const Real x = (z[i] - origin) * scale - shift, q = exp2_of(x);
    out[i] = q * (kEntropy ? constant + slope * at_least(Real(-kDead), x) : constant);
  }
}

template <class Real>
void token_gradient(const TokenRow& row, const SliceRunner& runner, const LogNormalizer& normalizer,
                    const TokenFactors& factors, const Row& gradient) {
  const RowSlices slices{row.vocab, runner, nullptr};
  const Real scale = Real(kLog2E / row.temperature), origin = Real(normalizer.origin);
  const Real shift = Real(normalizer.log_sum * kLog2E);
  const Real constant = Real(factors.constant), slope = Real(factors.slope);
  slices.for_slices([&](int64_t slice) {
    slices.for_blocks(slice, [&](int64_t begin, int64_t count) {
      alignas(64) Real in_buffer[kBlock], out_buffer[kBlock];
      prefetch_next(row.logits, begin, row.vocab, kTokenAhead);
      const Real* z = load(row.logits, begin, count, in_buffer);
      Real* out = destination(gradient, begin, out_buffer);
      if (factors.slope != 0) {
        token_gradient_block<true>(z, count, origin, scale, shift, constant, slope, out);
      } else {
        token_gradient_block<false>(z, count, origin, scale, shift, constant, slope, out);
      }
      if (row.token >= begin && row.token < begin + count) out[row.token - begin] += Real(factors.token);
      store(gradient, begin, count, out);
    });
    finish_streaming(gradient);
  });
}

extern const Precisions<TokenKernels> token_kernels;

}  // namespace fastkd::FASTKD_ISA
