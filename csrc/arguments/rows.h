// A tensor of any rank and strides as rows: all leading dimensions count rows, followed by a vocabulary dimension or
// none.
#pragma once
#include <utility>
#include <vector>

#include "../math/float16.h"
#include "check.h"
#include "row.h"

namespace fastkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

inline Dtype dtype_of(ScalarType type) {
  return type == ScalarType::Double     ? Dtype::kFloat64
         : type == ScalarType::BFloat16 ? Dtype::kBFloat16
         : type == ScalarType::Half     ? Dtype::kFloat16
                                        : Dtype::kFloat32;
}

inline int64_t element_size(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    default:
      return 1;
  }
}

// The first `leading` dimensions as (size, stride), with adjacent dimensions merged where one stride covers both.
inline std::vector<std::pair<int64_t, int64_t>> merged_dimensions(const Tensor& tensor, int64_t leading) {
  std::vector<std::pair<int64_t, int64_t>> out;
  for (int64_t i = 0; i < leading; ++i) {
    const int64_t size = tensor.size(i), stride = tensor.stride(i);
    if (size == 1) continue;
    if (!out.empty() && out.back().second == size * stride) {
      out.back() = {out.back().first * size, stride};
    } else {
      out.emplace_back(size, stride);
    }
  }
  return out;
}

class Rows {
 public:
  Rows() = default;
  // leading: how many dimensions count rows. The last of the other dimensions, if there are any, is the vocabulary.
  Rows(const Tensor& tensor, int64_t leading)
      : data_(static_cast<char*>(tensor.data_ptr())),
        type_(tensor.scalar_type()),
        element_size_(element_size(type_)),
        column_stride_(tensor.dim() > leading ? tensor.stride(tensor.dim() - 1) : 0),
        dimensions_(merged_dimensions(tensor, leading)) {}

  explicit operator bool() const { return data_ != nullptr; }

  char* at(int64_t row) const {
    int64_t offset = 0;
    for (size_t i = dimensions_.size(); i-- > 0;) {
      offset += row % dimensions_[i].first * dimensions_[i].second;
      row /= dimensions_[i].first;
    }
    return data_ + offset * element_size_;
  }

  Row row(int64_t index) const { return {at(index), column_stride_, dtype_of(type_), streamed_, map_}; }
  void stream() { streamed_ = true; }
  void set_map(const LogitMap& map) { map_ = map; }

  // Element `column` of the row as double. The tensor holds floats or bools.
  double number(int64_t index, int64_t column = 0) const {
    const char* p = at(index) + column * column_stride_ * element_size_;
    switch (type_) {
      case ScalarType::Double:
        return *reinterpret_cast<const double*>(p);
      case ScalarType::Float:
        return *reinterpret_cast<const float*>(p);
      case ScalarType::BFloat16:
        return portable::to_float(*reinterpret_cast<const portable::BFloat16*>(p));
      case ScalarType::Half:
        return portable::to_float(*reinterpret_cast<const portable::Float16*>(p));
      default:
        return *reinterpret_cast<const bool*>(p);
    }
  }

  int64_t integer(int64_t index, int64_t column = 0) const {
    const char* p = at(index) + column * column_stride_ * element_size_;
    return type_ == ScalarType::Long ? *reinterpret_cast<const int64_t*>(p) : *reinterpret_cast<const int32_t*>(p);
  }

 private:
  char* data_ = nullptr;
  ScalarType type_ = ScalarType::Float;
  int64_t element_size_ = 4, column_stride_ = 1;
  bool streamed_ = false;
  LogitMap map_{};
  std::vector<std::pair<int64_t, int64_t>> dimensions_;
};

// Whether the first `leading` sizes are the same.
inline bool same_leading(const Tensor& tensor, const Tensor& like, int64_t leading) {
  if (tensor.dim() < leading) return false;
  for (int64_t i = 0; i < leading; ++i) {
    if (tensor.size(i) != like.size(i)) return false;
  }
  return true;
}

}  // namespace fastkd
