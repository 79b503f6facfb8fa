// The selection of a row's quantiles: the teacher's logits between which its quantile levels lie.
#pragma once
#include <type_traits>

#include "common/block.cuh"
#include "common/sources.cuh"

namespace fastkd::cuda {

// A quantile of a quantity that grows with the logits: its value at `below` plus `fraction` of the difference to that
// at `above`.
struct ClipQuantile {
  double below, above, fraction;
};

// The teacher's logits of a row as a source of their own. kBits: how many of a logit's leading bits may differ between
// logits of equal sign; all others follow from the sign.
template <class Source>
struct ClipTeacher;

template <class T>
struct ClipTeacher<PackedSource<T>> {
  using Rows = PackedSource<T, false>;
  static constexpr int kBits = sizeof(typename Rows::Item) == 4 ? 32 : std::is_same<T, BFloat16>::value ? 16 : 24;
  const Rows rows;

  __device__ explicit ClipTeacher(const PackedSource<T>& source) : rows(source.teacher_alone()) {}
  static __device__ __forceinline__ float logit(const typename Rows::Raw& raw, int j) {
    return Rows::student_of(raw, j);
  }
};

template <>
struct ClipTeacher<AnySource> {
  using Rows = AnySource;
  static constexpr int kBits = 32;
  const Rows& rows;

  __device__ explicit ClipTeacher(const AnySource& source) : rows(source) {}
  static __device__ __forceinline__ float logit(const AnySource::Raw& raw, int) { return raw.teacher; }
};

// Finds the teacher's logits between which a row's quantile levels lie, by their ranks. It is a radix search over bits
// that compare in the order of the numbers, 8 bits per pass, with a histogram for each of the four ranks (ranks with
// equal leading bits share one). The counts are integers, so the order of threads has no effect. A NaN is ordered
// beyond the infinities.
template <class Source>
struct ClipSelect {
  using Teacher = ClipTeacher<Source>;
  using Rows = typename Teacher::Rows;
  static constexpr int kTargets = 4, kBins = 256, kLaneBins = kBins / kWarp;
  struct Target {
    unsigned prefix;  // the leading bits known so far; the others are 0
    int rank;         // among the logits with this prefix
  };
  struct alignas(16) Bins {
    unsigned count[4];
  };
  static constexpr int kBytes = 2 * kTargets * int(sizeof(Target)) + kTargets * kBins * int(sizeof(unsigned));

  const Teacher teacher;
  const Team& team;
  const int vocab;
  Target* const targets;  // two sets: one is read while the other is written
  unsigned* const histograms;

  __device__ ClipSelect(const Source& source, const Team& t, unsigned char* shared)
      : teacher{source},
        team(t),
        vocab(source.arguments.vocab),
        targets(reinterpret_cast<Target*>(shared)),
        histograms(reinterpret_cast<unsigned*>(targets + 2 * kTargets)) {}

  // levels are in [0, 1]. begin() and finish() are called by the leading thread only.
  __device__ void begin(double lower_level, double upper_level, ClipQuantile (&quantiles)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const double place = (i == 0 ? lower_level : upper_level) * double(vocab - 1);
      const int below = int(place);
      quantiles[i].fraction = place - double(below);
      shared_store(targets + 2 * i, Target{0, below});
      shared_store(targets + 2 * i + 1, Target{0, below + 1 < vocab ? below + 1 : below});
    }
  }

  // Returns the direction of the next pass, the opposite of the last one's.
  __device__ bool run(bool backwards) const {
    int from = 0;
#pragma unroll 1
    for (int shift = 24; shift >= 32 - Teacher::kBits; shift -= 8, from ^= kTargets, backwards = !backwards) {
      for (int i = team.thread; i < kTargets * kBins; i += team.threads) shared_store(histograms + i, 0u);
      team.sync();
      count(targets + from, shift, backwards);
      sync_all();
      descend(targets + from, targets + (from ^ kTargets), shift);
      sync_all();
    }
    return backwards;
  }

  __device__ void finish(ClipQuantile (&quantiles)[2]) const {
    const Target* const found = targets + (Teacher::kBits / 8 % 2) * kTargets;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      quantiles[i].below = number_of(shared_load(found + 2 * i).prefix);
      quantiles[i].above = number_of(shared_load(found + 2 * i + 1).prefix);
    }
  }

 private:
  __device__ void sync_all() const {
    if (team.blocks > 1) {
      cluster_sync();
    } else {
      team.sync();
    }
  }

  // Bits that compare in the order of the numbers, and the inverse. A key's bits below the leading kBits are all 0 for
  // positive numbers and all 1 for negative ones.
  static __device__ __forceinline__ unsigned key_of(float x) {
    const unsigned bits = bit_cast<unsigned>(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  static __device__ float number_of(unsigned key) {
    return bit_cast<float>(key & 0x80000000u ? key ^ 0x80000000u
                                             : ~(key | unsigned((uint64_t(1) << (32 - Teacher::kBits)) - 1)));
  }

  static __device__ __forceinline__ bool shares(unsigned key, unsigned prefix, int shift) {
    return (key ^ prefix) >> shift >> 8 == 0;
  }

  static __device__ __forceinline__ void add_one(unsigned* to) {
    FASTKD_TWIN(, simt::shared_read(to, sizeof(*to)));  // 0 at the last barrier; only atomics since
    atomicAdd(to, 1u);
  }

  // Counts the next 8 bits of all logits that share a target's prefix.
  __device__ void count(const Target* now, int shift, bool backwards) const {
    unsigned prefix[kTargets];
    bool own[kTargets];
#pragma unroll
    for (int t = 0; t < kTargets; ++t) {
      prefix[t] = shared_load(now + t).prefix;
      own[t] = true;
#pragma unroll
      for (int s = 0; s < t; ++s) own[t] = own[t] && prefix[s] != prefix[t];
    }
    for_packs<false>(teacher.rows, team, backwards, [&](int pack, const typename Rows::Raw& raw) {
      const int column = teacher.rows.column(pack);
#pragma unroll
      for (int j = 0; j < Rows::kSize; ++j) {
        if (unsigned(column + j) >= unsigned(vocab)) continue;
        const unsigned key = key_of(Teacher::logit(raw, j));
#pragma unroll
        for (int t = 0; t < kTargets; ++t) {
          if (own[t] && shares(key, prefix[t], shift)) add_one(histograms + t * kBins + (key >> shift & (kBins - 1)));
        }
      }
    });
  }

  // Extends each target by its next 8 bits, from the histograms of all blocks. Each target is handled by one warp.
  __device__ void descend(const Target* now, Target* next, int shift) const {
    const int lane = team.thread % kWarp, warps = team.threads / kWarp;
#pragma unroll 1
    for (int t = team.thread / kWarp; t < kTargets; t += warps) {
      const Target target = shared_load(now + t);
      int at = 0;
      while (shared_load(now + at).prefix != target.prefix) ++at;
      unsigned* const first = histograms + at * kBins + lane * kLaneBins;
      unsigned bins[kLaneBins] = {};
#pragma unroll 1
      for (unsigned r = 0; r < team.blocks; ++r) {
        const Bins* const from = reinterpret_cast<const Bins*>(team.blocks > 1 ? in_peer(first, r) : first);
#pragma unroll
        for (int i = 0; i < kLaneBins; i += 4) {
          const Bins four = shared_load(from + i / 4);
#pragma unroll
          for (int k = 0; k < 4; ++k) bins[i + k] += four.count[k];
        }
      }
      unsigned all = 0, before = 0;  // all: of the lanes so far; before: of those before this lane
#pragma unroll
      for (int i = 0; i < kLaneBins; ++i) all += bins[i];
      const unsigned mine = all, rank = unsigned(target.rank);
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const unsigned other = shuffle_xor(all, step);
        if (lane & step) before += other;
        all += other;
      }
      if (rank < before || rank - before >= mine) continue;
#pragma unroll
      for (int i = 0; i < kLaneBins; ++i) {
        if (rank >= before && rank - before < bins[i]) {
          shared_store(next + t, Target{target.prefix | unsigned(lane * kLaneBins + i) << shift, int(rank - before)});
        }
        before += bins[i];
      }
    }
  }
};

}  // namespace fastkd::cuda
