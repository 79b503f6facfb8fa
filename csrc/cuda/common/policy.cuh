// Launch configurations and the reasons for them, as pure functions of the compute capability, the element size and the
// vocabulary.
#pragma once
#include <cstdint>
#include <initializer_list>

namespace fastkd::cuda {

// The dynamic shared memory that a block may use, by compute capability (10 x major + minor). The system reserves 1
// KiB.
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

// Why a launch has its configuration.
enum class LaunchReason : uint8_t {
  kElements,
  kWarp,
  kWarpMemory,
  kBlockPerRow,
  kHalf,
  kWhole,
  kSixteenBlocks,
  kExceedsBlock,
  kExceedsEightBlocks,
  kExceedsSixteenBlocks,
  kRefused,
  kOnePass,
  kOnePassWarp
};

constexpr const char* text_of(LaunchReason reason) {
  switch (reason) {
    case LaunchReason::kElements:
      return "the tensors cannot be moved in packs of 16 bytes (strides, alignment, soft caps, or several teachers): "
             "rows are read element by element, again in each pass";
    case LaunchReason::kWarp:
      return "a row has at most 4096 bytes: one warp per row, 4 rows per block";
    case LaunchReason::kWarpMemory:
      return "a row has at most 4096 bytes, but 4 rows per block would need too much shared memory: one block per row";
    case LaunchReason::kBlockPerRow:
      return "a row has at most 4096 bytes, but this op needs a whole block: one block per row";
    case LaunchReason::kHalf:
      return "the rows fit with half of the shared memory of a multiprocessor per block: two blocks run on each";
    case LaunchReason::kWhole:
      return "the rows fit with all the shared memory of a multiprocessor per block: one block runs on each";
    case LaunchReason::kSixteenBlocks:
      return "the rows fit only with all the shared memory of 16 multiprocessors";
    case LaunchReason::kExceedsBlock:
      return "the rows exceed the shared memory of one block, and there are no clusters: each pass reads them again";
    case LaunchReason::kExceedsEightBlocks:
      return "the rows exceed the shared memory of 8 blocks, the largest cluster: each pass reads them again";
    case LaunchReason::kExceedsSixteenBlocks:
      return "the rows exceed the shared memory of 16 blocks, the largest cluster: each pass reads them again";
    case LaunchReason::kRefused:
      return "the device cannot run the cluster: each pass reads the rows again";
    case LaunchReason::kOnePass:
      return "there is one pass: rows are not kept in shared memory";
    case LaunchReason::kOnePassWarp:
      return "a row has at most 4096 bytes: one warp per row, 4 rows per block; there is one pass: rows are not kept "
             "in shared memory";
  }
  return "";
}

// How the threads are assigned to a row of one or two logit tensors.
struct RowLaunch {
  int threads;
  int warp_rows;  // rows per block, one per warp; 0: a row has a whole block or cluster
  int cluster;    // blocks per row
  bool resident;  // rows stay in shared memory between passes, so that they are read once
  LaunchReason reason;
  int64_t slice_bytes;  // bytes of one row in one block's shared memory
  int64_t teams = 0;    // of the grid; set by the launch
};

// Threads per block where two blocks share a multiprocessor; twice as many where one block has it to itself. A thread
// may then use 168 registers, or 128.
inline constexpr int kRowThreads = 192, kManyRowThreads = 256;
// How many packs ahead a thread's copies are, where rows do not stay in shared memory. With 384 or 512 threads per
// multiprocessor, that is 24 or 32 KiB under way of each tensor.
inline constexpr int kAhead = 4;
// The first and the last pack of a row may extend beyond it and are kept apart.
inline constexpr int kEdges = 2;
constexpr int64_t ahead_bytes(int threads) { return (int64_t(kAhead) * threads + kEdges) * 16; }
inline constexpr int kWarpRows = 4;
// The longest row, in bytes, for which one warp is enough: it reads the row in a few loads.
inline constexpr int64_t kWarpRowBytes = 4096;
static_assert(kWarpRowBytes == 4096 && kWarpRows == 4, "text_of names both");

// A launch's threads per block if two blocks shared a multiprocessor.
constexpr int shared_threads(const RowLaunch& launch) {
  const bool whole = launch.reason == LaunchReason::kWhole || launch.reason == LaunchReason::kSixteenBlocks;
  return whole ? launch.threads / 2 : launch.threads;
}

// The launch in which each pass reads the rows from global memory again. Shared memory holds the packs under way.
constexpr RowLaunch reread_launch(LaunchReason reason, int threads) {
  return {threads, 0, 1, false, reason, ahead_bytes(threads)};
}

// The shared memory per block if two blocks share a multiprocessor. The multiprocessor has 1 KiB more than one block
// may use, and reserves 1 KiB for each block. (On sm_75 it has no more than one block may use.)
constexpr int64_t half_limit(int capability) {
  const int64_t all = shared_limit(capability) + (capability == 75 ? 0 : 1024);
  return all / 2 - 1024;
}

// overhead: shared memory that a team needs besides the rows. tensors: how many tensors' rows stay there.
// threads: kRowThreads, or kManyRowThreads for a kernel that needs fewer registers.
constexpr RowLaunch row_launch(int capability, int element_size, int64_t vocab, int64_t overhead, bool packed,
                               int tensors = 2, int threads = kRowThreads) {
  // One more pack, for a row that does not begin on a 16-byte boundary.
  const int64_t bytes = (vocab * element_size + 15) / 16 * 16 + 16;
  if (!packed) {
    return {vocab >= 4096 ? threads : vocab >= 1024 ? 128 : 32, 0, 1, false, LaunchReason::kElements, 0};
  }
  if (bytes <= kWarpRowBytes) return {kWarpRows * 32, kWarpRows, 1, true, LaunchReason::kWarp, bytes};
  const int64_t limit = shared_limit(capability) - overhead;
  const int64_t half = half_limit(capability) - overhead;
  // Using half of the limit leaves room for a second block, whose loads overlap this block's arithmetic. Using all of
  // it still saves the second read. Portable clusters have at most 8 blocks; 16 are used for rows that fit no other
  // way.
  for (int64_t room : {half, limit}) {
    for (int cluster = 1; cluster <= (capability >= 90 ? 8 : 1); cluster *= 2) {
      const int64_t slice = ((bytes / 16 + cluster - 1) / cluster) * 16;
      const bool many = cluster > 1 && slice < 16384;  // too little work per block for the barriers
      if (tensors * slice <= room && !many) {
        return room == half ? RowLaunch{threads, 0, cluster, true, LaunchReason::kHalf, slice}
                            : RowLaunch{2 * threads, 0, cluster, true, LaunchReason::kWhole, slice};
      }
    }
  }
  const int64_t slice = ((bytes / 16 + 15) / 16) * 16;
  const bool sixteen = capability == 90 || capability == 100;
  if (sixteen && tensors * slice <= limit) {
    return {2 * threads, 0, 16, true, LaunchReason::kSixteenBlocks, slice};
  }
  return reread_launch(capability < 90 ? LaunchReason::kExceedsBlock
                       : sixteen       ? LaunchReason::kExceedsSixteenBlocks
                                       : LaunchReason::kExceedsEightBlocks,
                       threads);
}

// The same launch for an op with a single pass.
constexpr RowLaunch one_pass(RowLaunch launch) {
  if (launch.resident) {
    launch.threads = shared_threads(launch);  // any number of blocks fits
    launch.slice_bytes = ahead_bytes(launch.warp_rows > 0 ? 32 : launch.threads);
    launch.resident = false;
  }
  if (launch.reason != LaunchReason::kElements) {
    launch.reason = launch.warp_rows > 0 ? LaunchReason::kOnePassWarp : LaunchReason::kOnePass;
  }
  return launch;
}

// The same launch for an op that needs a block for each row, however short.
constexpr RowLaunch block_per_row(RowLaunch launch) {
  if (launch.warp_rows > 0) launch.reason = LaunchReason::kBlockPerRow;
  launch.warp_rows = 0;
  return launch;
}

// Elementwise kernels loop over their packs in a fixed number of blocks, enough for any device.
inline constexpr int kFlatThreads = 256;
inline constexpr int kFlatBlocks = 2048;

// Tiles of a product C = A B. 64 bytes of 16-bit elements along k are two steps of the tensor cores. A stage of a
// 128 x 128 tile takes 16 KiB; with three stages, two blocks fit even on a multiprocessor with 100 KiB.
inline constexpr int kTileColumns = 128;
inline constexpr int kTileDepthBytes = 64;
inline constexpr int kManyRows = 128;
inline constexpr int kFewRows = 16;  // the fewest rows that tensor cores process

// level: 75, or 80 for sm_80 and later, where copies to shared memory need no registers.
constexpr int tile_threads(int rows) { return rows == kManyRows ? 256 : 128; }
constexpr int tile_stages(int level, int rows) { return level < 80 ? 2 : rows == kManyRows ? 3 : 4; }
// Blocks per multiprocessor. This allows 128 registers per thread, or 255 where multiply-adds hold their operands, or
// sm_75 holds the next tile, in registers.
constexpr int tile_blocks(int level, int rows, int element_size) {
  return level < 80 || (rows == kManyRows && element_size == 4) ? 1 : 512 / tile_threads(rows);
}

// With few rows, reading the weights is the main cost, and a small tile keeps more loads in flight. Float32 products do
// not use tensor cores and would be slowed down by the absent rows of a large tile. Up to 64 rows they use small tiles,
// which read the weights up to four times, mostly from the L2.
constexpr bool few_rows(int64_t rows, int element_size) { return rows <= (element_size == 4 ? 4 : 1) * kFewRows; }

// Into how many parts, one block each, k is split. There are enough parts to give each multiprocessor of the largest
// devices two blocks, and at least four tiles per part, since the first must arrive before the tensor cores start. The
// number does not depend on the device, so that results do not depend on it either.
constexpr int depth_splits(int64_t tiles, int64_t depth_tiles) {
  constexpr int64_t kBlocks = 264, kMost = 16;
  if (tiles == 0) return 1;
  int64_t splits = kBlocks / tiles < depth_tiles / 4 ? kBlocks / tiles : depth_tiles / 4;
  splits = splits < kMost ? splits : kMost;
  return splits > 1 ? int(splits) : 1;
}

// Threads of the block that sorts choices. Each warp has its own counters in shared memory. The number of warps is
// limited by 32 KiB of counters and by the number of rows.
inline constexpr int kRouteThreads = 1024;
constexpr int route_threads(int64_t rows, int64_t bins) {
  int threads = kRouteThreads;
  while (threads > 128 && (threads / 32 * bins * 4 > 32 << 10 || threads >= 2 * rows)) threads /= 2;
  return threads;
}

}  // namespace fastkd::cuda
