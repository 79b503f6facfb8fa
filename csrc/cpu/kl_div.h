// torch.nn.functional.kl_div on log-probabilities for one chunk of elements: the sum of its terms, the terms themselves
// where the reduction is "none", and both gradients. Each input is read once, and each requested result written once.
#pragma once
#include "../math/kl_div.h"
#include "common/simd.h"

namespace fastkd {

struct KlDivChunk {
  Row input;  // empty: neither the sum, the terms nor the target's gradient is requested
  Row target;
  int64_t begin, end;
  bool log_target;
  bool reduce;                          // whether the sum is requested
  Row terms;                            // empty: not requested
  Row upstream;                         // gradient of the terms; empty: `scale` for all of them
  double scale;                         // of the gradients
  Row input_gradient, target_gradient;  // empty: not requested
};
using KlDivKernel = double (*)(const KlDivChunk&);

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

template <bool kLogTarget, class Real>
double kl_div_block(const KlDivChunk& c, const Real* ones, int64_t begin, int64_t count) {
  alignas(64) Real x_buffer[kBlock], t_buffer[kBlock], g_buffer[kBlock], out_buffer[kBlock];
  const int64_t ahead = begin + kBlock, some = c.end - ahead < kBlock ? c.end - ahead : kBlock;
  if (some > 0) {
    if (c.input) prefetch(c.input, ahead, some);
    prefetch(c.target, ahead, some);
  }
  const Real* t = load(c.target, begin, count, t_buffer);
  const Real* x = c.input ? load(c.input, begin, count, x_buffer) : t;
  const Real* upstream = c.upstream ? load(c.upstream, begin, count, g_buffer) : ones;
  const Real scale = Real(c.scale);
  Real sum = 0;
  if (c.terms) {
    Real* out = destination(c.terms, begin, out_buffer);
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) {
      const KlDivEntry<kLogTarget, Real> e{x[i], t[i]};
      out[i] = e.term(e.mass());
    }
    store(c.terms, begin, count, out);
  } else if (c.reduce) {
    FASTKD_SIMD_REDUCE(+ : sum)
    for (int64_t i = 0; i < count; ++i) {
      const KlDivEntry<kLogTarget, Real> e{x[i], t[i]};
      sum += e.term(e.mass());
    }
  }
  if (c.input_gradient) {
    Real* out = destination(c.input_gradient, begin, out_buffer);
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) {
      const KlDivEntry<kLogTarget, Real> e{x[i], t[i]};
      out[i] = -scale * upstream[i] * e.mass();
    }
    store(c.input_gradient, begin, count, out);
  }
  if (c.target_gradient) {
    Real* out = destination(c.target_gradient, begin, out_buffer);
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) {
      const KlDivEntry<kLogTarget, Real> e{x[i], t[i]};
      out[i] = scale * upstream[i] * e.by_target(e.mass());
    }
    store(c.target_gradient, begin, count, out);
  }
  return sum;
}

template <class Real>
double kl_div_chunk(const KlDivChunk& c) {
  alignas(64) Real ones[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) ones[i] = Real(1);
  double sum = 0;
  for (int64_t begin = c.begin; begin < c.end; begin += kBlock) {
    const int64_t count = c.end - begin < kBlock ? c.end - begin : kBlock;
    sum += c.log_target ? kl_div_block<true, Real>(c, ones, begin, count)
                        : kl_div_block<false, Real>(c, ones, begin, count);
  }
  finish_streaming(c.input_gradient);
  finish_streaming(c.target_gradient);
  return sum;
}

extern const Precisions<KlDivKernel> kl_div_kernels;

}  // namespace fastkd::FASTKD_ISA
