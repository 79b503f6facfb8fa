// Launch numbers, and the reasons. Pure functions of the compute capability, the element size and the vocabulary.
#pragma once
#include <cstdint>

namespace fastkd::cuda {

// Dynamic shared memory a block may have, by compute capability (10 x major + minor). 1 KiB of it is the system's.
constexpr int64_t shared_limit(int capability) {
  switch (capability) {
    case 75:
      return 64 << 10;
    case 80:
    case 87:
      return 163 << 10;
    case 86:
    case 89:
      return 99 << 10;
    default:
      return capability >= 120 ? 99 << 10 : capability >= 90 ? 227 << 10 : 48 << 10;
  }
}

// How a row of one or two logit tensors is worked on.
struct RowLaunch {
  int threads;
  int warp_rows;        // rows a block, one a warp; 0: a row takes the whole block, or cluster
  int cluster;          // blocks a row
  bool resident;        // the rows stay in shared memory between passes: read once
  int64_t slice_bytes;  // of one row, in one block's shared memory
};

// Two such blocks a multiprocessor are three warps for each of its four parts, with 168 registers a thread, and keep
// 24 KiB of loads on their way: each thread has the next packs coming while it works on the last.
inline constexpr int kRowThreads = 192;
inline constexpr int kWarpRows = 4;
// A warp reads this many bytes of a row in a few loads; longer rows are worth a block.
inline constexpr int64_t kWarpRowBytes = 4096;

// Each pass reads the rows again.
constexpr RowLaunch reread_launch() { return {kRowThreads, 0, 1, false, 0}; }

// What is left for the rows where two blocks share a multiprocessor, which has 1 KiB more than one block may take and
// keeps 1 KiB of each block for itself. (On sm_75 that block's limit is all there is.)
constexpr int64_t half_limit(int capability) {
  const int64_t all = shared_limit(capability) + (capability == 75 ? 0 : 1024);
  return all / 2 - 1024;
}

// overhead: shared memory that a team needs beside the rows. tensors: how many stay there.
constexpr RowLaunch row_launch(int capability, int element_size, int64_t vocab, int64_t overhead, bool packed,
                               int tensors = 2) {
  // One pack more for a row that does not begin on a 16-byte boundary.
  const int64_t bytes = (vocab * element_size + 15) / 16 * 16 + 16;
  if (!packed) return {vocab >= 4096 ? kRowThreads : vocab >= 1024 ? 128 : 32, 0, 1, false, 0};
  if (bytes <= kWarpRowBytes) return {kWarpRows * 32, kWarpRows, 1, true, bytes};
  const int64_t limit = shared_limit(capability) - overhead;
  const int64_t half = half_limit(capability) - overhead;
  // Half of the limit leaves room for a second block, whose loads overlap this one's arithmetic; the whole of it still
  // saves the second read. Portable clusters end at 8 blocks, 16 are for rows that fit no other way.
  for (int64_t room : {half, limit}) {
    for (int cluster = 1; cluster <= (capability >= 90 ? 8 : 1); cluster *= 2) {
      const int64_t slice = ((bytes / 16 + cluster - 1) / cluster) * 16;
      const bool many = cluster > 1 && slice < 16384;  // too little work for another block's barriers
      if (tensors * slice <= room && !many) return {kRowThreads, 0, cluster, true, slice};
    }
  }
  const int64_t slice = ((bytes / 16 + 15) / 16) * 16;
  if ((capability == 90 || capability == 100) && tensors * slice <= limit) return {kRowThreads, 0, 16, true, slice};
  return reread_launch();
}

// Elementwise kernels walk over their packs in a fixed number of blocks, enough for any device.
inline constexpr int kFlatThreads = 256;
inline constexpr int kFlatBlocks = 2048;

// Tiles of a product C = A B. In 64 bytes along k 16-bit elements feed two steps of the tensor cores, and a stage of a
// 128 x 128 tile takes 16 KiB: with three of them two blocks share even a multiprocessor of 100 KiB.
inline constexpr int kTileColumns = 128;
inline constexpr int kTileDepthBytes = 64;
inline constexpr int kManyRows = 128;
inline constexpr int kFewRows = 16;  // the least that tensor cores take

// level: 75, or 80 and later, where copies pass the registers by.
constexpr int tile_threads(int rows) { return rows == kManyRows ? 256 : 128; }
constexpr int tile_stages(int level, int rows) { return level < 80 ? 2 : rows == kManyRows ? 3 : 4; }
// A multiprocessor's blocks: 128 registers a thread, or 255 for the operands of multiply-adds, or of the next tile.
constexpr int tile_blocks(int level, int rows, int element_size) {
  return level < 80 || (rows == kManyRows && element_size == 4) ? 1 : 512 / tile_threads(rows);
}

// Few rows are a matter of the weights' bytes: a small tile keeps more of them on their way. Float32 has no tensor
// cores to waste on absent rows, and rather reads the weights up to four times, mostly from the L2.
constexpr bool few_rows(int64_t rows, int element_size) { return rows <= (element_size == 4 ? 4 : 1) * kFewRows; }

// How many parts k is split into, one block each: enough to give each multiprocessor of the largest devices two blocks,
// and at least four tiles a part, since the first must arrive before the tensor cores start. The number does not depend
// on the device, so that results do not either.
constexpr int depth_splits(int64_t tiles, int64_t depth_tiles) {
  constexpr int64_t kBlocks = 264, kMost = 16;
  if (tiles == 0) return 1;
  int64_t splits = kBlocks / tiles < depth_tiles / 4 ? kBlocks / tiles : depth_tiles / 4;
  splits = splits < kMost ? splits : kMost;
  return splits > 1 ? int(splits) : 1;
}

// The block that sorts choices: each warp counts its own in shared memory, as many as 32 KiB of counters let be there
// and as the rows are worth.
inline constexpr int kRouteThreads = 1024;
constexpr int route_threads(int64_t rows, int64_t bins) {
  int threads = kRouteThreads;
  while (threads > 128 && (threads / 32 * bins * 4 > 32 << 10 || threads >= 2 * rows)) threads /= 2;
  return threads;
}

}  // namespace fastkd::cuda
