// The emulated machine of simt.h: blocks, warps and fibers of the running cluster, and their scheduler.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "simt_context.h"

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// These have the same values in all fibers of a launch. They are variables, not macros, since cudaLaunchConfig_t has
// members of the same names.
inline thread_local dim3 blockDim [[gnu::tls_model("initial-exec")]];
inline thread_local dim3 gridDim [[gnu::tls_model("initial-exec")]];

namespace simt {

enum class State : unsigned char { kReady, kBlock, kWarp, kCluster, kMbarrier, kDone };
enum class Operation : unsigned char { kSync, kShuffle, kBallot, kWork };

// The effect of one operation of a whole warp, given every lane's operands and where its results go.
using WarpWork = void (*)(const void* const* in, void* const* out);

struct Thread;
struct Machine;

// The last access of its kind to a 4-byte word. bytes: a mask of those accessed by it. written: a mask of those written
// by any access since the block began. coming: a copy not yet waited for is to write it. bulk: a bulk copy wrote it,
// and `thread` is the number of its mbarrier instead. mbarrier: an mbarrier lies there.
struct Access {
  uint64_t time : 39, thread : 14, bytes : 4, written : 4, coming : 1, bulk : 1, mbarrier : 1;
};
struct Word {
  Access write, read, other_read;  // other_read: the latest read by another thread than read.thread
};

struct Warp {
  Thread* lanes;
  unsigned launched, exited, waiting;
};

struct FreeShared {
  void operator()(unsigned char* p) const { ::operator delete(p, std::align_val_t(1024)); }
};

// A copy of at most 16 bytes to shared memory that has not completed.
struct AsyncCopy {
  unsigned char* to;
  const void* from;  // null: zeros
  size_t size;
  uint64_t group;
  unsigned char bytes[16];
};

// A bulk copy to shared memory that has not completed.
struct BulkCopy {
  unsigned char* to;
  const void* from;
  std::vector<unsigned char> bytes;
};

// An mbarrier in a block's shared memory. The present phase completes when all threads it counts have arrived and as
// many bytes as they expect were copied.
struct Mbarrier {
  size_t offset;
  unsigned count, pending;    // arrivals in a phase, and those still missing in the present one
  uint64_t expected, copied;  // bytes of the present phase
  uint64_t phase;             // how many phases have completed
  uint64_t completed;         // when the last one did
  unsigned finisher;          // the thread that had waited for it
  Access initialised;
  std::vector<BulkCopy> copies;
  std::vector<uint64_t> seen;  // for each thread of the block: when the last phase that it has waited for completed

  bool complete() const { return pending == 0 && copied == expected; }
  bool begun() const { return pending < count || copied > 0; }
};

struct Block {
  uint3 index;
  unsigned rank, alive, arrived;
  uint64_t time;
  Machine* machine;
  Thread* threads;
  std::unique_ptr<unsigned char, FreeShared> shared;
  std::vector<Word> words;
  std::vector<Mbarrier> mbarriers;
};

struct Thread {
  Context context;
  uint3 index;
  State state;
  Operation operation;
  bool started;
  unsigned lane, id, mask, source;
  size_t bytes;
  const void* in;
  void* out;
  WarpWork work;
  std::vector<AsyncCopy> copies;
  uint64_t groups;  // number of groups of copies committed
  Block* block;
  Warp* warp;
  uint64_t warp_time;
  uint64_t fenced;     // when the thread last ordered its accesses before later bulk copies
  unsigned waits_for;  // the number of an mbarrier
};

// Bytes of global memory moved, by width of access: 1, 2, 4, 8, 16.
struct Traffic {
  unsigned long long read[5] = {}, written[5] = {};
};

struct Totals {
  Traffic traffic;
  unsigned long long launches = 0, largest_cluster = 0, largest_shared_memory = 0;
  unsigned long long attributes_set = 0, occupancy_queries = 0;
};

struct FunctionLimits {
  size_t dynamic_shared = 48 * 1024;
  bool nonportable_cluster = false;
};

struct Settings {
  std::atomic<int> capability{90};
  std::atomic<unsigned> seed{0};
  std::atomic<unsigned> most_blocks{16};  // of a cluster
  std::atomic<int> most_grid_blocks{INT32_MAX};
  std::mutex mutex;  // guards the members below
  Totals totals;
  std::map<std::pair<int, const void*>, FunctionLimits> functions;  // by device and kernel
};

inline Settings& settings() {
  static Settings instance;
  return instance;
}

inline int most_grid_blocks() { return settings().most_grid_blocks; }

inline Totals totals() {
  std::lock_guard<std::mutex> lock(settings().mutex);
  return settings().totals;
}

inline thread_local Thread* current [[gnu::tls_model("initial-exec")]] = nullptr;

struct Shape {
  dim3 grid, block;
  unsigned cluster;
  size_t shared;
};

// Not a std::string: a fiber that ends in a fault frees no memory.
struct Place {
  char text[96];
};
inline Place where(const Thread& t);

struct Machine {
  Shape shape;
  void (*call)(const void*);
  const void* closure;
  Context scheduler;
  bool abandoning = false;
  unsigned alive = 0, arrived = 0;  // of the running cluster
  uint64_t clock = 0, start = 0, time = 0, random = 0;
  size_t cursor = 0;
  std::vector<Thread*> ready, next;
  std::vector<Block> blocks;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned char*> stacks;
  Traffic traffic;
  char fault[512] = "";

  Machine() = default;
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;
  ~Machine() {
    for (unsigned char* stack : stacks) munmap(stack, kStackBytes);
  }

  Thread* pop() {
    if (cursor == ready.size()) {
      ready.swap(next);
      next.clear();
      cursor = 0;
      if (random) {
        for (size_t i = ready.size(); i > 1; --i) {
          random ^= random << 13, random ^= random >> 7, random ^= random << 17;
          std::swap(ready[i - 1], ready[(random >> 32) * i >> 32]);
        }
      }
      if (ready.empty()) return nullptr;
    }
    return ready[cursor++];
  }

  void wake(Thread& t) {
    t.state = State::kReady;
    next.push_back(&t);
  }

  void leave(Thread& me, bool last) {
    Thread* to = pop();
    if (to == &me) return;
    current = to;
    switch_context(me.context, to ? to->context : scheduler, last);
    if (abandoning) switch_context(me.context, scheduler, true);
  }

  unsigned block_threads() const { return shape.block.x * shape.block.y * shape.block.z; }

  void release_block(Block& b) {
    b.arrived = 0;
    b.time = ++clock;
    for (unsigned i = 0; i < block_threads(); ++i) {
      if (b.threads[i].state == State::kBlock) wake(b.threads[i]);
    }
  }

  void release_cluster() {
    arrived = 0;
    time = ++clock;
    for (Thread& t : threads) {
      if (t.state == State::kCluster) wake(t);
    }
  }

  void allocate(const Shape& s) {
    shape = s;
    blockDim = s.block;
    gridDim = s.grid;
    const unsigned per_block = block_threads(), block_warps = (per_block + 31) / 32;
    blocks.resize(s.cluster);
    threads.resize(size_t(s.cluster) * per_block);
    warps.resize(size_t(s.cluster) * block_warps);
    while (stacks.size() < threads.size()) stacks.push_back(new_stack());
    for (unsigned r = 0; r < s.cluster; ++r) {
      Block& b = blocks[r];
      b.machine = this;
      b.rank = r;
      b.threads = &threads[size_t(r) * per_block];
      b.shared.reset(s.shared ? static_cast<unsigned char*>(::operator new(s.shared, std::align_val_t(1024)))
                              : nullptr);
      b.words.resize((s.shared + 3) / 4);
      for (unsigned i = 0; i < per_block; ++i) {
        Thread& t = b.threads[i];
        t.index = {i % s.block.x, i / s.block.x % s.block.y, i / s.block.x / s.block.y};
        t.lane = i % 32;
        t.id = r * per_block + i;
        t.block = &b;
        t.warp = &warps[r * block_warps + i / 32];
        if (t.lane == 0) *t.warp = {&t, 0, 0, 0};
        t.warp->launched |= 1u << t.lane;
      }
    }
  }

  void begin_cluster(uint64_t first) {
    start = time = ++clock;
    alive = unsigned(threads.size());
    arrived = 0;
    cursor = 0;
    ready.clear();
    next.clear();
    for (Block& b : blocks) {
      const uint64_t i = first + b.rank, columns = shape.grid.x;
      b.index = {unsigned(i % columns), unsigned(i / columns % shape.grid.y), unsigned(i / columns / shape.grid.y)};
      b.alive = block_threads();
      b.arrived = 0;
      b.time = start;
      b.mbarriers.clear();
      if (shape.shared) std::memset(b.shared.get(), 0xFF, shape.shared);
    }
    for (Warp& w : warps) w.exited = w.waiting = 0;
    for (Thread& t : threads) {
      t.warp_time = t.fenced = 0;
      t.started = false;
      t.copies.clear();
      t.groups = 0;
      prepare_context(t.context, stacks[t.id], t.id, &enter);
      wake(t);
    }
  }

  static void enter();

  static std::string waits_text(const Thread& t) {
    const Mbarrier& b = t.block->mbarriers[t.waits_for];
    return " wait for phase " + std::to_string(b.phase) + " of the mbarrier at shared offset " +
           std::to_string(b.offset) + ", which has " + std::to_string(b.count - b.pending) + " of " +
           std::to_string(b.count) + " arrivals and " + std::to_string(b.copied) + " of " + std::to_string(b.expected) +
           " bytes";
  }

  std::string deadlock() const {
    struct Group {
      unsigned count = 0;
      const Thread* example = nullptr;
    };
    std::map<std::pair<State, unsigned>, Group> groups;
    std::string overlap;
    for (const Thread& t : threads) {
      const bool in_warp = t.state == State::kWarp;
      Group& g = groups[{t.state, in_warp ? t.mask : t.state == State::kMbarrier ? t.waits_for : 0}];
      if (!g.count++) g.example = &t;
      for (unsigned i = 0; in_warp && overlap.empty() && i < t.lane; ++i) {
        const Thread& other = t.warp->lanes[i];
        if (other.state == State::kWarp && other.mask != t.mask && (other.mask & t.mask)) {
          overlap = "; lanes " + std::to_string(i) + " and " + std::to_string(t.lane) +
                    " of one warp wait with different, overlapping masks";
        }
      }
    }
    std::string text = "simt: deadlock: ";
    for (const auto& [key, group] : groups) {
      char mask[16];
      std::snprintf(mask, sizeof(mask), "%08x", key.second);
      text += (&group == &groups.begin()->second ? "" : ", ") + std::to_string(group.count) + " threads";
      switch (key.first) {
        case State::kBlock:
          text += " wait at a block barrier";
          break;
        case State::kWarp:
          text += std::string(" wait at a warp operation with mask ") + mask;
          break;
        case State::kCluster:
          text += " wait at a cluster barrier";
          break;
        case State::kMbarrier:
          text += waits_text(*group.example);
          break;
        default:
          text += " have exited";
      }
      text += std::string(" (") + where(*group.example).text + ")";
    }
    return text + overlap;
  }

  // Lets the sanitizer free its data of fibers that will never finish.
  void abandon() {
#ifdef SIMT_ASAN
    abandoning = true;
    for (Thread& t : threads) {
      if (t.started && t.state != State::kDone) switch_context(scheduler, t.context, false);
      __asan_unpoison_memory_region(stacks[t.id], kStackBytes);
    }
    abandoning = false;
#endif
  }

  void run(const Shape& s, void (*function)(const void*), const void* argument, unsigned seed) {
    if (current) throw std::runtime_error("simt: a kernel launches a kernel");
    allocate(s);
    call = function;
    closure = argument;
    random = seed * 0x9E3779B97F4A7C15ull;
    traffic = {};
    fault[0] = 0;
    forget_stack(scheduler);
    const uint64_t count = uint64_t(s.grid.x) * s.grid.y * s.grid.z;
    for (uint64_t first = 0; first < count; first += s.cluster) {
      begin_cluster(first);
      current = pop();
      switch_context(scheduler, current->context, false);
      current = nullptr;
      if (fault[0] || alive) {
        const std::string message = fault[0] ? fault : deadlock();
        abandon();
        throw std::runtime_error(message);
      }
    }
  }
};

inline Machine& machine() {
  thread_local Machine instance;
  return instance;
}

inline Place where(const Thread& t) {
  const Shape& shape = t.block->machine->shape;
  const uint3 b = t.block->index, i = t.index;
  Place place;
  int used = 0;
  const auto add = [&](const char* name, uint3 at, dim3 of) {
    const char* format = of.z > 1 ? "%s (%u, %u, %u)" : of.y > 1 ? "%s (%u, %u)" : "%s %u";
    used += std::snprintf(place.text + used, sizeof(place.text) - size_t(used), format, name, at.x, at.y, at.z);
  };
  add("block", b, shape.grid);
  add(", thread", i, shape.block);
  return place;
}

// Reports a fault and leaves the fiber for good. No destructor in the kernel runs.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  Thread& me = *current;
  Machine& m = *me.block->machine;
  int used = std::snprintf(m.fault, sizeof(m.fault), "simt: %s: ", where(me).text);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(m.fault + used, sizeof(m.fault) - used, format, arguments);
  va_end(arguments);
  me.state = State::kDone;
  switch_context(me.context, m.scheduler, true);
  std::abort();
}

inline void Machine::enter() {
  Thread& me = *current;
  Machine& m = *me.block->machine;
  Block& block = *me.block;
  Warp& warp = *me.warp;
  start_context(m.scheduler);
  me.started = true;
  m.call(m.closure);
  if (!me.copies.empty()) fail("exits with %zu asynchronous copies not waited for", me.copies.size());
  if (block.alive == 1) {
    for (const Mbarrier& b : block.mbarriers) {
      if (b.copies.empty()) continue;
      fail("exits with %zu bulk copies not waited for at the mbarrier at shared offset %zu", b.copies.size(), b.offset);
    }
  }
  for (unsigned left = warp.waiting; left; left &= left - 1) {
    const Thread& other = warp.lanes[__builtin_ctz(left)];
    if (other.mask >> me.lane & 1) {
      fail("lane %u exits, but lane %u waits for it in a warp operation with mask %08x", me.lane, other.lane,
           other.mask);
    }
  }
  me.state = State::kDone;
  warp.exited |= 1u << me.lane;
  --m.alive;
  if (--block.alive && block.arrived == block.alive) m.release_block(block);
  if (m.alive && m.arrived == m.alive) m.release_cluster();
  m.leave(me, true);
}

}  // namespace simt
