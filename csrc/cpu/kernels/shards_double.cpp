#include "../shards.h"

namespace fastkd::FASTKD_ISA {

const ShardPairKernels shard_pair_double = list_shard_kernels<double>(Divergences{});

}  // namespace fastkd::FASTKD_ISA
