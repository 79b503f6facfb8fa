// Where kernels are registered: as the CUDA implementation of fastkd's ops or, in the emulator build, as separate ops
// that take CPU tensors.
#pragma once

#ifdef FASTKD_SIMT
#define FASTKD_LIBRARY fastkd_simt
#define FASTKD_KEY CPU
#else
#define FASTKD_LIBRARY fastkd
#define FASTKD_KEY CUDA
#endif

#define FASTKD_IMPL_IN(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)
#define FASTKD_IMPL(m) FASTKD_IMPL_IN(FASTKD_LIBRARY, FASTKD_KEY, m)
