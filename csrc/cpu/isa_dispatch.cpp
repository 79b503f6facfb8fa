// Chooses, once per process, the best instruction set among those compiled in.
#include "isa.h"

namespace fastkd {

#ifdef FASTKD_X86
extern const Kernels kernels_x86_64_v2, kernels_x86_64_v3, kernels_x86_64_v4;
#else
extern const Kernels kernels_baseline;
#endif

namespace {

struct InstructionSet {
  const Kernels& kernels;
  bool supported;
};

// Best first.
#ifdef FASTKD_X86
#if defined(__clang__) && __clang_major__ < 18  // old clang does not know the levels' names
const bool kV3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                 __builtin_cpu_supports("fma");
const bool kV4 = kV3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vl");
#else
const bool kV3 = __builtin_cpu_supports("x86-64-v3") != 0, kV4 = __builtin_cpu_supports("x86-64-v4") != 0;
#endif
const InstructionSet kCandidates[] = {{kernels_x86_64_v4, kV4}, {kernels_x86_64_v3, kV3}, {kernels_x86_64_v2, true}};
#else
const InstructionSet kCandidates[] = {{kernels_baseline, true}};
#endif

const Kernels* best() {
  for (const InstructionSet& candidate : kCandidates) {
    if (candidate.supported) return &candidate.kernels;
  }
  return nullptr;
}

const Kernels* chosen = best();

}  // namespace

const Kernels& kernels() { return *chosen; }

bool use_isa(const char* name) {
  for (const InstructionSet& candidate : kCandidates) {
    if (__builtin_strcmp(name, candidate.kernels.isa) == 0 && candidate.supported) {
      chosen = &candidate.kernels;
      return true;
    }
  }
  return false;
}

}  // namespace fastkd
