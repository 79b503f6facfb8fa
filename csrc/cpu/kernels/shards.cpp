#include "../shards.h"

namespace fastkd::FASTKD_ISA {

const Precisions<ShardSideKernels> shard_side_kernels{{shard_statistics<float>, shard_softmax_gradient<float>},
                                                      {shard_statistics<double>, shard_softmax_gradient<double>}};

}  // namespace fastkd::FASTKD_ISA
