#include "../scale_rows.h"

namespace fastkd::FASTKD_ISA {

const Precisions<ScaleRowKernel> scale_row_kernels{scale_row<float>, scale_row<double>};

}  // namespace fastkd::FASTKD_ISA
