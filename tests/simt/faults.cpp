// What the emulator must report and what it must accept: `faults CASE [SEED] [CAPABILITY]` runs one case. Exit code: 0
// for a correct kernel, 1 for wrong values, 3 for a reported fault.
#include <chrono>

#include "bulk_cases.h"

namespace {

__global__ void neighbour(float* y, bool report, bool sync) {
  float* s = floats();
  const unsigned t = threadIdx.x, other = (t + 37) % kThreads;
  s[t] = float(t);
  if (report) simt::shared_write(s + t, sizeof(float));
  if (sync) __syncthreads();
  if (report) simt::shared_read(s + other, sizeof(float));
  y[t] = s[other];
}

void check_neighbour(bool report, bool sync) {
  std::vector<float> y(kThreads);
  run({}, neighbour, y.data(), report, sync);
  for (int t = 0; t < kThreads; ++t) expect(y[t] == float((t + 37) % kThreads), "neighbour");
}

void with_barrier() { check_neighbour(true, true); }
void missing_barrier() { check_neighbour(true, false); }
void unseen_missing_barrier() { check_neighbour(false, false); }

// Lane 0 of each warp reads what lane 1 wrote.
__global__ void warp_race(bool sync) {
  store(floats() + threadIdx.x, 1.f);
  if (sync) {
    __syncwarp();
  } else {
    __shfl_xor_sync(~0u, 0, 1);
  }
  if (threadIdx.x % 32 == 0) load(floats() + threadIdx.x + 1);
}

void syncwarp_orders() { run({}, warp_race, true); }
void shuffle_does_not_order() { run({}, warp_race, false); }

__global__ void overwrite() {
  if (threadIdx.x == 0) store(floats(), 1.f);
  __syncthreads();
  load(floats());
  if (threadIdx.x == kThreads / 2) store(floats(), 2.f);
}

// Adjacent bytes of one word are written by different threads.
__global__ void bytes_apart() {
  unsigned char* s = simt::shared_memory();
  store(s + threadIdx.x, (unsigned char)(threadIdx.x));
  load(s + threadIdx.x);
  __syncthreads();
  load(s + (threadIdx.x + 1) % kThreads);
}

__global__ void peer_race() {
  store(floats() + threadIdx.x, 1.f);
  __syncthreads();
  if (simt::cluster_rank() == 0) load(simt::in_peer(floats() + threadIdx.x, 1));
  simt::sync_cluster();
}

__global__ void half_warp_shuffle() {
  if (threadIdx.x % 32 < 16) __shfl_xor_sync(~0u, 1.f, 1);
}

__global__ void half_warp_never_arrives() {
  if (threadIdx.x % 32 < 16) __shfl_xor_sync(~0u, 1.f, 1);
  __syncthreads();
}

__global__ void exited_lane() {
  if (threadIdx.x == 5) return;
  if (threadIdx.x % 32 > 7) __syncwarp();
  __syncwarp(~0u);
}

__global__ void wrong_mask() { __shfl_xor_sync(0xffffu, 1.f, 1); }
__global__ void wrong_source() {
  if (threadIdx.x < 16) __shfl_sync(0xffffu, 1.f, 20);
}
__global__ void missing_source() { __shfl_xor_sync(~0u, 1.f, 1); }
__global__ void mixed_operations() {
  if (threadIdx.x % 2) {
    __syncwarp();
  } else {
    __ballot_sync(~0u, 1);
  }
}
__global__ void overlapping_masks() { __syncwarp(threadIdx.x % 32 < 16 ? 0x1ffffu : 0xffff8000u); }

enum class Copy { kUnwaited, kOtherGroup, kNoBarrier, kOverwrite, kStore, kTwice, kSource, kLeft, kOffLine, kOff8 };

template <Copy kFault>
__global__ void careless_copy() {
  alignas(16) static unsigned char source[32] = {};
  unsigned char* const mine = simt::shared_memory() + threadIdx.x * 16;
  if (kFault == Copy::kOverwrite) {
    store(mine, (unsigned char)(1));
    __syncthreads();
    load(simt::shared_memory() + (threadIdx.x + 37) % kThreads * 16);
  }
  if (kFault == Copy::kOff8) simt::async_copy(mine, source + 4, true, 8);
  simt::async_copy(mine, source + (kFault == Copy::kOffLine ? 8 : 0), true);
  if (kFault != Copy::kUnwaited) simt::async_commit();
  if (kFault == Copy::kStore) store(mine + 5, (unsigned char)(1));
  if (kFault == Copy::kTwice) simt::async_copy(mine, source, true);
  if (kFault == Copy::kSource) ++source[threadIdx.x % 16];
  if (kFault == Copy::kLeft) return;
  simt::async_wait(kFault == Copy::kOtherGroup ? 1 : 0);
  if (kFault != Copy::kNoBarrier) __syncthreads();
  load(simt::shared_memory() + (threadIdx.x + 37) % kThreads * 16);
}

__global__ void mixed_work() {
  int in = 0, out;
  simt::warp_work(
      threadIdx.x % 2 ? [](const void* const*, void* const*) {} : [](const void* const*, void* const*) {}, in, out);
}
__global__ void work_of_a_part() {
  int in = 0, out;
  simt::warp_work([](const void* const*, void* const*) {}, in, out);
}

__global__ void read_at(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 1]; }
void past_global() {
  std::vector<float> x(kThreads), y(kThreads);
  run({}, read_at, x.data(), y.data());
}

__global__ void past_shared(bool report) {
  float* s = floats() + threadIdx.x + 1;
  if (report) simt::shared_write(s, sizeof(float));
  *s = 1.f;
}

__global__ void unwritten() {
  if (threadIdx.x != 7) store(floats() + threadIdx.x, 1.f);
  __syncthreads();
  load(floats() + threadIdx.x / 8);
}

// Shared memory that another block wrote is not valid in this block.
__global__ void stale() {
  if (blockIdx.x == 0) store(floats() + threadIdx.x, 1.f);
  __syncthreads();
  load(floats() + threadIdx.x);
}

__global__ void barriers_apart() {
  if (simt::cluster_rank() == 1 && threadIdx.x < 100) {
    __syncthreads();
  } else {
    simt::sync_cluster();
  }
}

__global__ void peer_exits() {
  store(floats() + threadIdx.x, 1.f);
  simt::sync_cluster();
  if (simt::cluster_rank() == 1) return;
  __syncthreads();
  load(simt::in_peer(floats(), 1));
}

__global__ void peer_exits_late() {
  store(floats() + threadIdx.x, 1.f);
  float* peer = simt::in_peer(floats(), 1);
  simt::sync_cluster();
  if (simt::cluster_rank() == 1) return;
  for (int i = 0; i < 3; ++i) __syncthreads();
  load(peer);
}

__global__ void rank_out_of_range() { simt::in_peer(floats(), 2); }
__global__ void not_shared(float* x) { simt::in_peer(x, 1); }
__global__ void odd_width() { simt::count_read(12, 12); }

__global__ void barriers(int rounds) {
  for (int i = 0; i < rounds; ++i) __syncwarp();
}

void benchmark() {
  constexpr int kRounds = 20000, kBlocks = 20000;
  const auto seconds = [](unsigned grid, unsigned block, int rounds) {
    const auto start = std::chrono::steady_clock::now();
    run({grid, block, 0}, barriers, rounds);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  for (unsigned block : {32u, 256u, 1024u}) {
    std::printf("%4u threads: %.1f ns a switch, %.1f ns a thread started\n", block,
                seconds(1, block, kRounds) * 1e9 / block / kRounds, seconds(kBlocks, block, 0) * 1e9 / block / kBlocks);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Launch pair{2, kThreads, kThreads * sizeof(float), 2}, copies{1, kThreads, kThreads * 16},
      bulk{1, kThreads, kBulkShared};
  const std::map<std::string, void (*)()> simple = {
      {"block_reduction", block_reduction},
      {"cluster_exchange", cluster_exchange},
      {"two_dimensions", two_dimensions},
      {"atomics", atomics},
      {"early_exit", early_exit},
      {"warp_operations", warp_operations},
      {"asynchronous_copies", asynchronous_copies},
      {"bulk_copies", bulk_copies},
      {"bulk_past_global", bulk_past_global},
      {"matrix_fragments", matrix_fragments},
      {"os_threads", os_threads},
      {"with_barrier", with_barrier},
      {"syncwarp_orders", syncwarp_orders},
      {"traffic", traffic},
      {"limits", limits},
      {"benchmark", benchmark},
      {"missing_barrier", missing_barrier},
      {"unseen_missing_barrier", unseen_missing_barrier},
      {"shuffle_does_not_order", shuffle_does_not_order},
      {"past_global", past_global},
  };
  struct Kernel {
    Launch launch;
    void (*kernel)();
  };
  const std::map<std::string, Kernel> kernels = {
      {"bytes_apart", {{}, bytes_apart}},
      {"overwrite", {{}, overwrite}},
      {"peer_race", {pair, peer_race}},
      {"half_warp_shuffle", {{}, half_warp_shuffle}},
      {"half_warp_never_arrives", {{}, half_warp_never_arrives}},
      {"exited_lane", {{}, exited_lane}},
      {"wrong_mask", {{}, wrong_mask}},
      {"wrong_source", {{}, wrong_source}},
      {"missing_source", {{1, 33}, missing_source}},
      {"mixed_operations", {{}, mixed_operations}},
      {"overlapping_masks", {{}, overlapping_masks}},
      {"unwritten", {{}, unwritten}},
      {"stale", {{2}, stale}},
      {"barriers_apart", {pair, barriers_apart}},
      {"peer_exits", {pair, peer_exits}},
      {"peer_exits_late", {pair, peer_exits_late}},
      {"rank_out_of_range", {pair, rank_out_of_range}},
      {"odd_width", {{}, odd_width}},
      {"copy_not_waited_for", {copies, careless_copy<Copy::kUnwaited>}},
      {"copy_of_another_group", {copies, careless_copy<Copy::kOtherGroup>}},
      {"copy_without_barrier", {copies, careless_copy<Copy::kNoBarrier>}},
      {"copy_over_what_is_read", {copies, careless_copy<Copy::kOverwrite>}},
      {"copy_stored_over", {copies, careless_copy<Copy::kStore>}},
      {"copy_over_a_copy", {copies, careless_copy<Copy::kTwice>}},
      {"copy_of_what_changes", {copies, careless_copy<Copy::kSource>}},
      {"copy_left_behind", {copies, careless_copy<Copy::kLeft>}},
      {"copy_off_a_line", {copies, careless_copy<Copy::kOffLine>}},
      {"copy_off_8_bytes", {copies, careless_copy<Copy::kOff8>}},
      {"bulk_not_waited_for", {bulk, careless_bulk_copy<Bulk::kUnwaited>}},
      {"bulk_too_few_bytes", {bulk, careless_bulk_copy<Bulk::kTooFew>}},
      {"bulk_too_many_bytes", {bulk, careless_bulk_copy<Bulk::kTooMany>}},
      {"bulk_nobody_arrives", {bulk, careless_bulk_copy<Bulk::kNobodyArrives>}},
      {"bulk_wrong_parity", {bulk, careless_bulk_copy<Bulk::kParity>}},
      {"bulk_parity_before_all", {bulk, careless_bulk_copy<Bulk::kParityBefore>}},
      {"bulk_arrives_twice", {bulk, careless_bulk_copy<Bulk::kAgain>}},
      {"bulk_arrives_again", {bulk, careless_bulk_copy<Bulk::kAgainUnwaited>}},
      {"bulk_off_a_line", {bulk, careless_bulk_copy<Bulk::kOffLine>}},
      {"bulk_source_off_a_line", {bulk, careless_bulk_copy<Bulk::kSourceOffLine>}},
      {"bulk_odd_size", {bulk, careless_bulk_copy<Bulk::kSize>}},
      {"bulk_no_mbarrier", {bulk, careless_bulk_copy<Bulk::kNoInit>}},
      {"bulk_mbarrier_twice", {bulk, careless_bulk_copy<Bulk::kInitTwice>}},
      {"bulk_mbarrier_not_fenced", {bulk, careless_bulk_copy<Bulk::kInitUnfenced>}},
      {"bulk_mbarrier_not_shared", {bulk, careless_bulk_copy<Bulk::kInitNoBarrier>}},
      {"bulk_mbarrier_stored_over", {bulk, careless_bulk_copy<Bulk::kOverBarrier>}},
      {"bulk_over_unfenced", {bulk, careless_bulk_copy<Bulk::kUnfenced>}},
      {"bulk_fenced_early", {bulk, careless_bulk_copy<Bulk::kFencedEarly>}},
      {"bulk_outside", {bulk, careless_bulk_copy<Bulk::kOutside>}},
      {"bulk_over_a_copy", {bulk, careless_bulk_copy<Bulk::kOverlap>}},
      {"bulk_over_what_is_read", {bulk, careless_bulk_copy<Bulk::kOverRead>}},
      {"bulk_stored_over", {bulk, careless_bulk_copy<Bulk::kStore>}},
      {"bulk_of_what_changes", {bulk, careless_bulk_copy<Bulk::kSource>}},
      {"bulk_left_behind", {bulk, careless_bulk_copy<Bulk::kLeft>}},
      {"bulk_others_wait", {bulk, careless_bulk_copy<Bulk::kOthersWait>}},
      {"mixed_work", {{}, mixed_work}},
      {"work_of_a_part", {{1, 33}, work_of_a_part}},
  };
  const std::string name = argc > 1 ? argv[1] : "";
  simt_configure(argc > 3 ? std::atoi(argv[3]) : 90, argc > 2 ? unsigned(std::atoi(argv[2])) : 0);
  try {
    float x = 0;
    if (simple.count(name)) {
      simple.at(name)();
    } else if (kernels.count(name)) {
      run(kernels.at(name).launch, kernels.at(name).kernel);
    } else if (name == "past_shared" || name == "unseen_past_shared") {
      run({}, past_shared, name == "past_shared");
    } else if (name == "not_shared") {
      run(pair, not_shared, &x);
    } else {
      std::printf("no case '%s'\n", name.c_str());
      return 2;
    }
  } catch (const std::runtime_error& fault) {
    std::printf("%s\n", fault.what());
    block_reduction();  // the emulator must still work after a fault
    return 3;
  } catch (const std::logic_error& wrong) {
    std::printf("wrong: %s\n", wrong.what());
    return 1;
  }
  return 0;
}
