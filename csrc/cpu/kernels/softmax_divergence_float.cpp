#include "../softmax_divergence.h"

namespace fastkd::FASTKD_ISA {

const SoftmaxDivergenceKernels softmax_divergence_float = list_kernels<float>(Divergences{});

}  // namespace fastkd::FASTKD_ISA
