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
  kQuarter,
  kHalf,
  kWhole,
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
    case LaunchReason::kQuarter:
      return "the rows fit with a quarter of the shared memory of a multiprocessor per block: four blocks run on each";
    case LaunchReason::kHalf:
      return "the rows fit with half of the shared memory of a multiprocessor per block: two blocks run on each";
    case LaunchReason::kWhole:
      return "the rows fit with all the shared memory of a multiprocessor per block: one block runs on each";
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

// Threads per block where four blocks share a multiprocessor (a thread may then use 128 registers; with up to 168,
// three blocks do), and where two do (168 registers, or 128). Twice as many as the latter where one block has the
// multiprocessor to itself.
inline constexpr int kQuarterThreads = 128, kRowThreads = 192, kManyRowThreads = 256;
// How many packs ahead a thread's copies are, where rows do not stay in shared memory. With 384 or 512 threads per
// multiprocessor, that is 24 or 32 KiB under way of each tensor.
inline constexpr int kAhead = 4;
// The first and the last pack of a row may extend beyond it and are kept apart.
inline constexpr int kEdges = 2;
// A team's row is copied to shared memory in kAhead groups, each with a barrier of 8 bytes (bulk_copy.cuh).
inline constexpr int kRowBarrierBytes = kAhead * 8;
static_assert(kRowBarrierBytes % 16 == 0);
constexpr int64_t ahead_bytes(int threads) { return (int64_t(kAhead) * threads + kEdges) * 16; }
inline constexpr int kWarpRows = 4;
// The longest row, in bytes, for which one warp is enough: it reads the row in a few loads.
inline constexpr int64_t kWarpRowBytes = 4096;
static_assert(kWarpRowBytes == 4096 && kWarpRows == 4, "text_of names both");

// The launch in which each pass reads the rows from global memory again. Shared memory holds the packs under way.
constexpr RowLaunch reread_launch(LaunchReason reason, int threads) {
  return {threads, 0, 1, false, reason, ahead_bytes(threads)};
}

// The shared memory per block if so many blocks share a multiprocessor. The multiprocessor has 1 KiB more than one
// block may use, and reserves 1 KiB for each block. (On sm_75 it has no more than one block may use.)
constexpr int64_t share_limit(int capability, int blocks) {
  const int64_t all = shared_limit(capability) + (capability == 75 ? 0 : 1024);
  return blocks == 1 ? shared_limit(capability) : all / blocks - 1024;
}
constexpr int64_t half_limit(int capability) { return share_limit(capability, 2); }

// The blocks of a cluster at most: on every device that has clusters, and on some (where a launch must ask for it).
inline constexpr int kPortableBlocks = 8, kMostBlocks = 16;
// A block of a cluster has at least this many packs of a row a thread; with fewer, its barriers would take longer.
inline constexpr int kLeastPacks = 5;

// What a kernel needs of a launch.
struct RowNeeds {
  int64_t overhead;           // shared memory that each block needs besides the rows
  bool packed;                // rows are moved in packs
  int tensors = 2;            // how many tensors' rows stay in shared memory
  int threads = kRowThreads;  // per block where two share a multiprocessor; more for a kernel that needs few registers
  int64_t divided = 0;        // shared memory that the blocks of a row divide among them
  int most_blocks = kMostBlocks;            // of a row
  RowLaunch (*adapt)(RowLaunch) = nullptr;  // one_pass or block_per_row, for ops that need it
};

// most_blocks: that the device runs in a cluster; 0: it has refused clusters.
//
// Of the launches that keep the rows in shared memory, that with the most rows at a time is taken, and of several such
// that with the most blocks per multiprocessor: while the blocks of one row wait for each other, or for their leading
// threads, other rows' copies and arithmetic go on.
constexpr RowLaunch row_launch(int capability, int element_size, int64_t vocab, const RowNeeds& needs,
                               int most_blocks = kMostBlocks) {
  // One more pack, for a row that does not begin on a 16-byte boundary.
  const int64_t bytes = (vocab * element_size + 15) / 16 * 16 + 16;
  if (!needs.packed) {
    const int threads = vocab >= 4096 ? needs.threads : vocab >= 1024 ? 128 : 32;
    return {threads, 0, 1, false, LaunchReason::kElements, 0};
  }
  if (bytes <= kWarpRowBytes) return {kWarpRows * 32, kWarpRows, 1, true, LaunchReason::kWarp, bytes};
  if (most_blocks == 0) return reread_launch(LaunchReason::kRefused, needs.threads);
  const bool sixteen = capability == 90 || capability == 100;
  int most = capability < 90 ? 1 : sixteen ? kMostBlocks : kPortableBlocks;
  for (int limit : {most_blocks, needs.most_blocks}) most = limit < most ? limit : most;
  RowLaunch best = reread_launch(capability < 90 ? LaunchReason::kExceedsBlock
                                 : sixteen       ? LaunchReason::kExceedsSixteenBlocks
                                                 : LaunchReason::kExceedsEightBlocks,
                                 needs.threads);
  int best_share = 0;
  for (int share : {4, 2, 1}) {  // blocks on a multiprocessor
    const int threads = share == 4 ? kQuarterThreads : share == 2 ? needs.threads : 2 * needs.threads;
    const int64_t room = share_limit(capability, share) - needs.overhead - kRowBarrierBytes;
    for (int cluster = 1; cluster <= most; cluster *= 2) {
      const int64_t slice = ((bytes / 16 + cluster - 1) / cluster) * 16;
      if (needs.tensors * slice + needs.divided / cluster > room) continue;
      if (cluster > 1 && slice < kLeastPacks * 16 * threads) break;
      if (share * best.cluster > best_share * cluster) {
        const LaunchReason reason = share == 4   ? LaunchReason::kQuarter
                                    : share == 2 ? LaunchReason::kHalf
                                                 : LaunchReason::kWhole;
        best = {threads, 0, cluster, true, reason, slice};
        best_share = share;
      }
      break;
    }
  }
  return best;
}

// The same launch for an op with a single pass. Any number of blocks fits: rows need no shared memory of their own.
constexpr RowLaunch one_pass(RowLaunch launch) {
  if (launch.resident) {
    if (launch.reason == LaunchReason::kQuarter && launch.cluster > 1) launch.cluster /= 2;
    if (launch.warp_rows == 0) launch.threads = kRowThreads;
    launch.slice_bytes = ahead_bytes(launch.warp_rows > 0 ? 32 : launch.threads);
    launch.resident = false;
  }
  if (launch.reason != LaunchReason::kElements && launch.reason != LaunchReason::kRefused) {
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
