// The kernels of every kShards-th divergence. This file is compiled once per shard; FASTKD_SHARD is the shard's number.
#include "softmax_divergence.cuh"
#include "softmax_divergence_launch.h"

namespace fastkd::cuda {
namespace {

template <class Divergence, class Source>
void launch_source(const Device& device, const RowArguments& arguments, int element_size) {
  const RowNeeds needs{team_bytes(false), Source::kPacked, /*tensors=*/2, threads_for<Divergence, Source>()};
  launch_teams(device, softmax_divergence_kernel<Divergence, Source>, arguments, element_size, needs,
               [](const RowLaunch& launch) { return team_bytes(launch.warp_rows > 0) + rows_bytes(launch, 2); });
}

template <class Divergence>
void launch_divergence(const Device& device, const RowArguments& arguments, SourceKind kind) {
  with_source<true>(kind, [&](auto source, int element_size) {
    launch_source<Divergence, typename decltype(source)::Type>(device, arguments, element_size);
  });
}

template <int kPlace, class... Divergence>
bool launch_from(TypeList<Divergence...>, int, const Device&, const RowArguments&, SourceKind) {
  return false;
}
template <int kPlace, class First, class... Rest>
bool launch_from(TypeList<First, Rest...>, int divergence, const Device& device, const RowArguments& arguments,
                 SourceKind kind) {
  if constexpr (kPlace % kShards == FASTKD_SHARD) {
    if (divergence == kPlace) {
      launch_divergence<First>(device, arguments, kind);
      return true;
    }
  }
  return launch_from<kPlace + 1>(TypeList<Rest...>{}, divergence, device, arguments, kind);
}

}  // namespace

template <>
bool launch_shard<FASTKD_SHARD>(int divergence, const Device& device, const RowArguments& arguments, SourceKind kind) {
  return launch_from<0>(Divergences{}, divergence, device, arguments, kind);
}

}  // namespace fastkd::cuda
