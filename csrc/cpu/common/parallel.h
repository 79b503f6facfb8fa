// Distributes rows over threads, or the slices of a row where rows are few and long. The results do not depend on the
// choice: a row's slices are always the same and are always merged in the same order.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

#include "../../arguments/allocate.h"
#include "row_slices.h"

namespace fastkd {

inline const SliceRunner& one_thread() {
  static const SliceRunner runner{[](void*, int64_t slices, void (*body)(void*, int64_t), void* context) {
                                    for (int64_t slice = 0; slice < slices; ++slice) body(context, slice);
                                  },
                                  nullptr};
  return runner;
}

inline const SliceRunner& all_threads() {
  static const SliceRunner runner{[](void*, int64_t slices, void (*body)(void*, int64_t), void* context) {
                                    torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
                                      for (int64_t slice = begin; slice < end; ++slice) body(context, slice);
                                    });
                                  },
                                  nullptr};
  return runner;
}

// A thread's working memory. It is kept for the thread's next call: allocating it anew would cost a small call more
// than its arithmetic.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }
  void swap(Scratch& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  int64_t size() const { return size_; }
  // Returns memory aligned to 64 bytes. The previous contents are lost.
  char* at_least(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 63) / 64 * 64;
      data_ = static_cast<char*>(std::aligned_alloc(64, size_));
      ask_for_huge_pages(data_, size_);
      if (data_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }
  static char* of_thread(int64_t bytes) {
    thread_local Scratch scratch;
    return scratch.at_least(bytes);
  }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0;
};

// Working memory of one call, so large that the allocator would return it to the system after each call, and the system
// would map and zero it page by page in the next. The largest such buffer is kept for the next call, of any thread,
// until release().
class WorkingMemory {
 public:
  explicit WorkingMemory(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      memory_.swap(kept);
    }
    data_ = memory_.at_least(bytes);
  }
  WorkingMemory(const WorkingMemory&) = delete;
  ~WorkingMemory() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (memory_.size() > kept.size()) memory_.swap(kept);
  }
  char* data() const { return data_; }
  static void release() {
    Scratch released;
    const std::lock_guard<std::mutex> lock(mutex);
    released.swap(kept);
  }

 private:
  static inline std::mutex mutex;
  static inline Scratch kept;
  Scratch memory_;
  char* data_;
};

// Calls run_row(row, slice runner, scratch) for every row.
template <class RunRow>
void for_rows(int64_t rows, int64_t vocab, int64_t scratch_bytes, const RunRow& run_row) {
  constexpr int64_t kGrain = 32768;  // the least number of elements per thread
  const int64_t threads = torch::stable::get_num_threads();
  if (rows < 4 * threads && vocab >= 4 * kSlice && threads > 1) {
    char* const scratch = Scratch::of_thread(scratch_bytes);
    for (int64_t row = 0; row < rows; ++row) run_row(row, all_threads(), scratch);
    return;
  }
  torch::stable::parallel_for(0, rows, kGrain / vocab + 1, [&](int64_t begin, int64_t end) {
    char* const scratch = Scratch::of_thread(scratch_bytes);
    for (int64_t row = begin; row < end; ++row) run_row(row, one_thread(), scratch);
  });
}

}  // namespace fastkd
