// The entries of a row's support by their columns: a hash table in a team's shared memory.
#pragma once
#include "teams.cuh"

namespace fastkd::cuda {

// Of each column with an entry: one of its entries, and how many it has. Which entry that is may depend on the order in
// which threads run; the counts do not.
class SupportTable {
 public:
  // How many entries a column has, and how many of them cannot be padding.
  struct Count {
    int packed;
    __device__ __forceinline__ int all() const { return packed & 0xffff; }
    __device__ __forceinline__ int others() const { return packed >> 16; }
  };

  // Twice as many places as entries, so that few are looked at.
  __host__ __device__ static constexpr int places(int k) {
    int n = 32;
    while (n < 2 * k) n *= 2;
    return n;
  }
  __host__ __device__ static constexpr int64_t bytes(int k) { return int64_t(places(k)) * 2 * int64_t(sizeof(int)); }

  __device__ SupportTable(unsigned char* shared, int k)
      : last_(places(k) - 1), entries_(reinterpret_cast<int*>(shared)), counts_(entries_ + places(k)) {}
  __device__ __forceinline__ unsigned char* end() const {
    return reinterpret_cast<unsigned char*>(counts_ + last_ + 1);
  }

  __device__ void clear(const Team& team) const {
    for (int i = team.thread; i <= last_; i += team.threads) {
      shared_store(entries_ + i, -1);
      shared_store(counts_ + i, 0);
    }
  }

  // column_of(e): the column of entry e. All entries are inserted between two barriers, and found after the second.
  template <class ColumnOf>
  __device__ __forceinline__ void insert(int e, int column, bool may_pad, const ColumnOf& column_of) const {
    int place = first_place(column);
#pragma unroll 1
    for (;; place = (place + 1) & last_) {
      const int found = shared_exchange(entries_ + place, -1, e);
      if (found < 0 || column_of(found) == column) break;
    }
    shared_add(reinterpret_cast<unsigned*>(counts_ + place), may_pad ? 1u : 0x10001u);
  }
  template <class ColumnOf>
  __device__ __forceinline__ Count find(int column, const ColumnOf& column_of) const {
#pragma unroll 1
    for (int place = first_place(column);; place = (place + 1) & last_) {
      const int found = shared_load(entries_ + place);
      if (found < 0) return {0};
      if (column_of(found) == column) return {shared_load(counts_ + place)};
    }
  }

 private:
  __device__ __forceinline__ int first_place(int column) const {
    return int((unsigned(column) * 2654435769u) >> 16) & last_;
  }

  const int last_;
  int *const entries_, *const counts_;
};

}  // namespace fastkd::cuda
