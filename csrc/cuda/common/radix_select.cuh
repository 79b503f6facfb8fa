// Finds the largest of the keys that a team's threads hold, digit by digit. Each block counts, in shared memory, how
// many keys have each value of the leading 11 bits. The counts show which bin contains the last of the keys wanted;
// only this bin is counted again, by the next 11 bits. The counts are integers, added by atomics, so the order of
// threads has no effect on the result.
//
// Keys are unsigned integers of at most 63 bits. Teams are blocks or clusters.
#pragma once
#include "block.cuh"

namespace fastkd::cuda {

// 32 bits that compare in the order of the numbers. Both zeros have the same bits.
__device__ __forceinline__ unsigned ordered(float x) {
  const unsigned bits = bit_cast<unsigned>(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The inverse of ordered(); -inf for bits below those of every number.
__device__ __forceinline__ float from_ordered(unsigned bits) {
  constexpr unsigned kLeast = 0x007fffffu;  // ordered(-inf)
  const unsigned valid = bits > kLeast ? bits : kLeast;
  return bit_cast<float>(valid & 0x80000000u ? valid & 0x7fffffffu : ~valid);
}

// The keys in [least, least + 2^shift): how many there are (inside), and how many are larger (above).
struct KeyBin {
  uint64_t least;
  int shift;
  unsigned above, inside;

  __device__ __forceinline__ unsigned from_here() const { return above + inside; }
};

// blocks: the number of the team's blocks, or 1 to select among this block's keys only. All threads must make the same
// calls.
struct RadixSelect {
  static constexpr int kDigit = 11, kBins = 1 << kDigit, kGroup = kWarp, kGroups = kBins / kGroup;
  static constexpr int kBinsBytes = kBins * 4;
  static constexpr int kSharedBytes = kBinsBytes + kGroups * 4 + 16;

  // A bin given by its number, while the search narrows down a group of bins.
  struct Place {
    unsigned number, above, inside;
  };

  const Team& team;
  const unsigned blocks;
  unsigned *const bins, *const groups;
  Place* const found;

  // shared: kSharedBytes, aligned to 16. It begins with the bins, which may be used for other data while nothing is
  // counted.
  __device__ __forceinline__ RadixSelect(const Team& t, unsigned char* shared, unsigned count)
      : team(t),
        blocks(count),
        bins(reinterpret_cast<unsigned*>(shared)),
        groups(bins + kBins),
        found(reinterpret_cast<Place*>(groups + kGroups)) {}

  // To be called before counting, with a barrier in between.
  __device__ __forceinline__ void clear() const {
    for (int i = team.thread; i < kBins; i += team.threads) shared_store(bins + i, 0u);
  }
  __device__ __forceinline__ void count(unsigned digit) const { shared_add(bins + digit, 1u); }

  // The bin that contains the `wanted`-th largest key counted (the lowest bin if fewer were counted). Counting may
  // continue afterwards. Until the team's next barrier, other blocks may still read this block's counts.
  __device__ Place find(unsigned wanted) const {
    team.sync();
    for (int g = team.thread; g < kGroups; g += team.threads) {
      unsigned sum = 0;
#pragma unroll 8
      for (int i = 0; i < kGroup; ++i)
        sum += shared_load(bins + g * kGroup + (g + i) % kGroup);  // staggered, to avoid bank conflicts
      shared_store(groups + g, sum);
    }
    sync_all();
    if (team.thread < kWarp) {
      const int lane = team.thread;
      const unsigned low = total(groups + 2 * lane), high = total(groups + 2 * lane + 1);
      unsigned above = in_higher_lanes(low + high);
      if (has_wanted(above, low + high, wanted)) {
        const bool upper = above + high >= wanted;
        shared_store(found, Place{unsigned(2 * lane + upper), upper ? above : above + high, 0});
      }
      __syncwarp();
      const Place group = shared_load(found);
      __syncwarp();
      const unsigned number = group.number * kGroup + unsigned(lane), inside = total(bins + number);
      above = group.above + in_higher_lanes(inside);
      if (has_wanted(above, inside, wanted)) shared_store(found, Place{number, above, inside});
    }
    team.sync();
    return shared_load(found);
  }

  // Narrows `bin`, which contains the `wanted`-th largest key, until at most `enough` keys lie in it and above it, or
  // it has only one value. for_keys(bin, body) must call body(key) for this thread's keys, at least for those in the
  // bin.
  template <class ForKeys>
  __device__ KeyBin select(KeyBin bin, unsigned wanted, unsigned enough, const ForKeys& for_keys) const {
#pragma unroll 1
    while (bin.from_here() > enough && bin.shift > 0) {
      const int shift = bin.shift > kDigit ? bin.shift - kDigit : 0;
      sync_all();  // see find()
      clear();
      team.sync();
      for_keys(bin, [&](uint64_t key) {
        const uint64_t place = key - bin.least;
        if (place >> bin.shift == 0) count(unsigned(place >> shift));
      });
      const Place digit = find(wanted - bin.above);
      bin = {bin.least + (uint64_t(digit.number) << shift), shift, bin.above + digit.above, digit.inside};
    }
    return bin;
  }

 private:
  __device__ __forceinline__ void sync_all() const {
    if (blocks > 1) {
      cluster_sync();
    } else {
      team.sync();
    }
  }

  __device__ __forceinline__ unsigned total(unsigned* count) const {
    if (blocks == 1) return shared_load(count);
    unsigned sum = 0;
#pragma unroll 4
    for (unsigned r = 0; r < blocks; ++r) sum += shared_load(in_peer(count, r));
    return sum;
  }

  // True in one lane: the one that has the wanted key, or the first one if no lane has it.
  __device__ __forceinline__ bool has_wanted(unsigned above, unsigned inside, unsigned wanted) const {
    return above < wanted && (wanted <= above + inside || team.thread == 0);
  }

  __device__ __forceinline__ unsigned in_higher_lanes(unsigned mine) const {
    unsigned above = 0;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const unsigned other = shuffle_xor(mine, step);
      if ((team.thread & step) == 0) above += other;
      mine += other;
    }
    return above;
  }
};

// Sorts keys in shared memory in descending order. size: a power of two. Begins and ends with a barrier.
inline __device__ void sort_keys(const Team& team, uint64_t* keys, int size) {
  team.sync();
#pragma unroll 1
  for (int run = 2; run <= size; run *= 2) {
#pragma unroll 1
    for (int step = run / 2; step > 0; step /= 2) {
      for (int i = team.thread; i < size / 2; i += team.threads) {
        const int low = 2 * i - (i & (step - 1));
        const uint64_t a = shared_load(keys + low), b = shared_load(keys + low + step);
        if ((a < b) == ((low & run) == 0)) {
          shared_store(keys + low, b);
          shared_store(keys + low + step, a);
        }
      }
      team.sync();
    }
  }
}

}  // namespace fastkd::cuda
