// teacher_topk on CUDA: the k largest of each row with their log-probabilities, in one launch.
//
// Memory: the first pass sums the softmax and counts the logits by their leading bits. Where the row fits into shared
// memory (of a block or a cluster), it is read once. Otherwise it is read once more to collect the logits from the bin
// of the k-th largest on, and once more for each further digit if too many logits share that bin. The k-th largest of a
// block's first logits is a lower bound of the row's k-th largest, so that few of the other logits need be counted.
//
// A key consists of a logit's ordered bits, followed by its column counted from the end of the row. No two keys are
// equal, and of equal logits the lower column wins.
#include <torch/csrc/stable/library.h>

#include "../arguments/teacher_topk_entry.h"
#include "../math/logit_sum.h"
#include "common/fast_sum.cuh"
#include "common/radix_select.cuh"
#include "common/register.h"
#include "common/sources.cuh"

namespace fastkd::cuda {
namespace {

constexpr int kMaxK = 1024;
constexpr int kMaxKeys = 2 * kMaxK;  // keys collected at most; enough that most rows need no further digit
constexpr int kLogitBits = 32;

struct SelectArguments : RowArguments {
  int k, column_bits;
  float* log_probs;  // [rows, k]
  int32_t* indices;
};

// What the leading thread publishes to the other threads of its block.
struct SelectParameters {
  double temperature, origin, log_sum;  // of the softmax's sum: origin is a logit, log_sum natural and relative to it
};

// A block's shared memory: [parameters][counters][selection][slots of the reductions][keys collected][row]. The keys
// are divided among the blocks of a cluster. The best keys are sorted in the memory of the selection's bins.
struct SelectShared {
  SelectParameters parameters;
  unsigned collected, best;  // number of keys
  alignas(16) unsigned char selection[RadixSelect::kSharedBytes];
  alignas(16) unsigned char slots[Team::kSharedBytes];
};
static_assert(RadixSelect::kBinsBytes >= kMaxK * sizeof(uint64_t));
constexpr int64_t kKeysBytes = kMaxKeys * sizeof(uint64_t);  // of all blocks
__host__ __device__ constexpr int64_t select_bytes(int cluster) { return sizeof(SelectShared) + kKeysBytes / cluster; }
static_assert(select_bytes(kMostBlocks) % 16 == 0);

template <class Source>
struct SelectWorker {
  static constexpr int kSize = Source::kSize;
  // How many packs each thread reads first, to obtain a lower bound of the k-th largest.
  static constexpr int kFirstPacks = 32 / kSize;
  using Raw = typename Source::Raw;
  using Item = typename Source::Item;
  using Sum = FastSum<Item>;

  const SelectArguments& arguments;
  const Team& team;
  SelectShared& shared;
  uint64_t* const keys;  // this block's

  __device__ __forceinline__ void run(int64_t row, const Source& source) const {
    const RadixSelect select(team, shared.selection, team.blocks);
    open(row, select);
    const SelectParameters begun = shared_load(&shared.parameters);
    const double to_base_2 = kLog2E / begun.temperature;
    const Sum sum = first_pass(source, float(to_base_2), select);
    if (!normalize(sum, to_base_2)) {  // NaN, or no finite logit: the row has no order
      if (team.rank == 0) write_lost(row);
      return;
    }
    const int shift = kLogitBits + arguments.column_bits - RadixSelect::kDigit;
    const RadixSelect::Place digit = select.find(unsigned(arguments.k));
    KeyBin bin{uint64_t(digit.number) << shift, shift, digit.above, digit.inside};
    bool backwards = true;  // alternates, since the part read last is still in the L2
    bin = select.select(bin, unsigned(arguments.k), kMaxKeys, [&](const KeyBin& in, const auto& body) {
      for_keys(source, in.least, backwards, body);
      backwards = !backwards;
    });
    collect(source, bin.least, backwards);
    if (team.rank == 0) write(row, bin);
  }

 private:
  __device__ void open(int64_t row, const RadixSelect& select) const {
    select.clear();
    if (team.leads()) {
      shared_store(&shared.parameters, SelectParameters{arguments.row_temperature(row), 0, 0});
      shared_store(&shared.collected, 0u);
      shared_store(&shared.best, 0u);
    }
    team.sync();
  }

  // Converts a pack's logits to float. Returns the largest.
  static __device__ __forceinline__ float widen(const Raw& raw, float (&z)[kSize]) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) z[j] = Source::student_of(raw, j);
    float largest = z[0];
#pragma unroll
    for (int j = 1; j < kSize; ++j) largest = z[j] > largest ? z[j] : largest;
    return largest;
  }

  // Whether a column is in the row: packs may begin before the row and end after it.
  __device__ __forceinline__ bool in_row(int column) const { return unsigned(column) < unsigned(arguments.vocab); }

  // Packs with nothing to compare: all logits are below `least`.
  static __device__ __forceinline__ PackRange<Item> packs_below(float least) {
    PackRange<Item> range;
    // The largest number below; that of 0 is not -0.
    const float below = least == 0 ? -1.4e-45f : from_ordered(ordered(least) - 1);
    if (least > -INFINITY) range.set(-INFINITY, below);
    return range;
  }

  __device__ Sum first_pass(const Source& source, float scale, const RadixSelect& select) const {
    Sum mine(scale, 0);
    float least = -INFINITY;
    int end = source.packs();
    if (end > kFirstPacks * team.threads) end = kFirstPacks * team.threads;
    source.start(team);
    RowPass<true, Source> pass(source, team, false);
#pragma unroll 1
    while (true) {
      const PackRange<Item> uninteresting = packs_below(least);
#pragma unroll 1
      for (; pass.more(end); pass.advance()) {
        const Raw raw = pass.take();
        if constexpr (Source::kPacked) {
          if (uninteresting.below(raw.student) && mine.add_fast(raw.student)) continue;
        }
        float z[kSize];
        const float largest = widen(raw, z);
        mine.add(z);
        if (!(largest >= least)) continue;
        const int column = source.column(pass.pack);
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          if (z[j] >= least && in_row(column + j)) select.count(ordered(z[j]) >> (kLogitBits - RadixSelect::kDigit));
        }
      }
      if (end == source.packs()) return mine;
      end = source.packs();
      const RadixSelect here(team, shared.selection, 1);
      least = from_ordered(here.find(unsigned(arguments.k)).number << (kLogitBits - RadixSelect::kDigit));
    }
  }

  // Writes the whole row's sum to the parameters. Returns false where no logit is finite, or one is NaN or +inf.
  __device__ bool normalize(Sum mine, double to_base_2) const {
    const auto larger = [](float& all, float next) { all = at_least(all, next); };
    const float origin = team.block_sum<true>(mine.origin, larger);
    mine.raise(origin);
    const double sum = team.block_sum(double(mine.sum), [](double& all, double next) { all += next; });
    const LogitSum all = team.cluster_sum(LogitSum{double(origin), sum},
                                          [&](LogitSum& into, const LogitSum& next) { into.merge(next, to_base_2); });
    if (team.leads()) {
      shared_store(&shared.parameters.origin, all.origin);
      shared_store(&shared.parameters.log_sum, ::log(all.sum) + all.nan_or_zero());
    }
    team.sync();
    const double found = shared_load(&shared.parameters.log_sum);
    return found == found;
  }

  // Calls body(key) for this thread's keys that are at least `from`.
  template <class Body>
  __device__ void for_keys(const Source& source, uint64_t from, bool backwards, const Body& body) const {
    const float least = from_ordered(unsigned(from >> arguments.column_bits));
    const PackRange<Item> uninteresting = packs_below(least);
    for_packs<false>(source, team, backwards, [&](int pack, const Raw& raw) {
      if constexpr (Source::kPacked) {
        if (uninteresting.below(raw.student)) return;
      }
      float z[kSize];
      if (!(widen(raw, z) >= least)) return;
      const int column = source.column(pack);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        if (!(z[j] >= least) || !in_row(column + j)) continue;
        const unsigned place = unsigned(arguments.vocab - 1 - column - j);
        const uint64_t key = uint64_t(ordered(z[j])) << arguments.column_bits | place;
        if (key >= from) body(key);
      }
    });
  }

  // Collects all keys that are at least `from`, at most kMaxKeys. The team's first block counts them. Ends with a
  // barrier. The next row's keys are written after further barriers, when the first block is done with these.
  __device__ void collect(const Source& source, uint64_t from, bool backwards) const {
    unsigned* const collected = team.blocks > 1 ? in_peer(&shared.collected, 0) : &shared.collected;
    for_keys(source, from, backwards, [&](uint64_t key) {
      put<kMaxKeys>([&](unsigned place) { return collected_key(place); }, collected, key);
    });
    if (team.blocks > 1) {
      cluster_sync();
    } else {
      team.sync();
    }
  }

  // Where a key that was collected is: each block has kMaxKeys / blocks of them.
  __device__ __forceinline__ uint64_t* collected_key(unsigned place) const {
    if (team.blocks == 1) return keys + place;
    return in_peer(keys + place / team.blocks, place % team.blocks);
  }

  // The capacity is checked: if the logits are modified during the call, there may be more keys than were counted.
  template <int kCapacity, class Slot>
  static __device__ __forceinline__ void put(const Slot& slot, unsigned* count, uint64_t key) {
    const unsigned place = shared_add(count, 1u);
    if (place < kCapacity) shared_store(slot(place), key);
  }
  template <int kCapacity>
  static __device__ __forceinline__ int count_of(const unsigned* count) {
    const unsigned n = shared_load(count);
    return int(n < kCapacity ? n : kCapacity);
  }

  // Reduces the keys collected, which are at least bin.least, to little more than k, sorts them and writes the results.
  __device__ void write(int64_t row, KeyBin bin) const {
    const SelectParameters parameters = shared_load(&shared.parameters);
    const int k = arguments.k, count = count_of<kMaxKeys>(&shared.collected);
    const auto for_collected = [&](const KeyBin&, const auto& body) {
      for (int i = team.thread; i < count; i += team.threads) body(shared_load(collected_key(unsigned(i))));
    };
    const RadixSelect here(team, shared.selection, 1);
    bin = here.select(bin, unsigned(k), unsigned(2 * k < kMaxK ? 2 * k : kMaxK), for_collected);
    uint64_t* const best = reinterpret_cast<uint64_t*>(shared.selection);
    for_collected(bin, [&](uint64_t key) {
      if (key >= bin.least) put<kMaxK>([&](unsigned place) { return best + place; }, &shared.best, key);
    });
    team.sync();
    int size = 1;
    while (size < int(bin.from_here()) && size < kMaxK) size *= 2;
    for (int i = count_of<kMaxK>(&shared.best) + team.thread; i < size; i += team.threads)
      shared_store(best + i, uint64_t(0));
    sort_keys(team, best, size);
    for (int i = team.thread; i < k; i += team.threads) {
      const uint64_t key = shared_load(best + i);
      const float z = from_ordered(unsigned(key >> arguments.column_bits));
      const unsigned place = unsigned(key & ((uint64_t(1) << arguments.column_bits) - 1));
      const double step = double(z) - parameters.origin, log_prob = step / parameters.temperature - parameters.log_sum;
      global_store(arguments.log_probs + row * k + i, step < -kImpossible ? -INFINITY : float(log_prob));
      global_store(arguments.indices + row * k + i, int32_t(arguments.vocab - 1) - int32_t(place));
    }
  }

  __device__ void write_lost(int64_t row) const {
    for (int i = team.thread; i < arguments.k; i += team.threads) {
      global_store(arguments.log_probs + row * arguments.k + i, float(NAN));
      global_store(arguments.indices + row * arguments.k + i, int32_t(i));
    }
  }
};

template <class Source>
__global__ void __launch_bounds__(2 * kRowThreads, 1)
    teacher_topk_kernel(const __grid_constant__ SelectArguments arguments, const RowLaunch launch) {
  SelectShared& shared = *reinterpret_cast<SelectShared*>(shared_memory());
  const Team team(shared.slots, unsigned(launch.cluster));
  const SelectWorker<Source> worker{arguments, team, shared, reinterpret_cast<uint64_t*>(&shared + 1)};
  unsigned char* const rows = shared_memory() + select_bytes(launch.cluster);
  for_rows(team, launch, arguments.rows, [&](int64_t row) FASTKD_INLINE_BODY {
    const Source source(arguments, row, launch, team.rank, shared.slots, rows);
    worker.run(row, source);
  });
}

template <class Source>
void launch_rows(const Device& device, const SelectArguments& arguments, int element_size) {
  RowNeeds needs{sizeof(SelectShared), Source::kPacked, /*tensors=*/1, kRowThreads, kKeysBytes};
  needs.adapt = block_per_row;  // a row needs a histogram
  launch_teams(device, teacher_topk_kernel<Source>, arguments, element_size, needs,
               [](const RowLaunch& with) { return select_bytes(with.cluster) + rows_bytes(with, 1); });
}

struct Cuda {
  static constexpr bool kValuesChecked = false;

  static void solve(const RowProblem& problem, int64_t k, float* log_probs, int32_t* indices) {
    FASTKD_CHECK_TYPE(!problem.float64, kTeacherTopk, "float64 logits are supported on the CPU only");
    FASTKD_CHECK_VALUE(k <= kMaxK, kTeacherTopk, "k may be at most ", kMaxK, " on CUDA, got ", k);
    FASTKD_CHECK_VALUE(problem.student_width < kMaxColumns, kTeacherTopk,
                       "a vocabulary on CUDA must have fewer than 2^31 - 1024 columns, got ", problem.student_width);
    const Device device(problem.student_tensor, kTeacherTopk);
    SelectArguments a{};
    a.rows = problem.rows;
    a.vocab = int(problem.vocab);
    a.student_width = int(problem.student_width);
    a.temperature = problem.options.temperature;
    if (const auto& each = problem.options.temperatures) {
      a.temperatures = device_rows(*each, problem.leading, kTeacherTopk);
    }
    a.student = device_rows(problem.student_tensor, problem.leading, kTeacherTopk);
    a.k = int(k);
    while ((int64_t(1) << a.column_bits) < problem.vocab) ++a.column_bits;
    a.log_probs = log_probs;
    a.indices = indices;
    with_source<false>(source_kind(a), [&](auto source, int element_size) {
      launch_rows<typename decltype(source)::Type>(device, a, element_size);
    });
  }
};

}  // namespace

FASTKD_IMPL(m) { implement_op<TeacherTopk, Cuda>(m); }

}  // namespace fastkd::cuda
