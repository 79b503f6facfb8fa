// byte_log_probs on the GPU, forward: log-sum-exps of a row's logits by column. Logarithms are relative to the row's
// origin, its largest logit that counts.
//
// Memory, for the empty prefix: one read of the logits. A block processes the same slice of the ids in all its rows. It
// keeps a list of the slice's places, sorted by column, in shared memory (4 bytes per id are read for that, once per
// block), and loads each row's logits of the slice beside it. Every thread sums an equally long piece of the list. A
// column may therefore have any share of the ids, and no sum depends on the order of threads. The slices of a row
// belong to the blocks of a cluster. Where that is not possible, the slices' sums by column go through global memory to
// a second kernel.
//
// For other prefixes, and for columns whose share of the row is tiny, one warp gathers a column's ids.
#pragma once
#include "byte_segments.cuh"

namespace fastkd::cuda {

// Only what is impossible counts as exactly 0: the sum of a column whose possible ids all underflow is kLeastSum, and a
// slice's factor is at least 2^kLeastPower.
inline constexpr float kLeastSum = 0x1p-125f, kLeastPower = -125;

// The exponent of 2 that corresponds to e^below. `below` is a slice's largest logit minus the row's.
__device__ __forceinline__ float power_of(float below) {
  return below < float(-kImpossible) ? -INFINITY : at_least(kLeastPower, below * float(kLog2E));
}

// A slice's part of a row, in packs. Places are counted from the slice's first id.
template <class Source>
struct ByteSlice;

template <class T>
struct ByteSlice<PackedSource<T, false>> {
  using Item = T;
  using Raw = Packed<T>;
  static constexpr int kSize = Raw::kSize;
  const PackedRow<T> logits, gradient;
  const int lead;

  __device__ ByteSlice(const ByteArguments& a, int64_t row, int first, int count)
      : logits(a.logits.at(row, first), count),
        gradient(a.gradient ? a.gradient.at(row, first) : nullptr, count),
        lead(logits.lead) {}

  __device__ __forceinline__ int packs() const { return logits.packs(); }
  __device__ __forceinline__ int place(int pack) const { return logits.column(pack); }
  __device__ __forceinline__ Raw fetch(int pack) const {
    return logits.template load<true>(pack, element<T>(float(-INFINITY)));
  }
  // Packs [whole_begin, whole_end) are not cut.
  __device__ __forceinline__ int whole_begin() const { return lead > 0; }
  __device__ __forceinline__ int whole_end() const { return (lead + logits.columns) / kSize; }
  __device__ __forceinline__ Raw fetch_whole(int pack) const {
    return bit_cast<Raw>(global_load16<true>(logits.place(pack)));
  }
  __device__ __forceinline__ void store(int pack, const Raw& raw) const { gradient.store(pack, raw); }
};

template <>
struct ByteSlice<AnySource> {
  using Item = float;
  struct Raw {
    float item[1];
  };
  static constexpr int kSize = 1;
  const DeviceRows &logits, &gradient;
  char *const logits_first, *const gradient_first;
  const int count, lead = 0;

  __device__ ByteSlice(const ByteArguments& a, int64_t row, int first, int n)
      : logits(a.logits),
        gradient(a.gradient),
        logits_first(a.logits.at(row, first)),
        gradient_first(a.gradient ? a.gradient.at(row, first) : nullptr),
        count(n) {}

  __device__ __forceinline__ int packs() const { return count; }
  __device__ __forceinline__ int place(int pack) const { return pack; }
  __device__ __forceinline__ Raw fetch(int pack) const { return {{AnySource::logit(logits, logits_first, pack)}}; }
  __device__ __forceinline__ int whole_begin() const { return 0; }
  __device__ __forceinline__ int whole_end() const { return count; }
  __device__ __forceinline__ Raw fetch_whole(int pack) const { return fetch(pack); }
  __device__ __forceinline__ void store(int pack, const Raw& raw) const {
    gradient.put(AnySource::place(gradient, gradient_first, pack), raw.item[0]);
  }
};

// Sets the logits of a pack's ids that do not count to -inf.
template <class Slice>
__device__ __forceinline__ void drop_invalid(const ByteArguments& a, const Slice& slice, const char* valid_row,
                                             int first, int count, int pack, typename Slice::Raw& raw) {
  if (!a.valid) return;
#pragma unroll
  for (int j = 0; j < Slice::kSize; ++j) {
    const int place = slice.place(pack) + j;
    if (place >= 0 && place < count && !a.counts(valid_row, first + place))
      raw.item[j] = element<typename Slice::Item>(float(-INFINITY));
  }
}

// What a slice computes of a row: of each column the sum of 2^((logit - top) log2(e)); the slice's top; and of each
// warp its part of the sum over all columns.
inline constexpr int kParts = kRowThreads / kWarp;
__host__ __device__ constexpr int64_t slice_sums(int64_t columns) { return columns + 1 + kParts; }

// Computes a row of the empty prefix from its slices' sums. load(slice, i) returns the i-th of slice_sums. This block
// writes columns [begin, end). Shared memory: factors has one number per slice.
template <class Load>
__device__ void finish_whole(const ByteArguments& a, int64_t row, const Team& team, float* factors, const Load& load,
                             int begin, int end) {
  // Columns with a smaller share of the row are summed separately, unless the sum is 0, that is, no id is possible.
  // Compared with this share, all terms that underflowed or were raised are negligible.
  constexpr double kSmall = 0x1p-85;
  constexpr int kLanes = 4;  // lanes that add one column's sums over the slices
  const int columns = a.columns, lane = team.thread % kWarp;
  const auto add = [](double& all, double next) { all += next; };
  // Every warp computes the top itself, which needs no barrier.
  float top = -INFINITY;
#pragma unroll 1
  for (int s = lane; s < a.slices; s += kWarp) top = at_least(top, load(s, columns));
  top = warp_reduce<true>(top, [](float& all, float next) { all = at_least(all, next); });
  for (int s = team.thread; s < a.slices; s += team.threads)
    shared_store(factors + s, exp2_of(power_of(load(s, columns) - top)));
  team.sync();
  double total = 0;
#pragma unroll 4
  for (int i = lane; i < kParts * a.slices; i += kWarp)
    total += double(load(i / kParts, columns + 1 + i % kParts)) * shared_load(factors + i / kParts);
  const double all = ::log(warp_reduce<true>(total, add)) + (top - top);
#pragma unroll 1
  for (int base = begin + team.thread / kLanes - lane / kLanes; base < end; base += team.threads / kLanes) {
    const int c = base + lane / kLanes;
    double sum = 0;
    if (c < end) {
#pragma unroll 4
      for (int s = lane % kLanes; s < a.slices; s += kLanes) sum += double(load(s, c)) * shared_load(factors + s);
    }
    sum = lanes_reduce<false>(sum, add, kLanes);
    const bool writes = c < end && lane % kLanes == 0, apart = sum > 0 && sum < kSmall;
    if (writes && !apart) write_column(a, row, c, ::log(sum), all);
    for (unsigned left = __ballot_sync(~0u, writes && apart); left != 0; left &= left - 1) {
      const int column = base + (FASTKD_TWIN(__ffs(left), __builtin_ffs(left)) - 1) / kLanes;
      const SegmentSum own = gathered_sum(a, row, segment_of(a, a.whole, column));
      if (lane == 0) write_column(a, row, column, own.relative_to(top), all);
    }
  }
  if (begin == 0 && team.leads()) a.keep(row, all, top);
}

// A block's shared memory: [slots of the reductions][found][sums by column, of this row and of the next][runs][sums of
// the first runs of pieces][list][logits; before them, the counters of the sort].
struct ByteLayout {
  int64_t found, sums, runs, heads, list, logits, bytes;

  __host__ __device__ ByteLayout(int64_t columns, int64_t slice, int item)
      : found(Team::kSharedBytes),
        sums(found + (columns * 8 + 15) / 16 * 16),
        runs(sums + (slice_sums(columns) * 8 + 15) / 16 * 16),
        heads(runs + (columns * 4 + 12 + 15) / 16 * 16),
        list(heads + kRowThreads * 4),
        logits(list + slice * 2),
        bytes(logits + (slice == 0 ? 0 : at_least(slice * item + 32, columns * 8))) {}
};

// The largest logits so far, one for each place in a pack.
template <class Raw, class Item>
struct LargestOf {
  static constexpr int kWords = sizeof(Raw) / sizeof(unsigned);
  struct alignas(Raw) Words {
    unsigned word[kWords];
  } words;

  __device__ __forceinline__ LargestOf() {
    Raw raw;
#pragma unroll
    for (Item& item : raw.item) item = element<Item>(float(-INFINITY));
    words = bit_cast<Words>(raw);
  }
  __device__ __forceinline__ void take(const Raw& raw) {
    const Words next = bit_cast<Words>(raw);
#pragma unroll
    for (int j = 0; j < kWords; ++j) words.word[j] = larger<Item>(words.word[j], next.word[j]);
  }
  __device__ __forceinline__ float found() const {
    const Raw raw = bit_cast<Raw>(words);
    float all = -INFINITY;
#pragma unroll
    for (const Item& item : raw.item) all = at_least(all, to_float(item));
    return all;
  }
};

// A block that processes one slice.
template <class Source>
struct ByteWorker {
  using Slice = ByteSlice<Source>;
  using Item = typename Slice::Item;
  using Raw = typename Slice::Raw;
  using Places = Packed<uint16_t>;
  using Largest = LargestOf<Raw, Item>;
  static constexpr int kBatch = 8, kAhead = 4;
  static constexpr unsigned kNoRun = ~0u;

  const ByteArguments& a;
  const Team& team;
  const int slice, first, count;  // the slice's number, its first id and how many ids it has
  int first_column, end_column;   // this block writes columns [first_column, end_column)
  double* found;
  float *sums, *heads;
  unsigned* runs;  // one per column with ids: end in the list << 16 | column; two kNoRun follow
  uint16_t* list;  // places in the slice, sorted by column
  Raw* stored;
  int sort_room, piece, first_run = 0;
  bool sorted = false, second = false;

  __device__ ByteWorker(const ByteArguments& arguments, const Team& t, int number, unsigned char* shared)
      : a(arguments),
        team(t),
        slice(number),
        first(number * a.slice),
        count(a.ids - first < a.slice ? a.ids - first : a.slice) {
    const ByteLayout layout(a.columns, a.slice, sizeof(Item));
    found = reinterpret_cast<double*>(shared + layout.found);
    sums = reinterpret_cast<float*>(shared + layout.sums);
    heads = reinterpret_cast<float*>(shared + layout.heads);
    runs = reinterpret_cast<unsigned*>(shared + layout.runs);
    list = reinterpret_cast<uint16_t*>(shared + layout.list);
    stored = reinterpret_cast<Raw*>(shared + layout.logits);
    sort_room = int(layout.bytes - layout.logits);
    const int share = (a.columns + a.slices - 1) / a.slices;
    first_column = share * slice;
    end_column = first_column + share < a.columns ? first_column + share : a.columns;
    // An odd number of batches, to avoid bank conflicts.
    piece = (((count + team.threads - 1) / team.threads + kBatch - 1) / kBatch | 1) * kBatch;
  }

  // Processes a row of the empty prefix.
  __device__ __forceinline__ void run(int64_t row) {
    if (!sorted) sort();
    sorted = true;
    const Slice logits(a, row, first, count);
    // Two buffers alternate, since other blocks of the cluster may still read the previous row's sums.
    float* const into = sums + (second ? slice_sums(a.columns) : 0);
    second = !second;
    const float top =
        team.block_sum<true>(fill(row, logits), [](float& all, float next) { all = at_least(all, next); });
    const double mine = sum(reinterpret_cast<const char*>(stored) + logits.lead * int(sizeof(Item)), top, into);
    const double part = warp_reduce<false>(mine, [](double& all, double next) { all += next; });
    if (team.thread % kWarp == 0) shared_store(into + a.columns + 1 + team.thread / kWarp, float(part));
    if (team.leads()) shared_store(into + a.columns, top);
    if (a.partials != nullptr) {
      team.sync();
      const int sums_here = int(slice_sums(a.columns));
      float* const to = a.partials + (row * a.slices + slice) * sums_here;
      for (int i = team.thread; i < sums_here; i += team.threads) global_store(to + i, shared_load(into + i));
      return;
    }
    if (a.slices > 1) {
      cluster_sync();
    } else {
      team.sync();
    }
    finish_whole(
        a, row, team, heads,
        [&](int s, int i) { return shared_load(a.slices > 1 ? in_peer(into + i, unsigned(s)) : into + i); },
        first_column, end_column);
  }

 private:
  // Calls body(place, column) for places [begin, end) of the slice, by all lanes of a warp together. Column -1: beyond
  // end.
  template <class Body>
  __device__ __forceinline__ void for_columns(int begin, int end, const Body& body) const {
#pragma unroll 1
    for (int base = begin; base < end; base += kAhead * kWarp) {
      int c[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int place = base + k * kWarp + team.thread % kWarp;
        c[k] = place < end ? a.column(first + place) : -1;
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) body(base + k * kWarp + team.thread % kWarp, c[k]);
    }
  }

  // Sorts the slice's ids by column, ascending within each. Every warp counts the ids of a range of its own, then
  // places them.
  __device__ void sort() {
    const int columns = a.columns, threads = team.threads, warp = team.thread / kWarp;
    const int room = sort_room / (8 * columns), warps = room < threads / kWarp ? room : threads / kWarp;
    unsigned *const counts = reinterpret_cast<unsigned*>(stored), *const lanes = counts + warps * columns;
    const int share = (count + warps - 1) / warps;
    const int begin = warp < warps ? warp * share : count, end = begin + share < count ? begin + share : count;
    for (int i = team.thread; i < 2 * warps * columns; i += threads) shared_store(counts + i, 0u);
    for (int i = team.thread; i < 2 * slice_sums(columns); i += threads) shared_store(sums + i, 0.0f);
    if (count + team.thread < listed()) shared_store(list + count + team.thread, uint16_t(0));
    team.sync();
    for_columns(begin, end, [&](int, int c) {
      if (c >= 0) shared_add(counts + warp * columns + c, 1u);
    });
    team.sync();
    for (int c = team.thread; c < columns; c += threads) {
      unsigned total = 0;
      for (int w = 0; w < warps; ++w) total += shared_load(counts + w * columns + c);
      shared_store(lanes + c, total);
    }
    team.sync();
    for (int c = team.thread; c < columns; c += threads) {
      unsigned at = 0, number = 0;
#pragma unroll 8
      for (int before = 0; before < c; ++before) {
        const unsigned total = shared_load(lanes + before);
        at += total;
        number += total > 0;
      }
      for (int w = 0; w < warps; ++w) {
        const unsigned mine = shared_load(counts + w * columns + c);
        shared_store(counts + w * columns + c, at);
        at += mine;
      }
      const bool some = shared_load(lanes + c) > 0;
      if (some) shared_store(runs + number, at << 16 | unsigned(c));
      if (c == columns - 1) {
        number += some;
        shared_store(runs + number, unsigned(kNoRun));
        shared_store(runs + number + 1, unsigned(kNoRun));
        shared_store(runs + columns + 2, number);
      }
    }
    team.sync();
    for (int c = team.thread; c < columns; c += threads) shared_store(lanes + c, 0u);
    team.sync();
    const unsigned bit = 1u << team.thread % kWarp;
    for_columns(begin, end, [&](int place, int c) {
      const int at = warp * columns + c;
      if (c >= 0) shared_or(lanes + at, bit);
      __syncwarp();
      unsigned same = 0, next = 0;
      if (c >= 0) {
        same = shared_load(lanes + at);  // lanes with this column
        next = shared_load(counts + at);
        shared_store(list + next + bits_set(same & (bit - 1)), uint16_t(place));
      }
      __syncwarp();
      if (c >= 0 && same < 2 * uint64_t(bit)) {  // the last such lane
        shared_store(lanes + at, 0u);
        shared_store(counts + at, next + bits_set(same));
      }
      __syncwarp();
    });
    team.sync();
    // The first run that ends after the beginning of this thread's piece.
    int low = 0, high = int(shared_load(runs + columns + 2));
    while (low < high) {
      const int middle = (low + high) / 2;
      const bool behind = end_of(shared_load(runs + middle)) > team.thread * piece;
      low = behind ? low : middle + 1;
      high = behind ? middle : high;
    }
    first_run = low;
  }

  // The list's length, in whole batches. Places after the last id are 0 and belong to no run.
  __device__ __forceinline__ int listed() const { return (count + kBatch - 1) / kBatch * kBatch; }
  static __device__ __forceinline__ int end_of(unsigned run) { return int(run >> 16); }
  static __device__ __forceinline__ int column_of(unsigned run) { return int(run & 0xffff); }

  static __device__ __forceinline__ unsigned bits_set(unsigned x) {
    return unsigned(FASTKD_TWIN(__popc(x), __builtin_popcount(x)));
  }

  // Loads the slice's logits into shared memory. Returns the largest of those that this thread loaded. Its packs are
  // thread, thread + threads, ...
  __device__ float fill(int64_t row, const Slice& logits) const {
    const int packs = logits.packs(), threads = team.threads;
    Largest largest;
    const auto take = [&](int pack, const Raw& raw) {
      shared_store(stored + pack, raw);
      largest.take(raw);
    };
    int pack = team.thread;
    if (pack < logits.whole_begin()) {
      take(pack, logits.fetch(pack));
      pack += threads;
    }
    Raw raw[kAhead]{};
#pragma unroll 1
    for (; pack + (kAhead - 1) * threads < logits.whole_end(); pack += kAhead * threads) {
#pragma unroll
      for (int k = 0; k < kAhead; ++k) raw[k] = logits.fetch_whole(pack + k * threads);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) take(pack + k * threads, raw[k]);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (pack + k * threads < packs) raw[k] = logits.fetch(pack + k * threads);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (pack + k * threads < packs) take(pack + k * threads, raw[k]);
    }
    if (!a.valid) return largest.found();
    largest = Largest();
    const char* const valid = a.valid.at(row);
#pragma unroll 1
    for (int mine = team.thread; mine < packs; mine += threads) {
      Raw raw = shared_load(stored + mine);
      drop_invalid(a, logits, valid, first, count, mine, raw);
      take(mine, raw);
    }
    return largest.found();
  }

  // Sums by column into `into`, where columns without ids stay 0. A run belongs to the thread in whose piece it begins.
  // A thread writes its piece's part of a run that began earlier to `heads`; the run's thread adds it. Returns the sum
  // of the thread's piece.
  __device__ double sum(const char* logits, float top, float* into) const {
    const float zero = top == -INFINITY ? 0 : top;
    const int begin = team.thread * piece, end = begin + piece, stop = end < listed() ? end : listed();
    double whole = 0;
    float all = 0, part = 0, most = -INFINITY;  // of the run; most: its largest logit, relative to the slice's
    bool goes_on = false;
    unsigned run = kNoRun;
    if (begin < stop) {
      const unsigned* ahead = runs + first_run;
      bool mine = first_run == 0 ? begin == 0 : end_of(shared_load(ahead - 1)) >= begin;
      run = shared_load(ahead++);
      unsigned next = shared_load(ahead++);
      const auto put = [&] {
        const float sum = sum_of(all + part, most);
        shared_store(mine ? into + column_of(run) : heads + team.thread, sum);
        whole += sum;
      };
#pragma unroll 1
      for (int i = begin; i < stop; i += kBatch) {
        float below[kBatch], e[kBatch];
        const Places places = shared_load(reinterpret_cast<const Places*>(list + i));
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          below[j] =
              to_float(shared_load(reinterpret_cast<const Item*>(logits + places.item[j] * sizeof(Item)))) - zero;
          e[j] = exp2_fast(below[j] * float(kLog2E));
        }
        int left = end_of(run) - i;
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          if (left == j) {
            put();
            all = part = 0;
            most = -INFINITY;
            mine = true;
            run = next;
            next = shared_load(ahead++);
            left = end_of(run) - i;
          }
          part += e[j];
          most = ::fmaxf(most, below[j]);
        }
        if ((i - begin) % (4 * kBatch) == 3 * kBatch) {
          all += part;
          part = 0;
        }
      }
      goes_on = mine && run != kNoRun && end_of(run) > end;
      if (run != kNoRun && !goes_on) put();
    }
    team.sync();
    if (!goes_on) return whole;
    double sum = sum_of(all + part, most);
    whole += sum;
#pragma unroll 1
    for (int t = team.thread + 1; t * piece < end_of(run); t += kBatch) {
      float pieces = 0;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) pieces += (t + j) * piece < end_of(run) ? shared_load(heads + t + j) : 0;
      sum += pieces;
    }
    shared_store(into + column_of(run), float(sum));
    return whole;
  }

  // A piece's sum, which is 0 only if no id is possible.
  static __device__ __forceinline__ float sum_of(float sum, float most) {
    return sum == 0 && most >= float(-kImpossible) ? kLeastSum : sum;
  }
};

}  // namespace fastkd::cuda
