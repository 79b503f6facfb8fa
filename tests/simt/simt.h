// Runs CUDA kernels on the CPU. Each CUDA thread is a fiber; the blocks of a cluster run together, clusters one after
// the other, all on the OS thread that launches. A fault (deadlock, wrong mask, invalid use of shared memory, race)
// makes cudaLaunchKernelEx throw std::runtime_error. Fibers switch only at barriers and warp operations, directly to
// the next ready fiber.
//
// Detection of races: `clock` is incremented when a barrier completes. An access at time t by thread A is ordered
// before one by thread B if a barrier covering both completed after t. For warp barriers the condition used instead is
// that A and B have each passed a warp barrier after t. That is exact for full masks; a correct order made by a chain
// of partial masks is never reported as a race. Shuffles and votes order no memory accesses, as in CUDA. Bulk copies
// and their mbarriers: simt_bulk.h.
#pragma once

#include "simt_machine.h"

#define __global__
#define __grid_constant__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__

namespace simt {

inline void sync_block() {
  Thread& me = *current;
  Block& block = *me.block;
  me.state = State::kBlock;
  if (++block.arrived == block.alive) block.machine->release_block(block);
  block.machine->leave(me, false);
}

inline void sync_cluster() {
  Thread& me = *current;
  Machine& m = *me.block->machine;
  me.state = State::kCluster;
  if (++m.arrived == m.alive) m.release_cluster();
  m.leave(me, false);
}

// Completes a warp operation for all of its lanes. The last lane to arrive runs this; the operands of the others are
// still on their stacks.
inline void complete(Machine& m, Warp& warp, unsigned lanes) {
  const Thread& me = *current;
  unsigned ballot = 0;
  if (me.operation == Operation::kSync) ++m.clock;
  for (unsigned left = lanes; left; left &= left - 1) {
    const Thread& t = warp.lanes[__builtin_ctz(left)];
    if (t.operation != me.operation || t.bytes != me.bytes || (t.operation == Operation::kWork && t.work != me.work)) {
      fail("warp operation with mask %08x meets a different one of lane %u", me.mask, t.lane);
    }
    if (t.operation == Operation::kBallot) ballot |= unsigned(*static_cast<const bool*>(t.in)) << t.lane;
  }
  if (me.operation == Operation::kWork) {
    const void* in[32];
    void* out[32];
    for (int lane = 0; lane < 32; ++lane) in[lane] = warp.lanes[lane].in, out[lane] = warp.lanes[lane].out;
    me.work(in, out);
  }
  for (unsigned left = lanes; left; left &= left - 1) {
    Thread& t = warp.lanes[__builtin_ctz(left)];
    if (t.operation == Operation::kSync) t.warp_time = m.clock;
    if (t.operation == Operation::kShuffle) std::memcpy(t.out, warp.lanes[t.source].in, t.bytes);
    if (t.operation == Operation::kBallot) std::memcpy(t.out, &ballot, sizeof(ballot));
    m.wake(t);
  }
  warp.waiting &= ~lanes;
}

// Lanes that the block's size leaves out of its last warp need not arrive, but reading them is a fault.
inline void warp_operation(Operation operation, unsigned mask, const void* in = nullptr, void* out = nullptr,
                           size_t bytes = 0, unsigned source = 0) {
  Thread& me = *current;
  Warp& warp = *me.warp;
  const unsigned lanes = mask & warp.launched;
  if (!(mask >> me.lane & 1)) fail("warp operation with mask %08x leaves out its own lane %u", mask, me.lane);
  if (lanes & warp.exited) {
    fail("warp operation with mask %08x names lane %d, which has exited", mask, __builtin_ctz(lanes & warp.exited));
  }
  if (operation == Operation::kShuffle && !(lanes >> source & 1)) {
    fail("shuffle with mask %08x reads lane %u, which %s", mask, source,
         mask >> source & 1 ? "the block does not have" : "the mask leaves out");
  }
  me.operation = operation;
  me.mask = mask;
  me.in = in;
  me.out = out;
  me.bytes = bytes;
  me.source = source;
  me.state = State::kWarp;
  warp.waiting |= 1u << me.lane;
  bool complete_now = !(lanes & ~warp.waiting);
  for (unsigned left = lanes; complete_now && left; left &= left - 1) {
    complete_now = warp.lanes[__builtin_ctz(left)].mask == mask;
  }
  if (complete_now) complete(*me.block->machine, warp, lanes);
  me.block->machine->leave(me, false);
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 128, "a shuffle moves at most 128 plain bytes");
  T result = value;
  warp_operation(Operation::kShuffle, mask, &value, &result, sizeof(T), source);
  return result;
}

inline unsigned ballot(unsigned mask, bool predicate) {
  unsigned result = 0;
  warp_operation(Operation::kBallot, mask, &predicate, &result);
  return result;
}

// For instructions that exchange registers of a whole warp in a pattern of their own.
template <class In, class Out>
void warp_work(WarpWork work, const In& in, Out& out) {
  if (current->warp->launched != ~0u) fail("an operation of a whole warp in a warp of fewer lanes");
  current->work = work;
  warp_operation(Operation::kWork, ~0u, &in, &out, sizeof(In));
}

inline unsigned char* shared_memory() { return current->block->shared.get(); }
inline unsigned cluster_rank() { return current->block->rank; }
inline unsigned cluster_size() { return current->block->machine->shape.cluster; }

inline void require_alive(const Block& block) {
  if (!block.alive) fail("the shared memory of cluster block %u is gone: it has exited", block.rank);
}

template <class T>
T* in_peer(T* mine, unsigned rank) {
  Machine& m = *current->block->machine;
  const size_t offset = uintptr_t(mine) - uintptr_t(shared_memory());
  if (offset >= m.shape.shared) fail("in_peer: the pointer is not in the block's shared memory");
  if (rank >= m.shape.cluster) fail("in_peer: rank %u in a cluster of %u", rank, m.shape.cluster);
  require_alive(m.blocks[rank]);
  return reinterpret_cast<T*>(m.blocks[rank].shared.get() + offset);
}

// What a bulk copy of this block wrote is ordered before what a thread does after its wait at the copy's mbarrier.
// Otherwise the write counts as that of a thread that has waited.
inline void check_race(const Block& block, const Access& a, unsigned bytes, const char* doing, const char* done,
                       size_t offset) {
  const Thread& me = *current;
  const Machine& m = *me.block->machine;
  if (!(a.bytes & bytes) || a.time < m.time) return;
  const Mbarrier* const mbarrier = a.bulk ? &block.mbarriers[a.thread] : nullptr;
  const unsigned thread = mbarrier ? mbarrier->finisher : a.thread;
  if (mbarrier && &block == me.block && mbarrier->seen[me.id % m.block_threads()] >= a.time) return;
  if (!mbarrier && thread == me.id) return;
  const Thread& other = m.threads[thread];
  if (other.block == me.block && a.time < me.block->time) return;
  const bool same_wait = !mbarrier || mbarrier->completed == a.time;
  if (other.warp == me.warp && same_wait && a.time < std::min(other.warp_time, me.warp_time)) return;
  if (mbarrier) {
    fail("race: it %s shared offset %zu, written by a bulk copy that %s has waited for, with no barrier between", doing,
         offset, where(other).text);
  }
  fail("race: it %s shared offset %zu, %s by %s with no barrier between", doing, offset, done, where(other).text);
}

inline void record(Access& a, unsigned bytes, uint64_t now) {
  const bool same = a.time == now && a.thread == current->id && !a.bulk;
  a.bytes = same ? a.bytes | bytes : bytes;
  a.time = now;
  a.thread = current->id;
  a.bulk = false;
}

inline void shared_access(const void* p, size_t bytes, bool write) {
  Thread& me = *current;
  Machine& m = *me.block->machine;
  const char* verb = write ? "write" : "read";
  const size_t size = m.shape.shared;
  Block* block = me.block;
  size_t begin = uintptr_t(p) - uintptr_t(block->shared.get());
  for (unsigned r = 0; begin >= size && r < m.shape.cluster; ++r) {
    const size_t offset = uintptr_t(p) - uintptr_t(m.blocks[r].shared.get());
    if (offset < size) begin = offset, block = &m.blocks[r];
  }
  if (begin >= size || bytes > size - begin) {
    fail("shared %s of %zu bytes at offset %td is outside the block's %zu", verb, bytes, ptrdiff_t(begin), size);
  }
  require_alive(*block);
  for (size_t at = begin, stop; at < begin + bytes; at = stop) {
    stop = std::min(begin + bytes, at / 4 * 4 + 4);
    const unsigned touched = ((1u << (stop - at)) - 1) << at % 4;
    Word& word = block->words[at / 4];
    const bool old = word.write.time < m.start;
    const unsigned written = old ? 0 : word.write.written;
    if (!old && word.write.coming)
      fail("shared %s at offset %zu, which a copy not yet waited for is to write", verb, at);
    if (!old && word.write.mbarrier) fail("shared %s at offset %zu, where an mbarrier lies", verb, at);
    if (!write && (touched & ~written)) fail("shared read at offset %zu, which was never written", at);
    check_race(*block, word.write, touched, write ? "writes" : "reads", "written", at);
    if (write) {
      check_race(*block, word.read, touched, "writes", "read", at);
      check_race(*block, word.other_read, touched, "writes", "read", at);
      record(word.write, touched, m.clock);
      word.write.written = written | touched;
      word.write.coming = word.write.mbarrier = false;
    } else {
      if (word.read.thread != me.id) word.other_read = word.read;
      record(word.read, touched, m.clock);
    }
  }
}

inline void shared_read(const void* p, size_t bytes) { shared_access(p, bytes, false); }
inline void shared_write(const void* p, size_t bytes) { shared_access(p, bytes, true); }

inline void count(unsigned long long* by_width, size_t bytes, int width) {
  if (width < 1 || width > 16 || (width & (width - 1))) fail("an access to global memory of %d bytes", width);
  by_width[__builtin_ctz(unsigned(width))] += bytes;
}
inline void count_read(size_t bytes, int width) { count(current->block->machine->traffic.read, bytes, width); }
inline void count_write(size_t bytes, int width) { count(current->block->machine->traffic.written, bytes, width); }

// Marks the destination as what a copy is yet to write, or no longer.
inline void mark_coming(const unsigned char* to, size_t size, bool coming) {
  Block& block = *current->block;
  Word* const words = &block.words[size_t(to - block.shared.get()) / 4];
  for (size_t i = 0; i < size / 4; ++i) {
    words[i].write.coming = coming;
    if (coming) words[i].write.written = 0;
  }
}

// An asynchronous copy of 16 bytes, or fewer, or of zeros. The destination's contents become invalid at once, and the
// new contents are there when the thread has waited for the copy's group. Until then any access to the destination is a
// fault, and so is a change of the source. For the detection of races it is a write at both times.
inline void async_copy(void* to, const void* from, bool there, size_t bytes = 16) {
  Thread& me = *current;
  if (uintptr_t(to) % bytes || (there && uintptr_t(from) % bytes)) {
    fail("an asynchronous copy off a %d-byte boundary", int(bytes));
  }
  AsyncCopy copy{static_cast<unsigned char*>(to), there ? from : nullptr, bytes, me.groups, {}};
  shared_write(to, bytes);
  mark_coming(copy.to, copy.size, true);
  std::memset(to, 0xFF, bytes);
  if (there) {
    count_read(bytes, int(bytes));
    std::memcpy(copy.bytes, from, bytes);
  }
  me.copies.push_back(copy);
}
inline void async_commit() { ++current->groups; }
// Waits for all groups except the latest `latest`.
inline void async_wait(unsigned latest) {
  Thread& me = *current;
  auto copy = me.copies.begin();
  for (; copy != me.copies.end() && copy->group + latest < me.groups; ++copy) {
    if (copy->from && std::memcmp(copy->from, copy->bytes, copy->size) != 0) {
      fail("the source of an asynchronous copy has changed before the copy was waited for");
    }
    mark_coming(copy->to, copy->size, false);
    std::memcpy(copy->to, copy->bytes, copy->size);
    shared_write(copy->to, copy->size);
  }
  me.copies.erase(me.copies.begin(), copy);
}

// The traffic of the last launch from this OS thread.
inline Traffic launch_traffic() { return machine().traffic; }

template <class T>
T atomic_add(T* address, T value) {
  T old, sum;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    sum = old + value;
  } while (!__atomic_compare_exchange(address, &old, &sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace simt

#define threadIdx (simt::current->index)
#define blockIdx (simt::current->block->index)

inline void __syncthreads() { simt::sync_block(); }
inline void __syncwarp(unsigned mask = ~0u) { simt::warp_operation(simt::Operation::kSync, mask); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return simt::shuffle(mask, value, (simt::current->lane & -unsigned(width)) | (unsigned(source) & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const unsigned lane = simt::current->lane, source = lane ^ unsigned(lane_mask);
  return simt::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = simt::current->lane, source = lane + delta;
  return simt::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return simt::ballot(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return simt::ballot(mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return simt::ballot(mask, predicate == 0) == 0; }

inline unsigned atomicOr(unsigned* p, unsigned v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }
inline int atomicCAS(int* p, int expected, int v) {
  __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
inline int atomicAdd(int* p, int v) { return simt::atomic_add(p, v); }
inline unsigned atomicAdd(unsigned* p, unsigned v) { return simt::atomic_add(p, v); }
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) { return simt::atomic_add(p, v); }
inline float atomicAdd(float* p, float v) { return simt::atomic_add(p, v); }
inline double atomicAdd(double* p, double v) { return simt::atomic_add(p, v); }

#include "simt_bulk.h"
#include "simt_runtime.h"
