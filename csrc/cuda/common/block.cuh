// Reductions over the threads that share a row. The order of additions is fixed: the same input gives the same bits.
// This is the only file with warp shuffles.
#pragma once
#include "device.cuh"

namespace fastkd::cuda {

inline constexpr int kWarp = 32;

// The value held by the lane whose number differs by `lane_mask`. T is any trivially copyable type.
template <class T>
__device__ __forceinline__ T shuffle_xor(const T& value, int lane_mask) {
#ifdef FASTKD_SIMT
  return __shfl_xor_sync(~0u, value, lane_mask);
#else
  static_assert(sizeof(T) % 4 == 0);
  unsigned words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (unsigned& word : words) word = __shfl_xor_sync(~0u, word, lane_mask);
  T out;
  memcpy(&out, words, sizeof(T));
  return out;
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

// Reduces over groups of `lanes` lanes, a power of two. merge(all, next) must be associative up to rounding and accept
// its arguments in either order.
template <class T, class Merge>
__device__ __forceinline__ T lanes_reduce(T value, const Merge& merge, int lanes) {
  // Unrolled only for small states, since a step of a large one is much code.
#pragma unroll(sizeof(T) <= 8 ? 5 : 1)
  for (int step = lanes / 2; step > 0; step /= 2) {
    const T other = shuffle_xor(value, step);
    // Both lanes merge in the same order, the lower lane's value first, so that both get the same result.
    const bool lower = (threadIdx.x & step) == 0;
    T all = chosen(lower, value, other);
    merge(all, chosen(lower, other, value));
    value = all;
  }
  return value;
}
template <class T, class Merge>
__device__ __forceinline__ T warp_reduce(const T& value, const Merge& merge) {
  return lanes_reduce(value, merge, kWarp);
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

  // The sum over the block's part of the team, valid in all of its threads or only in the leading one. Contains
  // barriers.
  template <class T, class Merge>
  __device__ __forceinline__ T block_sum(T value, const Merge& merge, bool everywhere = false) const {
    value = warp_reduce(value, merge);
    static_assert(sizeof(T) <= kSlotBytes);
    if (warp) return value;
    const auto slot = [&](int i) { return reinterpret_cast<T*>(slots + i * kSlotBytes); };
    __syncthreads();  // the slots may still be read by the previous reduction
    if (threadIdx.x % kWarp == 0) shared_store(slot(threadIdx.x / kWarp), value);
    __syncthreads();
    if (everywhere || leads()) {
      value = shared_load(slot(0));
#pragma unroll 1
      for (int w = 1; w < threads / kWarp; ++w) merge(value, shared_load(slot(w)));
    }
    return value;
  }

  // The sum over the leading threads of the cluster's blocks, valid in those threads. Contains a barrier of the
  // cluster. align(value, most) converts a block's value before the sum; most(x) is the largest x of all blocks.
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
      value = lanes_reduce(value, merge, int(blocks));
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

  // To be called by all threads when the copies of a row to shared memory begin, where they are waited for at barriers
  // (bulk_copy.cuh). Whether they are the first ones. Then the parity of the barriers' phases.
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
