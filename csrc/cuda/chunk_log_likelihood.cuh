// chunk_log_likelihood on the GPU, the kernels over rows. Forward: the log-sum-exp of all logits and of those in the
// boundary set. Backward: the gradient of both.
//
// Memory: the forward reads each row that is needed once; the backward reads it once and writes the gradient once. Rows
// that contribute to no chunk, or to no chunk's gradient, are not read (backward writes zeros). The boundary set is
// read as one bit per column. A team copies it into shared memory once for all its rows (there are at most kFlatBlocks
// blocks). That adds 1 / (8 element_size rows) to the bytes read: where a block has one row, 1/32 for float32 and 1/16
// for 16-bit logits. The bits are packed once per call, from one byte per column. A set too large for shared memory
// (236,000 columns on sm_75, 384,000 on sm_86, more elsewhere) is read through the L1 instead, one word per pack. A row
// in which the set's share underflows in float is read a second time.
//
// Invalid values that the host could not check, a token or chunk out of range, make the row NaN without an access out
// of bounds.
#pragma once
#include "../math/logit_sum.h"
#include "common/fast_sum.cuh"
#include "common/sources.cuh"

namespace fastkd::cuda {

// The boundary set as bits. Column 0 has bit number `first`.
struct BoundaryBits {
  const unsigned* words;  // null: no set
  int bytes, first;
  bool on_chip;  // copied to shared memory

  // Packs of a row may read the bits of columns -7 to vocab + 6, and of the word after them.
  static constexpr int kBefore = 32;
  static constexpr int64_t bytes_for(int64_t vocab) { return (vocab / 8 + 31) / 16 * 16; }

  __host__ __device__ int on_chip_bytes() const { return on_chip ? bytes : 0; }
};

struct ChunkArguments : RowArguments {
  int64_t length, batch, chunks;
  DeviceRows ids, chunk_ids;
  double to_base_2;  // log2(e) / temperature
  BoundaryBits boundary;
  double* numbers;         // per row: its normaliser; after those of all rows, that of the boundary set
  double* label_log_prob;  // per row; forward only
  float *log_likelihood, *boundary_log_prob;
  int64_t* token_count;
  const float *likelihood_gradient, *boundary_gradient;

  __device__ int64_t chunk(int64_t row) const { return chunk_ids.integer(row); }
  // The chunk that ended just before this row, whose boundary probability comes from this row's logits; -1: none.
  __device__ int64_t ended_before(int64_t row) const {
    if (boundary.words == nullptr || row % length == 0) return -1;
    const int64_t before = chunk(row - 1);
    return before >= 0 && before != chunk(row) ? before : -1;
  }
  __device__ LogNormalizer normalizer(int64_t row, bool of_set) const {
    const double* const first = numbers + (of_set ? 2 * rows : 0) + row;
    return {global_load(first), global_load(first + rows)};
  }
  __device__ void put_normalizer(int64_t row, bool of_set, const LogNormalizer& x) const {
    double* const first = numbers + (of_set ? 2 * rows : 0) + row;
    global_store(first, x.origin);
    global_store(first + rows, x.log_sum);
  }
  // The logarithm of the boundary set's share of a row.
  __device__ double boundary_share(const LogNormalizer& all, const LogNormalizer& set) const {
    const double below = set.origin - all.origin;
    return log_share(below, below / temperature + (set.log_sum - all.log_sum));
  }
  // The column of the row's token; -1 if it has no valid token.
  __device__ int token(int64_t row) const {
    const int64_t id = ids.integer(row);
    return id >= 0 && id < vocab ? int(id) : -1;
  }
};

// A team's shared memory: [parameters][slots of the reductions][boundary set].
inline constexpr int kChunkOrdersBytes = 64;
__host__ __device__ constexpr int64_t chunk_overhead(bool warp) {
  return kChunkOrdersBytes + (warp ? 0 : Team::kSharedBytes);
}
__host__ __device__ inline int64_t chunk_team_bytes(const BoundaryBits& boundary, bool warp) {
  return chunk_overhead(warp) + boundary.on_chip_bytes();
}

// The boundary set as a team reads it, from shared or global memory.
class TeamBoundary {
 public:
  __device__ TeamBoundary(const BoundaryBits& set, const Team& team, unsigned char* shared)
      : set_(set), team_(team), on_chip_(reinterpret_cast<unsigned*>(shared)) {}

  // Copies the set to shared memory, before the first row that needs it. All threads of the team must call it. Contains
  // a barrier.
  __device__ void fetch() {
    if (!set_.on_chip || here_) return;
    for (int i = team_.thread; i < set_.bytes / 16; i += team_.threads) {
      const uint4 bits = global_load16<false>(set_.words + 4 * i);
      shared_store(reinterpret_cast<uint4*>(on_chip_) + i, bits);
    }
    team_.sync();
    here_ = true;
  }

  // Bit j of the result says whether column + j is in the set. Bits from kSize on are arbitrary.
  template <int kSize>
  __device__ __forceinline__ unsigned from(int column) const {
    const unsigned place = unsigned(set_.first + column), shift = place % 32;
    unsigned bits = word(place / 32) >> shift;
    if (shift + kSize > 32) bits |= word(place / 32 + 1) << (32 - shift);
    return bits;
  }

 private:
  __device__ __forceinline__ unsigned word(unsigned i) const {
    return set_.on_chip ? shared_load(on_chip_ + i) : global_load(set_.words + i);
  }

  const BoundaryBits& set_;
  const Team& team_;
  unsigned* const on_chip_;
  bool here_ = false;
};

// Sums of 2^(z scale) over all columns and over the boundary set, both relative to the same logit.
struct ChunkSums {
  double all, boundary;
};

// The team's sums and their origin, mine.origin, in every thread. The boundary set's columns are marked. Contains
// barriers.
template <class Item>
__device__ ChunkSums total(const Team& team, FastSum<Item>& mine) {
  mine.raise(team.block_sum<true>(mine.origin, [](float& a, float next) { a = at_least(a, next); }));
  return team.block_sum<true>(ChunkSums{mine.sum, mine.marked}, [](ChunkSums& a, const ChunkSums& next) {
    a = {a.all + next.all, a.boundary + next.boundary};
  });
}

// The forward pass over a row.
template <class Source>
struct ChunkSumWorker {
  static constexpr int kSize = Source::kSize;

  // What the leading thread publishes to the others.
  struct RowParameters {
    bool scored;
    int ended;  // the chunk that ended just before, or -1
  };
  static_assert(sizeof(RowParameters) <= kChunkOrdersBytes);

  const ChunkArguments& arguments;
  const Team& team;
  TeamBoundary& set;
  RowParameters* const published;

  __device__ __forceinline__ void run(int64_t row, const Source& source) const {
    if (team.leads()) {
      const int64_t ended = arguments.ended_before(row);
      shared_store(published, RowParameters{arguments.chunk(row) >= 0, ended < arguments.chunks ? int(ended) : -1});
    }
    team.sync();
    const RowParameters parameters = shared_load(published);
    if (!parameters.scored && parameters.ended < 0) return;
    if (parameters.ended >= 0) set.fetch();
    const float scale = float(arguments.to_base_2);
    FastSum<typename Source::Item> mine(scale, 0);
    source.start(team);
    RowPass<true, Source> pass(source, team, false);
    const auto marks = [&](int pack) { return set.template from<kSize>(source.column(pack)); };
    const auto careful = [&](int pack, const typename Source::Raw& raw) {
      float z[kSize];
      widen(raw, z);
      mine.add(z, parameters.ended >= 0 ? marks(pack) : 0);
    };
    if constexpr (!Source::kPacked) {
      for_packs(pass, careful);
    } else if (parameters.ended >= 0) {
      for_packs(
          pass,
          [&](int pack, const typename Source::Raw& raw) {
            return mine.template add_fast</*kMarks=*/true>(raw.student, marks(pack));
          },
          careful);
    } else {
      for_packs(pass, [&](int, const typename Source::Raw& raw) { return mine.add_fast(raw.student); }, careful);
    }
    const ChunkSums sums = total(team, mine);
    const double origin = mine.origin, nan_or_zero = (origin - origin) + (sums.all - sums.all);
    LogNormalizer of_set{origin, ::log(sums.boundary)};
    // The set's share of the row underflows beside the rest, or nearly does.
    if (parameters.ended >= 0 && sums.boundary < 0x1p-100) of_set = rare_boundary(source, scale);
    if (!team.leads()) return;
    const LogNormalizer all{origin, ::log(sums.all) + nan_or_zero};
    of_set.log_sum += nan_or_zero;
    arguments.put_normalizer(row, false, all);
    if (parameters.ended >= 0) {
      arguments.put_normalizer(row, true, of_set);
      const int64_t at = row / arguments.length * arguments.chunks + parameters.ended;
      global_store(arguments.boundary_log_prob + at, float(arguments.boundary_share(all, of_set)));
    }
    if (parameters.scored) global_store(arguments.label_log_prob + row, label_log_prob(row, all));
  }

 private:
  static __device__ __forceinline__ void widen(const typename Source::Raw& raw, float (&z)[kSize]) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) z[j] = Source::student_of(raw, j);
  }

  // The boundary set's sum, relative to the set's own largest logit.
  __device__ LogNormalizer rare_boundary(const Source& source, float scale) const {
    FastSum<typename Source::Item> mine(scale, 0);
    for_packs<false>(source, team, /*backwards=*/true, [&](int pack, const typename Source::Raw& raw) {
      float z[kSize];
      widen(raw, z);
      const unsigned in = set.template from<kSize>(source.column(pack));
#pragma unroll
      for (int j = 0; j < kSize; ++j) z[j] = in >> j & 1 ? z[j] : -INFINITY;
      mine.add(z);
    });
    const double sum = total(team, mine).all;
    return {double(mine.origin), ::log(sum)};
  }

  __device__ double label_log_prob(int64_t row, const LogNormalizer& all) const {
    const int label = arguments.token(row);
    if (label < 0) return double(NAN);
    const DeviceRows& logits = arguments.student;
    const double below = logits.float_at(logits.at(row, label)) - all.origin;
    return log_share(below, below / arguments.temperature - all.log_sum);
  }
};

// The backward pass over a row. The gradient of entry v is factor 2^((z_v - origin) scale - shift). Columns in the
// boundary set and the other columns have different values of these numbers. The row's token gets label_factor in
// addition.
template <class Source>
struct ChunkGradientWorker {
  static constexpr int kSize = Source::kSize;

  struct RowParameters {
    bool read, apart;  // apart: columns of the boundary set have numbers of their own
    int label;
    float origin, shift, factor, own_origin, own_shift, own_factor, label_factor;
  };
  static_assert(sizeof(RowParameters) <= kChunkOrdersBytes);

  const ChunkArguments& arguments;
  const Team& team;
  TeamBoundary& set;
  RowParameters* const published;

  __device__ __forceinline__ void run(int64_t row, const Source& source) const {
    if (team.leads()) shared_store(published, plan(row));
    team.sync();
    const RowParameters at = shared_load(published);
    if (!at.read) return source.write_zeros(team);
    if (at.apart) set.fetch();
    const float scale = float(arguments.to_base_2);
    const auto& gradients = source.gradients();
    source.start(team);
    for_packs<true>(source, team, false, [&](int pack, const typename Source::Raw& raw) {
      const int column = source.column(pack), label = at.label - column;
      const unsigned in = at.apart ? set.template from<kSize>(column) : 0;
      float gradient[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const bool own = in >> j & 1;
        const float x = Source::student_of(raw, j) - (own ? at.own_origin : at.origin);
        gradient[j] = (own ? at.own_factor : at.factor) * exp2_fast(x * scale - (own ? at.own_shift : at.shift));
      }
      if (unsigned(label) < unsigned(kSize)) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) gradient[j] += j == label ? at.label_factor : 0;
      }
      typename Source::Out out{};
#pragma unroll
      for (int first = 0; first < kSize; first += Source::kWord) {
        float word[Source::kWord];
#pragma unroll
        for (int j = 0; j < Source::kWord; ++j) word[j] = gradient[first + j];
        Source::append(out, word);
      }
      gradients.store_student(pack, out);
    });
  }

 private:
  __device__ __forceinline__ RowParameters plan(int64_t row) const {
    const int64_t chunk = arguments.chunk(row), ended = arguments.ended_before(row);
    const LogNormalizer all = arguments.normalizer(row, false), set = arguments.normalizer(row, true);
    const double share = ended >= 0 ? arguments.boundary_share(all, set) : 0;
    const bool scored = chunk >= 0, possible = ended >= 0 && share > double(-INFINITY);
    const double of_label = scored ? upstream(arguments.likelihood_gradient, row, chunk) : 0;
    // A boundary of probability 0 gets no gradient.
    const double of_boundary = possible ? upstream(arguments.boundary_gradient, row, ended) : 0;
    RowParameters out{};
    out.read = of_label != 0 || of_boundary != 0;
    if (!out.read) return out;
    out.apart = of_boundary != 0;
    out.label = scored ? arguments.token(row) : -1;
    const double per_logit = 1 / arguments.temperature, rest = -(of_label + of_boundary) * per_logit;
    out.origin = float(all.origin);
    out.shift = float(all.log_sum * kLog2E);
    out.factor = float(rest);
    out.label_factor = float(of_label * per_logit);
    if (!out.apart) return out;
    // In the boundary set the two softmaxes differ by a constant factor only. 2^x is computed relative to the set's own
    // sum, since relative to the row's it might underflow.
    out.own_origin = float(set.origin);
    out.own_shift = float(set.log_sum * kLog2E);
    out.own_factor = float(of_boundary * per_logit + rest * ::exp(share));
    return out;
  }

  __device__ double upstream(const float* gradient, int64_t row, int64_t chunk) const {
    if (chunk >= arguments.chunks) return double(NAN);
    return global_load(gradient + row / arguments.length * arguments.chunks + chunk);
  }
};

template <template <class> class Worker, class Source>
__device__ __forceinline__ void work_on_rows(const ChunkArguments& arguments, const RowLaunch& launch) {
  const bool by_warp = launch.warp_rows > 0;
  const int64_t own = chunk_team_bytes(arguments.boundary, by_warp);
  unsigned char* const shared = team_memory(launch, own + rows_bytes(launch, 1));
  const Team team(shared + kChunkOrdersBytes, 1, by_warp);
  TeamBoundary set(arguments.boundary, team, shared + chunk_overhead(by_warp));
  const Worker<Source> worker{arguments, team, set, reinterpret_cast<typename Worker<Source>::RowParameters*>(shared)};
  for_rows(team, launch, arguments.rows, [&](int64_t row) FASTKD_INLINE_BODY {
    worker.run(row, Source(arguments, row, launch, 0, shared, shared + own));
  });
}

// Blocks per multiprocessor. With one tensor, each block has half as many copies under way as one with two.
inline constexpr int kChunkBlocks = 4;

template <class Source>
__global__ void __launch_bounds__(kRowThreads, kChunkBlocks)
    chunk_log_likelihood_kernel(const __grid_constant__ ChunkArguments arguments, const RowLaunch launch) {
  work_on_rows<ChunkSumWorker, Source>(arguments, launch);
}

template <class Source>
__global__ void __launch_bounds__(kRowThreads, kChunkBlocks)
    chunk_gradient_kernel(const __grid_constant__ ChunkArguments arguments, const RowLaunch launch) {
  work_on_rows<ChunkGradientWorker, Source>(arguments, launch);
}

}  // namespace fastkd::cuda
