// How the rows of a call are divided among teams, and a team's loop over its rows.
#pragma once
#include "block.cuh"
#include "bulk_copy.cuh"
#include "launch.h"
#include "policy.cuh"

namespace fastkd::cuda {

// The size of a grid is limited: a team that finishes its row takes another one.
inline int64_t teams_of(int64_t rows, int cluster) {
  const int64_t most = FASTKD_TWIN(INT32_MAX, simt::most_grid_blocks()) / cluster;
  return rows < most ? rows : most > 0 ? most : 1;
}

// How the kernel is launched for rows of `vocab` logits of element_size bytes. team_bytes(launch) is the shared memory
// per team. If warps would need too much of it, a row gets the whole block instead. If the device cannot run a cluster,
// a smaller one is tried, and then each pass reads the rows again. role: of the kernel, in the launch log.
template <class Kernel, class TeamBytes>
RowLaunch teams_launch(const Device& device, Kernel kernel, int64_t vocab, int element_size, const RowNeeds& needs,
                       const TeamBytes& team_bytes, const char* role) {
  const int capability = device.capability();
  const auto launch_of = [&](int most_blocks) {
    const RowLaunch launch = row_launch(capability, element_size, vocab, needs, most_blocks);
    return needs.adapt != nullptr ? needs.adapt(launch) : launch;
  };
  RowLaunch launch = launch_of(kMostBlocks);
  // Where a multiprocessor has no more memory than one block may use (sm_75), limiting a block to half of it gains
  // nothing.
  const int64_t room = capability == 75 ? shared_limit(capability) : half_limit(capability);
  if (launch.warp_rows > 0 && launch.warp_rows * team_bytes(launch) > room) {
    launch.warp_rows = 0;
    launch.reason = LaunchReason::kWarpMemory;
  }
  while (!device.fits(kernel, launch.threads, team_bytes(launch), launch.cluster)) {
    const RowLaunch next = launch_of(launch.cluster > kPortableBlocks ? kPortableBlocks : 0);
    device.log_refused(role, launch.threads, team_bytes(launch), launch.cluster,
                       next.resident ? "a launch with fewer blocks per row"
                                     : "one block per row, without a cluster; each pass reads the rows again");
    launch = next;
  }
  return launch;
}

// Launches kernel(arguments, launch) for arguments.rows rows. bytes: shared memory per team.
template <class Kernel, class Arguments>
void launch_teams(const Device& device, Kernel kernel, const Arguments& arguments, RowLaunch launch, int64_t bytes,
                  const char* role) {
  const int64_t block_rows = launch.warp_rows > 0 ? launch.warp_rows : 1;
  const int64_t blocks = teams_of((arguments.rows + block_rows - 1) / block_rows, launch.cluster);
  launch.teams = blocks * block_rows;
  device.launch({role, launch}, kernel, blocks * launch.cluster, launch.threads, block_rows * bytes, launch.cluster,
                arguments, launch);
}
template <class Kernel, class Arguments, class TeamBytes>
void launch_teams(const Device& device, Kernel kernel, const Arguments& arguments, int element_size,
                  const RowNeeds& needs, const TeamBytes& team_bytes, const char* role = "rows") {
  const RowLaunch launch = teams_launch(device, kernel, arguments.vocab, element_size, needs, team_bytes, role);
  launch_teams(device, kernel, arguments, launch, team_bytes(launch), role);
}

// The shared memory of a team's rows of so many tensors, in one block.
__host__ __device__ constexpr int64_t rows_bytes(const RowLaunch& launch, int tensors) {
  return kRowBarrierBytes + tensors * launch.slice_bytes;
}

// The part of the block's shared memory that belongs to the thread's team; each team has `bytes`.
__device__ __forceinline__ unsigned char* team_memory(const RowLaunch& launch, int64_t bytes) {
  return shared_memory() + (launch.warp_rows > 0 ? threadIdx.x / kWarp * bytes : 0);
}

// Of the body of for_rows: it is all of a kernel. As a function of its own, it would read what it refers to in local
// memory.
#define FASTKD_INLINE_BODY __attribute__((always_inline))

// Calls body(row) for every row of the team.
template <class Body>
__device__ __forceinline__ void for_rows(const Team& team, const RowLaunch& launch, int64_t rows, const Body& body) {
  const int64_t team_number = launch.warp_rows > 0 ? int64_t(blockIdx.x) * launch.warp_rows + threadIdx.x / kWarp
                                                   : int64_t(blockIdx.x) / launch.cluster;
  for (int64_t row = team_number; row < rows; row += launch.teams) {
    body(row);
    if (launch.resident && has_bulk_copies()) fence_before_copies();
    team.sync();  // before the next row overwrites the shared memory
  }
  team.leave();
}

}  // namespace fastkd::cuda
