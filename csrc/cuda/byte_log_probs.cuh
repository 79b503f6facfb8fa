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

// A possible id's exponent is never taken to be below this, so that only impossible ids add exactly 0.
inline constexpr float kLeastPower = -125;

// The exponent of 2 that corresponds to e^below. `below` is a logit minus its slice's largest one, or a slice's largest
// logit minus the row's.
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
  // The same in two steps, with other loads in between: nothing waits for the first step's load before the second.
  __device__ __forceinline__ void begin_fetch(int pack, uint4& words) const {
    if (logits.whole(pack)) words = global_load16<true>(logits.place(pack));
  }
  __device__ __forceinline__ Raw end_fetch(int pack, const uint4& words) const {
    return bit_cast<Raw>(logits.whole(pack) ? words : logits.load_cut(pack, element<T>(float(-INFINITY))));
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
  __device__ __forceinline__ void begin_fetch(int, uint4&) const {}
  __device__ __forceinline__ Raw end_fetch(int pack, const uint4&) const { return fetch(pack); }
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

// Computes a row of the empty prefix from its slices' sums. load(slice, column) returns the sum of
// 2^((logit - top) log2(e)), and for column = `columns` the slice's top. This block writes columns [begin, end). Shared
// memory: found has one number per column, factors one per slice.
template <class Load>
__device__ void finish_whole(const ByteArguments& a, int64_t row, const Team& team, double* found, float* factors,
                             const Load& load, int begin, int end) {
  // Columns with a smaller share of the row are summed separately, unless the sum is 0, that is, no id is possible.
  // Compared with this share, all terms that were raised to kLeastPower are negligible.
  constexpr double kSmall = 0x1p-85;
  const int columns = a.columns;
  float top = -INFINITY;
  for (int s = team.thread; s < a.slices; s += team.threads) top = at_least(top, load(s, columns));
  top = team.block_sum(top, [](float& x, float next) { x = at_least(x, next); }, /*everywhere=*/true);
  for (int s = team.thread; s < a.slices; s += team.threads)
    shared_store(factors + s, exp2_of(power_of(load(s, columns) - top)));
  team.sync();
  double total = 0;
  for (int c = team.thread; c < columns; c += team.threads) {
    double sum = 0;
#pragma unroll 4
    for (int s = 0; s < a.slices; ++s) sum += double(load(s, c)) * shared_load(factors + s);
    shared_store(found + c, sum);
    total += sum;
  }
  total = team.block_sum(total, [](double& x, double next) { x += next; }, /*everywhere=*/true);
  const double all = ::log(total) + (top - top);
  const auto small = [&](double sum) { return sum > 0 && sum < kSmall; };
  for (int c = begin + team.thread; c < end; c += team.threads) {
    const double sum = shared_load(found + c);
    if (!small(sum)) write_column(a, row, c, ::log(sum), all);
  }
#pragma unroll 1
  for (int c = begin + team.thread / kWarp; c < end; c += team.threads / kWarp) {
    if (!small(shared_load(found + c))) continue;
    const SegmentSum own = gathered_sum(a, row, segment_of(a, a.whole, c));
    if (team.thread % kWarp == 0) write_column(a, row, c, own.relative_to(top), all);
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
        runs(sums + (columns * 8 + 8 + 15) / 16 * 16),
        heads(runs + (columns * 4 + 12 + 15) / 16 * 16),
        list(heads + kRowThreads * 4),
        logits(list + slice * 2),
        bytes(logits + (slice == 0 ? 0 : at_least(slice * item + 32, columns * 8))) {}
};

// A block that processes one slice.
template <class Source>
struct ByteWorker {
  using Slice = ByteSlice<Source>;
  using Item = typename Slice::Item;
  using Raw = typename Slice::Raw;
  using Places = Packed<uint16_t>;
  static constexpr int kBatch = 8, kAhead = 4;
  static constexpr unsigned kNoRun = ~0u;

  const ByteArguments& a;
  const Team& team;
  const int slice, first, count;  // the slice's number, its first id and how many ids it has
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
    // An odd number of batches, to avoid bank conflicts.
    piece = (((count + team.threads - 1) / team.threads + kBatch - 1) / kBatch | 1) * kBatch;
  }

  // Processes a row of the empty prefix.
  __device__ void run(int64_t row) {
    if (!sorted) sort();
    sorted = true;
    const Slice logits(a, row, first, count);
    // Two buffers alternate, since other blocks of the cluster may still read the previous row's sums.
    float* const into = sums + (second ? a.columns + 1 : 0);
    second = !second;
    const float top = team.block_sum(
        fill(row, logits), [](float& all, float next) { all = at_least(all, next); }, /*everywhere=*/true);
    sum(reinterpret_cast<const Item*>(stored) + logits.lead, top, into);
    if (team.leads()) shared_store(into + a.columns, top);
    if (a.partials != nullptr) {
      team.sync();
      float* const to = a.partials + (row * a.slices + slice) * (a.columns + 1);
      for (int c = team.thread; c <= a.columns; c += team.threads) global_store(to + c, shared_load(into + c));
      return;
    }
    if (a.slices > 1) {
      cluster_sync();
    } else {
      team.sync();
    }
    const int share = (a.columns + a.slices - 1) / a.slices, begin = share * slice;
    finish_whole(
        a, row, team, found, heads,
        [&](int s, int c) { return shared_load(a.slices > 1 ? in_peer(into + c, unsigned(s)) : into + c); }, begin,
        begin + share < a.columns ? begin + share : a.columns);
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
    for (int i = team.thread; i < 2 * (columns + 1); i += threads) shared_store(sums + i, 0.0f);
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

  // Loads the slice's logits into shared memory. Returns the largest of those that this thread loaded.
  __device__ float fill(int64_t row, const Slice& logits) const {
    const int packs = logits.packs(), threads = team.threads;
    const char* const valid = a.valid ? a.valid.at(row) : nullptr;
    float top = -INFINITY;
#pragma unroll 1
    for (int pack = team.thread; pack < packs; pack += kAhead * threads) {
      uint4 words[kAhead]{};
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (pack + k * threads < packs) logits.begin_fetch(pack + k * threads, words[k]);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (pack + k * threads >= packs) break;
        Raw raw = logits.end_fetch(pack + k * threads, words[k]);
        drop_invalid(a, logits, valid, first, count, pack + k * threads, raw);
        shared_store(stored + pack + k * threads, raw);
#pragma unroll
        for (int j = 0; j < Slice::kSize; ++j) {
          const float x = to_float(raw.item[j]);
          top = x > top ? x : top;
        }
      }
    }
    return top;
  }

  // Sums by column into `into`, where columns without ids stay 0. A run belongs to the thread in whose piece it begins.
  // A thread writes its piece's part of a run that began earlier to `heads`; the run's thread adds it.
  __device__ void sum(const Item* logits, float top, float* into) const {
    const float zero = top == -INFINITY ? 0 : top;
    const int begin = team.thread * piece, end = begin + piece, stop = end < listed() ? end : listed();
    float all = 0, part = 0;
    bool goes_on = false;
    unsigned run = kNoRun;
    if (begin < stop) {
      const unsigned* ahead = runs + first_run;
      bool mine = first_run == 0 ? begin == 0 : end_of(shared_load(ahead - 1)) >= begin;
      run = shared_load(ahead++);
      unsigned next = shared_load(ahead++);
      const auto put = [&] { shared_store(mine ? into + column_of(run) : heads + team.thread, all + part); };
#pragma unroll 1
      for (int i = begin; i < stop; i += kBatch) {
        float e[kBatch];
        const Places places = shared_load(reinterpret_cast<const Places*>(list + i));
#pragma unroll
        for (int j = 0; j < kBatch; ++j) e[j] = term(shared_load(logits + places.item[j]), zero);
        int left = end_of(run) - i;
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          if (left == j) {
            put();
            all = part = 0;
            mine = true;
            run = next;
            next = shared_load(ahead++);
            left = end_of(run) - i;
          }
          part += e[j];
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
    if (!goes_on) return;
    const int last = (end_of(run) - 1) / piece;
    double sum = double(all) + part;
#pragma unroll 1
    for (int t = team.thread + 1; t <= last; t += kBatch) {
      float pieces = 0;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) pieces += t + j <= last ? shared_load(heads + t + j) : 0;
      sum += pieces;
    }
    shared_store(into + column_of(run), float(sum));
  }

  static __device__ __forceinline__ float term(Item item, float zero) {
    return exp2_fast(power_of(to_float(item) - zero));
  }
};

}  // namespace fastkd::cuda
