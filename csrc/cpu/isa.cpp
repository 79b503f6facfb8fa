// The table of one instruction set's kernels. This file and those in csrc/cpu/kernels are compiled once for each set;
// FASTKD_ISA names the set.
#include "isa.h"

namespace fastkd {

#define FASTKD_QUOTE(x) FASTKD_STRINGIZE(x)
#define FASTKD_JOIN_(a, b) a##b
#define FASTKD_JOIN(a, b) FASTKD_JOIN_(a, b)

extern const Kernels FASTKD_JOIN(kernels_, FASTKD_ISA);

using namespace FASTKD_ISA;

const Kernels FASTKD_JOIN(kernels_, FASTKD_ISA) = {
    FASTKD_QUOTE(FASTKD_ISA),
    byte_kernels,
    chunk_kernels,
    clipped_kernels,
    cross_entropy_kernels,
    gated_routing_kernels,
    kl_div_kernels,
    scale_row_kernels,
    {shard_pair_float, shard_pair_double},
    shard_side_kernels,
    {softmax_divergence_float, softmax_divergence_double},
    teacher_topk_float,
    teacher_topk_double,
    token_kernels,
    token_stats_kernels,
    topk_kernels,
};

}  // namespace fastkd
