// 16 bytes of elements in registers, and a row as a sequence of them.
#pragma once
#include "device.cuh"

namespace fastkd::cuda {

template <class T>
struct alignas(16) Packed {
  static constexpr int kSize = 16 / sizeof(T);
  T item[kSize];
};

// One row, or the part of it that a block holds, from `first` on. Pack i covers columns [i kSize - lead, ...): packs
// lie on 16-byte boundaries wherever the row begins, and only the first and the last may be cut.
template <class T>
struct PackedRow {
  using P = Packed<T>;
  T* data;
  int columns;
  int lead;

  __device__ __forceinline__ PackedRow(void* row, int n)
      : data(static_cast<T*>(row)), columns(n), lead(int(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T))) {}

  __device__ __forceinline__ int packs() const { return (columns + lead + P::kSize - 1) / P::kSize; }
  __device__ __forceinline__ int column(int pack) const { return pack * P::kSize - lead; }
  __device__ __forceinline__ bool whole(int pack) const {
    return column(pack) >= 0 && column(pack) + P::kSize <= columns;
  }

  // Columns outside the row read as `outside`.
  template <bool kStream>
  __device__ __forceinline__ P load(int pack, T outside) const {
    const int begin = column(pack);
    const uint4 bits = whole(pack) ? global_load16<kStream>(data + begin) : load_cut(data, columns, begin, outside);
    P out;
    memcpy(&out, &bits, 16);
    return out;
  }

  __device__ __forceinline__ void store(int pack, const P& value) const {
    const int begin = column(pack);
    uint4 bits;
    memcpy(&bits, &value, 16);
    if (whole(pack)) {
      global_store16(data + begin, bits);
    } else {
      store_cut(data, columns, begin, bits);
    }
  }

 private:
  // Once or twice a row: apart, so that the loops stay small.
  static __device__ __noinline__ uint4 load_cut(const T* data, int columns, int begin, T outside) {
    P value;
#pragma unroll
    for (int j = 0; j < P::kSize; ++j) {
      value.item[j] = begin + j >= 0 && begin + j < columns ? global_load(data + begin + j) : outside;
    }
    uint4 bits;
    memcpy(&bits, &value, 16);
    return bits;
  }
  static __device__ __noinline__ void store_cut(T* data, int columns, int begin, uint4 bits) {
    P value;
    memcpy(&value, &bits, 16);
#pragma unroll
    for (int j = 0; j < P::kSize; ++j) {
      if (begin + j >= 0 && begin + j < columns) global_store(data + begin + j, value.item[j]);
    }
  }
};

// A float as an element.
template <class T, class Real>
__device__ __forceinline__ T element(Real x) {
  T out;
  from_float(x, out);
  return out;
}

}  // namespace fastkd::cuda
