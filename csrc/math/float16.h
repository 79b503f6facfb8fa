// Conversion of bfloat16 and float16, held as bit patterns, to and from float, in integer arithmetic that vectorises on
// every instruction set. Rounding is to nearest even, NaN stays NaN, overflow becomes infinity, subnormals are kept. On
// a GPU its own conversion instructions are used.
#pragma once
#include "elementary.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fastkd::FASTKD_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The same function names for types that need no conversion.
FASTKD_INLINE float to_float(float x) { return x; }
FASTKD_INLINE double to_float(double x) { return x; }
FASTKD_INLINE void from_float(double x, float& out) { out = float(x); }
FASTKD_INLINE void from_float(double x, double& out) { out = x; }

FASTKD_INLINE float to_float(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

FASTKD_INLINE float to_float(Float16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, size = x.bits & 0x7fffu;
  constexpr uint32_t kExponentShift = 112u << 23;
  const uint32_t normal = (size << 13) + kExponentShift;
  // Subnormals are converted from integers: interpreted as float bit patterns they would be subnormal floats, which are
  // slow to multiply.
  const uint32_t subnormal = bit_cast<uint32_t>(float(int32_t(size)) * 5.9604645e-8f);  // 2^-24
  const uint32_t finite = size < 0x0400u ? subnormal : normal;
  return bit_cast<float>((size >= 0x7c00u ? normal + kExponentShift : finite) | sign);
#endif
}

FASTKD_INLINE void from_float(float x, BFloat16& out) {
#ifdef __CUDA_ARCH__
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = uint16_t(x != x ? 0x7fc0u : rounded);
#endif
}

FASTKD_INLINE void from_float(float x, Float16& out) {
#ifdef __CUDA_ARCH__
  out.bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  const uint32_t normal = (size - 0x38000000u + 0x0fffu + ((size >> 13) & 1u)) >> 13;
  // For values below 2^-14: adding 1/2 aligns the value's last bit with that of the float16 subnormals, and the
  // addition rounds it.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(size) + 0.5f) - 0x3f000000u;
  uint32_t out_bits = size < 0x38800000u ? subnormal : normal;
  out_bits = size >= 0x477ff000u ? 0x7c00u : out_bits;
  out.bits = uint16_t((size > 0x7f800000u ? 0x7e00u : out_bits) | sign);
#endif
}

}  // namespace fastkd::FASTKD_ISA
