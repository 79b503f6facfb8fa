// Definitions that let one formula compile with the host compiler, for each instruction set, and with nvcc.
#pragma once

#ifdef __CUDACC__
#define FASTKD_INLINE __host__ __device__ __forceinline__
#else
#define FASTKD_INLINE inline __attribute__((always_inline))
#endif

// Every function below lives in a namespace named after the instruction set of its translation unit. Otherwise the
// linker would keep one copy of each function, perhaps the AVX-512 one, for all machines.
#ifndef FASTKD_ISA
#define FASTKD_ISA portable
#endif
