// Matrix products C[m, n] = sum over k of A(m, k) B(k, n), one tile of C per block, accumulated in float32. 16-bit
// elements use tensor cores, others multiply-adds.
//
// A tile of an operand is stored in shared memory with the same orientation as in global memory, in lines of 16-byte
// chunks. Lines run along k, or across it, with one line for each k. Chunks are permuted within a line
// (OperandTile::chunk), so that the eight chunks read together, adjacent in one line or in eight consecutive lines, are
// in different banks. The exception is multiply-adds whose B lies along k: there two accesses share a bank, at 40
// cycles of shared memory for a step of 64.
//
// From sm_80 on, tiles are copied to shared memory a few tiles ahead, without registers. On sm_75 the next tile is held
// in registers.
#pragma once
#include <type_traits>

#include "mma.cuh"
#include "policy.cuh"
#include "vec.cuh"

namespace fastkd::cuda {

// Whether this compiler pass is for devices of this level: 75, or 80 for sm_80 and later.
template <int kLevel>
inline constexpr bool kCompiledHere =
#ifdef __CUDA_ARCH__
    (kLevel >= 80) == (__CUDA_ARCH__ >= 800);
#else
    true;
#endif

template <class T_, int kLevel_, int kRows_>
struct Tile {
  using T = T_;
  static constexpr int kLevel = kLevel_, kRows = kRows_, kColumns = kTileColumns;
  static constexpr int kPack = 16 / sizeof(T), kDepth = kTileDepthBytes / sizeof(T);
  static constexpr int kThreads = tile_threads(kRows), kStages = tile_stages(kLevel, kRows);
  static constexpr int kBlocks = tile_blocks(kLevel, kRows, sizeof(T));
  static constexpr bool kAsync = kLevel >= 80;
  static constexpr bool kTensorCores = std::is_same_v<T, Float16> || (std::is_same_v<T, BFloat16> && kLevel >= 80);
};

// The layout of an operand's tile in shared memory. kExtent: for A its rows, for B its columns.
template <class Tile, int kExtent, bool kAlongK_>
struct OperandTile {
  static constexpr bool kAlongK = kAlongK_;
  static constexpr int kLines = kAlongK ? kExtent : Tile::kDepth;
  static constexpr int kChunks = (kAlongK ? Tile::kDepth : kExtent) / Tile::kPack;
  static constexpr int kBytes = kLines * kChunks * 16;
  static_assert(kChunks == 4 || kChunks % 8 == 0);

  static __device__ __forceinline__ int chunk(int line, int i) {
    return (line * kChunks + (i ^ (kChunks == 4 ? line / 2 % 4 : line % 8))) * 16;
  }
  // The offset of element (i, k), i being a row of A or a column of B.
  static __device__ __forceinline__ int element(int i, int k) {
    const int line = kAlongK ? i : k, place = kAlongK ? k : i;
    return chunk(line, place / Tile::kPack) + place % Tile::kPack * int(sizeof(typename Tile::T));
  }
  // The offset of element (i + more_i, k + more_k), given that of (i, k), for 16-bit elements. more_i and more_k are
  // multiples of 16 and share no set bit with i or k.
  static __device__ __forceinline__ int beyond(int element, int more_i, int more_k) {
    const int lines = kAlongK ? more_i : more_k, place = kAlongK ? more_k : more_i;
    return (element ^ place * 2) + lines * kChunks * 16;
  }
};

// Where a tile begins: at k of a learner. A tile does not cross from one learner to the next.
struct Place {
  int learner, k;
};

// The places of the tiles of consecutive learners, in order.
struct Walk {
  Place place;
  int depth, step;

  __device__ __forceinline__ Walk(int learner, int tile, int tile_depth, int all)
      : place{learner, tile * tile_depth}, depth(all), step(tile_depth) {}
  __device__ __forceinline__ void next() {
    if (depth - place.k > step) {
      place.k += step;
    } else {
      place = {place.learner + 1, 0};
    }
  }
};

// 16 bytes of elements get(0), get(1), ... They are combined by shifts, so that no register array is indexed.
template <class T, class Get>
__device__ __forceinline__ uint4 pack_of(const Get& get) {
  unsigned words[4] = {};
#pragma unroll
  for (int j = 0; j < int(16 / sizeof(T)); ++j) {
    const T item = get(j);
    unsigned bits = 0;
    memcpy(&bits, &item, sizeof(T));
    words[j * sizeof(T) / 4] |= bits << j * sizeof(T) % 4 * 8;
  }
  return {words[0], words[1], words[2], words[3]};
}

// 16 bytes. Elements from `left` on are 0. whole: either all elements are there or none, and they are 16-byte aligned.
template <class T>
__device__ __forceinline__ uint4 load_pack(const T* from, int left, bool whole) {
  if (!whole) return pack_of<T>([&](int j) { return j < left ? global_load(from + j) : T{}; });
  return left > 0 ? global_load16<false>(from) : uint4{0, 0, 0, 0};
}

// Stores kCount float32 values as T. Those from `left` on are not stored.
template <bool kStream, int kCount, class T>
__device__ __forceinline__ void store_values(T* to, int left, bool whole, const float (&values)[kCount]) {
  constexpr int kPack = 16 / sizeof(T);
#pragma unroll
  for (int first = 0; first < kCount; first += kPack) {
    const auto item = [&](int j) { return element<T>(values[first + j]); };
    if (!whole) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        if (first + j < left) global_store(to + first + j, item(j));
      }
    } else if (left > 0) {
      global_store16<kStream>(to + first, pack_of<T>(item));
    }
  }
}

// Copies tiles of an operand to shared memory. Lines says where a line of a tile begins in global memory and how many
// elements it has there; the elements after those are 0. whole: lines begin and end on 16-byte boundaries.
template <class Tile, class Shared_, class Lines>
class Loader {
 public:
  using Shared = Shared_;
  using T = typename Tile::T;

  __device__ __forceinline__ Loader(const Lines& lines, bool whole) : lines_(lines), whole_(whole) {
    each_slot([&](int slot, int line, int, int) { lines_.prepare(slot, line); });
  }

  __device__ __forceinline__ void begin(unsigned char* to, const Place& place) {
    each_slot([&](int slot, int line, int chunk, int at) {
      int left = 0;
      const T* const from = lines_.at(slot, line, place, &left) + chunk * Tile::kPack;
      left -= chunk * Tile::kPack;
      if constexpr (!Tile::kAsync) {
        held_[slot] = load_pack(from, left, whole_);
      } else if (whole_) {
        async_copy16(to + at, from, left > 0);
      } else {
        shared_store(reinterpret_cast<uint4*>(to + at), load_pack(from, left, false));
      }
    });
  }

  __device__ __forceinline__ void finish(unsigned char* to) const {
    if constexpr (!Tile::kAsync) {
      each_slot([&](int slot, int, int, int at) { shared_store(reinterpret_cast<uint4*>(to + at), held_[slot]); });
    }
  }

  static constexpr int kSlots = (Shared::kLines * Shared::kChunks + Tile::kThreads - 1) / Tile::kThreads;

 private:
  static constexpr int kStep = Tile::kThreads / Shared::kChunks;
  static_assert(Tile::kThreads % Shared::kChunks == 0);

  // Calls body(slot, line, chunk, offset in shared memory) for each chunk of a tile that this thread copies.
  template <class Body>
  static __device__ __forceinline__ void each_slot(const Body& body) {
    const int thread = thread_again(), chunk = thread % Shared::kChunks, first = thread / Shared::kChunks;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int line = slot * kStep + first;
      if (Shared::kLines % kStep != 0 && line >= Shared::kLines) continue;
      // The permutation of chunks repeats every eight lines.
      const int at = kStep % 8 == 0 ? Shared::chunk(first, chunk) + slot * kStep * Shared::kChunks * 16
                                    : Shared::chunk(line, chunk);
      body(slot, line, chunk, at);
    }
  }

  Lines lines_;
  const bool whole_;
  uint4 held_[Tile::kAsync ? 1 : kSlots];
};

// A tile of C in fragments of 16 x 8 (mma.cuh). Each warp has kWarpRows rows and 32 columns.
template <class Tile, class A, class B>
class TensorCores {
 public:
  // Results of rows from `live` on are not used and may be wrong.
  __device__ __forceinline__ void multiply(const unsigned char* a, const unsigned char* b, int live) {
    const int thread = thread_again(), lane = thread % kWarp, m = first_row(thread), n = first_column(thread);
    if (m >= live) return;
    const int r = lane % 8, odd = lane / 8 % 2 * 8, high = lane / 16 * 8;
    const int from_a = A::kAlongK ? A::element(m + odd + r, high) : A::element(m + odd, high + r);
    const int from_b = B::kAlongK ? B::element(n + high + r, odd) : B::element(n + high, odd + r);
#pragma unroll
    for (int k = 0; k < Tile::kDepth; k += 16) {
      unsigned columns[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) load_matrices<!B::kAlongK>(columns[j], b + B::beyond(from_b, 16 * j, k));
#pragma unroll
      for (int i = 0; i < kRowFragments; ++i) {
        unsigned rows[4];
        load_matrices<!A::kAlongK>(rows, a + A::beyond(from_a, 16 * i, k));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          multiply_add<typename Tile::T>(sums_[2 * i][j], sums_[2 * i + 1][j], rows, columns[j / 2][j % 2 * 2],
                                         columns[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  // Calls put(row, column, values, prepare(column)) with 16 bytes' worth of columns at a time. All lanes of a warp must
  // call this.
  template <class Prepare, class Put>
  __device__ __forceinline__ void each(const Prepare& prepare, const Put& put) {
    const int thread = int(threadIdx.x), lane = thread % kWarp, column = first_column(thread) + lane % 4 * 8;
    const auto state = prepare(column);
#pragma unroll 1  // rotates the registers instead of unrolling the code
    for (int group = 0; group < kGroups; ++group) {
      float values[8];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        float words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) words[j] = sums_[0][j][side];
        transpose(words);
#pragma unroll
        for (int j = 0; j < 4; ++j) values[2 * j + side] = words[j];
      }
      put(first_row(thread) + 8 * group + lane / 4, column, values, state);
      turn();
    }
  }

 private:
  static constexpr int kRowWarps = Tile::kThreads / kWarp / 4, kWarpRows = Tile::kRows / kRowWarps;
  static constexpr int kRowFragments = kWarpRows / 16, kGroups = 2 * kRowFragments;

  static __device__ __forceinline__ int first_row(int thread) { return thread / kWarp / 4 * kWarpRows; }
  static __device__ __forceinline__ int first_column(int thread) { return thread / kWarp % 4 * 32; }

  __device__ __forceinline__ void turn() {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const float first = sums_[0][j][side];
#pragma unroll
        for (int group = 0; group + 1 < kGroups; ++group) sums_[group][j][side] = sums_[group + 1][j][side];
        sums_[kGroups - 1][j][side] = first;
      }
    }
  }

  float sums_[kGroups][4][2] = {};
};

// A tile of C computed by multiply-adds: each thread has kRows rows and 8 columns.
template <class Tile, class A, class B>
class MultiplyAdds {
 public:
  __device__ __forceinline__ void multiply(const unsigned char* a, const unsigned char* b, int live) {
    if (live <= 0) return;
#pragma unroll
    for (int k = 0; k < Tile::kDepth; k += kStep) {
      float rows[kRows][kStep];
      if constexpr (A::kAlongK) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) load(a + A::element(row(i), k), rows[i]);
      } else {
#pragma unroll
        for (int i = 0; i < kRows; i += 4) {
          float four[4];
          load(a + A::element(row(i), k), four);
#pragma unroll
          for (int l = 0; l < 4; ++l) rows[i + l][0] = four[l];
        }
      }
      const auto add = [&](int c, int step, float factor) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          float& sum = sums_[c / kPack * kRows + i][c % kPack];
          sum = __builtin_fmaf(rows[i][step], factor, sum);
        }
      };
      if constexpr (B::kAlongK) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          float steps[kStep];
          load(b + B::element(column(c), k), steps);
#pragma unroll
          for (int step = 0; step < kStep; ++step) add(c, step, steps[step]);
        }
      } else {
#pragma unroll
        for (int step = 0; step < kStep; ++step) {
#pragma unroll
          for (int first = 0; first < kColumns; first += 4) {
            float four[4];
            load(b + B::element(column(first), k + step), four);
#pragma unroll
            for (int l = 0; l < 4; ++l) add(first + l, step, four[l]);
          }
        }
      }
    }
  }

  template <class Prepare, class Put>
  __device__ __forceinline__ void each(const Prepare& prepare, const Put& put) {
#pragma unroll 1
    for (int part = 0; part < kColumns / kPack; ++part) {
      const int first = B::kAlongK ? kThreadsAcross * (part * kPack + across() % kPack) + across() / kPack * kPack
                                   : kThreadsAcross * kPack * part + across() * kPack;
      const auto state = prepare(first);
#pragma unroll 1
      for (int i = 0; i < kRows; ++i) {
        float values[kPack];
#pragma unroll
        for (int j = 0; j < kPack; ++j) values[j] = sums_[0][j];
        if constexpr (B::kAlongK) transpose(values);
        put(row(i), first, values, state);
        turn();
      }
    }
  }

 private:
  static constexpr int kPack = Tile::kPack, kColumns = 8, kThreadsAcross = Tile::kColumns / kColumns;
  static constexpr int kThreadsDown = Tile::kThreads / kThreadsAcross, kRows = Tile::kRows / kThreadsDown;
  static constexpr int kGroups = kRows * kColumns / kPack;
  static constexpr int kStep = A::kAlongK ? 4 : 1;  // values of k per step
  static_assert(A::kAlongK || !B::kAlongK);

  static __device__ __forceinline__ int across() { return int(threadIdx.x) % kThreadsAcross; }
  static __device__ __forceinline__ int row(int i) {
    const int down = int(threadIdx.x) / kThreadsAcross;
    return A::kAlongK ? down + i * kThreadsDown : i / 4 * 4 * kThreadsDown + 4 * down + i % 4;
  }
  static __device__ __forceinline__ int column(int j) {
    return B::kAlongK ? across() + kThreadsAcross * j
                      : kThreadsAcross * kPack * (j / kPack) + across() * kPack + j % kPack;
  }

  template <int kCount>
  static __device__ __forceinline__ void load(const unsigned char* from, float (&out)[kCount]) {
    struct alignas(kCount * sizeof(typename Tile::T)) Items {
      typename Tile::T item[kCount];
    };
    const Items items = shared_load(reinterpret_cast<const Items*>(from));
#pragma unroll
    for (int j = 0; j < kCount; ++j) out[j] = to_float(items.item[j]);
  }

  __device__ __forceinline__ void turn() {
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const float first = sums_[0][j];
#pragma unroll
      for (int group = 0; group + 1 < kGroups; ++group) sums_[group][j] = sums_[group + 1][j];
      sums_[kGroups - 1][j] = first;
    }
  }

  float sums_[kGroups][kPack] = {};
};

template <class Tile, class A, class B>
using Core = std::conditional_t<Tile::kTensorCores, TensorCores<Tile, A, B>, MultiplyAdds<Tile, A, B>>;

// Adds the products of `tiles` tiles, beginning at `walk`, to core. after(done, b) is called when done = 0, 1, ...
// tiles are added; b is the last tile's B.
template <class Tile, class LoadA, class LoadB, class After>
__device__ __forceinline__ void multiply_tiles(Core<Tile, typename LoadA::Shared, typename LoadB::Shared>& core,
                                               LoadA& a, LoadB& b, Walk walk, int tiles, unsigned char* shared,
                                               const int& live, const After& after) {
  constexpr int kStages = Tile::kStages, kBytesA = LoadA::Shared::kBytes, kStage = kBytesA + LoadB::Shared::kBytes;
  int filled = 0;  // the stage to be filled next; the stage after it was filled earliest
  const auto after_it = [](int stage) { return stage == (kStages - 1) * kStage ? 0 : stage + kStage; };
  // Tile i is multiplied while tile i + kStages - 1 is being copied.
#pragma unroll 1
  for (int i = 1 - kStages; i < tiles; ++i) {
    if (i >= 0) {
      if constexpr (Tile::kAsync) async_wait<kStages - 2>();
      __syncthreads();  // tile i has arrived, and all threads are done with tile i - 1, whose stage is filled next
    }
    const bool more = i + kStages - 1 < tiles;
    if (more) {
      a.begin(shared + filled, walk.place);
      b.begin(shared + filled + kBytesA, walk.place);
      walk.next();
    }
    if constexpr (Tile::kAsync) async_commit();
    const unsigned char* const used = shared + after_it(filled);
    if (i >= 0) core.multiply(used, used + kBytesA, live);
    if (i >= -1) after(i + 1, used + kBytesA);
    if (more) {
      a.finish(shared + filled);
      b.finish(shared + filled + kBytesA);
    }
    filled = after_it(filled);
  }
  if constexpr (Tile::kAsync) async_wait<0>();
}

}  // namespace fastkd::cuda
