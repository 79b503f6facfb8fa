// A row is cut into slices of a fixed number of columns, and slices into blocks. The results of slices are merged in
// order, and so do not depend on which thread computed which slice.
#pragma once
#include "simd.h"

namespace fastkd {

inline constexpr int64_t kSlice = 8192;
inline constexpr int64_t kPartialBytes = 128;  // room for the result of one slice

// Calls body(context, slice) for every slice, in any order and on any threads.
struct SliceRunner {
  void (*run)(void* self, int64_t slices, void (*body)(void* context, int64_t slice), void* context);
  void* self;
};

inline int64_t slices_of(int64_t vocab) { return (vocab + kSlice - 1) / kSlice; }
inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

// What a slice's sums of 2^(logit scale) are relative to: a logit near the largest so far. It moves only when a block's
// largest logit exceeds it by far, so that sums are seldom rescaled.
template <class Real>
struct Origin {
  Real logit = Real(-INFINITY);

  // Moves the origin up to `top` if that is much larger, and returns the step. The sums are then to be multiplied by
  // 2^(-step scale).
  FASTKD_INLINE double raise_to(Real top, Real scale) {
    if (!(top > logit + Real(8) / scale)) return 0;
    const double step = double(top) - double(logit);
    logit = top;
    return step;
  }
  FASTKD_INLINE Real zero() const { return logit == Real(-INFINITY) ? Real(0) : logit; }
};

struct RowSlices {
  int64_t vocab;
  const SliceRunner& runner;
  char* partials;  // kPartialBytes per slice

  template <class Body>
  void for_blocks(int64_t slice, Body body) const {
    const int64_t first = slice * kSlice, last = first + kSlice < vocab ? first + kSlice : vocab;
    for (int64_t begin = first; begin < last; begin += kBlock)
      body(begin, last - begin < kBlock ? last - begin : kBlock);
  }

  // Runs body(slice) for every slice.
  template <class Body>
  void for_slices(const Body& body) const {
    runner.run(
        runner.self, slices_of(vocab), [](void* self, int64_t slice) { (*static_cast<const Body*>(self))(slice); },
        const_cast<Body*>(&body));
  }

  // Computes body(slice) for all slices and merges the results in the order of the slices by merge(all, next).
  template <class Partial, class Body, class Merge>
  Partial reduce_slices(const Body& body, const Merge& merge) const {
    static_assert(sizeof(Partial) <= kPartialBytes);
    Partial* part = reinterpret_cast<Partial*>(partials);
    for_slices([&](int64_t slice) { part[slice] = body(slice); });
    Partial all = part[0];
    for (int64_t slice = 1; slice < slices_of(vocab); ++slice) merge(all, part[slice]);
    return all;
  }
};

}  // namespace fastkd::FASTKD_ISA
