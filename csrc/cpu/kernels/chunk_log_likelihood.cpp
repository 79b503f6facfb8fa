#include "../chunk_log_likelihood.h"

namespace fastkd::FASTKD_ISA {

const Precisions<ChunkKernels> chunk_kernels{{chunk_sums<float>, chunk_gradient<float>},
                                             {chunk_sums<double>, chunk_gradient<double>}};

}  // namespace fastkd::FASTKD_ISA
