// How the rows of a call are divided among teams, and how a team walks over its own.
#pragma once
#include "block.cuh"
#include "launch.h"
#include "policy.cuh"

namespace fastkd::cuda {

// Grids have an end: a team that ends takes the next row.
inline int64_t teams_of(int64_t rows, int cluster) { return rows < INT32_MAX / cluster ? rows : INT32_MAX / cluster; }

// Launches kernel(arguments, launch) for so many rows. team_bytes(launch): shared memory a team needs. Warps that need
// too much of it leave the block to one row, and rows whose cluster the device cannot run are read again.
template <class Kernel, class Arguments, class TeamBytes>
void launch_teams(const Device& device, Kernel kernel, const Arguments& arguments, RowLaunch launch,
                  const TeamBytes& team_bytes) {
  if (launch.warp_rows > 0) {
    const int64_t bytes = launch.warp_rows * team_bytes(launch);
    // Where a multiprocessor has no more than a block may take (sm_75), halving it helps no one.
    const int capability = device.capability();
    if (bytes <= (capability == 75 ? shared_limit(capability) : half_limit(capability))) {
      const int64_t blocks = (arguments.rows + launch.warp_rows - 1) / launch.warp_rows;
      return device.launch(kernel, teams_of(blocks, 1), launch.threads, bytes, 1, arguments, launch);
    }
    launch.warp_rows = 0;
  }
  if (!device.fits(kernel, launch.threads, team_bytes(launch), launch.cluster)) launch = reread_launch();
  device.launch(kernel, teams_of(arguments.rows, launch.cluster) * launch.cluster, launch.threads, team_bytes(launch),
                launch.cluster, arguments, launch);
}

// The part of the block's shared memory that is the thread's team's, `bytes` each.
__device__ __forceinline__ unsigned char* team_memory(const RowLaunch& launch, int64_t bytes) {
  return shared_memory() + (launch.warp_rows > 0 ? threadIdx.x / kWarp * bytes : 0);
}

// Calls body(row) for every row of the team.
template <class Body>
__device__ __forceinline__ void for_rows(const Team& team, const RowLaunch& launch, int64_t rows, const Body& body) {
  const int64_t block_rows = launch.warp_rows > 0 ? launch.warp_rows : 1;
  const int64_t first =
      int64_t(blockIdx.x) / launch.cluster * block_rows + (launch.warp_rows > 0 ? threadIdx.x / kWarp : 0);
  const int64_t step = int64_t(gridDim.x) / launch.cluster * block_rows;
  for (int64_t row = first; row < rows; row += step) {
    body(row);
    team.sync();  // before the next row takes over the shared memory
  }
}

}  // namespace fastkd::cuda
