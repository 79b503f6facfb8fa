// Multiplies one row of a gradient by a factor, in place: a backward pass applies grad_output this way. One read and
// one write of the row.
#pragma once
#include "common/simd.h"

namespace fastkd {
using ScaleRowKernel = void (*)(const Row& row, int64_t width, double factor);
}

namespace fastkd::FASTKD_ISA {

// A factor of 0 gives 0 whatever the row holds, so that a row with weight 0 does not produce NaN.
template <class Real>
void scale_row(const Row& row, int64_t width, double factor) {
  if (factor == 1) return;
  if (factor == 0) return fill_zero(row, 0, width);
  for (int64_t begin = 0; begin < width; begin += kBlock) {
    const int64_t count = width - begin < kBlock ? width - begin : kBlock;
    alignas(64) Real in_buffer[kBlock], out_buffer[kBlock];
    const Real* in = load(row, begin, count, in_buffer);
    Real* out = destination(row, begin, out_buffer);
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) out[i] = in[i] * Real(factor);
    store(row, begin, count, out);
  }
}

extern const Precisions<ScaleRowKernel> scale_row_kernels;

}  // namespace fastkd::FASTKD_ISA
