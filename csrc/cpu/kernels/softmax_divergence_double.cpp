#include "../softmax_divergence.h"

namespace fastkd::FASTKD_ISA {

const SoftmaxDivergenceKernels softmax_divergence_double = list_kernels<double>(Divergences{});

}  // namespace fastkd::FASTKD_ISA
