// One tensor's row in packs: where they lie, and how they move between global memory, shared memory and registers.
#pragma once
#include "rows.cuh"
#include "vec.cuh"

namespace fastkd::cuda {

// In place of an element type: student and teacher have different dtypes, float32, bfloat16 or float16.
struct Mixed {};

template <class T>
struct RowPacks {
  using Item = T;  // an element in registers, where a pack always has 16 bytes
  static constexpr int kSize = Packed<Item>::kSize;
  uint4* first = nullptr;  // where pack 0 lies, which may begin before the row

  __device__ __forceinline__ RowPacks() {}
  __device__ __forceinline__ RowPacks(const DeviceRows& rows, int64_t row)
      : first(rows ? reinterpret_cast<uint4*>(reinterpret_cast<uintptr_t>(rows.at(row)) & ~uintptr_t(15)) : nullptr) {}
  __device__ __forceinline__ explicit operator bool() const { return first != nullptr; }
  // How many elements of pack 0 lie before a row.
  static __device__ __forceinline__ int lead(const DeviceRows& rows, int64_t row) {
    return int(reinterpret_cast<uintptr_t>(rows.at(row)) % 16 / sizeof(T));
  }

  // A pack that lies in the row as a whole.
  __device__ __forceinline__ void copy(uint4* slot, int pack) const { async_copy16(slot, first + pack, true); }
  __device__ __forceinline__ void store(int pack, const uint4& x) const { global_store16(first + pack, x); }
  // A pack that extends beyond the row; loaded with -inf in the columns outside.
  __device__ __forceinline__ void load_cut(uint4* slot, int pack, int lead, int columns) const {
    shared_store(slot, row(lead, columns).load_cut(pack, element<T>(float(-INFINITY))));
  }
  __device__ __forceinline__ void store_cut(int pack, const uint4& x, int lead, int columns) const {
    row(lead, columns).store_words(pack, x);
  }

  __device__ __forceinline__ uint4 read(const uint4* slot) const { return shared_load(slot); }
  __device__ __forceinline__ float logit(int column, int lead) const {
    return to_float(global_load(reinterpret_cast<T*>(first) + lead + column));
  }
  __device__ __forceinline__ void put(int column, float x, int lead) const {
    global_store(reinterpret_cast<T*>(first) + lead + column, element<T>(x));
  }

 private:
  __device__ __forceinline__ PackedRow<T> row(int lead, int columns) const {
    return {reinterpret_cast<T*>(first) + lead, columns, lead};
  }
};

// Four elements a pack: 16 bytes of float32, or 8 bytes of a 16-bit dtype, which take the first half of a slot. The
// dtype is a branch that all threads take alike. In registers all are float32.
template <>
struct RowPacks<Mixed> {
  using Item = float;
  static constexpr int kSize = Packed<Item>::kSize;
  char* first = nullptr;
  const DeviceRows* rows = nullptr;
  int size = 0;  // of an element

  __device__ __forceinline__ RowPacks() {}
  // Rows that are only in shared memory, in float32.
  static __device__ __forceinline__ RowPacks in_shared_memory() {
    RowPacks out;
    out.size = sizeof(float);
    return out;
  }
  __device__ __forceinline__ RowPacks(const DeviceRows& r, int64_t row) : rows(&r), size(r.element_size) {
    if (r) first = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(r.at(row)) & ~uintptr_t(bytes() - 1));
  }
  __device__ __forceinline__ explicit operator bool() const { return first != nullptr; }
  static __device__ __forceinline__ int lead(const DeviceRows& rows, int64_t row) {
    return int(reinterpret_cast<uintptr_t>(rows.at(row)) / rows.element_size % kSize);
  }

  __device__ __forceinline__ void copy(uint4* slot, int pack) const {
    if (size == 4) {
      async_copy16(slot, place(pack), true);
    } else {
      async_copy8(slot, place(pack));
    }
  }
  __device__ __forceinline__ void store(int pack, const uint4& x) const {
    if (size == 4) {
      global_store16(place(pack), x);
    } else {
      const uint4 narrow = narrowed(x);
      global_store8(place(pack), {narrow.x, narrow.y});
    }
  }
  __device__ __forceinline__ void load_cut(uint4* slot, int pack, int lead, int columns) const {
    const int begin = pack * kSize - lead;
    const float outside = -INFINITY;
    switch (rows->type) {
      case ScalarType::BFloat16:
        return store_narrow(slot,
                            cuda::load_cut<kSize>(row<BFloat16>(lead), columns, begin, element<BFloat16>(outside)));
      case ScalarType::Half:
        return store_narrow(slot, cuda::load_cut<kSize>(row<Float16>(lead), columns, begin, element<Float16>(outside)));
      default:
        return shared_store(slot, cuda::load_cut<kSize>(row<float>(lead), columns, begin, outside));
    }
  }
  __device__ __forceinline__ void store_cut(int pack, const uint4& x, int lead, int columns) const {
    const int begin = pack * kSize - lead;
    if (size == 4) {
      cuda::store_cut<kSize>(row<float>(lead), columns, begin, x);
    } else {
      cuda::store_cut<kSize>(row<uint16_t>(lead), columns, begin, narrowed(x));
    }
  }

  __device__ __forceinline__ uint4 read(const uint4* slot) const {
    if (size == 4) return shared_load(slot);
    const uint2 narrow = shared_load(reinterpret_cast<const uint2*>(slot));
    const uint4 words{narrow.x, narrow.y, 0, 0};
    return rows->type == ScalarType::BFloat16 ? widened<BFloat16>(words) : widened<Float16>(words);
  }
  __device__ __forceinline__ float logit(int column, int lead) const {
    return rows->float_at(first + (lead + column) * size);
  }
  __device__ __forceinline__ void put(int column, float x, int lead) const {
    rows->put(first + (lead + column) * size, x);
  }

 private:
  __device__ __forceinline__ int bytes() const { return kSize * size; }
  __device__ __forceinline__ char* place(int pack) const { return first + int64_t(pack) * bytes(); }
  template <class T>
  __device__ __forceinline__ T* row(int lead) const {
    return reinterpret_cast<T*>(first) + lead;
  }

  static __device__ __forceinline__ void store_narrow(uint4* slot, const uint4& words) {
    shared_store(reinterpret_cast<uint2*>(slot), uint2{words.x, words.y});
  }
  template <class T>
  static __device__ __forceinline__ uint4 widened(const uint4& words) {
    return {bit_cast<unsigned>(item_of<T>(words, 0)), bit_cast<unsigned>(item_of<T>(words, 1)),
            bit_cast<unsigned>(item_of<T>(words, 2)), bit_cast<unsigned>(item_of<T>(words, 3))};
  }
  __device__ __forceinline__ uint4 narrowed(const uint4& x) const {
    const float low[2] = {item_of<float>(x, 0), item_of<float>(x, 1)};
    const float high[2] = {item_of<float>(x, 2), item_of<float>(x, 3)};
    if (rows->type == ScalarType::BFloat16) return {word_from<BFloat16>(low), word_from<BFloat16>(high), 0, 0};
    return {word_from<Float16>(low), word_from<Float16>(high), 0, 0};
  }
};

}  // namespace fastkd::cuda
