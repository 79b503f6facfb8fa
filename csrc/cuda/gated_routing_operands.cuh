// Where the operands of gated routing's products are in memory: the Lines arguments of Loader (tiles.cuh).
#pragma once
#include "common/tiles.cuh"

namespace fastkd::cuda {

struct Routes {
  const int *order, *counts;
  int64_t rows;
  int learners;

  __device__ __forceinline__ int count(int learner) const { return global_load(counts + learner); }

  // The number of learners that sorted row i runs; -1 if its choice is out of range.
  __device__ __forceinline__ int choice(int64_t i) const {
    if (i >= count(learners)) return -1;
    int low = 0, high = learners;  // counts[n] > i for n < low, not for n >= high
    while (low < high) {
      const int middle = (low + high) / 2;
      const bool above = i < count(middle);
      low = above ? middle + 1 : low;
      high = above ? high : middle;
    }
    return low;
  }
};

// A tensor [learners,] lines, columns. whole: its lines begin and end on 16-byte boundaries.
template <class T>
struct Lines {
  T* data;
  int columns;
  bool whole;
};

// The parts that k is divided into. sums: [parts] times the kernel's result; null: there is one part.
struct Parts {
  float* sums;
  int count;
};

// The tiles of k that belong to a part.
struct Share {
  int begin, end;
  __device__ __forceinline__ Share(int64_t tiles, int part, int parts)
      : begin(int(tiles * part / parts)), end(int(tiles * (part + 1) / parts)) {}
};

// Splits a block's number into its coordinates, the fastest-changing one first.
struct BlockNumber {
  unsigned rest = blockIdx.x;
  __device__ __forceinline__ int next(int count) {
    const int found = int(rest % unsigned(count));
    rest /= unsigned(count);
    return found;
  }
};

constexpr __host__ __device__ int64_t tiles_of(int64_t size, int tile) { return (size + tile - 1) / tile; }

// The rows of a tile, in shared memory: their numbers in the batch, and how many learners each of them runs.
struct TileRows {
  int *sources, *choices;
  __device__ __forceinline__ TileRows(unsigned char* shared, int rows)
      : sources(reinterpret_cast<int*>(shared)), choices(sources + rows) {}
};

// A, along k. GatheredRows: rows of the batch. SortedRows: rows of scratch, from `first` on.
template <class T, int kSlots>
struct GatheredRows {
  Lines<const T> from;
  TileRows rows;
  int source[kSlots];

  __device__ __forceinline__ void prepare(int slot, int line) { source[slot] = shared_load(rows.sources + line); }
  __device__ __forceinline__ const T* at(int slot, int, const Place& place, int* left) const {
    *left = source[slot] >= 0 ? from.columns - place.k : 0;
    return from.data + int64_t(source[slot]) * from.columns + place.k;
  }
};
template <class T>
struct SortedRows {
  Lines<const T> from;
  TileRows rows;
  unsigned first;
  int64_t all;

  __device__ __forceinline__ void prepare(int, int) {}
  __device__ __forceinline__ const T* at(int, int line, const Place& place, int* left) const {
    *left = place.learner < shared_load(rows.choices + line) ? from.columns - place.k : 0;
    return from.data + (place.learner * all + (first + unsigned(line))) * from.columns + place.k;
  }
};

// B of the weights, across k (WeightsAcross) or along k (WeightsAlong).
template <class T>
struct WeightsAcross {
  Lines<const T> from;
  int depth, column;

  __device__ __forceinline__ void prepare(int, int) {}
  __device__ __forceinline__ const T* at(int, int line, const Place& place, int* left) const {
    *left = line < depth - place.k ? from.columns - column : 0;
    return from.data + (int64_t(place.learner) * depth + place.k + line) * from.columns + column;
  }
};
template <class T>
struct WeightsAlong {
  Lines<const T> from;
  int lines, column;

  __device__ __forceinline__ void prepare(int, int) {}
  __device__ __forceinline__ const T* at(int, int line, const Place& place, int* left) const {
    *left = line < lines - column ? from.columns - place.k : 0;
    return from.data + (int64_t(place.learner) * lines + column + line) * from.columns + place.k;
  }
};

// Rows as lines across k, of a learner that has `count` rows. GatheredAcross: rows of the batch, from sorted row
// `first` on. SortedAcross: rows of scratch.
template <class T, int kSlots, int kDepth>
struct GatheredAcross {
  Lines<const T> from;
  const int* order;
  int count, column, first;
  int next[kSlots];  // row numbers, loaded one tile ahead

  __device__ __forceinline__ void prepare(int slot, int line) { next[slot] = source(first, line); }
  __device__ __forceinline__ const T* at(int slot, int line, const Place& place, int* left) {
    *left = line < count - place.k ? from.columns - column : 0;
    const T* const found = from.data + int64_t(next[slot]) * from.columns + column;
    next[slot] = count - place.k > kDepth ? source(place.k + kDepth, line) : 0;
    return found;
  }

 private:
  __device__ __forceinline__ int source(int k, int line) const {
    return line < count - k ? global_load(order + k + line) : 0;
  }
};
template <class T>
struct SortedAcross {
  Lines<const T> from;
  int count, column;
  int64_t first;  // where the learner's rows begin among those of all learners

  __device__ __forceinline__ void prepare(int, int) {}
  __device__ __forceinline__ const T* at(int, int line, const Place& place, int* left) const {
    *left = line < count - place.k ? from.columns - column : 0;
    return from.data + (first + place.k + line) * from.columns + column;
  }
};

}  // namespace fastkd::cuda
