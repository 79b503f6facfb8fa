// byte_log_probs on the GPU: its arguments, and sums over a column's ids, gathered by one warp.
#pragma once
#include "../math/logit_sum.h"
#include "common/sources.cuh"

namespace fastkd::cuda {

struct ByteArguments {
  static constexpr int64_t kNoPrefix = -1, kNeverWhole = -2;
  int64_t rows, prefixes, whole;  // whole: a prefix number, or kNeverWhole
  int ids, columns, width;
  int slices, slice;  // number of slices of the ids, and ids per slice: a multiple of 8
  const int32_t *order, *segments;
  const int16_t* column_of;
  DeviceRows logits, gradient, prefix, valid;
  const float* grad_output;  // [rows, columns]
  float* out;
  double* sums;     // [rows, columns + 2]: see ByteProblem::sums_per_row
  float* partials;  // [rows, slices, columns + 1]; null: the slices belong to a cluster's blocks

  // The row's prefix number; kNoPrefix if it is out of range.
  __device__ int64_t prefix_of(int64_t row) const {
    const int64_t index = prefix ? prefix.integer(row) : 0;
    return index >= 0 && index < prefixes ? index : kNoPrefix;
  }
  __device__ double* sums_of(int64_t row) const { return sums + row * (columns + 2); }
  // Stores the numbers that all columns have in common.
  __device__ void keep(int64_t row, double all, double origin) const {
    global_store(sums_of(row) + columns, all);
    global_store(sums_of(row) + columns + 1, origin);
  }
  // The tables are not checked on the host, so a column out of range is replaced.
  __device__ __forceinline__ int column(int id) const {
    const int c = global_load(column_of + id);
    return unsigned(c) < unsigned(columns) ? c : 0;
  }
  __device__ __forceinline__ bool counts(const char* valid_row, int id) const {
    return !valid || global_load(reinterpret_cast<const bool*>(valid_row + id * valid.column_stride));
  }
};

// Places [begin, end) of `order`.
struct Segment {
  int begin, end;
};

__device__ inline Segment segment_of(const ByteArguments& a, int64_t prefix, int column) {
  const int32_t* const place = a.segments + (prefix * a.columns + column) * 2;
  const auto inside = [&](int x) { return x < 0 ? 0 : x < a.ids ? x : a.ids; };
  return {inside(global_load(place)), inside(global_load(place + 1))};
}

// A lane's share of a sum of e^logit, relative to the lane's largest logit.
struct GatherSum {
  float origin = -INFINITY;
  double sum = 0;

  __device__ __forceinline__ void raise(float to) {
    if (to == origin) return;
    sum *= exp2_of((origin - to) * float(kLog2E));  // a factor of 0 if there was no origin yet; the sum is 0 then
    origin = to;
  }
};

// A log-sum-exp in eight bytes: the largest logit (-inf if no id is possible), and the logarithm of the sum relative to
// it, in units of 2^-27. That logarithm is at least 0 and less than 32.
struct SegmentSum {
  float top;
  unsigned steps;

  static __device__ __forceinline__ SegmentSum of(float top, double sum) {
    if (top == -INFINITY && sum == 0) return {top, 0};
    const double log = ::log(sum);
    return log >= 0 && log < 32 ? SegmentSum{top, unsigned(log * 0x1p27 + 0.5)} : SegmentSum{NAN, 0};
  }
  __device__ __forceinline__ double log() const { return steps * 0x1p-27; }
  // A column's logarithm relative to the row's origin; -inf where none of its ids is possible.
  __device__ __forceinline__ double relative_to(float origin) const {
    const double below = double(top) - double(origin);
    return below < -kImpossible ? -double(INFINITY) : below + log();
  }
};

// The log-sum-exp of a segment's ids, computed by one warp.
inline __device__ SegmentSum gathered_sum(const ByteArguments& a, int64_t row, Segment segment) {
  constexpr int kAhead = 4;
  const char *const logits = a.logits.at(row), *const valid = a.valid ? a.valid.at(row) : nullptr;
  const int lane = int(threadIdx.x) % kWarp;
  GatherSum mine;
#pragma unroll 1
  for (int begin = segment.begin; begin < segment.end; begin += kAhead * kWarp) {
    float x[kAhead], top = -INFINITY;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int i = begin + k * kWarp + lane;
      x[k] = -INFINITY;
      if (i >= segment.end) continue;
      const int id = global_load(a.order + i);
      if (unsigned(id) >= unsigned(a.ids)) {
        x[k] = NAN;
      } else if (a.counts(valid, id)) {
        x[k] = a.logits.float_at(logits + id * a.logits.column_stride * a.logits.element_size);
      }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) top = x[k] > top ? x[k] : top;
    if (top > mine.origin) mine.raise(top);
    const float zero = mine.origin == -INFINITY ? 0 : mine.origin;
    float part = 0;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) part += exp2_of((x[k] - zero) * float(kLog2E));
    mine.sum += part;
  }
  const float top = warp_reduce<true>(mine.origin, [](float& all, float next) { all = at_least(all, next); });
  mine.raise(top);
  return SegmentSum::of(top, warp_reduce<true>(mine.sum, [](double& all, double next) { all += next; }));
}

// own, all: the logarithms of the column's sum and of the sum over all columns.
inline __device__ void write_column(const ByteArguments& a, int64_t row, int column, double own, double all) {
  const double log = own - all;
  global_store(a.out + row * a.columns + column, float(log > 0 ? 0 : log));
  global_store(a.sums_of(row) + column, own);
}

}  // namespace fastkd::cuda
