// Matrix products of float32, C = A B, one panel of C after the other. Between panels the caller may process the
// finished panel.
//
// A tile is kTileRows x kTileColumns sums that stay in registers while k advances; a panel is one column of tiles. The
// first tile of a panel copies the panel's part of B into contiguous memory as it reads it; the other tiles read that
// copy. A is read in place. Every tile sums over k in the same order, so that a row's result does not depend on the
// other rows.
//
// The code uses the compiler's vector types, with the width of the instruction set, since the vectoriser does not keep
// a tile's sums in registers in a plain loop.
#pragma once
#include <utility>

#include "simd.h"

namespace fastkd::FASTKD_ISA {

// A tile's sums must leave room for one row of the panel and an element of A among the 32 (or 16) vector registers.
// kDepth: how many k are processed at a time, so that the panel's part of B stays in the L2 cache (or in L1, where a
// tile has fewer rows and therefore reads B more often). Up to kFewRows rows are multiplied without panels.
#if defined(__AVX512F__)
inline constexpr int kLanes = 16, kTileRows = 14, kTileVectors = 2, kDepth = 768, kFewRows = 12;
#elif defined(__AVX__)
inline constexpr int kLanes = 8, kTileRows = 4, kTileVectors = 3, kDepth = 384, kFewRows = 24;
#elif defined(__aarch64__)
inline constexpr int kLanes = 4, kTileRows = 8, kTileVectors = 3, kDepth = 384, kFewRows = 12;
#else
inline constexpr int kLanes = 4, kTileRows = 4, kTileVectors = 3, kDepth = 384, kFewRows = 24;
#endif
inline constexpr int kTileColumns = kLanes * kTileVectors;
// The largest width, in vectors, of a piece in multiply_few: the fewer rows, the wider the piece.
inline constexpr int kWideVectors = 4 * kTileVectors;
inline constexpr int64_t kPackedFloats = int64_t(kDepth) * kTileColumns;
// How many k ahead the first tile prefetches B.
inline constexpr int kAhead = 16;

using Vector = float __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// A(i, k). RowMajor: `stride` floats between rows. TileMajor: contiguous, for each k the kTileRows rows of a tile.
struct RowMajor {
  const float* data;
  int64_t stride;
  FASTKD_INLINE RowMajor at(int64_t row, int64_t k) const { return {data + row * stride + k, stride}; }
};
struct TileMajor {
  const float* data;
  int64_t depth;  // of all tiles
  FASTKD_INLINE TileMajor at(int64_t row, int64_t k) const {
    return {data + row / kTileRows * kTileRows * depth + row % kTileRows + k * kTileRows, depth};
  }
};

// a * b + c, rounded as a vector lane rounds it on this instruction set.
FASTKD_INLINE float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// C(i, j) at rows[i] + j.
using RowPointers = float* const*;
using ConstRowPointers = const float* const*;

// out(i, j) = start(i, j) + sum_k A(i, k) B(k, j), with start = 0 if it is null; start and out may be the same. kCopy:
// B is read from `b` with `stride` and copied to `packed`. Otherwise B is read from `packed`, and one row of `b`, which
// is needed soon, is prefetched every kAhead values of k.
template <int kRows, bool kCopy, class A>
__attribute__((noinline)) void multiply_tile(A a, const float* b, int64_t stride, float* packed, int64_t depth,
                                             ConstRowPointers start, RowPointers out, int64_t column) {
  Vector sums[kRows][kTileVectors] = {};
  // The tile's part of `start`, in rows far apart, which the hardware prefetcher does not predict. It arrives while k
  // runs.
  for (int i = 0; start && i < kRows; ++i) {
    for (int j = 0; j < kTileColumns; j += 16) __builtin_prefetch(start[i] + column + j, 1, 3);
  }
  // One pointer per three rows: the other two are one and two strides away, which an address operand can express.
  constexpr int kPointers = (kRows + 2) / 3;
  const float* rows[kPointers];
  if constexpr (__is_same(A, RowMajor)) {
    for (int p = 0; p < kPointers; ++p) rows[p] = a.data + 3 * p * a.stride;
  }
  for (int64_t first = 0; first < depth; first += kAhead) {
    if (!kCopy) {
      for (int j = 0; j < kTileColumns; j += 16) __builtin_prefetch(b + j, 0, 2);
      b += stride;
    }
    const int64_t end = depth - first < kAhead ? depth : first + kAhead;
#pragma GCC unroll 1
    for (int64_t k = first; k < end; ++k) {
      Vector of_b[kTileVectors];
      const float* from = kCopy ? b : packed;
      for (int j = 0; j < kTileVectors; ++j) of_b[j] = *reinterpret_cast<const Vector*>(from + j * kLanes);
      if constexpr (kCopy) {
        for (int j = 0; j < kTileVectors; ++j) *reinterpret_cast<Vector*>(packed + j * kLanes) = of_b[j];
        for (int j = 0; j < kTileColumns; j += 16) __builtin_prefetch(b + kAhead * stride + j, 0, 3);
        b += stride;
      }
      packed += kTileColumns;
      for (int i = 0; i < kRows; ++i) {
        float x;
        if constexpr (__is_same(A, RowMajor)) {
          x = rows[i / 3][i % 3 * a.stride];
        } else {
          x = a.data[i];
        }
        for (int j = 0; j < kTileVectors; ++j) sums[i][j] += x * of_b[j];
      }
      if constexpr (__is_same(A, RowMajor)) {
        for (int p = 0; p < kPointers; ++p) ++rows[p];
      } else {
        a.data += kTileRows;
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kTileVectors; ++j) {
      const int64_t at = column + j * kLanes;
      if (start) sums[i][j] += *reinterpret_cast<const Vector*>(start[i] + at);
      *reinterpret_cast<Vector*>(out[i] + at) = sums[i][j];
    }
  }
}

// The columns of B that belong to one panel, and how they are laid out.
struct Panel {
  const float* data;  // B(k, 0) at data + k * stride
  int64_t stride;
  ConstRowPointers rows;    // or at rows[k] + column
  bool transposed;          // or B(0, j) at data + j * stride
  int64_t column, columns;  // of B and of C; at most kTileColumns, except in multiply_few
  float* packed;            // null, or the whole panel as pack() writes it
  bool copied_by_tile() const { return packed == nullptr && rows == nullptr && !transposed && columns == kTileColumns; }
};

// Interleaves the lower halves of two vectors, and the upper halves.
template <int... kLane>
FASTKD_INLINE void interleave(const Vector& a, const Vector& b, Vector& low, Vector& high,
                              std::integer_sequence<int, kLane...>) {
  low = __builtin_shufflevector(a, b, (kLane / 2 + kLane % 2 * kLanes)...);
  high = __builtin_shufflevector(a, b, (kLanes / 2 + kLane / 2 + kLane % 2 * kLanes)...);
}

// Transposes: v[i][j] becomes v[j][i]. Each round interleaves pairs of vectors that are kLanes / 2 apart.
FASTKD_INLINE void transpose(Vector* v) {
  for (int round = 1; round < kLanes; round *= 2) {
    Vector next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      interleave(v[i], v[i + kLanes / 2], next[2 * i], next[2 * i + 1], std::make_integer_sequence<int, kLanes>());
    }
    for (int i = 0; i < kLanes; ++i) v[i] = next[i];
  }
}

// packed[k][j] = B(first + k, column + j), and 0 beyond the panel's columns.
inline void pack(const Panel& panel, int64_t first, int64_t depth, float* packed) {
  if (!panel.transposed) {
    for (int64_t k = 0; k < depth; ++k, packed += kTileColumns) {
      const float* row = (panel.rows ? panel.rows[first + k] : panel.data + (first + k) * panel.stride) + panel.column;
      if (panel.columns == kTileColumns) {
        __builtin_memcpy(packed, row, sizeof(float) * kTileColumns);
      } else {
        __builtin_memset(packed, 0, sizeof(float) * kTileColumns);
        __builtin_memcpy(packed, row, sizeof(float) * panel.columns);
      }
    }
    return;
  }
  const float* data = panel.data + panel.column * panel.stride + first;
  for (int64_t j = 0; j < kTileColumns; j += kLanes) {
    int64_t k = 0;
    for (; k + kLanes <= depth && j + kLanes <= panel.columns; k += kLanes) {
      Vector block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = *reinterpret_cast<const Vector*>(data + (j + i) * panel.stride + k);
      transpose(block);
      for (int i = 0; i < kLanes; ++i) *reinterpret_cast<Vector*>(packed + (k + i) * kTileColumns + j) = block[i];
    }
    for (; k < depth; ++k) {
      for (int i = 0; i < kLanes; ++i) {
        packed[k * kTileColumns + j + i] = j + i < panel.columns ? data[(j + i) * panel.stride + k] : 0.0f;
      }
    }
  }
}

// A tile of kRows rows. `b` and `stride`: the data that the tile copies, or prefetches.
template <int kRows, class A>
FASTKD_INLINE void multiply_rows(bool copy, A a, const Panel& panel, const float* b, int64_t stride, int64_t depth,
                                 float* packed, ConstRowPointers start, RowPointers out) {
  if (panel.columns == kTileColumns) {
    const auto multiply = copy ? multiply_tile<kRows, true, A> : multiply_tile<kRows, false, A>;
    return multiply(a, b, stride, packed, depth, start, out, panel.column);
  }
  // The panel is narrower than a tile: compute the tile in a buffer.
  float tile[kRows][kTileColumns] = {};
  float* rows[kRows];
  for (int i = 0; i < kRows; ++i) {
    rows[i] = tile[i];
    if (start) __builtin_memcpy(tile[i], start[i] + panel.column, sizeof(float) * panel.columns);
  }
  multiply_tile<kRows, false>(a, packed, 0, packed, depth, start ? rows : nullptr, rows, 0);
  for (int i = 0; i < kRows; ++i) __builtin_memcpy(out[i] + panel.column, tile[i], sizeof(float) * panel.columns);
}

// sums(i, j) += sum_k A(i, k) B(k, j) for kVectors vectors of columns, adding in the same order as a tile does.
template <int kRows, int kVectors>
FASTKD_INLINE void multiply_piece(RowMajor a, const float* b, int64_t stride, int64_t depth, int64_t ahead, float* sums,
                                  int64_t columns) {
  Vector all[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) all[i][j] = *reinterpret_cast<Vector*>(sums + i * columns + j * kLanes);
  }
  for (int64_t k = 0; k < depth; ++k, b += stride) {
    for (int j = 0; j < kVectors * kLanes; j += 16) __builtin_prefetch(b + ahead + j, 0, 3);
    Vector of_b[kVectors];
    for (int j = 0; j < kVectors; ++j) of_b[j] = *reinterpret_cast<const Vector*>(b + j * kLanes);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kVectors; ++j) all[i][j] += a.data[i * a.stride + k] * of_b[j];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) *reinterpret_cast<Vector*>(sums + i * columns + j * kLanes) = all[i][j];
  }
}

// The same for `width` columns. The sums of consecutive rows are `columns` apart.
template <int kRows>
__attribute__((noinline)) void multiply_strip(RowMajor a, const float* b, int64_t stride, int64_t depth, int64_t ahead,
                                              float* sums, int64_t columns, int64_t width) {
  constexpr int kSums = kTileRows * kTileVectors / 12 * 12;
  constexpr int kVectors = kSums / kRows < kWideVectors ? kSums / kRows : kWideVectors;
  int64_t j = 0;
  for (; j + kVectors * kLanes <= width; j += kVectors * kLanes) {
    multiply_piece<kRows, kVectors>(a, b + j, stride, depth, ahead, sums + j, columns);
  }
  for (; j + kLanes <= width; j += kLanes) {
    multiply_piece<kRows, 1>(a, b + j, stride, depth, ahead, sums + j, columns);
  }
  for (; j < width; ++j) {
    for (int i = 0; i < kRows; ++i) {
      float& sum = sums[i * columns + j];
      for (int64_t k = 0; k < depth; ++k) sum = multiply_add(a.at(i, k).data[0], b[k * stride + j], sum);
    }
  }
}

// The panel's columns for so few rows that reading B is the main cost. A few rows of B are processed at a time, so that
// B is read as nearly in sequence as the columns allow, and each page of it is visited once. `sums` has room for whole
// vectors.
inline void multiply_few(RowMajor a, int64_t rows, const Panel& panel, int64_t depth, float* sums,
                         ConstRowPointers start, RowPointers out) {
  const int64_t columns = (panel.columns + kLanes - 1) / kLanes * kLanes, step = rows < 8 ? 8 : 16;
  for (int64_t first = 0; first < depth || first == 0; first += kDepth, start = out) {
    const int64_t end = depth - first < kDepth ? depth : first + kDepth;
    __builtin_memset(sums, 0, sizeof(float) * rows * columns);
    for (int64_t k = first; k < end; k += step) {
      const int64_t part = end - k < step ? end - k : step;
      const float* const b = panel.data + k * panel.stride + panel.column;
      int64_t row = 0;
      const auto multiply = [&](auto count) {
        constexpr int kRows = decltype(count)::value;
        for (; row + kRows <= rows; row += kRows) {
          multiply_strip<kRows>(a.at(row, k), b, panel.stride, part, row == 0 ? step * panel.stride : 0,
                                sums + row * columns, columns, panel.columns);
        }
      };
      if constexpr (kTileRows >= 8) multiply(Count<8>());
      multiply(Count<4>());
      multiply(Count<3>());
      multiply(Count<2>());
      multiply(Count<1>());
    }
    for (int64_t i = 0; i < rows; ++i) {
      const float* const from = start ? start[i] + panel.column : nullptr;
      float* const to = out[i] + panel.column;
      FASTKD_SIMD
      for (int64_t j = 0; j < panel.columns; ++j)
        to[j] = from ? sums[i * columns + j] + from[j] : sums[i * columns + j];
    }
  }
}

// C(i, j) = start(i, j) + sum_k A(i, k) B(k, j) for `rows` rows and the panel's columns. `room` holds kPackedFloats.
template <class A>
void multiply_panel(A a, int64_t rows, const Panel& panel, int64_t depth, float* room, ConstRowPointers start,
                    RowPointers out) {
  int64_t first = 0;
  do {
    const int64_t part = depth - first < kDepth ? depth - first : kDepth;
    const bool in_place = panel.copied_by_tile();
    float* const packed = panel.packed ? panel.packed + first * kTileColumns : room;
    if (!in_place && panel.packed == nullptr) pack(panel, first, part, packed);
    const float* const b = in_place ? panel.data + first * panel.stride + panel.column : packed;
    // The tiles prefetch the next panel of B, or the next part of packed panels, some rows per tile.
    const float* next = in_place ? b + kTileColumns : packed + part * kTileColumns;
    const int64_t stride = in_place ? panel.stride : kTileColumns;
    int64_t row = 0, left = in_place || panel.packed ? part : 0;
    const auto multiply = [&](auto count) {
      constexpr int kRows = decltype(count)::value;
      for (; row + kRows <= rows; row += kRows) {
        const bool copy = in_place && row == 0;
        const float* const far = copy ? b : left > 0 ? next : packed;
        multiply_rows<kRows>(copy, a.at(row, first), panel, far, far == packed ? 0 : stride, part, packed,
                             start ? start + row : nullptr, out + row);
        if (copy) continue;
        next += part / kAhead * stride;
        left -= part / kAhead;
      }
    };
    multiply(Count<kTileRows>());
    if constexpr (kTileRows > 8) multiply(Count<8>());
    if constexpr (kTileRows > 4) multiply(Count<4>());
    multiply(Count<2>());
    multiply(Count<1>());
    first += part;
    start = out;
  } while (first < depth);
}

}  // namespace fastkd::FASTKD_ISA
