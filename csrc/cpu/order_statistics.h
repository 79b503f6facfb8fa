// Finds two neighbours in the sorted order of a row without sorting it: a histogram of the leading bits limits the
// search to the values of one bin, and only those are read again.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "clipped_divergence.h"

namespace fastkd {

// Bits that compare as unsigned integers in the order of the numbers.
inline uint32_t ordered(float x) {
  const uint32_t bits = portable::bit_cast<uint32_t>(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
inline uint64_t ordered(double x) {
  const uint64_t bits = portable::bit_cast<uint64_t>(x + 0.0);
  return bits & (uint64_t(1) << 63) ? ~bits : bits | (uint64_t(1) << 63);
}

template <class Real>
class OrderStatistics {
 public:
  // Prepares the first `vocab` columns of the row.
  OrderStatistics(const Row& row, int64_t vocab) : row_(row), vocab_(vocab), counts_(size_t(1) << kBits) {
    for_values([&](Real x) { ++counts_[bin(x)]; });
  }

  // The quantile at `level`, by linear interpolation.
  QuantileEdge at(double level) {
    const double place = level * double(vocab_ - 1);
    const int64_t below = std::min(int64_t(place), vocab_ - 1), above = std::min(below + 1, vocab_ - 1);
    const auto [first, second] = neighbours(below, above);
    return {double(first), double(second), place - double(below)};
  }

 private:
  static constexpr int kBits = 12;

  static size_t bin(Real x) {
    const auto key = ordered(x);
    return size_t(key >> (sizeof(key) * 8 - kBits));
  }

  template <class Body>
  void for_values(const Body& body) const {
    alignas(64) Real buffer[kBlock];
    for (int64_t begin = 0; begin < vocab_; begin += kBlock) {
      const int64_t count = std::min(kBlock, vocab_ - begin);
      const Real* x = portable::load(row_, begin, count, buffer);
      for (int64_t i = 0; i < count; ++i) body(x[i]);
    }
  }

  std::pair<Real, Real> neighbours(int64_t below, int64_t above) const {
    size_t first = 0;
    int64_t before = 0;
    while (before + counts_[first] <= below) before += counts_[first++];
    size_t last = first;
    int64_t through = before + counts_[first];
    while (through <= above) through += counts_[++last];
    std::vector<Real> values;
    values.reserve(size_t(through - before));
    for_values([&](Real x) {
      const size_t b = bin(x);
      if (b >= first && b <= last) values.push_back(x);
    });
    const auto less = [](Real a, Real b) { return ordered(a) < ordered(b); };
    const auto place = values.begin() + (below - before);
    std::nth_element(values.begin(), place, values.end(), less);
    return {*place, above == below ? *place : *std::min_element(place + 1, values.end(), less)};
  }

  const Row row_;
  const int64_t vocab_;
  std::vector<int64_t> counts_;
};

}  // namespace fastkd
