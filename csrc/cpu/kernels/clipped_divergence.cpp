#include "../clipped_divergence.h"

namespace fastkd::FASTKD_ISA {

const Precisions<ClippedKernel> clipped_kernels{clipped_row<float>, clipped_row<double>};

}  // namespace fastkd::FASTKD_ISA
