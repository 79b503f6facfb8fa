// One row of byte_log_probs: log-sum-exps of the ids of each column, and the gradient.
//
// Memory, for the empty prefix: forward one read of the row, backward one read and one write; of the vocabulary two
// bytes an id, from the cache. For another prefix only the ids that start with it are read.
//
// What 2^x is of a block is computed first, in vectors, and then added up by column, one after the other: several
// tables take turns, so that an addition seldom waits for the one before.
#pragma once
#include "../math/elementary.h"
#include "row_slices.h"

namespace fastkd {

struct ByteRow {
  int64_t ids, columns, width;  // width: of the logits, ids or more
  Row logits;
  const bool* valid;  // null: all
  int64_t valid_stride;
  const int32_t* order;
  const int16_t* column_of;
  const int32_t* segments;  // [columns, 2]
  bool whole;               // the empty prefix
};

inline int64_t byte_log_probs_scratch(int64_t ids, int64_t columns) {
  return slices_of(ids) * (kPartialBytes + aligned(columns * int64_t(sizeof(double))));
}

// The natural logarithm of each column's sum of e^logit to out -> that of all.
using ByteSumKernel = double (*)(const ByteRow& row, const SliceRunner& runner, char* scratch, double* out);

// Adds up, of column c, factor[c] e^(logit - lse[c]), into the gradient; all else is zero. lse, factor: one a column.
using ByteGradientKernel = void (*)(const ByteRow& row, const SliceRunner& runner, double lse_of_row, const double* lse,
                                    const double* factor, const Row& gradient);

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

inline constexpr int64_t kTables = 8, kMostColumns = 1024;

template <class Real>
struct ByteTables {
  alignas(64) Real sums[kTables][kMostColumns];
  // u: 2^x of a block whose ids have these columns.
  FASTKD_INLINE void add(const Real* u, const int16_t* column, int64_t count) {
    int64_t i = 0;
    for (; i + kTables <= count; i += kTables) {
#pragma GCC unroll 8
      for (int64_t t = 0; t < kTables; ++t) sums[t][column[i + t]] += u[i + t];
    }
    for (; i < count; ++i) sums[0][column[i]] += u[i];
  }
};

// A block's logits, those that do not count -inf.
template <class Real>
const Real* load_valid(const ByteRow& row, int64_t begin, int64_t count, Real* buffer) {
  const Real* u = load(row.logits, begin, count, buffer);
  if (row.valid == nullptr) return u;
  const unsigned char* valid = reinterpret_cast<const unsigned char*>(row.valid) + begin * row.valid_stride;
  for (int64_t i = 0; i < count; ++i) buffer[i] = valid[i * row.valid_stride] ? u[i] : Real(-INFINITY);
  return buffer;
}

// The log-sum-exp of ids order[begin, end), in double.
template <class Real>
double segment_lse(const ByteRow& row, int64_t begin, int64_t end) {
  double top = -INFINITY, sum = 0;
  visit(row.logits.dtype, [&](auto element) {
    const auto* data = static_cast<const decltype(element)*>(row.logits.data);
    const auto logit = [&](int64_t i) {
      const int64_t id = row.order[i];
      const bool counts = row.valid == nullptr || row.valid[id * row.valid_stride];
      return counts ? double(to_float(data[id * row.logits.stride])) : -INFINITY;
    };
    for (int64_t i = begin; i < end; ++i) top = logit(i) > top ? logit(i) : top;
    if (top == -INFINITY) top = 0;
    for (int64_t i = begin; i < end; ++i) sum += ::exp(logit(i) - top);
  });
  return top + ::log(sum);
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
    const double step = origin.follow(largest(u, count), scale);
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
double whole_sums(const ByteRow& row, const SliceRunner& runner, char* scratch, double* out) {
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
  const double poison = top - top;  // NaN without a finite logit
  for (int64_t c = 0; c < row.columns; ++c) {
    const int64_t begin = row.segments[2 * c], end = row.segments[2 * c + 1];
    // A share of the row that underflows is summed by itself.
    out[c] = (begin == end        ? -INFINITY
              : out[c] < 0x1p-100 ? segment_lse<Real>(row, begin, end)
                                  : top + ::log(out[c])) +
             poison;
  }
  return top + ::log(total) + poison;
}

template <class Real>
double byte_sums(const ByteRow& row, const SliceRunner& runner, char* scratch, double* out) {
  if (row.whole) return whole_sums<Real>(row, runner, scratch, out);
  double top = -INFINITY, total = 0;
  for (int64_t c = 0; c < row.columns; ++c) {
    out[c] = row.segments[2 * c] == row.segments[2 * c + 1]
                 ? -INFINITY
                 : segment_lse<Real>(row, row.segments[2 * c], row.segments[2 * c + 1]);
    top = at_least(top, out[c]);
  }
  for (int64_t c = 0; c < row.columns; ++c) total += ::exp(out[c] - top);
  return top + ::log(total) + (top - top);
}

// Everything by value: what a loop reads through references it cannot keep in registers beside its stores.
template <class Real>
FASTKD_INLINE void byte_gradient_block(const Real* u, const int16_t* column, const Real* origin, const Real* factor,
                                       int64_t count, Real scale, Real* out) {
  FASTKD_SIMD
  for (int64_t i = 0; i < count; ++i) {
    const int32_t c = column[i];
    out[i] = factor[c] * exp2_of((u[i] - origin[c]) * scale);
  }
}

// The same with one origin.
template <class Real>
FASTKD_INLINE void byte_gradient_block(const Real* u, const int16_t* column, const Real* factor, int64_t count,
                                       Real origin, Real scale, Real* out) {
  FASTKD_SIMD
  for (int64_t i = 0; i < count; ++i) out[i] = factor[int32_t(column[i])] * exp2_of((u[i] - origin) * scale);
}

template <class Real>
void whole_gradient(const ByteRow& row, const SliceRunner& runner, double lse_of_row, const double* lse,
                    const double* factor, const Row& gradient) {
  // Exponents are relative to the row's sum or, where a column's share of it is tiny, to the column's own.
  const Real scale = Real(kLog2E), origin = Real(lse_of_row);
  bool apart = false;
  for (int64_t c = 0; c < row.columns; ++c) apart = apart || (lse[c] > -INFINITY && lse[c] - lse_of_row < -60);
  alignas(64) Real origins[kMostColumns], factors[kMostColumns];
  for (int64_t c = 0; c < row.columns; ++c) {
    origins[c] = !apart ? origin : lse[c] == -INFINITY ? Real(0) : Real(lse[c]);
    factors[c] = Real(lse[c] == -INFINITY ? 0 : factor[c] * ::exp(double(origins[c]) - lse[c]));
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
void byte_gradient(const ByteRow& row, const SliceRunner& runner, double lse_of_row, const double* lse,
                   const double* factor, const Row& gradient) {
  if (row.whole) return whole_gradient<Real>(row, runner, lse_of_row, lse, factor, gradient);
  fill_zero(gradient, 0, row.width);
  for (int64_t c = 0; c < row.columns; ++c) {
    if (lse[c] == -INFINITY) continue;
    for (int64_t i = row.segments[2 * c]; i < row.segments[2 * c + 1]; ++i) {
      const int64_t id = row.order[i];
      if (row.valid != nullptr && !row.valid[id * row.valid_stride]) continue;
      Real value;
      put_element(gradient, id, factor[c] * ::exp(double(*load(row.logits, id, 1, &value)) - lse[c]));
    }
  }
}

}  // namespace fastkd::FASTKD_ISA
