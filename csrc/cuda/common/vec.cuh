// 16 bytes of elements in registers (a pack), and a row as a sequence of packs.
#pragma once
#include <type_traits>

#include "device.cuh"

namespace fastkd::cuda {

template <class T>
struct alignas(16) Packed {
  static constexpr int kSize = 16 / sizeof(T);
  T item[kSize];
};

// Kernels hold a pack as four words and convert an element where it is used: taking a pack apart right after its load
// would make the thread wait for the load there. Indices are constants once the callers' loops are unrolled.
__device__ __forceinline__ unsigned word_of(const uint4& pack, int k) {
  return k == 0 ? pack.x : k == 1 ? pack.y : k == 2 ? pack.z : pack.w;
}

template <class T>
__device__ __forceinline__ float item_of(const uint4& pack, int j) {
  if constexpr (sizeof(T) == 4) {
    return bit_cast<float>(word_of(pack, j));
  } else {
    const unsigned word = word_of(pack, j / 2);
    if constexpr (std::is_same<T, BFloat16>::value) {
      return bit_cast<float>(j % 2 == 0 ? word << 16 : word & 0xffff0000u);
    } else {
      return to_float(T{uint16_t(j % 2 == 0 ? word : word >> 16)});
    }
  }
}

// A word of two 16-bit elements, or of one float.
template <class T>
__device__ __forceinline__ unsigned word_from(const float (&x)[4 / sizeof(T)]) {
  if constexpr (sizeof(T) == 4) {
    return bit_cast<unsigned>(x[0]);
  } else {
#ifdef __CUDA_ARCH__
    if constexpr (std::is_same<T, BFloat16>::value) {
      return bit_cast<unsigned>(__floats2bfloat162_rn(x[0], x[1]));
    } else {
      return bit_cast<unsigned>(__floats2half2_rn(x[0], x[1]));
    }
#else
    T first, second;
    from_float(x[0], first);
    from_float(x[1], second);
    return first.bits | unsigned(second.bits) << 16;
#endif
  }
}

__device__ __forceinline__ void set_word(uint4& pack, int k, unsigned word) {
  (k == 0 ? pack.x : k == 1 ? pack.y : k == 2 ? pack.z : pack.w) = word;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
// Two 16-bit elements, for instructions that take both at once.
template <class T>
using PairOf = typename std::conditional<std::is_same<T, BFloat16>::value, __nv_bfloat162, __half2>::type;
#endif

// The larger element of each place of two words; a NaN where both are NaN.
template <class T>
__device__ __forceinline__ unsigned larger(unsigned first, unsigned second) {
  const auto one_by_one = [&] {
    float x[4 / sizeof(T)];
#pragma unroll
    for (int j = 0; j < int(4 / sizeof(T)); ++j)
      x[j] = ::fmaxf(item_of<T>({first, 0, 0, 0}, j), item_of<T>({second, 0, 0, 0}, j));
    return word_from<T>(x);
  };
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(T) == 2) {
    return bit_cast<unsigned>(__hmax2(bit_cast<PairOf<T>>(first), bit_cast<PairOf<T>>(second)));
  } else {
    return one_by_one();
  }
#else
  return one_by_one();
#endif
}

// Bounds of a pack's elements.
template <class T>
class PackRange {
 public:
  // No pack is below or above a NaN, not even one of infinities.
  __device__ __forceinline__ void clear() { least_ = most_ = repeated(NAN, true); }
  // Of the numbers of T in [least, most]; no infinite one.
  __device__ __forceinline__ void set(float least, float most) {
    least_ = repeated(least, true);
    most_ = repeated(most, false);
  }

  // Whether all elements are at most the upper bound (false where one is NaN), or at least the lower one (in 16-bit
  // packs a NaN is not looked at).
  __device__ __forceinline__ bool below(const uint4& pack) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if constexpr (sizeof(T) == 2) {  // two elements at a time
      return __hble2(__hmax2_nan(__hmax2_nan(pair(pack.x), pair(pack.y)), __hmax2_nan(pair(pack.z), pair(pack.w))),
                     pair(most_));
    }
#endif
    bool all = true;
#pragma unroll
    for (int j = 0; j < Packed<T>::kSize; ++j) all = all && item_of<T>(pack, j) <= item_of<T>({most_, 0, 0, 0}, 0);
    return all;
  }
  __device__ __forceinline__ bool above(const uint4& pack) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if constexpr (sizeof(T) == 2) {
      return __hbge2(__hmin2(__hmin2(pair(pack.x), pair(pack.y)), __hmin2(pair(pack.z), pair(pack.w))), pair(least_));
    }
#endif
    bool all = true;
#pragma unroll
    for (int j = 0; j < Packed<T>::kSize; ++j) all = all && item_of<T>(pack, j) >= item_of<T>({least_, 0, 0, 0}, 0);
    return all;
  }

  // The pack with its elements raised to the lower bound.
  __device__ __forceinline__ uint4 raised(const uint4& pack) const {
    return {raised(pack.x), raised(pack.y), raised(pack.z), raised(pack.w)};
  }

 private:
  __device__ __forceinline__ unsigned raised(unsigned word) const { return larger<T>(word, least_); }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  static __device__ __forceinline__ PairOf<T> pair(unsigned word) { return bit_cast<PairOf<T>>(word); }
#endif

  // The nearest number of T that is at least, or at most, x, in each element of a word.
  static __device__ __forceinline__ unsigned repeated(float x, bool up) {
    if constexpr (sizeof(T) == 4) {
      return bit_cast<unsigned>(x);
    } else {
      T nearest;
      from_float(x, nearest);
      unsigned bits = nearest.bits;
      const float found = to_float(nearest);
      if (up ? found < x : found > x) {
        bits = found == 0 ? (up ? 0x0001 : 0x8001) : bits + ((found < 0) == up ? -1 : 1);
      }
      return bits | bits << 16;
    }
  }

  unsigned least_ = repeated(NAN, true), most_ = repeated(NAN, true);
};

// Loads columns [begin, begin + kSize) of a row into the lowest bits, with `outside` for those beyond it: a pack at one
// of the row's ends. A loop keeps the code small, and shifts avoid indexing a register array.
template <int kSize, class T>
__device__ __forceinline__ uint4 load_cut(const T* data, int columns, int begin, T outside) {
  uint64_t low = 0, high = 0;
#pragma unroll 1
  for (int j = 0; j < kSize; ++j) {
    const T value = begin + j >= 0 && begin + j < columns ? global_load(data + begin + j) : outside;
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    const int shift = j * 8 * int(sizeof(T));
    low |= shift < 64 ? bits << (shift & 63) : 0;
    high |= shift < 64 ? 0 : bits << (shift & 63);
  }
  return {unsigned(low), unsigned(low >> 32), unsigned(high), unsigned(high >> 32)};
}

// Stores those of the columns that are in the row.
template <int kSize, class T>
__device__ __forceinline__ void store_cut(T* data, int columns, int begin, const uint4& bits) {
  const uint64_t low = bits.x | uint64_t(bits.y) << 32, high = bits.z | uint64_t(bits.w) << 32;
#pragma unroll 1
  for (int j = 0; j < kSize; ++j) {
    const int shift = j * 8 * int(sizeof(T));
    const uint64_t item = (shift < 64 ? low : high) >> (shift & 63);
    T value;
    memcpy(&value, &item, sizeof(T));
    if (begin + j >= 0 && begin + j < columns) global_store(data + begin + j, value);
  }
}

// One row, or the part of it that a block works on. Pack i covers columns [i kSize - lead, ...). Packs lie on 16-byte
// boundaries wherever the row begins, so only the first and the last may extend beyond the row.
template <class T>
struct PackedRow {
  using P = Packed<T>;
  T* data;
  int columns;
  int lead;

  __device__ __forceinline__ PackedRow(void* row, int n)
      : data(static_cast<T*>(row)), columns(n), lead(int(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T))) {}

  __device__ __forceinline__ PackedRow(T* row, int n, int row_lead) : data(row), columns(n), lead(row_lead) {}

  __device__ __forceinline__ int packs() const { return (columns + lead + P::kSize - 1) / P::kSize; }
  __device__ __forceinline__ int column(int pack) const { return pack * P::kSize - lead; }
  // Where a pack lies, which may begin before the row and end after it.
  __device__ __forceinline__ uint4* place(int pack) const { return reinterpret_cast<uint4*>(data - lead) + pack; }
  __device__ __forceinline__ bool whole(int pack) const {
    return column(pack) >= 0 && column(pack) + P::kSize <= columns;
  }

  // Loads a pack. Columns outside the row are returned as `outside`.
  template <bool kStream>
  __device__ __forceinline__ P load(int pack, T outside) const {
    return bit_cast<P>(whole(pack) ? global_load16<kStream>(place(pack)) : load_cut(pack, outside));
  }

  __device__ __forceinline__ void store_words(int pack, const uint4& words) const {
    if (whole(pack)) {
      global_store16(place(pack), words);
    } else {
      store_cut<P::kSize>(data, columns, column(pack), words);
    }
  }
  __device__ __forceinline__ void store(int pack, const P& value) const { store_words(pack, bit_cast<uint4>(value)); }

  __device__ __forceinline__ uint4 load_cut(int pack, T outside) const {
    return cuda::load_cut<P::kSize>(data, columns, column(pack), outside);
  }
};

// Converts a float to an element.
template <class T, class Real>
__device__ __forceinline__ T element(Real x) {
  T out;
  from_float(x, out);
  return out;
}

}  // namespace fastkd::cuda
