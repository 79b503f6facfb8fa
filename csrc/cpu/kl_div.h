// One chunk of torch.nn.functional.kl_div on log-probabilities: the sum of its terms, the terms themselves where the
// reduction is "none", and both gradients. One read of each input, one write of each result asked for.
//   term             target (log target - input), 0 where target = 0;   log_target: e^target (target - input)
//   d / d input      -target;                                            log_target: -e^target
//   d / d target     log target + 1 - input;                             log_target: term + e^target
// NaN appears exactly where torch's composite of xlogy and its derivative has it: the target's derivative at 0 is NaN.
#pragma once
#include "simd.h"

namespace fastkd {

struct KlDivChunk {
  Row input, target;
  int64_t begin, end;
  bool log_target;
  bool reduce;                          // whether the sum is wanted
  Row terms;                            // empty: not wanted
  Row upstream;                         // gradient of the terms; empty: `scale` for all
  double scale;                         // of the gradients
  Row input_gradient, target_gradient;  // empty: not wanted
};
using KlDivKernel = double (*)(const KlDivChunk&);

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

// log(x) for every x >= 0 and NaN: subnormals are scaled up first.
FASTKD_INLINE float full_log(float x) {
  const bool subnormal = x < 1.17549435e-38f;
  const float lifted = subnormal ? x * 8388608.0f : x;
  const float log = (log2_of(lifted) - (subnormal ? 23.0f : 0.0f)) * float(kLn2);
  const float at_ends = x == 0.0f ? -INFINITY : x;  // log inf = inf, log of a NaN or a negative number NaN
  const float odd = x < 0.0f ? NAN : at_ends;
  return x > 0.0f && x < INFINITY ? log : odd;
}
FASTKD_INLINE double full_log(double x) { return ::log(x); }

// e^x for every x, as the square of 2^(x log2(e) / 2), whose exponent stays in range until e^x itself overflows.
FASTKD_INLINE float full_exp(float x) {
  const float exponent = x * 1.44269502f;
  const float capped = exponent > 254.0f ? 254.0f : exponent;
  const float root = exp2_of(capped * 0.5f);
  return root * root;
}
FASTKD_INLINE double full_exp(double x) { return ::exp(x); }

template <bool kLogTarget, class Real>
struct KlDivEntry {
  Real x, t;
  FASTKD_INLINE Real mass() const { return kLogTarget ? full_exp(t) : t; }
  FASTKD_INLINE Real term(Real mass) const {
    if constexpr (kLogTarget) return mass * (t - x);
    return (t == Real(0) ? Real(0) : t * full_log(t)) - t * x;
  }
  FASTKD_INLINE Real by_target(Real mass) const {
    if constexpr (kLogTarget) return term(mass) + mass;
    return (t == Real(0) ? Real(0) : full_log(t)) + t / t - x;
  }
};

template <bool kLogTarget, class Real>
double kl_div_block(const KlDivChunk& c, const Real* ones, int64_t begin, int64_t count) {
  alignas(64) Real x_buffer[kBlock], t_buffer[kBlock], g_buffer[kBlock], out_buffer[kBlock];
  const int64_t ahead = begin + kBlock, some = c.end - ahead < kBlock ? c.end - ahead : kBlock;
  if (some > 0) {
    prefetch(c.input, ahead, some);
    prefetch(c.target, ahead, some);
  }
  const Real* x = load(c.input, begin, count, x_buffer);
  const Real* t = load(c.target, begin, count, t_buffer);
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

}  // namespace fastkd::FASTKD_ISA
