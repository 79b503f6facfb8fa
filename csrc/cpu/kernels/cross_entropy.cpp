#include "../cross_entropy.h"

namespace fastkd::FASTKD_ISA {

const Precisions<CrossEntropyKernel> cross_entropy_kernels{cross_entropy_row<float>, cross_entropy_row<double>};

}  // namespace fastkd::FASTKD_ISA
