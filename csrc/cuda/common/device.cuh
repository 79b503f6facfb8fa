// Access to shared and global memory, blocks and clusters, as kernels use it. FASTKD_TWIN(device, host) has two
// variants: nvcc compiles the first. Under FASTKD_SIMT g++ compiles the second, which runs on the CPU, checks every
// access to shared memory and counts those to global memory (tests/simt).
#pragma once
#include "../../math/float16.h"

#ifdef FASTKD_SIMT
#include "simt.h"
#define FASTKD_TWIN(device, host) host
#else
#include <cooperative_groups.h>
#include <cuda_runtime.h>
#define FASTKD_TWIN(device, host) device
#endif

namespace fastkd::cuda {

using namespace portable;

#ifndef FASTKD_SIMT
extern __shared__ __align__(16) unsigned char dynamic_shared[];
#endif

__device__ __forceinline__ unsigned char* shared_memory() { return FASTKD_TWIN(dynamic_shared, simt::shared_memory()); }

template <class T>
__device__ __forceinline__ T shared_load(const T* from) {
  FASTKD_TWIN(, simt::shared_read(from, sizeof(T)));
  return *from;
}
template <class T>
__device__ __forceinline__ void shared_store(T* to, const T& value) {
  FASTKD_TWIN(, simt::shared_write(to, sizeof(T)));
  *to = value;
}

// The thread's number, read from the register again. The compiler then recomputes what depends on it instead of keeping
// it in registers.
__device__ __forceinline__ int thread_again() {
#ifdef FASTKD_SIMT
  return int(threadIdx.x);
#else
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#endif
}

// Sets bits that several threads may set between two barriers. The word was set to 0 before the first of them.
__device__ __forceinline__ void shared_or(unsigned* to, unsigned bits) { atomicOr(to, bits); }
// The same with addition. Returns the previous value.
__device__ __forceinline__ unsigned shared_add(unsigned* to, unsigned more) { return atomicAdd(to, more); }

// Stores `value` where `expected` is. Returns the previous value.
__device__ __forceinline__ int shared_exchange(int* to, int expected, int value) {
  return atomicCAS(to, expected, value);
}

// Global memory, one element or 16 bytes at a time. The streaming variants are for data read or written once, which
// should not evict from the L2 what will be read again.
template <class T>
__device__ __forceinline__ T global_load(const T* from) {
  FASTKD_TWIN(, simt::count_read(sizeof(T), sizeof(T)));
  return *from;
}
template <class T>
__device__ __forceinline__ void global_store(T* to, const T& value) {
  FASTKD_TWIN(, simt::count_write(sizeof(T), sizeof(T)));
  *to = value;
}
template <bool kStream>
__device__ __forceinline__ uint4 global_load16(const void* from) {
  const uint4* p = static_cast<const uint4*>(from);
  FASTKD_TWIN(, simt::count_read(16, 16));
  return FASTKD_TWIN(kStream ? __ldcs(p) : *p, *p);
}
template <bool kStream = true>
__device__ __forceinline__ void global_store16(void* to, const uint4& value) {
  uint4* p = static_cast<uint4*>(to);
  FASTKD_TWIN(, simt::count_write(16, 16));
#ifndef FASTKD_SIMT
  if constexpr (kStream) return __stcs(p, value);
#endif
  *p = value;
}

__device__ __forceinline__ void global_store8(void* to, const uint2& value) {
  uint2* p = static_cast<uint2*>(to);
  FASTKD_TWIN(, simt::count_write(8, 8));
  FASTKD_TWIN(__stcs(p, value), *p = value);
}

// Starts a copy of 16 bytes, or of zeros, from global to shared memory without going through registers. Copies are
// committed in groups. A thread that has waited for a group sees its own copies; other threads see them after the next
// barrier. Before sm_80 the copy is an ordinary load and store, complete at once.
__device__ __forceinline__ void async_copy16(void* to, const void* from, bool there) {
#ifdef FASTKD_SIMT
  simt::async_copy(to, from, there);
#elif __CUDA_ARCH__ < 800
  *static_cast<uint4*>(to) = there ? *static_cast<const uint4*>(from) : uint4{};
#else
  const unsigned place = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(there ? 16 : 0) : "memory");
#endif
}
// The same with 8 bytes.
__device__ __forceinline__ void async_copy8(void* to, const void* from) {
#ifdef FASTKD_SIMT
  simt::async_copy(to, from, true, 8);
#elif __CUDA_ARCH__ < 800
  *static_cast<uint2*>(to) = *static_cast<const uint2*>(from);
#else
  const unsigned place = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(place), "l"(from) : "memory");
#endif
}
__device__ __forceinline__ void async_commit() {
#ifdef FASTKD_SIMT
  simt::async_commit();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for all committed groups except the latest kLatest.
template <int kLatest>
__device__ __forceinline__ void async_wait() {
#ifdef FASTKD_SIMT
  simt::async_wait(kLatest);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kLatest) : "memory");
#endif
}

// Thread-block clusters exist from sm_90 on. On earlier devices a block counts as a cluster of one, and kernels are
// never launched with larger clusters.
#if defined(FASTKD_SIMT) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
__device__ __forceinline__ unsigned cluster_rank() {
  return FASTKD_TWIN(cooperative_groups::this_cluster().block_rank(), simt::cluster_rank());
}
__device__ __forceinline__ void cluster_sync() {
  FASTKD_TWIN(cooperative_groups::this_cluster().sync(), simt::sync_cluster());
}
// The corresponding address in the shared memory of another block of the cluster.
template <class T>
__device__ __forceinline__ T* in_peer(T* mine, unsigned rank) {
  return FASTKD_TWIN(cooperative_groups::this_cluster().map_shared_rank(mine, rank), simt::in_peer(mine, rank));
}
#else
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_sync() {}
template <class T>
__device__ __forceinline__ T* in_peer(T* mine, unsigned) {
  return mine;
}
#endif

}  // namespace fastkd::cuda
