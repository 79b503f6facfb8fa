// The passes over one process's columns, where the vocabulary is split across processes (csrc/math/shard_terms.h,
// csrc/arguments/shards_entry.h).
//
// Memory: each kernel reads its tensors once, except that the sums of a row that is nearly equal on both sides are
// formed in a second pass; the gradients are written once. One block has a row, and reads it element by element, so
// that every dtype, layout and soft cap, and any width of a shard, is read in the same way.
//
// Invalid values that the host could not check, such as a temperature that is not positive, make the row NaN without an
// access out of bounds.
#pragma once
#include "../arguments/shards_entry.h"
#include "../math/shard_terms.h"
#include "common/any_source.cuh"

namespace fastkd::cuda {

// --- Rows ---------------------------------------------------------------------------------------

struct ShardTable {
  int64_t rows;
  int vocab;
  const double* numbers;
  const int64_t* tokens;
  __device__ int token(int64_t row) const {
    const int64_t id = global_load(tokens + row);
    return id >= 0 && id < vocab ? int(id) : -1;
  }
  __device__ double at(int place, int64_t row) const { return global_load(numbers + place * rows + row); }
  __device__ double temperature(int place, int64_t row) const { return RowNumbers::positive(at(place, row)); }
  __device__ LogitFunction<float> map(int place, int64_t row) const {
    return LogitFunction<float>(LogitMap{at(place, row)});
  }
};

// A row of logits of any dtype and layout.
struct ShardLogits {
  const DeviceRows& tensor;
  char* const first;
  const LogitFunction<float> map;

  __device__ ShardLogits(const DeviceRows& rows, int64_t row, const LogitFunction<float>& function)
      : tensor(rows), first(rows.at(row)), map(function) {}
  __device__ __forceinline__ float plain(int column) const { return AnySource::logit(tensor, first, column); }
  __device__ __forceinline__ float operator()(int column) const {
    const float z = plain(column);
    return map ? mapped_logit(map, z) : z;
  }
  // The gradient by the logit as given.
  __device__ __forceinline__ float unmapped(int column, float gradient) const {
    return map ? gradient * slope_at(map, plain(column)) : gradient;
  }
};

struct ShardSideArguments : ShardTable {
  int width;
  DeviceRows logits, gradient;
  const bool* columns;
  const int64_t* holes;
  int64_t hole_count;
  const double* hole_gradients;
  double* out;
  int wanted;

  __device__ bool has_second(int column) const { return columns == nullptr || global_load(columns + column); }
};

struct ShardPairArguments : ShardTable {
  int width;
  DeviceRows student, teacher, gradient;
  portable::DivergencePlaces places;
  int place;  // rows with another divergence are those of another launch
  bool of_teacher, constant_teacher;
  double* out;

  __device__ bool takes(int64_t row) const { return places.at(at(kBeta, row)) == place; }
};

// A logit of a pair. The divergence's softmax lacks the label if it is of the other tokens.
template <class Divergence>
__device__ __forceinline__ float other_logit(const ShardLogits& side, int column, int token) {
  return Divergence::kExcludesLabel && column == token ? -INFINITY : side(column);
}

// A team's shared memory: [slots of the reductions][filter of holes].
inline constexpr int kFilterWords = 64;
inline constexpr int64_t kShardTeamBytes = Team::kSharedBytes + kFilterWords * 4;
inline int64_t shard_team_bytes(const RowLaunch&) { return kShardTeamBytes; }

// Whether a column is a hole: most are not, by a bit that several columns share.
class HoleFilter {
 public:
  __device__ HoleFilter(const ShardSideArguments& arguments, int64_t row, const Team& team, unsigned* words)
      : words_(words), count_(arguments.hole_count), holes_(arguments.holes + row * arguments.hole_count) {
    if (count_ == 0) return;
    for (int i = team.thread; i < kFilterWords; i += team.threads) shared_store(words_ + i, 0u);
    team.sync();
    for (int64_t j = team.thread; j < count_; j += team.threads) {
      const int64_t column = global_load(holes_ + j);
      if (column >= 0 && column < arguments.vocab) shared_or(words_ + word_of(int(column)), bit_of(int(column)));
    }
    team.sync();
  }
  __device__ bool operator()(int column) const {
    if (count_ == 0 || (shared_load(words_ + word_of(column)) & bit_of(column)) == 0) return false;
#pragma unroll 1
    for (int64_t j = 0; j < count_; ++j) {
      if (global_load(holes_ + j) == column) return true;
    }
    return false;
  }

 private:
  static __device__ int word_of(int column) { return column / 32 % kFilterWords; }
  static __device__ unsigned bit_of(int column) { return 1u << (column % 32); }
  unsigned* const words_;
  const int64_t count_;
  const int64_t* const holes_;
};

// --- One side -----------------------------------------------------------------------------------

// What a thread sums, relative to the largest of its logits so far. The second softmax may lack columns, and all that
// it has may be far below the first's.
struct ShardSideSums {
  float origin = -INFINITY, best = -INFINITY, second_origin = -INFINITY;
  float sum = 0, weighted = 0, second = 0, second_weighted = 0, total = 0;
  int columns = 0, best_column = 0;

  __device__ void raise(float to, float scale) {
    if (origin == to) return;
    SideSumsOf<float> a{sum, weighted};
    const float step = step_between(origin, to);
    a.raise(step * scale);
    sum = a.sum, weighted = a.weighted;
    if (columns > 0) total -= float(columns) * (origin == -INFINITY ? to : step);
    origin = to;
  }
  __device__ void raise_second(float to, float scale) {
    if (second_origin == to) return;
    SideSumsOf<float> a{second, second_weighted};
    a.raise(step_between(second_origin, to) * scale);
    second = a.sum, second_weighted = a.weighted;
    second_origin = to;
  }
  __device__ static float term(float e, float x) { return x > -float(kDead) ? e * x : 0; }
  __device__ void add(float z, int column, float scale, float second_scale, bool in_second) {
    if (z > best) best = z, best_column = column;
    if (z > origin) raise(z, scale);
    const float x = z - (origin == -INFINITY ? 0 : origin), first = x * scale, e = exp2_of(first);
    sum += e;
    weighted += term(e, first);
    if (in_second) {
      if (z > second_origin) raise_second(z, second_scale);
      const float other = (z - (second_origin == -INFINITY ? 0 : second_origin)) * second_scale, e2 = exp2_of(other);
      second += e2;
      second_weighted += term(e2, other);
    }
    total += x;
    ++columns;
  }
};

__device__ inline void shard_statistics_row(const ShardSideArguments& a, int64_t row, const Team& team,
                                            unsigned* filter) {
  const auto put = [&](int place, double x) { global_store(a.out + place * a.rows + row, x); };
  const bool read = a.at(kKeep, row) != 0;
  ShardSideSums mine;
  const float scale = float(kLog2E / a.temperature(kTemperature, row));
  const float second_scale = float(kLog2E / a.temperature(kSecondTemperature, row));
  const ShardLogits logits(a.logits, row, a.map(kSoftcap, row));
  if (read) {
    const HoleFilter hole(a, row, team, filter);
    const bool second = (a.wanted & kWantSecond) != 0;
#pragma unroll 4
    for (int column = team.thread; column < a.vocab; column += team.threads) {
      const float z = logits(column);
      if (!hole(column)) mine.add(z, column, scale, second_scale, second && a.has_second(column));
    }
  }
  const auto larger = [](float& x, float next) { x = at_least(x, next); };
  const float origin = team.block_sum<true>(mine.origin, larger);
  mine.raise(origin, scale);
  const float second_origin = team.block_sum<true>(mine.second_origin, larger);
  mine.raise_second(second_origin, second_scale);
  struct Sums {
    double sum, weighted, second, second_weighted, total, columns;
  };
  const Sums all =
      team.block_sum(Sums{mine.sum, mine.weighted, mine.second, mine.second_weighted, mine.total, double(mine.columns)},
                     [](Sums& x, const Sums& next) {
                       x.sum += next.sum, x.weighted += next.weighted, x.second += next.second;
                       x.second_weighted += next.second_weighted, x.total += next.total, x.columns += next.columns;
                     });
  const Best<float, int> best =
      team.block_sum(Best<float, int>{mine.best, mine.best_column},
                     [](Best<float, int>& x, const Best<float, int>& next) { x.merge(next); });
  if (!team.leads()) return;
  const int token = read ? a.token(row) : -1;
  put(kOrigin, origin);
  put(kSum, all.sum);
  put(kWeighted, all.weighted);
  put(kSecondSum, all.second);
  put(kSecondWeighted, all.second_weighted);
  put(kTokenLogit, token < 0 ? -double(INFINITY) : double(logits(token)));
  put(kBestLogit, best.logit);
  put(kBestColumn, best.column);
  put(kTotal, all.total);
  put(kColumns, all.columns);
  put(kSecondOrigin, second_origin);
}

inline __device__ void zero_row(const DeviceRows& gradient, int64_t row, int begin, int width, const Team& team) {
  zero_columns(gradient, row, begin, width, team);
}

__device__ inline void shard_softmax_gradient_row(const ShardSideArguments& a, int64_t row, const Team& team,
                                                  unsigned* filter) {
  if (a.at(kKeep, row) == 0) return zero_row(a.gradient, row, 0, a.width, team);
  const HoleFilter hole(a, row, team, filter);
  const ShardLogits logits(a.logits, row, a.map(kSoftcap, row));
  char* const out = a.gradient.at(row);
  const float scale = float(kLog2E / a.temperature(kTemperature, row));
  const float second_scale = float(kLog2E / a.temperature(kSecondTemperature, row));
  const auto number = [&](int place) { return float(a.at(place, row)); };
  const float origin = number(kSoftmaxOrigin), shift = number(kFirstLog2Sum), second_shift = number(kSecondLog2Sum);
  const float constant = number(kFirstConstant), slope = number(kFirstSlope);
  const float second_constant = number(kSecondConstant), second_slope = number(kSecondSlope);
  const float of_token = number(kSoftmaxTokenFactor), each = number(kEachColumn);
  const float second_origin = number(kSoftmaxSecondOrigin);
  const bool first = constant != 0 || slope != 0, second = second_constant != 0 || second_slope != 0;
  const int token = a.token(row);
  const auto part = [](float z, float s, float by, float c, float k) {
    const float x = z * s - by, q = exp2_of(x);
    return q * (k != 0 ? c + k * at_least(-float(kDead), x) : c);
  };
  const auto put = [&](int column, float gradient) {
    a.gradient.put(AnySource::place(a.gradient, out, column), logits.unmapped(column, gradient));
  };
#pragma unroll 4
  for (int column = team.thread; column < a.vocab; column += team.threads) {
    if (hole(column)) continue;
    const float z = logits(column);
    float gradient = each;
    if (first) gradient += part(z - origin, scale, shift, constant, slope);
    if (second && a.has_second(column)) {
      gradient += part(z - second_origin, second_scale, second_shift, second_constant, second_slope);
    }
    put(column, column == token ? gradient + of_token : gradient);
  }
  for (int64_t j = team.thread; j < a.hole_count; j += team.threads) {
    const int64_t place = row * a.hole_count + j, column = global_load(a.holes + place);
    if (column >= 0 && column < a.vocab) put(int(column), float(global_load(a.hole_gradients + place)));
  }
  zero_row(a.gradient, row, a.vocab, a.width, team);
}

// --- Student and teacher ------------------------------------------------------------------------

__device__ inline RowTask shard_task(const ShardPairArguments& a, int64_t row) {
  RowTask task{};
  task.temperature = a.temperature(kStudentTemperature, row);
  task.teacher_temperature = a.temperature(kTeacherTemperature, row);
  task.beta = a.at(kBeta, row);
  task.alpha = a.at(kAlpha, row);
  return task;
}

__device__ inline Normalized<float> shard_frame(const ShardPairArguments& a, int64_t row, const RowTask& task) {
  RowFrame<float> frame;
  frame.set_scales(task);
  frame.student_origin = float(a.at(kStudentOrigin, row));
  frame.teacher_origin = float(a.at(kTeacherOrigin, row));
  frame.student_lse = a.at(kStudentLog2Sum, row);
  frame.teacher_lse = a.at(kTeacherLog2Sum, row);
  frame.label_lse = 0;
  return frame.normalized();
}

template <bool kNear, class Divergence>
__device__ ShardTermSums<double> shard_pass(const ShardPairArguments& a, const ShardLogits& u, const ShardLogits& w,
                                            const Divergence& divergence, const Normalized<float>& at, int token,
                                            const Team& team) {
  ShardTermSums<float> mine{};
#pragma unroll 2
  for (int column = team.thread; column < a.vocab; column += team.threads) {
    const float x = other_logit<Divergence>(u, column, token), y = other_logit<Divergence>(w, column, token);
    mine.add(shard_terms<kNear, float>(divergence, at.outcome<kNear>(x, y)));
  }
  return team.block_sum<true>(ShardTermSums<double>{mine.f, mine.student, mine.teacher, mine.q, mine.p},
                              [](ShardTermSums<double>& x, const ShardTermSums<double>& next) { x.add(next); });
}

template <class Divergence>
__device__ void shard_sums_row(const ShardPairArguments& a, int64_t row, const Team& team) {
  ShardSums found{};
  if (a.at(kKeep, row) != 0) {
    const RowTask task = shard_task(a, row);
    const Divergence divergence{task.beta, task.alpha};
    const Normalized<float> at = shard_frame(a, row, task);
    const ShardLogits u(a.student, row, a.map(kStudentSoftcap, row)), w(a.teacher, row, a.map(kTeacherSoftcap, row));
    const int token = a.token(row);
    bool near = kAlwaysNear<Divergence>;
    if constexpr (!kAlwaysNear<Divergence>) {
      const ShardTermSums<double> far = shard_pass<false>(a, u, w, divergence, at, token, team);
      near = far.f < Divergence::kNearBelow;
      found = converted(divergence, far);
    }
    if (near) {
      const ShardTermSums<double> all = shard_pass<true>(a, u, w, divergence, at, token, team);
      found = {all.f, all.student, all.teacher};
    }
  }
  if (!team.leads()) return;
  const auto put = [&](int place, double x) { global_store(a.out + place * a.rows + row, x); };
  put(kValueSum, found.value);
  put(kStudentSlopeSum, found.student);
  put(kTeacherSlopeSum, found.teacher);
}

template <bool kNear, bool kTeacher, class Divergence>
__device__ void write_shard_gradient(const ShardPairArguments& a, int64_t row, const Team& team, const RowTask& task,
                                     const Divergence& divergence, double row_mean) {
  const Normalized<float> at = shard_frame(a, row, task);
  const ShardLogits u(a.student, row, a.map(kStudentSoftcap, row)), w(a.teacher, row, a.map(kTeacherSoftcap, row));
  const Mean<float> mean(row_mean);
  const double into = kTeacher && a.constant_teacher ? 0 : a.at(kFactor, row);
  const float factor = float(into / (kTeacher ? task.teacher_temperature : task.temperature));
  const float own = float(a.at(kOwnFactor, row)), of_token = float(a.at(kTokenFactor, row));
  const float own_origin = kTeacher ? at.teacher_origin : at.student_origin;
  const float own_scale = kTeacher ? at.teacher_scale : at.student_scale;
  const float own_shift = kTeacher ? at.teacher_lse : at.student_lse;
  const float label = float(a.at(kLabelFactor, row)), shift = float(a.at(kLabelLog2Sum, row));
  const int token = a.token(row);
  char* const out = a.gradient.at(row);
#pragma unroll 1
  for (int column = team.thread; column < a.vocab; column += team.threads) {
    const float x = other_logit<Divergence>(u, column, token), y = other_logit<Divergence>(w, column, token);
    float gradient = factor * shard_gradient<kNear, kTeacher>(divergence, at.outcome<kNear>(x, y), mean);
    if (own != 0) gradient += own * exp2_of(((kTeacher ? y : x) - own_origin) * own_scale - own_shift);
    if (label != 0) gradient += label * exp2_of((x - at.student_origin) * float(kLog2E) - shift);
    if (column == token) gradient += of_token;
    a.gradient.put(AnySource::place(a.gradient, out, column), (kTeacher ? w : u).unmapped(column, gradient));
  }
  zero_row(a.gradient, row, a.vocab, a.width, team);
}

template <class Divergence>
__device__ void shard_gradient_row(const ShardPairArguments& a, int64_t row, const Team& team) {
  if (a.at(kKeep, row) == 0) return zero_row(a.gradient, row, 0, a.width, team);
  const RowTask task = shard_task(a, row);
  const Divergence divergence{task.beta, task.alpha};
  const ShardMean at = shard_mean(divergence, a.at(kValue, row), a.at(kSlopeSum, row), a.of_teacher);
  if (a.of_teacher) {
    if (at.near)
      write_shard_gradient<true, true>(a, row, team, task, divergence, at.mean);
    else
      write_shard_gradient<false, true>(a, row, team, task, divergence, at.mean);
  } else {
    if (at.near)
      write_shard_gradient<true, false>(a, row, team, task, divergence, at.mean);
    else
      write_shard_gradient<false, false>(a, row, team, task, divergence, at.mean);
  }
}

// Blocks per multiprocessor.
inline constexpr int kShardBlocks = 2;

// --- Kernels ------------------------------------------------------------------------------------

template <class Arguments, class Body>
__device__ __forceinline__ void work_on_shard_rows(const Arguments& arguments, const RowLaunch& launch,
                                                   const Body& body) {
  unsigned char* const shared = team_memory(launch, kShardTeamBytes);
  const Team team(shared, unsigned(launch.cluster), launch.warp_rows > 0);
  for_rows(team, launch, arguments.rows, [&](int64_t row) FASTKD_INLINE_BODY {
    body(row, team, reinterpret_cast<unsigned*>(shared + Team::kSharedBytes));
  });
}

template <class Divergence>
__global__ void __launch_bounds__(kRowThreads, kShardBlocks)
    shard_sums_kernel(const __grid_constant__ ShardPairArguments arguments, const RowLaunch launch) {
  work_on_shard_rows(arguments, launch, [&](int64_t row, const Team& team, unsigned*) {
    if (arguments.takes(row)) shard_sums_row<Divergence>(arguments, row, team);
  });
}
template <class Divergence>
__global__ void __launch_bounds__(kRowThreads, kShardBlocks)
    shard_gradient_kernel(const __grid_constant__ ShardPairArguments arguments, const RowLaunch launch) {
  work_on_shard_rows(arguments, launch, [&](int64_t row, const Team& team, unsigned*) {
    if (arguments.takes(row)) shard_gradient_row<Divergence>(arguments, row, team);
  });
}

}  // namespace fastkd::cuda
