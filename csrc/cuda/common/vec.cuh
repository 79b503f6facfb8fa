// 16 bytes of elements in registers (a pack), and a row as a sequence of packs.
#pragma once
#include "device.cuh"

namespace fastkd::cuda {

template <class T>
struct alignas(16) Packed {
  static constexpr int kSize = 16 / sizeof(T);
  T item[kSize];

  // Rotates by 4 bytes.
  __device__ __forceinline__ void rotate() {
    uint4 bits;
    memcpy(&bits, this, 16);
    bits = {bits.y, bits.z, bits.w, bits.x};
    memcpy(this, &bits, 16);
  }
};

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

  __device__ __forceinline__ int packs() const { return (columns + lead + P::kSize - 1) / P::kSize; }
  __device__ __forceinline__ int column(int pack) const { return pack * P::kSize - lead; }
  __device__ __forceinline__ bool whole(int pack) const {
    return column(pack) >= 0 && column(pack) + P::kSize <= columns;
  }

  // Loads a pack. Columns outside the row are returned as `outside`.
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
  // For a pack that extends beyond the row, at most two per row. Loops keep the code small, and shifts avoid indexing a
  // register array.
  static __device__ __forceinline__ uint4 load_cut(const T* data, int columns, int begin, T outside) {
    uint64_t low = 0, high = 0;
#pragma unroll 1
    for (int j = 0; j < P::kSize; ++j) {
      const T value = begin + j >= 0 && begin + j < columns ? global_load(data + begin + j) : outside;
      const uint64_t bits = bits_of(value);
      const int shift = j * 8 * int(sizeof(T));
      low |= shift < 64 ? bits << (shift & 63) : 0;
      high |= shift < 64 ? 0 : bits << (shift & 63);
    }
    return {unsigned(low), unsigned(low >> 32), unsigned(high), unsigned(high >> 32)};
  }
  static __device__ __forceinline__ void store_cut(T* data, int columns, int begin, const uint4& bits) {
    const uint64_t low = bits.x | uint64_t(bits.y) << 32, high = bits.z | uint64_t(bits.w) << 32;
#pragma unroll 1
    for (int j = 0; j < P::kSize; ++j) {
      const int shift = j * 8 * int(sizeof(T));
      const uint64_t item = (shift < 64 ? low : high) >> (shift & 63);
      T value;
      memcpy(&value, &item, sizeof(T));
      if (begin + j >= 0 && begin + j < columns) global_store(data + begin + j, value);
    }
  }
  static __device__ __forceinline__ uint64_t bits_of(const T& value) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return bits;
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
