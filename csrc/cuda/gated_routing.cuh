// The matrix products of gated routing. Rows are sorted: the i-th sorted row is row order[i] of the batch, and
// c_n = counts[n] rows run learner n.
//
//   learner_kernel   pre_n = x w1[n] + b1[n],  hidden_n = act(pre_n)
//     or backward    inner_n = (grad w2[n]^T) act'(pre_n),  and hidden_n again
//   sum_kernel       out = bias + sum over n of hidden_n w2[n]
//     or backward    dx = sum over n of inner_n w1[n]^T
//   weight_kernel    dw1[n] = x^T inner_n and db1[n],  or dw2[n] = hidden_n^T grad
//
// x and grad are gathered as they are loaded, out and dx scattered as they are stored, so that no sorted copy is made.
// Scratch (hidden, inner, stored pre-activations) is [learners, rows, width] in sorted order; rows from c_n on are
// neither written nor read. Each result is written once, by one thread.
//
// Tiles have R = 128 rows, or 16 where there are few, and 128 columns. In elements, the kernels read
//   learner_kernel   of x or grad the sum of c_n depth ceil(width / 128), each weight ceil(c_n / R) times
//   sum_kernel       of scratch the sum of c_n width ceil(columns / 128), each weight ceil(c_n / R) times
//   weight_kernel    the sum of c_n (columns ceil(lines / 128) + lines ceil(columns / 128))
// for 2 flops a product, and write their results once. Adjacent blocks of the grid use the same rows: rows are read
// about once from memory; the weights and repeated reads come from the L2. Where there are too few tiles for the
// device, each tile's sum is divided among several blocks (depth_splits in policy.cuh): their sums go to float32
// scratch, and a second kernel adds them in order.
#pragma once
#include "../math/activation.h"
#include "gated_routing_operands.cuh"

namespace fastkd::cuda {

// Each kernel has its Arguments and a Result, whose put() processes and stores a finished sum.

template <class T>
struct HiddenArguments {
  Routes routes;
  Lines<const T> rows, weights;  // x and w1, or grad and w2
  int width, tiles;              // tiles of k; 0: the product is not requested
  Activation activation;
  Parts parts;
  const T* bias;                            // forward only
  const T* pre;                             // backward only
  Lines<T> pre_activations, hidden, inner;  // data null: not requested
};

template <class T, bool kBackward>
struct HiddenResult {
  static constexpr int kPack = 16 / sizeof(T);
  const HiddenArguments<T>& a;
  const int learner;

  __device__ __forceinline__ uint4 prepare(int column) const {
    if constexpr (kBackward) return {};
    return load_pack(a.bias + int64_t(learner) * a.width + column, a.width - column, a.hidden.whole);
  }

  __device__ __forceinline__ void put(int64_t i, int column, const float (&values)[kPack], uint4 bits) const {
    const int left = a.width - column;
    const int64_t place = (learner * a.routes.rows + i) * a.width + column;
    if constexpr (kBackward) bits = load_pack(a.pre + place, left, a.hidden.whole);
    Packed<T> given;  // pre-activations (backward), or the bias (forward)
    memcpy(&given, &bits, 16);
    float pre[kPack], hidden[kPack], inner[kPack];
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      pre[j] = to_float(given.item[j]) + (kBackward ? 0 : values[j]);
      const Activated<float> found = activated(a.activation, pre[j]);
      hidden[j] = found.value;
      inner[j] = values[j] * found.slope;
    }
    if (!kBackward && a.pre_activations.data != nullptr)
      store_values<false>(a.pre_activations.data + place, left, a.hidden.whole, pre);
    if (a.hidden.data != nullptr) store_values<false>(a.hidden.data + place, left, a.hidden.whole, hidden);
    if (kBackward && a.inner.data != nullptr) store_values<false>(a.inner.data + place, left, a.hidden.whole, inner);
  }
};

template <class T>
struct SumArguments {
  Routes routes;
  Lines<const T> rows, weights;  // hidden and w2, or inner and w1
  Lines<T> out;
  Parts parts;
  const T* bias;
  bool bias_by_choice;
  float lost;  // the value of rows whose choice is out of range
};

template <class T>
struct SumResult {
  static constexpr int kPack = 16 / sizeof(T);
  const SumArguments<T>& a;

  __device__ __forceinline__ uint4 prepare(int column) const {
    if (a.bias == nullptr || a.bias_by_choice) return {};
    return load_pack(a.bias + column, a.out.columns - column, a.out.whole);
  }

  __device__ __forceinline__ void put(int row, int choice, int column, const float (&values)[kPack], uint4 bits) const {
    const int left = a.out.columns - column;
    if (a.bias != nullptr && a.bias_by_choice && choice >= 0) {
      bits = load_pack(a.bias + int64_t(choice) * a.out.columns + column, left, a.out.whole);
    }
    Packed<T> bias;
    memcpy(&bias, &bits, 16);
    float out[kPack];
#pragma unroll
    for (int j = 0; j < kPack; ++j) out[j] = choice < 0 ? a.lost : values[j] + to_float(bias.item[j]);
    store_values<true>(a.out.data + int64_t(row) * a.out.columns + column, left, a.out.whole, out);
  }
};

// Parts are float32, [parts][lines of the result][columns].
template <int kPack>
__device__ __forceinline__ void store_part(const Parts& parts, int part, int64_t lines, int64_t line, int columns,
                                           int column, const float (&values)[kPack]) {
  float* const to = parts.sums + (part * lines + line) * columns + column;
  store_values<false>(to, columns - column, columns % kPack == 0, values);
}

template <int kPack>
__device__ __forceinline__ void add_parts(const Parts& parts, int64_t lines, int64_t line, int columns, int column,
                                          float (&values)[kPack]) {
#pragma unroll
  for (int j = 0; j < kPack; ++j) values[j] = 0;
#pragma unroll 1
  for (int part = 0; part < parts.count; ++part) {
    const float* const from = parts.sums + (part * lines + line) * columns + column;
#pragma unroll
    for (int first = 0; first < kPack; first += 4) {
      const uint4 bits = load_pack(from + first, columns - column - first, columns % kPack == 0);
      Packed<float> more;
      memcpy(&more, &bits, 16);
#pragma unroll
      for (int j = 0; j < 4; ++j) values[first + j] += more.item[j];
    }
  }
}

template <class Tile, bool kAcross, bool kRowsAlong = true>
struct Operands {
  using A = OperandTile<Tile, Tile::kRows, kRowsAlong>;
  using B = OperandTile<Tile, Tile::kColumns, !kAcross>;
  static constexpr int kStages = Tile::kStages * (A::kBytes + B::kBytes);
  static constexpr int kBytes = kStages + 2 * Tile::kRows * int(sizeof(int));
};

// The products of one learner. Grid order: columns, learners, parts, rows.
template <class Tile, bool kBackward>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    learner_kernel(const HiddenArguments<typename Tile::T> a) {
  if constexpr (kCompiledHere<Tile::kLevel>) {
    using T = typename Tile::T;
    using Shape = Operands<Tile, !kBackward>;
    using Weights = std::conditional_t<kBackward, WeightsAlong<T>, WeightsAcross<T>>;
    using Rows = GatheredRows<T, Loader<Tile, typename Shape::A, WeightsAcross<T>>::kSlots>;
    BlockNumber number;
    const int column = number.next(int(tiles_of(a.width, Tile::kColumns))) * Tile::kColumns;
    const int learner = number.next(a.routes.learners), part = number.next(a.parts.count);
    const int64_t first = int64_t(number.rest) * Tile::kRows, behind = a.routes.count(learner) - first;
    if (behind <= 0) return;
    const int live = behind < Tile::kRows ? int(behind) : Tile::kRows;
    const TileRows rows(shared_memory() + Shape::kStages, Tile::kRows);
    if (const int m = int(threadIdx.x); m < Tile::kRows) {
      shared_store(rows.sources + m, m < live ? global_load(a.routes.order + first + m) : -1);
    }
    __syncthreads();
    Loader<Tile, typename Shape::A, Rows> load_a({a.rows, rows, {}}, a.rows.whole);
    Loader<Tile, typename Shape::B, Weights> load_b({a.weights, kBackward ? a.width : a.rows.columns, column},
                                                    a.weights.whole);
    Core<Tile, typename Shape::A, typename Shape::B> core;
    const Share share(a.tiles, part, a.parts.count);
    multiply_tiles<Tile>(core, load_a, load_b, {learner, share.begin, Tile::kDepth, a.rows.columns},
                         share.end - share.begin, shared_memory(), live, [](int, const unsigned char*) {});
    const HiddenResult<T, kBackward> result{a, learner};
    core.each([&](int c) { return a.parts.sums != nullptr ? uint4{} : result.prepare(column + c); },
              [&](int m, int c, const auto& values, const auto& state) {
                if (m >= live || column + c >= a.width) return;
                if (a.parts.sums != nullptr) {
                  const int64_t lines = a.routes.rows * a.routes.learners, line = learner * a.routes.rows + first + m;
                  store_part(a.parts, part, lines, line, a.width, column + c, values);
                } else {
                  result.put(first + m, column + c, values, state);
                }
              });
  }
}

template <class T, bool kBackward>
__global__ void __launch_bounds__(kFlatThreads) add_learner_kernel(const HiddenArguments<T> a) {
  constexpr int kPack = 16 / sizeof(T);
  const int64_t packs = tiles_of(a.width, kPack), lines = a.routes.rows * a.routes.learners;
  for (int64_t i = int64_t(blockIdx.x) * kFlatThreads + threadIdx.x; i < lines * packs;
       i += int64_t(gridDim.x) * kFlatThreads) {
    const int column = int(i % packs) * kPack, learner = int(i / packs / a.routes.rows);
    const int64_t row = i / packs % a.routes.rows;
    if (row >= a.routes.count(learner)) continue;
    float values[kPack];
    add_parts(a.parts, lines, i / packs, a.width, column, values);
    const HiddenResult<T, kBackward> result{a, learner};
    result.put(row, column, values, result.prepare(column));
  }
}

// Sums over learners. Grid order: columns, parts, rows. A row is ready after the tiles of the learners that it runs,
// and is stored then. What is added to its sums later, zeros times weights that may be infinite, is not used.
template <class Tile, bool kBackward>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) sum_kernel(const SumArguments<typename Tile::T> a) {
  if constexpr (kCompiledHere<Tile::kLevel>) {
    using T = typename Tile::T;
    using Shape = Operands<Tile, !kBackward>;
    using Weights = std::conditional_t<kBackward, WeightsAlong<T>, WeightsAcross<T>>;
    BlockNumber number;
    const int column = number.next(int(tiles_of(a.out.columns, Tile::kColumns))) * Tile::kColumns;
    const int part = number.next(a.parts.count);
    const unsigned first = number.rest * Tile::kRows;
    const TileRows rows(shared_memory() + Shape::kStages, Tile::kRows);
    if (const int m = int(threadIdx.x); m < Tile::kRows) {
      const bool here = m < a.routes.rows - first;
      shared_store(rows.sources + m, here ? global_load(a.routes.order + first + m) : -1);
      shared_store(rows.choices + m, here ? a.routes.choice(first + m) : -1);
    }
    __syncthreads();
    Loader<Tile, typename Shape::A, SortedRows<T>> load_a({a.rows, rows, first, a.routes.rows}, a.rows.whole);
    Loader<Tile, typename Shape::B, Weights> load_b({a.weights, kBackward ? a.out.columns : a.rows.columns, column},
                                                    a.weights.whole);
    Core<Tile, typename Shape::A, typename Shape::B> core;

    const int most = shared_load(rows.choices), learner_tiles = int(tiles_of(a.rows.columns, Tile::kDepth));
    const Share share(int64_t(most > 0 ? most : 0) * learner_tiles, part, a.parts.count);
    const SumResult<T> result{a};
    // After how many of the block's tiles a row is ready. Rows run decreasing numbers of learners, so the last rows are
    // ready first.
    const auto ready = [&](int m) {
      const int last = shared_load(rows.choices + m) * learner_tiles;
      return (last < share.begin ? share.begin : last < share.end ? last : share.end) - share.begin;
    };
    int live = a.routes.rows - first < Tile::kRows ? int(a.routes.rows - first) : Tile::kRows;
    const auto after = [&](int done, const unsigned char*) {
      if (live == 0 || ready(live - 1) != done) return;
      core.each([&](int c) { return a.parts.sums != nullptr ? uint4{} : result.prepare(column + c); },
                [&](int m, int c, const auto& values, const auto& state) {
                  const int source = shared_load(rows.sources + m);
                  if (source < 0 || column + c >= a.out.columns || ready(m) != done) return;
                  if (a.parts.sums != nullptr) {
                    store_part(a.parts, part, a.routes.rows, first + m, a.out.columns, column + c, values);
                  } else {
                    result.put(source, shared_load(rows.choices + m), column + c, values, state);
                  }
                });
      while (live > 0 && ready(live - 1) == done) --live;
    };
    const int begin = learner_tiles > 0 ? share.begin / learner_tiles : 0;
    multiply_tiles<Tile>(core, load_a, load_b,
                         {begin, share.begin - begin * learner_tiles, Tile::kDepth, a.rows.columns},
                         share.end - share.begin, shared_memory(), live, after);
  }
}

template <class T>
__global__ void __launch_bounds__(kFlatThreads) add_sum_kernel(const SumArguments<T> a) {
  constexpr int kPack = 16 / sizeof(T);
  const int64_t packs = tiles_of(a.out.columns, kPack);
  for (int64_t i = int64_t(blockIdx.x) * kFlatThreads + threadIdx.x; i < a.routes.rows * packs;
       i += int64_t(gridDim.x) * kFlatThreads) {
    const int column = int(i % packs) * kPack;
    const int64_t row = i / packs;
    float values[kPack];
    add_parts(a.parts, a.routes.rows, row, a.out.columns, column, values);
    const SumResult<T> result{a};
    const int choice = a.bias_by_choice ? a.routes.choice(row) : row < a.routes.count(a.routes.learners) ? 0 : -1;
    result.put(global_load(a.routes.order + row), choice, column, values, result.prepare(column));
  }
}

template <class T>
struct WeightArguments {
  Routes routes;
  Lines<const T> a, b;  // x and inner, or hidden and grad
  int lines;            // lines of the result requested: all or none
  Lines<T> out;
  T* sums;  // sums of b's columns; null: not requested
  Parts parts;
};

// Each part has one more line: the sums of b's columns.
template <class T>
__device__ __forceinline__ void put_weight(const WeightArguments<T>& a, int learner, int line, int column,
                                           const float (&values)[16 / sizeof(T)]) {
  const int left = a.out.columns - column;
  if (line < a.lines) {
    store_values<true>(a.out.data + (int64_t(learner) * a.lines + line) * a.out.columns + column, left, a.out.whole,
                       values);
  } else if (a.sums != nullptr) {
    store_values<true>(a.sums + int64_t(learner) * a.out.columns + column, left, a.out.whole, values);
  }
}

// Gradients of the first weights, with the sums if they are requested, or of the second weights. Grid order: columns,
// lines, learners, parts.
template <class Tile, bool kFirst>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    weight_kernel(const WeightArguments<typename Tile::T> a) {
  if constexpr (kCompiledHere<Tile::kLevel>) {
    using T = typename Tile::T;
    using Shape = Operands<Tile, /*kAcross=*/true, /*kRowsAlong=*/false>;
    using Gathered = GatheredAcross<T, Loader<Tile, typename Shape::A, SortedAcross<T>>::kSlots, Tile::kDepth>;
    using Sorted = SortedAcross<T>;
    static_assert(Shape::A::kBytes == Shape::B::kBytes);
    constexpr int kPack = Tile::kPack;
    BlockNumber number;
    const int column = number.next(int(tiles_of(a.out.columns, Tile::kColumns))) * Tile::kColumns;
    const int line = number.next(a.lines > 0 ? int(tiles_of(a.lines, Tile::kRows)) : 1) * Tile::kRows;
    const int learner = number.next(a.routes.learners);
    const int count = a.routes.count(learner), live = a.lines > 0 ? Tile::kRows : 0;
    const Share share(tiles_of(count, Tile::kDepth), int(number.rest), a.parts.count);
    // Kept in shared memory, since it is needed only at the end and would occupy a register until then.
    int* const own_part = reinterpret_cast<int*>(shared_memory() + Shape::kStages);
    if (threadIdx.x == 0) shared_store(own_part, int(number.rest));
    const auto lines_of = [&](const Lines<const T>& from, int at, auto gathered) {
      if constexpr (decltype(gathered)::value) {
        return Gathered{from, a.routes.order, count, at, share.begin * Tile::kDepth, {}};
      } else {
        return Sorted{from, count, at, learner * a.routes.rows};
      }
    };
    using A = std::conditional_t<kFirst, Gathered, Sorted>;
    using B = std::conditional_t<kFirst, Sorted, Gathered>;
    // If no lines are requested, the operand has no columns.
    Loader<Tile, typename Shape::A, A> load_a(
        lines_of({a.a.data, live > 0 ? a.a.columns : 0, a.a.whole}, line, std::bool_constant<kFirst>()), a.a.whole);
    Loader<Tile, typename Shape::B, B> load_b(lines_of(a.b, column, std::bool_constant<!kFirst>()), a.b.whole);
    Core<Tile, typename Shape::A, typename Shape::B> core;
    // For the sums of b's columns: each thread has 4 bytes of columns, and every kGroups-th line of a tile.
    constexpr int kItems = 4 / int(sizeof(T)), kWords = Tile::kColumns / kItems, kGroups = Tile::kThreads / kWords;
    struct alignas(4) Word {
      T item[kItems];
    };
    const bool summing = a.sums != nullptr && line == 0;
    float sums[kItems] = {};
    multiply_tiles<Tile>(core, load_a, load_b, {0, share.begin, Tile::kDepth, count}, share.end - share.begin,
                         shared_memory(), live, [&](int done, const unsigned char* tile) {
                           if constexpr (kFirst) {
                             if (!summing || done == 0) return;
                             const int thread = thread_again();
#pragma unroll
                             for (int k = 0; k < Tile::kDepth; k += kGroups) {
                               const int place = Shape::B::element(thread % kWords * kItems, k + thread / kWords);
                               const Word found = shared_load(reinterpret_cast<const Word*>(tile + place));
#pragma unroll
                               for (int j = 0; j < kItems; ++j) sums[j] += to_float(found.item[j]);
                             }
                           }
                         });
    __syncthreads();
    const int part = shared_load(own_part);
    const auto put = [&](int m, int c, const float (&values)[kPack]) {
      if (column + c >= a.out.columns) return;
      if (a.parts.sums != nullptr) {
        const int64_t lines = a.lines + 1;
        store_part(a.parts, part, a.routes.learners * lines, learner * lines + m, a.out.columns, column + c, values);
      } else {
        put_weight(a, learner, m, column + c, values);
      }
    };
    core.each([](int) { return 0; },
              [&](int m, int c, const auto& values, int) {
                if (line + m < a.lines) put(line + m, c, values);
              });
    if constexpr (kFirst) {
      if (!summing) return;
      float* const found = reinterpret_cast<float*>(shared_memory());  // [groups][columns]
#pragma unroll
      for (int j = 0; j < kItems; ++j) shared_store(found + int(threadIdx.x) * kItems + j, sums[j]);
      __syncthreads();
      const int c = int(threadIdx.x) * kPack;
      if (c >= Tile::kColumns) return;
      float all[kPack] = {};
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) all[j] += shared_load(found + g * Tile::kColumns + c + j);
      }
      put(a.lines, c, all);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kFlatThreads) add_weight_kernel(const WeightArguments<T> a) {
  constexpr int kPack = 16 / sizeof(T);
  const int64_t packs = tiles_of(a.out.columns, kPack), lines = a.lines + 1;
  for (int64_t i = int64_t(blockIdx.x) * kFlatThreads + threadIdx.x; i < a.routes.learners * lines * packs;
       i += int64_t(gridDim.x) * kFlatThreads) {
    const int column = int(i % packs) * kPack, line = int(i / packs % lines);
    if (line == a.lines && a.sums == nullptr) continue;
    float values[kPack];
    add_parts(a.parts, a.routes.learners * lines, i / packs, a.out.columns, column, values);
    put_weight(a, int(i / packs / lines), line, column, values);
  }
}

}  // namespace fastkd::cuda
