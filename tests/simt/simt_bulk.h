// Bulk copies (cp.async.bulk) from global to shared memory, and the mbarriers at which a block waits for them.
//
// A copy's destination becomes invalid at once. Its contents arrive when a thread waits at the copy's mbarrier, and not
// before, so that nothing is found by luck; a phase that nobody waits for does not complete. Until then any access to
// the destination is a fault, and so is a change of the source. For the detection of races a copy is a write by the
// thread that starts it, and again when it completes. A thread may then read what it has waited for itself; others need
// a barrier after that thread's wait. Arriving at an mbarrier orders no other accesses, which is stricter than CUDA.
//
// Bulk copies use another path to memory (the async proxy): what a thread has written to the destination before, it
// must fence, before the barrier that orders the copy after it.
//
// Only what the kernels use is known: mbarriers of the block itself, waits by parity, one arrival at a time.
#pragma once

namespace simt {

inline bool has_bulk_copies() { return settings().capability >= 90; }

// The offset in this block's shared memory, or SIZE_MAX.
inline size_t own_offset(const void* p, size_t bytes) {
  const Block& block = *current->block;
  const size_t size = block.machine->shape.shared, offset = uintptr_t(p) - uintptr_t(block.shared.get());
  return offset < size && bytes <= size - offset ? offset : SIZE_MAX;
}

inline void mbarrier_init(void* p, unsigned count) {
  Thread& me = *current;
  Block& block = *me.block;
  if (!has_bulk_copies()) fail("mbarriers with bulk copies exist from sm_90 on");
  if (count == 0) fail("an mbarrier for 0 arrivals");
  const size_t offset = own_offset(p, 8);
  if (uintptr_t(p) % 8 || offset == SIZE_MAX) {
    fail("an mbarrier off an 8-byte boundary, or outside the block's shared memory");
  }
  shared_write(p, 8);
  for (size_t i = offset / 4; i < offset / 4 + 2; ++i) block.words[i].write.mbarrier = true;
  Mbarrier b{};
  b.offset = offset;
  b.count = b.pending = count;
  b.initialised = block.words[offset / 4].write;
  b.seen.assign(block.machine->block_threads(), 0);
  block.mbarriers.push_back(std::move(b));
}

// The number of the mbarrier at p.
inline unsigned mbarrier_at(const void* p) {
  const Block& block = *current->block;
  const size_t offset = uintptr_t(p) - uintptr_t(block.shared.get());
  for (size_t i = 0; i < block.mbarriers.size(); ++i) {
    if (block.mbarriers[i].offset != offset) continue;
    check_race(block, block.mbarriers[i].initialised, 15, "uses the mbarrier at", "initialised", offset);
    return unsigned(i);
  }
  fail("no mbarrier was initialised at shared offset %td", ptrdiff_t(offset));
}

// Orders the thread's accesses before bulk copies that follow (fence.proxy.async, and fence.mbarrier_init).
inline void fence_async() { current->fenced = ++current->block->machine->clock; }

inline void complete_phase(Block& block, unsigned number) {
  Machine& m = *block.machine;
  Mbarrier& b = block.mbarriers[number];
  b.completed = ++m.clock;
  b.finisher = current->id;
  for (const BulkCopy& copy : b.copies) {
    if (std::memcmp(copy.from, copy.bytes.data(), copy.bytes.size()) != 0) {
      fail("the source of a bulk copy has changed before the copy was waited for");
    }
    mark_coming(copy.to, copy.bytes.size(), false);
    std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
    const size_t first = size_t(copy.to - block.shared.get()) / 4;
    for (size_t i = first; i < first + copy.bytes.size() / 4; ++i) {
      Access& write = block.words[i].write;
      write.time = b.completed;
      write.thread = number;
      write.bulk = true;
      write.bytes = write.written = 15;
    }
  }
  b.copies.clear();
  ++b.phase;
  b.pending = b.count;
  b.expected = b.copied = 0;
}

// What follows when bytes or an arrival were added: a phase without bytes completes at once; of another, the threads
// that wait for it look again.
inline void after_arrival(Block& block, unsigned number) {
  Mbarrier& b = block.mbarriers[number];
  if (b.pending == 0 && b.copied > b.expected) {
    fail("%llu bytes were copied for the mbarrier at shared offset %zu, which expects %llu",
         static_cast<unsigned long long>(b.copied), b.offset, static_cast<unsigned long long>(b.expected));
  }
  if (!b.complete()) return;
  if (b.expected == 0) complete_phase(block, number);
  for (unsigned i = 0; i < block.machine->block_threads(); ++i) {
    Thread& t = block.threads[i];
    if (t.state == State::kMbarrier && t.waits_for == number) block.machine->wake(t);
  }
}

// Arrives, and adds to the bytes that the present phase expects.
inline void mbarrier_arrive_expect(void* p, size_t bytes) {
  Block& block = *current->block;
  const unsigned number = mbarrier_at(p);
  Mbarrier& b = block.mbarriers[number];
  if (b.pending == 0) {
    fail("arrives at the mbarrier at shared offset %zu, whose phase %llu has not completed", b.offset,
         static_cast<unsigned long long>(b.phase));
  }
  b.expected += bytes;
  if (b.expected >= 1 << 20) fail("an mbarrier expects %zu bytes, 2^20 - 1 at most", size_t(b.expected));
  --b.pending;
  after_arrival(block, number);
}

inline void bulk_copy(void* to, const void* from, size_t bytes, void* mbarrier) {
  Thread& me = *current;
  Block& block = *me.block;
  const Machine& m = *block.machine;
  if (uintptr_t(to) % 16 || uintptr_t(from) % 16 || bytes % 16 || bytes == 0) {
    fail("a bulk copy of %zu bytes off a 16-byte boundary, or of a size that is no multiple of 16", bytes);
  }
  const size_t offset = own_offset(to, bytes);
  if (offset == SIZE_MAX) fail("a bulk copy of %zu bytes leaves the block's shared memory", bytes);
  const unsigned number = mbarrier_at(mbarrier);
  Mbarrier& b = block.mbarriers[number];
  if (m.threads[b.initialised.thread].fenced <= b.initialised.time) {
    fail("a bulk copy uses the mbarrier at shared offset %zu, whose initialisation was not fenced", b.offset);
  }
  for (size_t i = offset / 4; i < (offset + bytes) / 4; ++i) {
    const Access& write = block.words[i].write;
    if (write.time < m.start || write.bulk || write.coming || m.threads[write.thread].fenced > write.time) continue;
    fail("a bulk copy overwrites shared offset %zu, written by %s without a fence after it", 4 * i,
         where(m.threads[write.thread]).text);
  }
  shared_write(to, bytes);
  const auto* const source = static_cast<const unsigned char*>(from);
  BulkCopy copy{static_cast<unsigned char*>(to), from, {source, source + bytes}};
  mark_coming(copy.to, bytes, true);
  std::memset(to, 0xFF, bytes);
  count_read(bytes, 16);
  b.copies.push_back(std::move(copy));
  b.copied += bytes;
  after_arrival(block, number);
}

// Waits until the latest phase of this parity has completed: the present phase, or the one before it.
inline void mbarrier_wait(void* p, unsigned parity) {
  Thread& me = *current;
  Block& block = *me.block;
  const unsigned number = mbarrier_at(p);
  const auto mbarrier = [&]() -> Mbarrier& { return block.mbarriers[number]; };  // others may be added meanwhile
  const uint64_t present = mbarrier().phase;
  const auto phase = static_cast<unsigned long long>(present);
  if (present % 2 == parity) {
    while (mbarrier().phase == present && !mbarrier().complete()) {
      me.waits_for = number;
      me.state = State::kMbarrier;
      block.machine->leave(me, false);
    }
    if (mbarrier().phase == present) complete_phase(block, number);
    if (mbarrier().phase > present + 1) fail("phase %llu of an mbarrier ends before its wait has returned", phase + 1);
  } else if (present == 0) {
    fail("waits for parity 1 of the mbarrier at shared offset %zu before its first phase", mbarrier().offset);
  } else if (mbarrier().begun()) {
    fail("waits for the other parity than that of phase %llu of the mbarrier at shared offset %zu, which has begun",
         phase, mbarrier().offset);
  }
  mbarrier().seen[me.id % block.machine->block_threads()] = mbarrier().completed;
}

}  // namespace simt
