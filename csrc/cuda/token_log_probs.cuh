// token_log_probs on the GPU. Forward: the log-probability of each row's token and the row's entropy. Backward: the
// gradient of both.
//
// Memory: the forward reads each row once; the backward reads it once and writes the gradient once. Rows that are
// masked, or into whose results no gradient flows, are not read.
//
// Invalid values that the host could not check, a token out of range or a temperature that is not positive, make the
// row NaN without an access out of bounds.
#pragma once
#include "../math/token_log_probs.h"
#include "common/fast_sum.cuh"
#include "common/sources.cuh"

namespace fastkd::cuda {

struct TokenArguments : RowArguments {
  double* numbers;  // [3, rows]: origin and log_sum of the normaliser, and the entropy
  float *log_probs, *entropy;
  const float *log_probs_gradient, *entropy_gradient;

  // The row's token; -1 if it is out of range.
  __device__ int token(int64_t row) const {
    const int64_t id = labels.integer(row + shift);
    return id >= 0 && id < vocab ? int(id) : -1;
  }
  // As sources return it; NaN for a token out of range.
  __device__ double token_logit(int64_t row) const {
    const int column = token(row);
    if (column < 0) return double(NAN);
    const float z = student.float_at(student.at(row, column));
    return student_map ? mapped_logit(student_map, z) : z;
  }
};

// A team's shared memory: [parameters][slots of the reductions][slots of packs].
inline constexpr int kTokenOrdersBytes = 64;
__host__ __device__ constexpr int64_t token_overhead(bool warp) {
  return kTokenOrdersBytes + (warp ? 0 : Team::kSharedBytes);
}
__host__ __device__ constexpr int64_t token_team_bytes(const RowLaunch& launch) {
  return token_overhead(launch.warp_rows > 0) + rows_bytes(launch, 1);
}

// The forward pass over a row.
template <bool kEntropy, class Source>
struct TokenSumWorker {
  // What the leading thread publishes to the others.
  struct RowParameters {
    bool read;
    float scale;  // log2(e) / temperature
  };
  static_assert(sizeof(RowParameters) <= kTokenOrdersBytes);

  const TokenArguments& arguments;
  const Team& team;
  RowParameters* const published;

  __device__ __forceinline__ void run(int64_t row, const Source& source) const {
    if (team.leads()) {
      shared_store(published, RowParameters{arguments.counts(row), float(kLog2E / arguments.row_temperature(row))});
    }
    team.sync();
    const RowParameters parameters = shared_load(published);
    TokenNumbers found{};
    if (parameters.read) {
      const TokenSums sums = pass(source, parameters.scale);
      if (!team.leads() || team.rank != 0) return;
      found = token_numbers(arguments.row_temperature(row), sums, kEntropy, arguments.token_logit(row));
    }
    if (!team.leads() || team.rank != 0) return;
    global_store(arguments.log_probs + row, float(found.log_prob));
    if constexpr (kEntropy) global_store(arguments.entropy + row, float(found.entropy));
    double* const first = arguments.numbers + row;
    global_store(first, found.normalizer.origin);
    global_store(first + arguments.rows, found.normalizer.log_sum);
    global_store(first + 2 * arguments.rows, found.entropy);
  }

 private:
  // The row's sums, valid in leading threads. NaN where the scale is.
  __device__ TokenSums pass(const Source& source, float scale) const {
    FastSum<typename Source::Item, kEntropy> mine(scale, 0);
    source.start(team);
    RowPass<true, Source> pass(source, team, false);
    const auto careful = [&](int, const typename Source::Raw& raw) {
      float z[Source::kSize];
#pragma unroll
      for (int j = 0; j < Source::kSize; ++j) z[j] = Source::student_of(raw, j);
      mine.add(z);
    };
    if constexpr (Source::kPacked) {
      for_packs(pass, [&](int, const typename Source::Raw& raw) { return mine.add_fast(raw.student); }, careful);
    } else {
      for_packs(pass, careful);
    }
    mine.raise(team.block_sum<true>(mine.origin, [](float& a, float next) { a = at_least(a, next); }));
    const SideSums sums =
        team.block_sum(SideSums{mine.sum, mine.weighted}, [](SideSums& a, const SideSums& b) { a.add(b); });
    return team.cluster_sum(TokenSums{double(mine.origin), sums},
                            [&](TokenSums& a, const TokenSums& b) { a.merge(b, double(scale)); });
  }
};

// The backward pass over a row: TokenFactors says what is computed, from q_v = 2^((z_v - origin) scale - shift).
template <bool kEntropy, class Source>
struct TokenGradientWorker {
  static constexpr int kSize = Source::kSize;

  struct RowParameters {
    bool read;
    int token;
    float scale, origin, shift, constant, slope, of_token;
  };
  static_assert(sizeof(RowParameters) <= kTokenOrdersBytes);

  const TokenArguments& arguments;
  const Team& team;
  RowParameters* const published;

  __device__ __forceinline__ void run(int64_t row, const Source& source) const {
    if (team.leads()) shared_store(published, plan(row));
    team.sync();
    const RowParameters at = shared_load(published);
    if (!at.read) return source.write_zeros(team);
    const auto& gradients = source.gradients();
    source.start(team);
    for_packs<true>(source, team, false, [&](int pack, const typename Source::Raw& raw) {
      float gradient[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float x = fused(Source::student_of(raw, j) - at.origin, at.scale, -at.shift), q = exp2_fast(x);
        gradient[j] = q * (kEntropy ? fused(at.slope, fmaxf(-float(kDead), x), at.constant) : at.constant);
      }
      const int token = at.token - source.column(pack);
      if (unsigned(token) < unsigned(kSize)) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) gradient[j] += j == token ? at.of_token : 0;
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
    zero_beyond_vocab(arguments, row, team);
  }

 private:
  __device__ __forceinline__ RowParameters plan(int64_t row) const {
    RowParameters out{};
    if (!arguments.counts(row)) return out;
    const double into_log_prob = global_load(arguments.log_probs_gradient + row);
    const double into_entropy = kEntropy ? global_load(arguments.entropy_gradient + row) : 0;
    out.read = into_log_prob != 0 || into_entropy != 0;
    if (!out.read) return out;
    const double* const first = arguments.numbers + row;
    const double log_sum = global_load(first + arguments.rows), entropy = global_load(first + 2 * arguments.rows);
    const double temperature = arguments.row_temperature(row);
    out.token = arguments.token(row);
    TokenFactors factors = token_factors(temperature, entropy, into_log_prob, into_entropy);
    if (out.token < 0 && into_log_prob != 0) factors.constant = double(NAN);
    out.scale = float(kLog2E / temperature);
    out.origin = float(global_load(first));
    out.shift = float(log_sum * kLog2E);
    out.constant = float(factors.constant);
    out.slope = float(factors.slope);
    out.of_token = float(factors.token);
    return out;
  }
};

template <template <bool, class> class Worker, bool kEntropy, class Source>
__device__ __forceinline__ void work_on_token_rows(const TokenArguments& arguments, const RowLaunch& launch) {
  const bool by_warp = launch.warp_rows > 0;
  unsigned char* const shared = team_memory(launch, token_team_bytes(launch));
  const Team team(shared + kTokenOrdersBytes, unsigned(launch.cluster), by_warp);
  using Published = typename Worker<kEntropy, Source>::RowParameters;
  const Worker<kEntropy, Source> worker{arguments, team, reinterpret_cast<Published*>(shared)};
  for_rows(team, launch, arguments.rows, [&](int64_t row) FASTKD_INLINE_BODY {
    worker.run(row, Source(arguments, row, launch, team.rank, shared, shared + token_overhead(by_warp)));
  });
}

// Blocks per multiprocessor. With one tensor, each block has half as many copies under way as one with two.
inline constexpr int kTokenBlocks = 4;

template <bool kEntropy, class Source>
__global__ void __launch_bounds__(kRowThreads, kTokenBlocks)
    token_log_probs_kernel(const __grid_constant__ TokenArguments arguments, const RowLaunch launch) {
  work_on_token_rows<TokenSumWorker, kEntropy, Source>(arguments, launch);
}

template <bool kEntropy, class Source>
__global__ void __launch_bounds__(kRowThreads, kTokenBlocks)
    token_gradient_kernel(const __grid_constant__ TokenArguments arguments, const RowLaunch launch) {
  work_on_token_rows<TokenGradientWorker, kEntropy, Source>(arguments, launch);
}

}  // namespace fastkd::cuda
