// How the entry reaches the kernels, which are compiled in several shards.
#pragma once
#include "common/launch.h"
#include "common/sources.cuh"

namespace fastkd::cuda {

inline constexpr int kShards = 4;

// Solves all rows if the shard has this divergence (its place in Divergences), else returns false.
template <int kShard>
bool launch_shard(int divergence, const Device& device, const RowArguments& arguments, SourceKind kind);

}  // namespace fastkd::cuda
