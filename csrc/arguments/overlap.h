// Whether writing a gradient into the logits' own memory would overwrite data still to be read: two elements of the
// logits at one address, or another argument in the same memory.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "rows.h"

namespace fastkd {

// The address of the first byte, and the address after the last byte.
using Bytes = std::pair<const char*, const char*>;

inline Bytes bytes_of(const Tensor& x) {
  const char* begin = static_cast<const char*>(x.data_ptr());
  const char* end = begin;
  if (x.numel() == 0) return {begin, begin};
  for (int64_t i = 0; i < x.dim(); ++i) end += (x.size(i) - 1) * x.stride(i) * element_size(x.scalar_type());
  return {begin, end + element_size(x.scalar_type())};
}

inline bool meet(const Bytes& a, const Bytes& b) { return a.first < b.second && b.first < a.second; }

// The byte range of each row, in ascending order.
inline std::vector<Bytes> bytes_of_rows(const Tensor& x) {
  const int64_t leading = x.dim() - 1, width = x.size(leading), size = element_size(x.scalar_type());
  const Rows rows(x, leading);
  int64_t count = 1;
  for (int64_t i = 0; i < leading; ++i) count *= x.size(i);
  std::vector<Bytes> found(size_t(width == 0 ? 0 : count));
  for (size_t i = 0; i < found.size(); ++i) {
    const char* begin = rows.at(int64_t(i));
    found[i] = {begin, begin + (width - 1) * x.stride(leading) * size + size};
  }
  std::sort(found.begin(), found.end());
  return found;
}

// Exact for rows with contiguous columns. Other layouts that interleave may be reported as overlapping.
inline bool overlaps_itself(const Tensor& x) {
  // If every dimension's stride exceeds the extent of all smaller ones, no two elements share an address.
  std::vector<std::pair<int64_t, int64_t>> dimensions;
  for (int64_t i = 0; i < x.dim(); ++i) {
    if (x.size(i) == 0) return false;
    if (x.size(i) > 1) dimensions.emplace_back(x.stride(i), x.size(i));
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t reach = 0;
  bool apart = true;
  for (const auto& [stride, size] : dimensions) {
    apart = apart && stride > reach;
    reach += stride * (size - 1);
  }
  if (apart) return false;
  const std::vector<Bytes> rows = bytes_of_rows(x);
  if (x.stride(x.dim() - 1) == 0 && x.size(x.dim() - 1) > 1) return true;
  for (size_t i = 1; i < rows.size(); ++i) {
    if (meet(rows[i - 1], rows[i])) return true;
  }
  return false;
}

inline bool overlap(const Tensor& x, const Tensor& y) {
  if (!meet(bytes_of(x), bytes_of(y))) return false;
  if (x.dim() == 0 || y.dim() == 0) return true;
  // The ranges may alternate without overlapping, as those of the two halves of one [rows, 2 vocab] tensor do.
  const std::vector<Bytes> a = bytes_of_rows(x), b = bytes_of_rows(y);
  for (size_t i = 0, j = 0; i < a.size() && j < b.size();) {
    if (meet(a[i], b[j])) return true;
    if (a[i].second <= b[j].second) {
      ++i;
    } else {
      ++j;
    }
  }
  return false;
}

// Finds the first tensor field, other than the very first, that shares memory with `gradient`.
struct OverlapFinder {
  const Tensor& gradient;
  bool first = true;
  const char* found = nullptr;

  void operator()(const char* name, const Tensor& x) {
    if (!first && found == nullptr && overlap(x, gradient)) found = name;
    first = false;
  }
  void operator()(const char* name, const std::vector<Tensor>& tensors) {
    for (const Tensor& x : tensors) (*this)(name, x);
  }
  void operator()(const char* name, const std::optional<Tensor>& x) {
    if (x) (*this)(name, *x);
  }
  template <class T>
  void operator()(const char*, const T&) {}
};

}  // namespace fastkd
