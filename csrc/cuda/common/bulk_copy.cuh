// Bulk copies from global to shared memory (cp.async.bulk, sm_90 and later): one thread starts a copy of any multiple
// of 16 bytes between addresses that are multiples of 16; all threads wait for it at an mbarrier. Without them
// has_bulk_copies() is false, and nothing else here may be called.
//
// An mbarrier counts phases. Here a phase completes when one thread has called expect_bytes(), and that many bytes have
// arrived. A thread that waits names the phase by its parity: 0 for the first one, then 1, 0, 1, ... The next phase may
// begin when the last one has completed.
#pragma once
#include "device.cuh"

namespace fastkd::cuda {

using CopyBarrier = uint64_t;  // in shared memory, aligned to 8

__device__ __forceinline__ bool has_bulk_copies() {
#ifdef FASTKD_SIMT
  return simt::has_bulk_copies();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return true;
#else
  return false;
#endif
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FASTKD_BULK(device, host) device
__device__ __forceinline__ unsigned shared_place(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }
#else
#define FASTKD_BULK(device, host) FASTKD_TWIN(, host)
#endif

// Bulk copies to a place in shared memory come after what the thread did there, if a barrier stands between this fence
// and the copies.
__device__ __forceinline__ void fence_before_copies() {
  FASTKD_BULK(asm volatile("fence.proxy.async.shared::cta;" :: : "memory"), simt::fence_async());
}

// To be called by one thread, before a barrier of all that use them.
__device__ __forceinline__ void init_barriers(CopyBarrier* barriers, int count) {
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    FASTKD_BULK(asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_place(barriers + i)) : "memory"),
                simt::mbarrier_init(barriers + i, 1));
  }
  FASTKD_BULK(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"), );
  fence_before_copies();
}

// Begins a phase. Its copies are to be started after that.
__device__ __forceinline__ void expect_bytes(CopyBarrier* barrier, unsigned bytes) {
  FASTKD_BULK(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_place(barrier)),
                           "r"(bytes) : "memory"),
              simt::mbarrier_arrive_expect(barrier, bytes));
}

__device__ __forceinline__ void bulk_copy(void* to, const void* from, unsigned bytes, CopyBarrier* barrier) {
  FASTKD_BULK(
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       shared_place(to)),
                   "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_place(barrier)) : "memory"),
      simt::bulk_copy(to, from, bytes, barrier));
}

// Waits until the phase of this parity has completed. The thread then sees its bytes.
__device__ __forceinline__ void wait_for_copies(CopyBarrier* barrier, unsigned parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned done;
  do {
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(shared_place(barrier)), "r"(parity)
        : "memory");
  } while (!done);
#endif
  FASTKD_BULK(, simt::mbarrier_wait(barrier, parity));
}

#undef FASTKD_BULK

}  // namespace fastkd::cuda
