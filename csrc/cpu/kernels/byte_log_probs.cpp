#include "../byte_log_probs.h"

namespace fastkd::FASTKD_ISA {

const Precisions<ByteKernels> byte_kernels{{byte_sums<float>, byte_gradient<float>},
                                           {byte_sums<double>, byte_gradient<double>}};

}  // namespace fastkd::FASTKD_ISA
