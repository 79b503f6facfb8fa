#include "../token_log_probs.h"

namespace fastkd::FASTKD_ISA {

const Precisions<TokenKernels> token_kernels{{token_sums<float>, token_gradient<float>},
                                             {token_sums<double>, token_gradient<double>}};

}  // namespace fastkd::FASTKD_ISA
