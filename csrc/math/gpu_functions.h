// Functions that round in a GPU's own way: as nvcc compiles them, and as a build of the emulator imitates them
// (tests/simt/rounded.h). FASTKD_GPU_FUNCTIONS: they are there.
#pragma once
#include "platform.h"

#if defined(__CUDA_ARCH__)
#define FASTKD_GPU_FUNCTIONS
namespace fastkd::FASTKD_ISA::gpu {

FASTKD_INLINE float exp2(float x) { return exp2f(x); }
FASTKD_INLINE float log2(float x) { return log2f(x); }
FASTKD_INLINE float exp2_approx(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
FASTKD_INLINE float log2_approx(float x) {
  float out;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
FASTKD_INLINE float reciprocal_approx(float x) {
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
// a b and a + b, never contracted with another operation.
FASTKD_INLINE float product(float a, float b) { return __fmul_rn(a, b); }
FASTKD_INLINE float sum(float a, float b) { return __fadd_rn(a, b); }

}  // namespace fastkd::FASTKD_ISA::gpu

#elif defined(FASTKD_SIMT_ROUNDED)
#define FASTKD_GPU_FUNCTIONS
#include "rounded.h"
namespace fastkd::FASTKD_ISA {
namespace gpu = simt::rounded;
}
#endif
