// A row cut in slices of a fixed number of columns, and those in blocks: what is found in slices is merged in order and
// does not depend on which thread took which.
#pragma once
#include "simd.h"

namespace fastkd {

inline constexpr int64_t kSlice = 8192;
inline constexpr int64_t kPartialBytes = 128;  // of what is found in a slice

// Calls body(context, slice) for every slice, in any order, on any threads.
struct SliceRunner {
  void (*run)(void* self, int64_t slices, void (*body)(void* context, int64_t slice), void* context);
  void* self;
};

inline int64_t slices_of(int64_t vocab) { return (vocab + kSlice - 1) / kSlice; }
inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

// What a slice's sums of 2^(logit scale) are relative to: a logit that follows the largest at a distance, so that it
// seldom moves.
template <class Real>
struct Origin {
  Real logit = Real(-INFINITY);

  // Moves up to `top` where that is much larger: sums are then to be multiplied by 2^(-step scale).
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
  char* partials;  // kPartialBytes a slice

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

  // Sums up what body(slice) returns, in the order of the slices: merge(all, next).
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
