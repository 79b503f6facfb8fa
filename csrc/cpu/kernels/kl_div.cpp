#include "../kl_div.h"

namespace fastkd::FASTKD_ISA {

const Precisions<KlDivKernel> kl_div_kernels{kl_div_chunk<float>, kl_div_chunk<double>};

}  // namespace fastkd::FASTKD_ISA
