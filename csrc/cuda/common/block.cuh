// Reductions over the threads that share a row. The order of additions is fixed: the same input gives the same bits.
// This is the only file with warp shuffles.
#pragma once
#include "device.cuh"

namespace fastkd::cuda {

inline constexpr int kWarp = 32;

// The first step of a reduction over so many values: the largest power of two below it.
__device__ __forceinline__ int largest_step(int count) {
  return count > 1 ? 1 << (31 - FASTKD_TWIN(__clz(count - 1), __builtin_clz(count - 1))) : 0;
}

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
// The first lane's value.
template <class T>
__device__ __forceinline__ T shuffle_from_first(const T& value) {
#ifdef FASTKD_SIMT
  return __shfl_sync(~0u, value, 0);
#else
  return each_word(value, [&](unsigned word) { return __shfl_sync(~0u, word, 0); });
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
    if constexpr (kEverywhere) value = shuffle_from_first(value);
    return value;
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

 private:
  mutable unsigned turn_ = 0;
};

}  // namespace fastkd::cuda
