// The interface between the op's entry and the kernels, which are compiled in several shards.
#pragma once
#include "common/launch.h"
#include "common/sources.cuh"

namespace fastkd::cuda {

inline constexpr int kShards = 4;

// Computes all rows and returns true if the shard has this divergence (its place in Divergences); else returns false.
template <int kShard>
bool launch_shard(int divergence, const Device& device, const RowArguments& arguments, SourceKind kind);

// The same for reverse KL from a mixture of two teachers' logits, if all three rows fit into shared memory. Where their
// weights adapt, arguments.distances is written.
bool launch_blended(int divergence, const Device& device, const RowArguments& arguments);

}  // namespace fastkd::cuda
