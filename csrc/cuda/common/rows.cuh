// A tensor as rows on the device: plain data that a kernel takes by value.
#pragma once
#include "../../arguments/rows.h"
#include "device.cuh"

namespace fastkd::cuda {

// Columns are counted in int. The limit leaves room for the packs and threads beyond the last column.
inline constexpr int64_t kMaxColumns = INT32_MAX - 1024;

struct DeviceRows {
  static constexpr int kDimensions = 6;  // that cannot be merged with their neighbours
  char* data = nullptr;
  int64_t column_stride = 0;
  int64_t sizes[kDimensions], strides[kDimensions];
  int8_t dimensions = 0, element_size = 0;
  ScalarType type = ScalarType::Undefined;

  __host__ __device__ explicit operator bool() const { return type != ScalarType::Undefined; }

  __device__ __forceinline__ char* at(int64_t row, int64_t column = 0) const {
    const int64_t first = dimensions > 1 ? offset_of(row) : dimensions == 1 ? row * strides[0] : 0;
    return data + (first + column * column_stride) * element_size;
  }

  // The row's first element. Not unrolled: there are many places that look a row up. sizes and strides are read where
  // the kernel's parameters are (__grid_constant__), which an index may choose.
  __device__ __forceinline__ int64_t offset_of(int64_t row) const {
    int64_t offset = 0;
#pragma unroll 1
    for (int i = dimensions - 1; i > 0; --i) {
      const int64_t outer = row / sizes[i];
      offset += (row - outer * sizes[i]) * strides[i];
      row = outer;
    }
    return offset + row * strides[0];
  }

  // For a tensor of logits.
  __device__ __forceinline__ float float_at(const char* p) const {
    switch (type) {
      case ScalarType::BFloat16:
        return to_float(global_load(reinterpret_cast<const BFloat16*>(p)));
      case ScalarType::Half:
        return to_float(global_load(reinterpret_cast<const Float16*>(p)));
      default:
        return global_load(reinterpret_cast<const float*>(p));
    }
  }

  __device__ double number(int64_t row, int64_t column = 0) const { return number_at(at(row, column)); }

  __device__ double number_at(const char* p) const {
    switch (type) {
      case ScalarType::Float:
        return global_load(reinterpret_cast<const float*>(p));
      case ScalarType::Double:
        return global_load(reinterpret_cast<const double*>(p));
      case ScalarType::BFloat16:
        return to_float(global_load(reinterpret_cast<const BFloat16*>(p)));
      case ScalarType::Half:
        return to_float(global_load(reinterpret_cast<const Float16*>(p)));
      case ScalarType::Bool:
        return global_load(reinterpret_cast<const bool*>(p));
      default:
        return double(integer_at(p));
    }
  }

  __device__ int64_t integer(int64_t row) const { return integer_at(at(row)); }
  __device__ int64_t integer_at(const char* p) const {
    return type == ScalarType::Long ? global_load(reinterpret_cast<const int64_t*>(p))
                                    : global_load(reinterpret_cast<const int32_t*>(p));
  }

  __device__ void put(char* p, double value) const {
    switch (type) {
      case ScalarType::Double:
        return global_store(reinterpret_cast<double*>(p), value);
      case ScalarType::BFloat16: {
        BFloat16 x;
        from_float(float(value), x);
        return global_store(reinterpret_cast<BFloat16*>(p), x);
      }
      case ScalarType::Half: {
        Float16 x;
        from_float(float(value), x);
        return global_store(reinterpret_cast<Float16*>(p), x);
      }
      default:
        return global_store(reinterpret_cast<float*>(p), float(value));
    }
  }
};

inline DeviceRows device_rows(const Tensor& tensor, int64_t leading, const char* function) {
  DeviceRows out;
  out.data = static_cast<char*>(tensor.data_ptr());
  out.type = tensor.scalar_type();
  out.element_size = int8_t(element_size(tensor.scalar_type()));
  out.column_stride = tensor.dim() > leading ? tensor.stride(tensor.dim() - 1) : 0;
  const auto dimensions = merged_dimensions(tensor, leading);
  FASTKD_CHECK_VALUE(dimensions.size() <= DeviceRows::kDimensions, function, "a tensor's strides have ",
                     dimensions.size(), " leading dimensions that do not merge, at most ", DeviceRows::kDimensions,
                     " are supported: make it contiguous");
  for (const auto& [size, stride] : dimensions) {
    out.sizes[out.dimensions] = size;
    out.strides[out.dimensions++] = stride;
  }
  return out;
}

// Whether rows can be read and written in packs of `pack` elements: unit stride, and each row begins at the same place
// of a pack as that of `like`; any_row: as any row of `like`.
inline bool moves_like(const DeviceRows& x, const DeviceRows& like, int pack, bool any_row = false) {
  if (x.column_stride != 1 || like.column_stride != 1) return false;
  const auto place = [&](const DeviceRows& r) { return reinterpret_cast<uintptr_t>(r.data) / r.element_size % pack; };
  if (place(x) != place(like)) return false;
  const auto whole_packs = [&](const DeviceRows& r) {
    for (int i = 0; i < r.dimensions; ++i) {
      if (r.strides[i] % pack != 0) return false;
    }
    return true;
  };
  if (whole_packs(x) && whole_packs(like)) return true;
  if (any_row || x.dimensions != like.dimensions) return false;
  for (int i = 0; i < x.dimensions; ++i) {
    if (x.sizes[i] != like.sizes[i] || (x.strides[i] - like.strides[i]) % pack != 0) return false;
  }
  return true;
}

}  // namespace fastkd::cuda
