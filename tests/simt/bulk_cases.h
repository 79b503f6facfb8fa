// Kernels with bulk copies: correct ones, and one for each fault that the emulator must report.
#pragma once

#include "../../csrc/cuda/common/bulk_copy.cuh"
#include "correct.h"

namespace {

using fastkd::cuda::bulk_copy;
using fastkd::cuda::CopyBarrier;
using fastkd::cuda::expect_bytes;
using fastkd::cuda::fence_before_copies;
using fastkd::cuda::init_barriers;
using fastkd::cuda::wait_for_copies;

constexpr int kBulkGroups = 2, kBulkBytes = kThreads * 16;  // of a group
constexpr size_t kBulkShared = 16 + kBulkGroups * kBulkBytes;

CopyBarrier* bulk_barriers() { return reinterpret_cast<CopyBarrier*>(simt::shared_memory()); }
unsigned char* bulk_slots() { return simt::shared_memory() + 16; }
uint4* bulk_slot(int group) { return reinterpret_cast<uint4*>(bulk_slots()) + group * kThreads + threadIdx.x; }

// Adds up rows of 32-bit numbers, each copied in two groups, as packed_source.cuh does. Odd rows are not read. A row's
// first pack is stored by a thread, not copied.
__global__ void copy_rows_in_bulk(const uint4* x, unsigned* sums, int rows) {
  const bool leads = threadIdx.x == 0;
  if (leads) init_barriers(bulk_barriers(), kBulkGroups);
  __syncthreads();
  unsigned parity = 0;
  for (int row = 0; row < rows; ++row) {
    unsigned sum = 0;
    if (row % 2 == 0) {
      const uint4* const from = x + row * kBulkGroups * kThreads;
      if (leads) {
        for (int group = 0; group < kBulkGroups; ++group) {
          const int first = group == 0 ? 1 : 0;
          const unsigned bytes = unsigned(kThreads - first) * 16;
          expect_bytes(bulk_barriers() + group, bytes);
          bulk_copy(bulk_slot(group) + first, from + group * kThreads + first, bytes, bulk_barriers() + group);
        }
        store(bulk_slot(0), from[0]);
        expect(bulk_slot(1)->x == ~0u, "data of a bulk copy are there early");
      }
      for (int group = 0; group < kBulkGroups; ++group) {
        wait_for_copies(bulk_barriers() + group, parity);
        sum += load(bulk_slot(group)).x;
      }
      parity ^= 1;
    }
    sums[row * kThreads + threadIdx.x] = sum;
    fence_before_copies();
    __syncthreads();
  }
}

// One thread waits; a barrier lets the others read. Other phases have nothing to wait for.
__global__ void wait_for_all(const uint4* x, unsigned* sums) {
  const int last = kThreads - 1;
  if (threadIdx.x == 0) {
    init_barriers(bulk_barriers(), 1);
    for (int i = 0; i < 3; ++i) expect_bytes(bulk_barriers(), 0);
    expect_bytes(bulk_barriers(), kBulkBytes);
    bulk_copy(bulk_slots(), x, kBulkBytes / 2, bulk_barriers());
  }
  __syncthreads();
  if (int(threadIdx.x) == last) wait_for_copies(bulk_barriers(), 1);
  if (threadIdx.x == 0) bulk_copy(bulk_slots() + kBulkBytes / 2, x, kBulkBytes / 2, bulk_barriers());
  __syncthreads();
  sums[threadIdx.x] = load(bulk_slot(0)).y;
  wait_for_copies(bulk_barriers(), 1);
}

void bulk_copies() {
  constexpr int kRows = 7;
  std::vector<uint4> x(kRows * kBulkGroups * kThreads);
  std::vector<unsigned> sums(kRows * kThreads, 1);
  for (unsigned i = 0; i < x.size(); ++i) x[i] = {i, i + 1, i + 2, i + 3};
  simt_reset();
  run({1, kThreads, kBulkShared}, copy_rows_in_bulk, x.data(), sums.data(), kRows);
  for (unsigned i = 0; i < sums.size(); ++i) {
    const unsigned row = i / kThreads, first = row * kBulkGroups * kThreads + i % kThreads;
    expect(sums[i] == (row % 2 == 0 ? 2 * first + kThreads : 0), "copy_rows_in_bulk");
  }
  SimtTraffic moved;
  simt_traffic(&moved);
  expect(moved.read_16 == 4 * (kBulkGroups * kThreads - 1) * 16, "traffic of bulk copies");
  run({1, kThreads, kBulkShared}, wait_for_all, x.data(), sums.data());
  for (unsigned i = 0; i < kThreads; ++i) expect(sums[i] == i % (kThreads / 2) + 1, "wait_for_all");
}

enum class Bulk {
  kUnwaited,
  kTooFew,
  kTooMany,
  kNobodyArrives,
  kParity,
  kParityBefore,
  kAgain,
  kAgainUnwaited,
  kOffLine,
  kSourceOffLine,
  kSize,
  kNoInit,
  kInitTwice,
  kInitUnfenced,
  kInitNoBarrier,
  kOverBarrier,
  kUnfenced,
  kFencedEarly,
  kOutside,
  kOverlap,
  kOverRead,
  kStore,
  kSource,
  kLeft,
  kOthersWait
};

template <Bulk kFault>
__global__ void careless_bulk_copy() {
  alignas(16) static unsigned char source[kBulkBytes] = {};
  CopyBarrier* const barrier = bulk_barriers();
  unsigned char* const slots = bulk_slots();
  const bool leads = threadIdx.x == 0;
  const auto is = [](Bulk fault) { return kFault == fault; };
  // What the leading thread fences is what it has written itself.
  if (is(Bulk::kFencedEarly)) fence_before_copies();
  if (is(Bulk::kUnfenced) || is(Bulk::kFencedEarly)) store(bulk_slot(0), uint4{1, 2, 3, 4});
  if (is(Bulk::kOverRead)) {
    store(bulk_slot(0), uint4{1, 2, 3, 4});
    fence_before_copies();
  }
  __syncthreads();
  if (leads && is(Bulk::kInitUnfenced)) simt::mbarrier_init(barrier, 1);
  if (leads && !is(Bulk::kInitUnfenced) && !is(Bulk::kNoInit)) init_barriers(barrier, is(Bulk::kInitTwice) ? 1 : 2);
  if (leads && is(Bulk::kInitTwice)) init_barriers(barrier, 1);
  if (!is(Bulk::kInitNoBarrier)) __syncthreads();
  if (is(Bulk::kOverRead)) load(reinterpret_cast<uint4*>(slots) + (threadIdx.x + 37) % kThreads);
  if (is(Bulk::kParityBefore)) wait_for_copies(barrier, 1);
  if (leads && is(Bulk::kOverBarrier)) store(reinterpret_cast<unsigned*>(barrier), 0u);
  if (leads && !is(Bulk::kNobodyArrives)) {
    if (is(Bulk::kParity)) expect_bytes(barrier, 0);
    expect_bytes(barrier, is(Bulk::kTooFew) ? kBulkBytes + 16 : is(Bulk::kTooMany) ? kBulkBytes - 16 : kBulkBytes);
    if (is(Bulk::kAgain)) expect_bytes(barrier, kBulkBytes);
    if (is(Bulk::kOffLine)) bulk_copy(slots + 8, source, kBulkBytes / 2, barrier);
    if (is(Bulk::kSourceOffLine)) bulk_copy(slots, source + 8, kBulkBytes / 2, barrier);
    if (is(Bulk::kSize)) bulk_copy(slots, source, 24, barrier);
    if (is(Bulk::kOutside)) bulk_copy(slots + kBulkBytes + 16, source, kBulkBytes, barrier);
    bulk_copy(slots, source, kBulkBytes, barrier);
    if (is(Bulk::kOverlap)) bulk_copy(slots + 16, source, 16, barrier + 1);
    if (is(Bulk::kSource)) ++source[40];
    if (is(Bulk::kStore)) store(slots + 5, (unsigned char)(1));
    if (is(Bulk::kAgainUnwaited)) expect_bytes(barrier, 0);
  }
  if (is(Bulk::kLeft)) return;
  if (is(Bulk::kParity)) __syncthreads();
  const bool waits = !is(Bulk::kUnwaited) && (!is(Bulk::kOthersWait) || threadIdx.x == 40);
  if (waits) wait_for_copies(barrier, 0);
  load(bulk_slot(0));
}

// Reads 16 bytes past the end of x.
__global__ void bulk_copy_past_global(const uint4* x) {
  if (threadIdx.x > 0) return;
  init_barriers(bulk_barriers(), 1);
  expect_bytes(bulk_barriers(), kBulkBytes);
  bulk_copy(bulk_slots(), x + 1, kBulkBytes, bulk_barriers());
  wait_for_copies(bulk_barriers(), 0);
}
void bulk_past_global() {
  std::vector<uint4> x(kThreads);
  run({1, kThreads, kBulkShared}, bulk_copy_past_global, x.data());
}

}  // namespace
