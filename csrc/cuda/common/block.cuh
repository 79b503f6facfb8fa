// Reductions over the threads that share a row. The order of additions is fixed: the same input gives the same bits.
// This is the only file with warp shuffles.
#pragma once
#include "device.cuh"
#include "policy.cuh"

namespace fastkd::cuda {

inline constexpr int kWarp = 32;

// The place of the highest bit of a positive number: the logarithm of a power of two.
__device__ __forceinline__ int highest_bit(int x) { return 31 - FASTKD_TWIN(__clz(x), __builtin_clz(unsigned(x))); }
// The first step of a reduction over so many values: the largest power of two below it.
__device__ __forceinline__ int largest_step(int count) { return count > 1 ? 1 << highest_bit(count - 1) : 0; }

// f(word) for each word of a trivially copyable value.
template <class T, class Function>
__device__ __forceinline__ T each_word(const T& value, const Function& f) {
  static_assert(sizeof(T) % 4 == 0);
  unsigned words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (unsigned& word : words) word = f(word);
  T out;
  memcpy(&out, words, sizeof(T));
  return out;
}

// The value held by the lane whose number differs by `lane_mask`. T is any trivially copyable type.
template <class T>
__device__ __forceinline__ T shuffle_xor(const T& value, int lane_mask) {
#ifdef FASTKD_SIMT
  return __shfl_xor_sync(~0u, value, lane_mask);
#else
  return each_word(value, [&](unsigned word) { return __shfl_xor_sync(~0u, word, lane_mask); });
#endif
}
__device__ __forceinline__ double shuffle_xor(double value, int lane_mask) {
  return __shfl_xor_sync(~0u, value, lane_mask);
}
// A lane's value.
template <class T>
__device__ __forceinline__ T shuffle_from(const T& value, int lane) {
#ifdef FASTKD_SIMT
  return __shfl_sync(~0u, value, lane);
#else
  return each_word(value, [&](unsigned word) { return __shfl_sync(~0u, word, lane); });
#endif
}

// One of two values, word by word: choosing between their addresses would put both into local memory.
template <class T>
__device__ __forceinline__ T chosen(bool first, const T& a, const T& b) {
#ifdef FASTKD_SIMT
  return first ? a : b;
#else
  unsigned words[sizeof(T) / 4], others[sizeof(T) / 4];
  memcpy(words, &a, sizeof(T));
  memcpy(others, &b, sizeof(T));
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 4); ++i) words[i] = first ? words[i] : others[i];
  T out;
  memcpy(&out, words, sizeof(T));
  return out;
#endif
}

__device__ __forceinline__ double chosen(bool first, double a, double b) { return first ? a : b; }

// Reduces over groups of `lanes` lanes, a power of two. merge(all, next) must be associative up to rounding.
// kEverywhere: valid in all of a group's lanes, which get the same bits; else in its first lane.
template <bool kEverywhere, class T, class Merge>
__device__ __forceinline__ T lanes_reduce(T value, const Merge& merge, int lanes) {
  // Unrolled only for small states, since a step of a large one is much code.
#pragma unroll(sizeof(T) <= 32 ? 5 : 1)
  for (int step = lanes / 2; step > 0; step /= 2) {
    const T other = shuffle_xor(value, step);
    if constexpr (kEverywhere) {
      // Both lanes merge in the same order, the lower lane's value first.
      const bool lower = (threadIdx.x & step) == 0;
      T all = chosen(lower, value, other);
      merge(all, chosen(lower, other, value));
      value = all;
    } else {
      merge(value, other);
    }
  }
  return value;
}
template <bool kEverywhere, class T, class Merge>
__device__ __forceinline__ T warp_reduce(const T& value, const Merge& merge) {
  return lanes_reduce<kEverywhere>(value, merge, kWarp);
}

// Sums of up to four numbers over the lanes of a warp, in fewer shuffles than one number after another takes: lanes
// that differ by a half of the warp exchange the numbers that the other one goes on with.
template <int kCount>
struct LaneSums {
  static_assert(1 <= kCount && kCount <= 4);
  static constexpr int kShare = kCount == 1 ? kWarp : kCount == 2 ? kWarp / 2 : kWarp / 4;  // lanes of one number
  double each[kCount];

  // To be called by all lanes; all of them get the sums.
  __device__ __forceinline__ LaneSums over_lanes() const {
    if constexpr (kCount == 1) return spread(each[0], kWarp);
    const bool upper = (threadIdx.x & 16) != 0;
    if constexpr (kCount == 2) return spread(exchanged(upper, each[0], each[1], 16), 16);
    const double first = exchanged(upper, each[0], each[2], 16), second = exchanged(upper, each[1], number(3), 16);
    return spread(exchanged((threadIdx.x & 8) != 0, first, second, 8), 8);
  }
  // The same where lane and lane + kMostBlocks have the same numbers, which count once.
  __device__ __forceinline__ LaneSums over_half() const {
    static_assert(2 * kMostBlocks == kWarp);
    if constexpr (kCount == 1) return spread(each[0], kMostBlocks);
    const bool upper = (threadIdx.x & 16) != 0;
    if constexpr (kCount == 2) return spread(chosen(upper, each[1], each[0]), 16);
    const double first = chosen(upper, each[2], each[0]), second = chosen(upper, number(3), each[1]);
    return spread(exchanged((threadIdx.x & 8) != 0, first, second, 8), 8);
  }
  // The same where a lane has one number's part: number lane / kShare.
  static __device__ __forceinline__ LaneSums of_parts(double part) { return spread(part, kShare); }

 private:
  __device__ __forceinline__ double number(int i) const { return i < kCount ? each[i] : 0; }
  // A number of this lane and its partner: the second of both in the lane where `second` is true.
  static __device__ __forceinline__ double exchanged(bool second, double a, double b, int lane_mask) {
    return chosen(second, b, a) + shuffle_xor(chosen(second, a, b), lane_mask);
  }
  // Adds over `lanes` lanes; then every lane takes all numbers.
  static __device__ __forceinline__ LaneSums spread(double part, int lanes) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      if (step < lanes) part += shuffle_xor(part, step);
    }
    LaneSums all;
#pragma unroll
    for (int i = 0; i < kCount; ++i) all.each[i] = shuffle_from(part, i * kShare);
    return all;
  }
};

// The threads that work on one row: a warp (the block's other warps work on other rows), a block, or the blocks of a
// cluster. A block's part of the team is all of these threads that are in one block.
struct Team {
  int thread, threads;    // within the block's part of the team
  unsigned rank, blocks;  // of the cluster: this block's rank, and how many blocks
  bool warp;              // the team is one warp
  static constexpr int kMaxWarps = 32;
  static constexpr int kSlotBytes = 64;
  static constexpr int kSharedBytes = (kMaxWarps + 2) * kSlotBytes;
  unsigned char* slots;  // kSharedBytes, aligned to 16; unused if the team is a warp

  __device__ __forceinline__ Team(unsigned char* shared, unsigned cluster_blocks, bool warp_team = false)
      : thread(warp_team ? threadIdx.x % kWarp : threadIdx.x),
        threads(warp_team ? kWarp : blockDim.x),
        rank(cluster_blocks > 1 ? cluster_rank() : 0),
        blocks(cluster_blocks),
        warp(warp_team),
        slots(shared) {}

  __device__ __forceinline__ bool leads() const { return thread == 0; }

  // A barrier for the block's part of the team.
  __device__ __forceinline__ void sync() const {
    if (warp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // The sum over the block's part of the team, valid in its leading thread or in all of its threads. Contains barriers.
  template <bool kEverywhere = false, class T, class Merge>
  __device__ __forceinline__ T block_sum(T value, const Merge& merge) const {
    static_assert(sizeof(T) <= kSlotBytes);
    if (warp) return warp_reduce<kEverywhere>(value, merge);
    value = warp_reduce<false>(value, merge);
    const int lane = threadIdx.x % kWarp, warps = threads / kWarp;
    const auto slot = [&](int i) { return reinterpret_cast<T*>(slots + i * kSlotBytes); };
    __syncthreads();  // the slots may still be read by the previous reduction
    if (lane == 0) shared_store(slot(threadIdx.x / kWarp), value);
    __syncthreads();
    if (!kEverywhere && threadIdx.x >= kWarp) return value;
    // Each lane reads one warp's value.
    value = shared_load(slot(lane < warps ? lane : 0));
#pragma unroll 1
    for (int step = largest_step(warps); step > 0; step /= 2) {
      const T other = shuffle_xor(value, step);
      if (lane + step < warps) merge(value, other);
    }
    if constexpr (kEverywhere) value = shuffle_from(value, 0);
    return value;
  }

  // Sums over the block's part of the team, valid in its first warp. Contains barriers.
  template <int kCount>
  __device__ __forceinline__ LaneSums<kCount> block_sum(const LaneSums<kCount>& mine) const {
    const LaneSums<kCount> sums = mine.over_lanes();
    if (warp) return sums;
    constexpr int kShare = LaneSums<kCount>::kShare;
    double* const parts = reinterpret_cast<double*>(slots);  // [number][warp]
    static_assert(4 * kMaxWarps * sizeof(double) <= kMaxWarps * kSlotBytes);
    __syncthreads();  // the slots may still be read by the previous reduction
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) shared_store(parts + i * kMaxWarps + threadIdx.x / kWarp, sums.each[i]);
    }
    __syncthreads();
    if (threadIdx.x >= kWarp) return sums;
    const int number = threadIdx.x / kShare, warps = threads / kWarp;
    double part = 0;
#pragma unroll 1
    for (int i = threadIdx.x % kShare; i < warps && number < kCount; i += kShare) {
      part += shared_load(parts + number * kMaxWarps + i);
    }
    return LaneSums<kCount>::of_parts(part);
  }

  // In the block's first warp: the value of block lane % kMostBlocks of a cluster, `none` where there is no such block.
  // value: of the leading thread. Contains a barrier of the cluster; to be called by all threads.
  template <class T>
  __device__ __forceinline__ T each_block(const T& value, const T& none) const {
    static_assert(sizeof(T) <= kSlotBytes);
    // Two slots in turn: when a block writes one again, all have passed the barrier after they read it.
    T* const mine = reinterpret_cast<T*>(slots + (kMaxWarps + turn_) * kSlotBytes);
    turn_ ^= 1;
    if (thread == 0) shared_store(mine, value);
    cluster_sync();
    const unsigned block = threadIdx.x % kMostBlocks;
    T of_block = none;
    if (threadIdx.x < kWarp && block < blocks) of_block = shared_load(in_peer(mine, block));
    return of_block;
  }

  // Sums over the team, valid in each block's first warp.
  template <int kCount>
  __device__ __forceinline__ LaneSums<kCount> sum(const LaneSums<kCount>& mine) const {
    const LaneSums<kCount> block = block_sum(mine);
    if (blocks == 1) return block;
    const LaneSums<kCount> one = each_block(block, LaneSums<kCount>{});
    if (threadIdx.x >= kWarp) return one;
    return one.over_half();
  }

  // The sum over the leading threads of the cluster's blocks, valid in those threads. Contains a barrier of the
  // cluster. align(value, most) converts a block's value before the sum; most(x) is the largest x of all blocks. All
  // lanes of the block's first warp call it, each with a block's value: lane + blocks with the same one as lane.
  template <class T, class Align, class Merge>
  __device__ T cluster_sum(T value, const Align& align, const Merge& merge) const {
    static_assert(sizeof(T) <= kSlotBytes);
    if (blocks == 1) return value;
    // Two slots in turn: when a block writes one again, all have passed the barrier after they read it.
    T* const mine = reinterpret_cast<T*>(slots + (kMaxWarps + turn_) * kSlotBytes);
    turn_ ^= 1;
    if (thread == 0) shared_store(mine, value);
    cluster_sync();
    if (threadIdx.x < kWarp) {
      // Each lane reads one block's value. Lanes whose numbers differ by a multiple of `blocks` do the same.
      value = shared_load(in_peer(mine, threadIdx.x & (blocks - 1)));
      align(value, [&](auto x) {
#pragma unroll 1
        for (unsigned step = 1; step < blocks; step *= 2) x = at_least(shuffle_xor(x, int(step)), x);
        return x;
      });
      value = lanes_reduce<false>(value, merge, int(blocks));
    }
    return value;
  }
  template <class T, class Merge>
  __device__ T cluster_sum(const T& value, const Merge& merge) const {
    return cluster_sum(value, [](T&, const auto&) {}, merge);
  }

  // To be called before the team's last thread exits: another block may still be reading this one's slots.
  __device__ __forceinline__ void leave() const {
    if (blocks > 1) cluster_sync();
  }

  template <class T, class Merge>
  __device__ T sum(const T& value, const Merge& merge) const {
    return cluster_sum(block_sum(value, merge), merge);
  }

  // All threads call this when a row's bulk copies begin (bulk_copy.cuh). It moves on to the barriers' next phase,
  // whose parity is copies_parity(). Returns whether that is the first one: the barriers are then to be made.
  __device__ __forceinline__ bool begin_copies() const {
    const bool first = copies_ == 0;
    copies_ = first ? 2 : copies_ ^ 1;
    return first;
  }
  __device__ __forceinline__ unsigned copies_parity() const { return copies_ & 1; }

 private:
  mutable unsigned turn_ = 0;
  mutable unsigned copies_ = 0;  // 2 + parity
};

}  // namespace fastkd::cuda
