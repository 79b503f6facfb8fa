// Memory for gradients. The system maps a new tensor of this size page by page at the first write, and with 4 KiB pages
// that costs more than the arithmetic. Huge pages are therefore requested before the first write, where the system has
// them.
#pragma once
#include <torch/csrc/stable/ops.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

#include "rows.h"

namespace fastkd {

// Gradients of at least this size are written past the caches: they would evict data that is still to be read.
inline constexpr int64_t kStreamedBytes = int64_t(32) << 20;

// For memory that has not been written yet.
inline void ask_for_huge_pages(const void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
  const uintptr_t first = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (first + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (first + uintptr_t(bytes)) / kHugePage * kHugePage;
  if (end > begin && end - begin >= 8 * kHugePage) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

inline void ask_for_huge_pages(const torch::stable::Tensor& fresh) {
  if (fresh.is_cpu()) ask_for_huge_pages(fresh.data_ptr(), fresh.numel() * element_size(fresh.scalar_type()));
}

inline torch::stable::Tensor gradient_like(const torch::stable::Tensor& like) {
  torch::stable::Tensor out = torch::stable::empty_like(like);
  ask_for_huge_pages(out);
  return out;
}

}  // namespace fastkd
