#include "../token_stats.h"

namespace fastkd::FASTKD_ISA {

const Precisions<TokenStatsKernel> token_stats_kernels{token_stats_row<float>, token_stats_row<double>};

}  // namespace fastkd::FASTKD_ISA
