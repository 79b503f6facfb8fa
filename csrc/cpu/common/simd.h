// Moves blocks of a row between memory (any dtype, any stride) and arithmetic (float, or double for float64). Kernels
// work on one block at a time, so that it stays in the L1 cache between the loops over it.
#pragma once
#include "../../arguments/row.h"
#include "../../math/float16.h"
#include "precisions.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

#define FASTKD_SIMD _Pragma("omp simd")
#define FASTKD_STRINGIZE(...) #__VA_ARGS__
#define FASTKD_SIMD_WITH(...) _Pragma(FASTKD_STRINGIZE(omp simd __VA_ARGS__))
#define FASTKD_SIMD_REDUCE(...) FASTKD_SIMD_WITH(reduction(__VA_ARGS__))

namespace fastkd {

inline constexpr int64_t kBlock = 512;

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

template <class Real>
inline constexpr Dtype kDtypeOf = sizeof(Real) == sizeof(float) ? Dtype::kFloat32 : Dtype::kFloat64;

// Calls body with a value of the element type that the dtype stands for.
template <class Body>
FASTKD_INLINE void visit(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat32:
      return body(float());
    case Dtype::kFloat64:
      return body(double());
    case Dtype::kBFloat16:
      return body(BFloat16());
    case Dtype::kFloat16:
      return body(Float16());
  }
}

FASTKD_INLINE int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

template <class Element, class Real>
void load_as(const Row& row, int64_t begin, int64_t count, Real* out) {
  const Element* in = static_cast<const Element*>(row.data) + begin * row.stride;
  if (row.stride == 1) {
    FASTKD_SIMD
    for (int64_t i = 0; i < count; ++i) out[i] = Real(to_float(in[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = Real(to_float(in[i * row.stride]));
  }
}

// Prefetches elements [begin, begin + count). Loops with much arithmetic on little data do not run far enough ahead to
// keep the memory system busy.
FASTKD_INLINE void prefetch(const Row& row, int64_t begin, int64_t count) {
  const int64_t size = size_of(row.dtype);
  if (row.stride != 1) return;
  const char* first = static_cast<const char*>(row.data) + begin * size;
  for (int64_t i = 0; i < count * size; i += 64) __builtin_prefetch(first + i, 0, 3);
}

// Prefetches the block that comes `blocks` after the one that begins at `begin`, as far as column `end`. Passes with
// little arithmetic need more than one block ahead.
FASTKD_INLINE void prefetch_next(const Row& row, int64_t begin, int64_t end, int64_t blocks = 1) {
  const int64_t ahead = begin + blocks * kBlock;
  if (ahead < end) prefetch(row, ahead, end - ahead < kBlock ? end - ahead : kBlock);
}

// Elements [begin, begin + count) of the row as given, not mapped: in place where the row holds contiguous Reals, else
// in `buffer`.
template <class Real>
const Real* load_plain(const Row& row, int64_t begin, int64_t count, Real* buffer) {
  if (row.dtype == kDtypeOf<Real> && row.stride == 1) return static_cast<const Real*>(row.data) + begin;
  visit(row.dtype, [&](auto element) { load_as<decltype(element)>(row, begin, count, buffer); });
  return buffer;
}

template <class Real>
__attribute__((noinline)) const Real* load_mapped(const Row& row, int64_t begin, int64_t count, Real* buffer) {
  const Real* const z = load_plain(row, begin, count, buffer);
  const LogitFunction<Real> function(row.map);
  FASTKD_SIMD
  for (int64_t i = 0; i < count; ++i) buffer[i] = function.value(z[i]);
  return buffer;
}

// Elements [begin, begin + count) of the row as Real, mapped if they are logits with a map: in place where the row
// holds contiguous Reals without a map, else in `buffer`.
template <class Real>
const Real* load(const Row& row, int64_t begin, int64_t count, Real* buffer) {
  return row.map ? load_mapped(row, begin, count, buffer) : load_plain(row, begin, count, buffer);
}

// Where to compute a block that is then stored to the row: in the row itself, or in `buffer`, which `store` converts.
// The gradient of mapped logits is never computed in place: it may overwrite the logits, which `store` still needs.
template <class Real>
Real* destination(const Row& row, int64_t begin, Real* buffer) {
  const bool direct = row.dtype == kDtypeOf<Real> && row.stride == 1 && !row.streamed && row.logits == nullptr;
  return direct ? static_cast<Real*>(row.data) + begin : buffer;
}

// Copies with stores that bypass the caches. A gradient larger than the caches is evicted before it is read again, and
// a plain store would first read the cache line that it overwrites. Whole lines are stored at once where the
// instruction set can; 16-byte stores fill a line in the write-combining buffer on every x86-64.
#ifdef __SSE2__
FASTKD_INLINE void stream_16(char* out, const char* in) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(out), _mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
}
#endif
inline void stream_copy(char* out, const char* in, int64_t bytes) {
#ifdef __SSE2__
  const int64_t head = (-reinterpret_cast<intptr_t>(out)) & 15;
  if (head < bytes) {
    __builtin_memcpy(out, in, head);
    int64_t i = head;
#ifdef __AVX512F__
    for (; i + 16 <= bytes && (reinterpret_cast<intptr_t>(out + i) & 63) != 0; i += 16) stream_16(out + i, in + i);
    for (; i + 64 <= bytes; i += 64) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), _mm512_loadu_si512(in + i));
    }
#endif
    for (; i + 16 <= bytes; i += 16) stream_16(out + i, in + i);
    __builtin_memcpy(out + i, in + i, bytes - i);
    return;
  }
#endif
  __builtin_memcpy(out, in, bytes);
}

// To be called before another thread may read streamed data: streaming stores are not ordered with other stores.
inline void finish_streaming(const Row& row) {
#ifdef __SSE2__
  if (row.streamed) _mm_sfence();
#else
  (void)row;
#endif
}

template <class Element, class Real>
void store_as(const Row& row, int64_t begin, int64_t count, const Real* in) {
  Element* out = static_cast<Element*>(row.data) + begin * row.stride;
  if (row.stride != 1) {
    for (int64_t i = 0; i < count; ++i) from_float(in[i], out[i * row.stride]);
    return;
  }
  if constexpr (sizeof(Element) == sizeof(Real)) {
    if (row.streamed) {
      return stream_copy(reinterpret_cast<char*>(out), reinterpret_cast<const char*>(in), count * sizeof(Element));
    }
  }
  alignas(64) Element converted[kBlock];
  Element* to = row.streamed ? converted : out;
  FASTKD_SIMD
  for (int64_t i = 0; i < count; ++i) from_float(in[i], to[i]);
  if (row.streamed)
    stream_copy(reinterpret_cast<char*>(out), reinterpret_cast<const char*>(to), count * sizeof(Element));
}

// Stores the gradient by mapped logits as that by the logits as given.
template <class Real>
__attribute__((noinline)) void store_by_slopes(const Row& row, int64_t begin, int64_t count, const Real* block) {
  alignas(64) Real buffer[kBlock], scaled[kBlock];
  const Real* const z = load_plain(*row.logits, begin, count, buffer);
  const LogitFunction<Real> function(row.logits->map);
  FASTKD_SIMD
  for (int64_t i = 0; i < count; ++i) scaled[i] = block[i] * function.slope(z[i]);
  visit(row.dtype, [&](auto element) { store_as<decltype(element)>(row, begin, count, scaled); });
}

template <class Real>
void store(const Row& row, int64_t begin, int64_t count, const Real* block) {
  if (block == destination(row, begin, static_cast<Real*>(nullptr))) return;
  if (row.logits != nullptr) return store_by_slopes(row, begin, count, block);
  visit(row.dtype, [&](auto element) { store_as<decltype(element)>(row, begin, count, block); });
}

FASTKD_INLINE void put_element(const Row& row, int64_t column, double value) {
  if (row.logits != nullptr) {
    double z;
    value *= LogitFunction<double>(row.logits->map).slope(*load_plain(*row.logits, column, 1, &z));
  }
  visit(row.dtype, [&](auto element) {
    using Element = decltype(element);
    if constexpr (sizeof(Element) == sizeof(double)) {
      static_cast<Element*>(row.data)[column * row.stride] = value;
    } else {
      from_float(float(value), static_cast<Element*>(row.data)[column * row.stride]);
    }
  });
}

template <class Real>
FASTKD_INLINE Real largest(const Real* x, int64_t count) {
  Real all = Real(-INFINITY);
  FASTKD_SIMD_REDUCE(max : all)
  for (int64_t i = 0; i < count; ++i) all = x[i] > all ? x[i] : all;
  return all;
}

inline void fill_zero(const Row& row, int64_t begin, int64_t end) {
  const int64_t size = size_of(row.dtype);
  if (!row || end <= begin) return;
  char* first = static_cast<char*>(row.data) + begin * row.stride * size;
  if (row.stride == 1) {
    __builtin_memset(first, 0, (end - begin) * size);
  } else {
    for (int64_t i = 0; i < end - begin; ++i) __builtin_memset(first + i * row.stride * size, 0, size);
  }
}

}  // namespace fastkd::FASTKD_ISA
