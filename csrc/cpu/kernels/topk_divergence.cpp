#include "../topk_divergence.h"

namespace fastkd::FASTKD_ISA {

const Precisions<TopkKernel> topk_kernels{{sum_rest<float>, uniform_terms<float>, write_rest<float>},
                                          {sum_rest<double>, uniform_terms<double>, write_rest<double>}};

}  // namespace fastkd::FASTKD_ISA
