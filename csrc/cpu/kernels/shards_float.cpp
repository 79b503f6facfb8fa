#include "../shards.h"

namespace fastkd::FASTKD_ISA {

const ShardPairKernels shard_pair_float = list_shard_kernels<float>(Divergences{});

}  // namespace fastkd::FASTKD_ISA
