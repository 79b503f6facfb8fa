// byte_log_probs of one row: the log-sum-exp of each column's ids, and the gradient.
//
// Logarithms are relative to the row's origin, a logit near the largest one that counts. Neither a constant added to
// all logits nor very large logits then reduce the accuracy of a sum.
//
// Memory, for the empty prefix: the forward reads the row once, the backward reads it once and writes the gradient
// once. Two bytes per id of the vocabulary tables are read from the cache. For another prefix only the ids that start
// with it are read.
//
// 2^x of a block is computed first, in vectors, and then added to the columns' sums, one entry after the other. Several
// tables of sums are used in turn, so that an addition seldom has to wait for the previous one to the same column.
#pragma once
#include "../math/logit_sum.h"
#include "common/row_slices.h"

namespace fastkd {

struct ByteRow {
  int64_t ids, columns, width;  // width: columns of the logits, at least `ids`
  Row logits;
  const bool* valid;  // null: all
  int64_t valid_stride;
  const int32_t* order;
  const int16_t* column_of;
  const int32_t* segments;  // [columns, 2]
  bool whole;               // the row has the empty prefix
};

inline int64_t byte_log_probs_scratch(int64_t ids, int64_t columns) {
  return slices_of(ids) * (kPartialBytes + aligned(columns * int64_t(sizeof(double))));
}

// Writes [columns + 2] numbers: the natural logarithm of the sum of e^(logit - origin), for each column and for all
// columns together, and the origin. A column without a possible id has -inf.
using ByteSumKernel = void (*)(const ByteRow& row, const SliceRunner& runner, char* scratch, double* sums);

// Writes the gradient: factor[c] e^(logit - origin - sums[c]) for the ids of each column c, and 0 elsewhere.
using ByteGradientKernel = void (*)(const ByteRow& row, const SliceRunner& runner, const double* sums,
                                    const double* factor, const Row& gradient);

struct ByteKernels {
  ByteSumKernel sum;
  ByteGradientKernel gradient;
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

inline constexpr int64_t kTables = 8, kMostColumns = 1024;

template <class Real>
struct ByteTables {
  alignas(64) Real sums[kTables][kMostColumns];
  // Adds a block. u: 2^x of its ids. column: their columns.
  FASTKD_INLINE void add(const Real* u, const int16_t* column, int64_t count) {
    int64_t i = 0;
    for (; i + kTables <= count; i += kTables) {
#pragma GCC unroll 8
      for (int64_t t = 0; t < kTables; ++t) sums[t][column[i + t]] += u[i + t];
    }
    for (; i < count; ++i) sums[0][column[i]] += u[i];
  }
};

// A block's logits, with -inf for ids that do not count.
template <class Real>
const Real* load_valid(const ByteRow& row, int64_t begin, int64_t count, Real* buffer) {
  const Real* u = load(row.logits, begin, count, buffer);
  if (row.valid == nullptr) return u;
  const unsigned char* valid = reinterpret_cast<const unsigned char*>(row.valid) + begin * row.valid_stride;
  for (int64_t i = 0; i < count; ++i) buffer[i] = valid[i * row.valid_stride] ? u[i] : Real(-INFINITY);
  return buffer;
}

// The log-sum-exp of a column's ids in double precision, relative to the column's own largest logit.
template <class Real>
LogNormalizer segment_sum(const ByteRow& row, int64_t column) {
  const int64_t begin = row.segments[2 * column], end = row.segments[2 * column + 1];
  double top = -INFINITY, sum = 0;
  visit(row.logits.dtype, [&](auto element) {
    const auto* data = static_cast<const decltype(element)*>(row.logits.data);
    const auto logit = [&](int64_t i) {
      const int64_t id = row.order[i];
      const bool counts = row.valid == nullptr || row.valid[id * row.valid_stride];
      return counts ? double(to_float(data[id * row.logits.stride])) : -INFINITY;
    };
    for (int64_t i = begin; i < end; ++i) top = logit(i) > top ? logit(i) : top;
    const double zero = top == -INFINITY ? 0 : top;
    for (int64_t i = begin; i < end; ++i) sum += ::exp(logit(i) - zero);
  });
  return {top, ::log(sum)};
}

// A column's logarithm relative to the row's origin; -inf where none of its ids is possible.
FASTKD_INLINE double relative_to(double origin, const LogNormalizer& column) {
  const double below = column.origin - origin, log = below + column.log_sum;
  if (log != log) return log;  // NaN: the row has no valid softmax
  return below < -kImpossible ? -INFINITY : log;
}

template <class Real>
void sum_slice(const ByteRow& row, int64_t slice, double& origin_out, double* out) {
  ByteTables<Real> tables;
  for (int64_t t = 0; t < kTables; ++t) {
    for (int64_t c = 0; c < row.columns; ++c) tables.sums[t][c] = Real(0);
  }
  static const SliceRunner none{};
  const Real scale = Real(kLog2E);
  Origin<Real> origin;
  RowSlices{row.ids, none, nullptr}.for_blocks(slice, [&](int64_t begin, int64_t count) {
    alignas(64) Real buffer[kBlock], e[kBlock];
    prefetch_next(row.logits, begin, row.ids);
    const Real* u = load_valid(row, begin, count, buffer);
    const bool first = origin.logit == Real(-INFINITY);
    const double step = origin.raise_to(largest(u, count), scale);
    if (step != 0 && !first) {
      const Real factor = Real(::exp2(-step * scale));
      for (int64_t t = 0; t < kTables; ++t) {
        for (int64_t c = 0; c < row.columns; ++c) tables.sums[t][c] *= factor;
      }
    }
    const Real zero = origin.zero();
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) e[i] = exp2_of((u[i] - zero) * scale);
    tables.add(e, row.column_of + begin, count);
  });
  origin_out = origin.logit;
  for (int64_t c = 0; c < row.columns; ++c) {
    double sum = 0;
    for (int64_t t = 0; t < kTables; ++t) sum += tables.sums[t][c];
    out[c] = sum;
  }
}

template <class Real>
void whole_sums(const ByteRow& row, const SliceRunner& runner, char* scratch, double* out) {
  const RowSlices slices{row.ids, runner, scratch};
  const int64_t count = slices_of(row.ids), stride = aligned(row.columns * sizeof(double)) / sizeof(double);
  double* const origins = reinterpret_cast<double*>(scratch);
  double* const sums = reinterpret_cast<double*>(scratch + count * kPartialBytes);
  slices.for_slices([&](int64_t slice) { sum_slice<Real>(row, slice, origins[slice], sums + slice * stride); });
  double top = -INFINITY, total = 0;
  for (int64_t slice = 0; slice < count; ++slice) top = at_least(top, origins[slice]);
  for (int64_t c = 0; c < row.columns; ++c) out[c] = 0;
  for (int64_t slice = 0; slice < count; ++slice) {
    const double factor = origins[slice] == top ? 1 : ::exp(origins[slice] - top);
    for (int64_t c = 0; c < row.columns; ++c) out[c] += sums[slice * stride + c] * factor;
  }
  for (int64_t c = 0; c < row.columns; ++c) total += out[c];
  const double nan_or_zero = top - top;  // NaN if there is no finite logit
  for (int64_t c = 0; c < row.columns; ++c) {
    // Columns whose share of the row underflows are summed separately.
    out[c] = (row.segments[2 * c] == row.segments[2 * c + 1] ? -INFINITY
              : out[c] < 0x1p-100                            ? relative_to(top, segment_sum<Real>(row, c))
                                                             : ::log(out[c])) +
             nan_or_zero;
  }
  out[row.columns] = ::log(total) + nan_or_zero;
  out[row.columns + 1] = top;
}

template <class Real>
void byte_sums(const ByteRow& row, const SliceRunner& runner, char* scratch, double* out) {
  if (row.whole) return whole_sums<Real>(row, runner, scratch, out);
  double tops[kMostColumns], top = -INFINITY, total = 0;
  for (int64_t c = 0; c < row.columns; ++c) {
    const LogNormalizer column = segment_sum<Real>(row, c);
    tops[c] = column.origin;
    out[c] = column.log_sum;
    top = at_least(top, tops[c]);
  }
  for (int64_t c = 0; c < row.columns; ++c) {
    out[c] = relative_to(top, {tops[c], out[c]}) + (top - top);
    total += ::exp(out[c]);
  }
  out[row.columns] = ::log(total);
  out[row.columns + 1] = top;
}

// All parameters are passed by value: in a loop with stores the compiler must reload what it reads through references.
template <class Real>
FASTKD_INLINE void byte_gradient_block(const Real* u, const int16_t* column, const Real* origin, const Real* factor,
                                       int64_t count, Real scale, Real* out) {
  FASTKD_SIMD
  for (int64_t i = 0; i < count; ++i) {
    const int32_t c = column[i];
    out[i] = factor[c] * exp2_of((u[i] - origin[c]) * scale);
  }
}

// The same with one origin for all columns.
template <class Real>
FASTKD_INLINE void byte_gradient_block(const Real* u, const int16_t* column, const Real* factor, int64_t count,
                                       Real origin, Real scale, Real* out) {
  FASTKD_SIMD
  for (int64_t i = 0; i < count; ++i) out[i] = factor[int32_t(column[i])] * exp2_of((u[i] - origin) * scale);
}

// The gradient of an id of the column is factor e^(logit - origin).
struct ColumnGradient {
  double origin, factor;
};

// The origin is chosen near the column's sum, so that no exponential overflows or underflows, and is representable as
// Real. If the sum or the row's origin is so large that its rounding would cost accuracy, the sum is computed again
// relative to the column's own largest logit.
template <class Real>
ColumnGradient column_gradient(const ByteRow& row, int64_t c, const double* sums, double factor) {
  constexpr double kFar = sizeof(Real) == 4 ? 0x1p23 : 0x1p13;
  const double log = sums[c], origin = sums[row.columns + 1];
  if (log == -INFINITY || factor == 0) return {origin, 0};
  if (-log > kFar || magnitude(origin) > kFar) {
    const LogNormalizer own = segment_sum<Real>(row, c);
    return {own.origin, factor * ::exp(-own.log_sum)};
  }
  const double near = Real(origin + log);
  return {near, factor * ::exp((near - origin) - log)};
}

template <class Real>
void whole_gradient(const ByteRow& row, const SliceRunner& runner, const double* sums, const double* factor,
                    const Row& gradient) {
  // Exponents are relative to the row's origin, or to an origin per column where a column's share of the row is tiny.
  const Real scale = Real(kLog2E), origin = Real(sums[row.columns + 1]);
  const double all = sums[row.columns];
  bool apart = false;
  for (int64_t c = 0; c < row.columns; ++c) apart = apart || (sums[c] > -INFINITY && sums[c] - all < -60);
  alignas(64) Real origins[kMostColumns], factors[kMostColumns];
  for (int64_t c = 0; c < row.columns; ++c) {
    if (apart) {
      const ColumnGradient own = column_gradient<Real>(row, c, sums, factor[c]);
      origins[c] = Real(own.origin);
      factors[c] = Real(own.factor);
    } else {
      factors[c] = Real(sums[c] == -INFINITY ? 0 : factor[c] * ::exp(-sums[c]));
    }
  }
  const RowSlices slices{row.ids, runner, nullptr};
  slices.for_slices([&](int64_t slice) {
    slices.for_blocks(slice, [&](int64_t begin, int64_t count) {
      alignas(64) Real in_buffer[kBlock], out_buffer[kBlock];
      prefetch_next(row.logits, begin, row.ids);
      const Real* u = load_valid(row, begin, count, in_buffer);
      Real* out = destination(gradient, begin, out_buffer);
      if (apart) {
        byte_gradient_block(u, row.column_of + begin, origins, factors, count, scale, out);
      } else {
        byte_gradient_block(u, row.column_of + begin, factors, count, origin, scale, out);
      }
      store(gradient, begin, count, out);
    });
    finish_streaming(gradient);
  });
  fill_zero(gradient, row.ids, row.width);
}

template <class Real>
void byte_gradient(const ByteRow& row, const SliceRunner& runner, const double* sums, const double* factor,
                   const Row& gradient) {
  if (row.whole) return whole_gradient<Real>(row, runner, sums, factor, gradient);
  fill_zero(gradient, 0, row.width);
  for (int64_t c = 0; c < row.columns; ++c) {
    if (sums[c] == -INFINITY) continue;
    const ColumnGradient own = column_gradient<Real>(row, c, sums, factor[c]);
    for (int64_t i = row.segments[2 * c]; i < row.segments[2 * c + 1]; ++i) {
      const int64_t id = row.order[i];
      if (row.valid != nullptr && !row.valid[id * row.valid_stride]) continue;
      Real value;
      put_element(gradient, id, own.factor * ::exp(double(*load(row.logits, id, 1, &value)) - own.origin));
    }
  }
}

extern const Precisions<ByteKernels> byte_kernels;

}  // namespace fastkd::FASTKD_ISA
