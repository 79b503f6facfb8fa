// byte_log_probs on CUDA: kernels, arguments and launches, and the gradient. byte_log_probs.cuh explains the forward.
// The backward reads the logits once and writes the gradient once.
#include <torch/csrc/stable/library.h>

#include "../arguments/byte_log_probs_entry.h"
#include "byte_log_probs.cuh"
#include "common/launch.h"
#include "common/register.h"

namespace fastkd::cuda {
namespace {

// Which rows a block processes. Blocks s, s + slices, ... have slice s; each takes every step-th row.
struct Turns {
  int slice;
  int64_t first, step;
  __device__ explicit Turns(const ByteArguments& a)
      : slice(int(blockIdx.x % unsigned(a.slices))),
        first(blockIdx.x / unsigned(a.slices)),
        step(gridDim.x / unsigned(a.slices)) {}
};

// A row with another prefix than the empty one, by one block.
__device__ void gather_row(const ByteArguments& a, int64_t row, int64_t prefix, const Team& team, double* found) {
  const int columns = a.columns, lane = team.thread % kWarp;
  // Each sum overwrites its segment.
  Segment* const segments = reinterpret_cast<Segment*>(found);
  SegmentSum* const sums = reinterpret_cast<SegmentSum*>(found);
  static_assert(sizeof(Segment) == sizeof(double) && sizeof(SegmentSum) == sizeof(double));
  for (int c = team.thread; c < columns; c += team.threads) shared_store(segments + c, segment_of(a, prefix, c));
  team.sync();
#pragma unroll 1
  for (int c = team.thread / kWarp; c < columns; c += team.threads / kWarp) {
    const Segment segment = shared_load(segments + c);
    const SegmentSum sum = segment.begin < segment.end ? gathered_sum(a, row, segment) : SegmentSum{-INFINITY, 0};
    __syncwarp();
    if (lane == 0) shared_store(sums + c, sum);
  }
  team.sync();
  float top = -INFINITY;
  for (int c = team.thread; c < columns; c += team.threads) top = at_least(top, shared_load(sums + c).top);
  top = team.block_sum<true>(top, [](float& x, float next) { x = at_least(x, next); });
  double total = 0;
  for (int c = team.thread; c < columns; c += team.threads) total += ::exp(shared_load(sums + c).relative_to(top));
  total = team.block_sum<true>(total, [](double& x, double next) { x += next; });
  const double all = ::log(total) + (top - top);
  for (int c = team.thread; c < columns; c += team.threads)
    write_column(a, row, c, shared_load(sums + c).relative_to(top), all);
  if (team.leads()) a.keep(row, all, top);
}

__device__ void lose_row(const ByteArguments& a, int64_t row, const Team& team) {
  for (int c = team.thread; c < a.columns; c += team.threads) write_column(a, row, c, NAN, NAN);
  if (team.leads()) a.keep(row, NAN, NAN);
}

template <class Source>
__global__ void __launch_bounds__(kRowThreads, 2) byte_log_probs_kernel(const __grid_constant__ ByteArguments a) {
  const Turns turns(a);
  const Team team(shared_memory(), 1);
  ByteWorker<Source> worker(a, team, turns.slice, shared_memory());
  for (int64_t row = turns.first; row < a.rows; row += turns.step) {
    const int64_t prefix = a.prefix_of(row);
    if (prefix == a.whole) {
      worker.run(row);
    } else if (row % a.slices != turns.slice) {
      continue;
    } else if (prefix == a.kNoPrefix) {
      lose_row(a, row, team);
    } else {
      gather_row(a, row, prefix, team, worker.found);
    }
    team.sync();  // before the next row overwrites the shared memory
  }
  if (a.slices > 1 && a.partials == nullptr) cluster_sync();  // other blocks may still read this block's sums
}

// Completes rows whose slices' sums were passed through global memory.
__global__ void __launch_bounds__(kRowThreads, 2) byte_merge_kernel(const __grid_constant__ ByteArguments a) {
  const Team team(shared_memory(), 1);
  float* const factors = reinterpret_cast<float*>(shared_memory() + Team::kSharedBytes);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    if (a.prefix_of(row) != a.whole) continue;
    const int64_t sums = slice_sums(a.columns);
    const float* const from = a.partials + row * a.slices * sums;
    finish_whole(a, row, team, factors, [&](int s, int i) { return global_load(from + s * sums + i); }, 0, a.columns);
    team.sync();
  }
}

// A block's shared memory for the gradient: [slots of the reductions][numbers stored by the forward, later segments]
// [factors][origins][columns of the slice's ids].
struct GradientLayout {
  int64_t logs, factors, origins, table, bytes;
  __host__ __device__ GradientLayout(int64_t columns, int64_t slice)
      : logs(Team::kSharedBytes),
        factors(logs + (columns + 2) * 8),
        origins(factors + columns * 4),
        table((origins + columns * 4 + 15) / 16 * 16),
        bytes(table + slice * 2) {}
};

// Statistics of the upstream gradients of a row's columns (the factors), and of the columns' logarithms.
struct Upstream {
  double all, least;  // all: the sum of the factors; least: the smallest of the columns' logarithms
  bool any;
};

// The gradient of a row, with one read and one write. Id v in column c gets
// factor[c] 2^((logit[v] - origin[c]) log2(e)).
template <class Source>
struct GradientWorker {
  using Slice = ByteSlice<Source>;
  using Item = typename Slice::Item;
  using Raw = typename Slice::Raw;
  static constexpr int kSize = Slice::kSize;
  struct alignas(2 * kSize) Columns {
    int16_t item[kSize];
  };

  const ByteArguments& a;
  const Team& team;
  const int first, count;
  double* logs;
  float *factors, *origins;
  int16_t* table;
  bool loaded = false;

  __device__ GradientWorker(const ByteArguments& arguments, const Team& t, int slice, unsigned char* shared)
      : a(arguments), team(t), first(slice * a.slice), count(a.ids - first < a.slice ? a.ids - first : a.slice) {
    const GradientLayout layout(a.columns, a.slice);
    logs = reinterpret_cast<double*>(shared + layout.logs);
    factors = reinterpret_cast<float*>(shared + layout.factors);
    origins = reinterpret_cast<float*>(shared + layout.origins);
    table = reinterpret_cast<int16_t*>(shared + layout.table);
  }

  __device__ __forceinline__ void run(int64_t row) {
    const Slice slice(a, row, first, count);
    const int64_t prefix = a.prefix_of(row);
    const bool gathers = prefix != a.kNoPrefix && prefix != a.whole;
    const Upstream upstream = read_upstream(row);
    const double all = shared_load(logs + a.columns), origin = shared_load(logs + a.columns + 1);
    if (!upstream.any || gathers) {
      for (int i = team.thread; i < slice.packs(); i += team.threads) slice.store(i, Raw{});
      if (upstream.any) gather(row, prefix, upstream);
    } else {
      const bool apart = upstream.least - all < -60;
      load_table();
      prepare(row, prefix, upstream, apart);
      write(row, slice, float(origin), apart);
    }
    if (first + count == a.ids) zero_columns(a.gradient, row, a.ids, a.width, team);
  }

 private:
  __device__ Upstream read_upstream(int64_t row) const {
    Upstream mine{0, INFINITY, false};
    for (int c = team.thread; c < a.columns + 2; c += team.threads) {
      const double log = global_load(a.sums_of(row) + c);
      shared_store(logs + c, log);
      if (c >= a.columns) break;
      // A column of probability 0 gets no gradient.
      const float g = log == -INFINITY ? 0 : global_load(a.grad_output + row * a.columns + c);
      shared_store(factors + c, g);
      mine.all += g;
      mine.least = log > -INFINITY && log < mine.least ? log : mine.least;
      mine.any = mine.any || g != 0;
    }
    const auto merge = [](Upstream& all, Upstream next) {
      all = {all.all + next.all, at_most(all.least, next.least), all.any || next.any};
    };
    return team.block_sum<true>(mine, merge);
  }

  // Prepares each column's origin and factor. Exponents are relative to the row's origin or, where a column's share of
  // the row is tiny, to an origin per column, near the column's sum. Where that value is so large that rounding would
  // cost accuracy, the column's largest logit is used, and the sum is computed again.
  __device__ void prepare(int64_t row, int64_t prefix, const Upstream& upstream, bool apart) const {
    constexpr double kFar = 0x1p23;
    const double all = shared_load(logs + a.columns), row_origin = shared_load(logs + a.columns + 1);
    const bool far = apart && (row_origin > kFar || row_origin < -kFar || upstream.least < -kFar);
    for (int c = team.thread; c < a.columns; c += team.threads) {
      const double log = shared_load(logs + c);
      const bool dead = log == -INFINITY;
      const float origin = float(apart && !far && !dead ? row_origin + log : row_origin);
      const double factor = shared_load(factors + c) - upstream.all * ::exp(log - all);
      shared_store(origins + c, origin);
      shared_store(factors + c, float(dead ? 0 : far ? factor : factor * ::exp((double(origin) - row_origin) - log)));
    }
    team.sync();
    if (!far) return;
#pragma unroll 1
    for (int c = team.thread / kWarp; c < a.columns; c += team.threads / kWarp) {
      const float factor = shared_load(factors + c);
      if (factor == 0) continue;
      const SegmentSum own = gathered_sum(a, row, segment_of(a, prefix, c));
      __syncwarp();
      if (team.thread % kWarp != 0) continue;
      shared_store(origins + c, own.top);
      shared_store(factors + c, float(factor * ::exp(-own.log())));
    }
    team.sync();
  }

  __device__ void load_table() {
    if (loaded) return;
    loaded = true;
    const PackedRow<int16_t> columns(const_cast<int16_t*>(a.column_of + first), count);
    for (int pack = team.thread; pack < columns.packs(); pack += team.threads) {
      const Packed<int16_t> found = columns.template load<false>(pack, 0);
#pragma unroll
      for (int j = 0; j < Packed<int16_t>::kSize; ++j) {
        const int place = columns.column(pack) + j, c = found.item[j];
        if (place >= 0 && place < count)
          shared_store(table + place, int16_t(unsigned(c) < unsigned(a.columns) ? c : 0));
      }
    }
    for (int place = count + team.thread; place < (count + 7) / 8 * 8; place += team.threads)
      shared_store(table + place, int16_t(0));
  }

  __device__ __forceinline__ Columns columns_at(const Slice& slice, int place) const {
    if (slice.lead == 0) return shared_load(reinterpret_cast<const Columns*>(table + place));
    Columns out;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const bool inside = place + j >= 0 && place + j < count;
      out.item[j] = inside ? shared_load(table + place + j) : int16_t(0);
    }
    return out;
  }

  __device__ void write(int64_t row, const Slice& slice, float row_origin, bool apart) const {
    const char* const valid = a.valid ? a.valid.at(row) : nullptr;
    const int packs = slice.packs(), threads = team.threads;
    if (team.thread >= packs) return;
    Raw next = slice.fetch(team.thread);
#pragma unroll 1
    for (int pack = team.thread; pack < packs; pack += threads) {
      Raw raw = next;
      if (pack + threads < packs) next = slice.fetch(pack + threads);
      drop_invalid(a, slice, valid, first, count, pack, raw);
      const Columns columns = columns_at(slice, slice.place(pack));
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const int c = columns.item[j];
        const float origin = apart ? shared_load(origins + c) : row_origin, x = to_float(raw.item[j]);
        raw.item[j] = element<Item>(shared_load(factors + c) * exp2_fast((x - origin) * float(kLog2E)));
      }
      slice.store(pack, raw);
    }
  }

  // A row with another prefix: only its ids are written, over zeros.
  __device__ void gather(int64_t row, int64_t prefix, const Upstream& upstream) const {
    prepare(row, prefix, upstream, /*apart=*/true);
    Segment* const segments = reinterpret_cast<Segment*>(logs);
    for (int c = team.thread; c < a.columns; c += team.threads) shared_store(segments + c, segment_of(a, prefix, c));
    team.sync();
    const char* const valid = a.valid ? a.valid.at(row) : nullptr;
#pragma unroll 1
    for (int c = team.thread / kWarp; c < a.columns; c += team.threads / kWarp) {
      const float factor = shared_load(factors + c), origin = shared_load(origins + c);
      const Segment segment = shared_load(segments + c);
      if (factor == 0) continue;
      for (int i = segment.begin + team.thread % kWarp; i < segment.end; i += kWarp) {
        const int id = global_load(a.order + i);
        if (id < first || id >= first + count || !a.counts(valid, id)) continue;
        const float x = a.logits.float_at(a.logits.at(row, id));
        a.gradient.put(a.gradient.at(row, id), factor * exp2_of((x - origin) * float(kLog2E)));
      }
    }
  }
};

template <class Source>
__global__ void __launch_bounds__(kRowThreads, 2)
    byte_log_probs_backward_kernel(const __grid_constant__ ByteArguments a) {
  const Turns turns(a);
  const Team team(shared_memory(), 1);
  GradientWorker<Source> worker(a, team, turns.slice, shared_memory());
  for (int64_t row = turns.first; row < a.rows; row += turns.step) {
    worker.run(row);
    team.sync();
  }
}

// As many blocks are launched as run at the same time, since each must first sort its slice.
int64_t teams_for(const ByteArguments& a, int64_t blocks) {
  const int64_t teams = blocks > a.slices ? blocks / a.slices : 1;
  return a.rows < teams ? a.rows : teams;
}

int slice_size(int64_t ids, int64_t slices) { return slices == 0 ? 0 : int((ids + slices * 8 - 1) / (slices * 8) * 8); }

constexpr int kMostIds = 65528;    // per slice: places have 16 bits
constexpr int kMostSlices = 4096;  // if sums go through global memory: each slice has a factor in shared memory

// Cuts the ids into equal slices: the fewest for which two blocks fit on a multiprocessor, or only one block where the
// slices would have too few ids for the number of columns.
void cut(ByteArguments& a, int capability, int64_t overhead, int bytes_an_id) {
  int64_t most = (half_limit(capability) - overhead) / bytes_an_id;
  if (most < 32 * a.columns) most = (shared_limit(capability) - overhead) / bytes_an_id;
  most = (most < kMostIds ? most : kMostIds) / 8 * 8;
  a.slice = slice_size(a.ids, (a.ids + most - 1) / most);
  a.slices = a.ids > a.slice ? int((a.ids + a.slice - 1) / a.slice) : 1;
}

template <class Source>
void launch_sums(const Device& device, ByteArguments a, const Tensor& like) {
  constexpr int item = int(sizeof(typename ByteSlice<Source>::Item));
  const auto kernel = byte_log_probs_kernel<Source>;
  const auto bytes = [&] { return ByteLayout(a.columns, a.slice, item).bytes; };
  a.slices = 1;
  a.slice = 0;
  if (a.whole == a.kNeverWhole) {
    const int64_t blocks = device.blocks_at_a_time(kernel, kRowThreads, bytes(), 1);
    return device.launch({"rows", "no row has the empty prefix: only the tokens of its prefix are read"}, kernel,
                         teams_for(a, blocks), kRowThreads, bytes(), 1, a);
  }
  // Each id takes a logit and a place in the list.
  const int64_t overhead = bytes() + 128 + a.columns * 8;
  const RowNeeds needs{overhead, /*packed=*/true, /*tensors=*/1};
  int64_t blocks = 0;
  for (int most_blocks : {kMostBlocks, kPortableBlocks}) {
    RowLaunch launch = block_per_row(row_launch(device.capability(), item + 2, a.ids, needs, most_blocks));
    if (launch.threads > kRowThreads) launch.threads = kRowThreads;  // the worker has no room for more
    a.slices = launch.cluster;
    a.slice = slice_size(a.ids, a.slices);
    if (!launch.resident || a.slice > kMostIds) break;
    blocks = device.blocks_at_a_time(kernel, launch.threads, bytes(), launch.cluster);
    if (blocks > 0) {
      return device.launch({"rows", launch}, kernel, teams_for(a, blocks) * a.slices, launch.threads, bytes(),
                           launch.cluster, a);
    }
    const bool smaller = launch.cluster > kPortableBlocks;
    device.log_refused(
        "rows", launch.threads, bytes(), launch.cluster,
        smaller ? "a launch with fewer blocks per row" : "slices without a cluster; a second kernel adds their sums");
    if (!smaller) break;
  }
  cut(a, device.capability(), overhead, item + 2);
  FASTKD_CHECK_VALUE(a.slices <= kMostSlices, kByteLogProbs, "vocab on this device may have at most ",
                     int64_t(kMostSlices) * a.slice, " ids, got ", a.ids);
  const int64_t merge_bytes = Team::kSharedBytes + a.slices * 4;
  const Tensor partials = torch::stable::new_empty(like, {a.rows, a.slices, slice_sums(a.columns)}, ScalarType::Float);
  a.partials = static_cast<float*>(partials.data_ptr());
  blocks = device.blocks_at_a_time(kernel, kRowThreads, bytes(), 1);
  device.launch({"slices", "no block or cluster holds a row: one block per slice"}, kernel,
                teams_for(a, blocks) * a.slices, kRowThreads, bytes(), 1, a);
  device.launch({"sum of slices", "one block per row"}, byte_merge_kernel, teams_of(a.rows, 1), kRowThreads,
                merge_bytes, 1, a);
}

template <class Source>
void launch_gradient(const Device& device, ByteArguments a) {
  const auto kernel = byte_log_probs_backward_kernel<Source>;
  cut(a, device.capability(), GradientLayout(a.columns, 0).bytes, 2);
  const int64_t shared_bytes = GradientLayout(a.columns, a.slice).bytes;
  const int64_t blocks = device.blocks_at_a_time(kernel, kRowThreads, shared_bytes, 1);
  device.launch({"gradient", "one block per slice of the vocabulary"}, kernel, teams_for(a, blocks) * a.slices,
                kRowThreads, shared_bytes, 1, a);
}

ByteArguments arguments_of(const ByteProblem& problem) {
  FASTKD_CHECK_TYPE(!problem.float64, kByteLogProbs, "float64 logits are supported on the CPU only");
  FASTKD_CHECK_VALUE(problem.vocab < kMaxColumns, kByteLogProbs,
                     "a vocabulary on CUDA must have fewer than 2^31 - 1024 columns, got ", problem.vocab);
  const auto rows_of = [&](const Tensor& x) { return device_rows(x, problem.leading, kByteLogProbs); };
  ByteArguments a{};
  a.rows = problem.rows;
  a.prefixes = problem.prefixes;
  a.whole = problem.ids > 0 && problem.whole >= 0 && problem.whole < problem.prefixes ? problem.whole : a.kNeverWhole;
  a.ids = int(problem.ids);
  a.columns = int(problem.columns);
  a.width = int(problem.vocab);
  a.order = problem.order;
  a.segments = problem.segments;
  a.column_of = problem.column_of;
  a.logits = rows_of(problem.student_tensor);
  if (problem.prefix_tensor != nullptr) a.prefix = rows_of(*problem.prefix_tensor);
  if (problem.valid_tensor != nullptr) a.valid = rows_of(*problem.valid_tensor);
  return a;
}

SourceKind kind_of(const ByteArguments& a) {
  RowArguments like{};
  like.student = a.logits;
  like.student_gradient = a.gradient;
  return source_kind(like);
}

struct Cuda {
  static constexpr bool kValuesChecked = false;

  static void solve(const ByteProblem& problem, Tensor& out, Tensor& sums) {
    ByteArguments a = arguments_of(problem);
    const Device device(problem.student_tensor, kByteLogProbs);
    a.out = static_cast<float*>(out.data_ptr());
    a.sums = static_cast<double*>(sums.data_ptr());
    with_source<false>(kind_of(a), [&](auto source, int) {
      launch_sums<typename decltype(source)::Type>(device, a, problem.student_tensor);
    });
  }

  static void differentiate(const ByteProblem& problem, const Tensor& gradient, const Tensor& sums,
                            const Tensor& grad_output) {
    ByteArguments a = arguments_of(problem);
    const Device device(problem.student_tensor, kByteLogProbs);
    a.gradient = device_rows(gradient, problem.leading, kByteLogProbs);
    a.sums = static_cast<double*>(sums.data_ptr());
    a.grad_output = static_cast<const float*>(grad_output.data_ptr());
    with_source<false>(kind_of(a),
                       [&](auto source, int) { launch_gradient<typename decltype(source)::Type>(device, a); });
  }
};

}  // namespace

FASTKD_IMPL(m) { implement_differentiable<ByteLogProbs, ByteLogProbsBackward, Cuda>(m); }

}  // namespace fastkd::cuda
