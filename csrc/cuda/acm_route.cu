// _acm_route on CUDA: a stable counting sort of the choices in decreasing order, by one block. Each warp sorts a
// contiguous range of the rows and reads it twice: once to count, once to place the rows; the second read comes from
// the L2. Between the two passes every counter is replaced by the place of its warp's first row with that choice.
//
// Bin 0 holds choice N, bin N choice 0, and bin N + 1 choices out of range: rows are ordered by increasing bin.
// counts[n], the number of rows with a valid choice above n, is where bin N - n begins; counts[N] is where bin N + 1
// begins.
#include "../arguments/gated_routing_entry.h"
#include "common/block.cuh"
#include "common/launch.h"
#include "common/policy.cuh"

namespace fastkd::cuda {
namespace {

template <class T>
struct RouteArguments {
  const T* choices;
  int *order, *counts;
  int64_t rows;
  int learners;
};

// A mask of the lanes whose `value`, a number of `bits` bits, equals this lane's.
__device__ __forceinline__ unsigned lanes_with(unsigned value, int bits) {
  unsigned same = ~0u;
#pragma unroll 1
  for (int bit = 0; bit < bits; ++bit) {
    const bool set = value >> bit & 1;
    const unsigned those = __ballot_sync(~0u, set);
    same &= set ? those : ~those;
  }
  return same;
}

// Calls body(row, bin, rank, peers) for the rows of this warp's range, 32 at a time. Of these 32, `peers` rows have the
// same bin, and the row is number `rank` of them. Lanes beyond the end have row -1 and a bin of their own.
template <class T, class Body>
__device__ __forceinline__ void for_stretch(const RouteArguments<T>& a, const Body& body) {
  constexpr int kAhead = 4;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp, warps = int(blockDim.x) / kWarp;
  const int64_t steps = (a.rows + kWarp - 1) / kWarp;
  const int64_t first = steps * warp / warps, last = steps * (warp + 1) / warps;
  int bits = 0;
  while ((a.learners + 2) >> bits != 0) ++bits;
  for (int64_t step = first; step < last; step += kAhead) {
    T choices[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t row = (step + i) * kWarp + lane;
      choices[i] = step + i < last && row < a.rows ? global_load(a.choices + row) : T(-1);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (step + i >= last) break;
      const int64_t row = (step + i) * kWarp + lane;
      const bool valid = choices[i] >= 0 && choices[i] <= a.learners;
      const int bin = row >= a.rows ? a.learners + 2 : valid ? a.learners - int(choices[i]) : a.learners + 1;
      const unsigned same = lanes_with(unsigned(bin), bits);
      body(row < a.rows ? row : -1, bin, __builtin_popcount(same & ((1u << lane) - 1)), __builtin_popcount(same));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kRouteThreads, 1) acm_route_kernel(const RouteArguments<T> a) {
  const int bins = a.learners + 2, threads = int(blockDim.x), warps = threads / kWarp, warp = int(threadIdx.x) / kWarp;
  int* const counters = reinterpret_cast<int*>(shared_memory());  // [warps][bins]
  int* const mine = counters + warp * bins;
  int* const totals = counters + warps * bins;  // for 32 ranges of bins
  for (int i = int(threadIdx.x); i < warps * bins; i += threads) shared_store(counters + i, 0);
  __syncthreads();
  for_stretch(a, [&](int64_t row, int bin, int rank, int peers) {
    if (row >= 0 && rank == 0) shared_store(mine + bin, shared_load(mine + bin) + peers);
    __syncwarp();
  });
  __syncthreads();

  // Done by one warp: each lane has a range of the bins.
  const int stretch = (bins + kWarp - 1) / kWarp, lane = int(threadIdx.x);
  const int begin = lane * stretch, end = begin + stretch < bins ? begin + stretch : bins;
  if (lane < kWarp) {
    int total = 0;
    for (int bin = begin; bin < end; ++bin) {
      for (int w = 0; w < warps; ++w) total += shared_load(counters + w * bins + bin);
    }
    shared_store(totals + lane, total);
    __syncwarp();
    int place = 0;
    for (int i = 0; i < lane; ++i) place += shared_load(totals + i);
    for (int bin = begin; bin < end; ++bin) {
      if (bin > 0) global_store(a.counts + (bin <= a.learners ? a.learners - bin : a.learners), place);
      for (int w = 0; w < warps; ++w) {
        int* const counter = counters + w * bins + bin;
        const int count = shared_load(counter);
        shared_store(counter, place);
        place += count;
      }
    }
  }
  __syncthreads();

  for_stretch(a, [&](int64_t row, int bin, int rank, int peers) {
    const int place = row >= 0 ? shared_load(mine + bin) : 0;
    if (row >= 0) global_store(a.order + place + rank, int(row));
    __syncwarp();
    if (row >= 0 && rank == 0) shared_store(mine + bin, place + peers);
    __syncwarp();
  });
}

template <class T>
void route(const Device& device, const AcmRouteCall& call) {
  const RouteArguments<T> a{static_cast<const T*>(call.choices.data_ptr()), static_cast<int*>(call.order.data_ptr()),
                            static_cast<int*>(call.counts.data_ptr()), call.choices.numel(), int(call.learners)};
  const int64_t bins = call.learners + 2;
  const int threads = route_threads(a.rows, bins);
  device.launch({"route", "one block sorts; its warps have counters of their own"}, acm_route_kernel<T>, 1, threads,
                (threads / kWarp * bins + kWarp) * 4, 1, a);
}

}  // namespace

void solve_route(const AcmRouteCall& call) {
  const Device device(call.choices, kAcm);
  if (call.choices.scalar_type() == ScalarType::Long) return route<int64_t>(device, call);
  route<int>(device, call);
}

}  // namespace fastkd::cuda
