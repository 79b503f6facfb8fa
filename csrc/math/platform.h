// What lets one formula serve the host compiler, every instruction set it is compiled for, and nvcc.
#pragma once

#ifdef __CUDACC__
#define FASTKD_INLINE __host__ __device__ __forceinline__
#else
#define FASTKD_INLINE inline __attribute__((always_inline))
#endif

// Every function below lives in a namespace named after the instruction set of its translation unit.
// Without that the linker would keep one copy of each, perhaps the AVX-512 one, for all machines.
#ifndef FASTKD_ISA
#define FASTKD_ISA portable
#endif
