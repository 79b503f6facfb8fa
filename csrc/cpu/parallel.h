// Threads over rows, and over the slices of a row where rows are few and long. Which of the two is chosen changes no
// result: a row's slices are always the same and always merged in the same order.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <memory>

#include "softmax_divergence.h"

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

// Calls run_row(row, slice runner, scratch) for every row.
template <class RunRow>
void for_rows(int64_t rows, int64_t vocab, int64_t scratch_bytes, const RunRow& run_row) {
  constexpr int64_t kGrain = 32768;  // elements a thread should at least have
  const int64_t threads = torch::stable::get_num_threads();
  if (rows < 4 * threads && vocab >= 4 * kSlice && threads > 1) {
    const std::unique_ptr<char[]> scratch(new char[scratch_bytes]);
    for (int64_t row = 0; row < rows; ++row) run_row(row, all_threads(), scratch.get());
    return;
  }
  torch::stable::parallel_for(0, rows, kGrain / vocab + 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> scratch(new char[scratch_bytes]);
    for (int64_t row = begin; row < end; ++row) run_row(row, one_thread(), scratch.get());
  });
}

}  // namespace fastkd
