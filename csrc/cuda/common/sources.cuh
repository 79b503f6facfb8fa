// Sources: the logits of one row, and where its gradients are written, in the form that kernels use.
#pragma once
#include "../../math/row_plan.h"
#include "row_losses.cuh"
#include "teams.cuh"
#include "vec.cuh"

namespace fastkd::cuda {

inline constexpr int kMaxTeachers = 16;
// Where all of many logits are below this, they are probably masked, and none of them is near the largest of the row.
inline constexpr double kMasked = -1000;

// Rows by their beta, as bits of a set.
enum BetaKind : int { kBetaInside = 1, kBetaZero = 2, kBetaOne = 4, kAnyBeta = 7 };

// The arguments of a call, the same for all rows. Without a teacher (teacher_count 0) sources read only the student's
// logits, and return them as the teacher's, too.
struct RowArguments : RowNumbers {
  int teacher_width;
  DeviceRows student, student_gradient, teacher_gradient;
  DeviceRows teachers[kMaxTeachers];
  int teacher_count;
  bool mix_probs;
  double beta, teacher_temperature;
  DeviceRows betas, teacher_temperatures, teacher_weights;
  int beta_kinds = kAnyBeta;  // the launch computes rows with such a beta; other launches do the others

  // Whether the launch computes this row.
  __device__ __forceinline__ bool takes(int64_t row) const {
    if (beta_kinds == kAnyBeta) return true;
    const double x = betas.number(row);
    return (beta_kinds & (x == 0 ? kBetaZero : x == 1 ? kBetaOne : kBetaInside)) != 0;
  }
  // NaN, as an invalid temperature is, where it is not in [0, 1].
  __device__ double row_beta(int64_t row) const {
    const double x = betas ? betas.number(row) : beta;
    return x >= 0 && x <= 1 ? x : double(NAN);
  }
  // The student's temperature, NaN also where beta is: the row is NaN then.
  __device__ double temperature_with(double row_beta, int64_t row) const {
    return row_temperature(row) + (row_beta - row_beta);
  }

  __device__ double row_teacher_temperature(int64_t row) const {
    return positive(teacher_temperatures ? teacher_temperatures.number(row) : teacher_temperature);
  }

  // Fills in the row's task. Returns whether the row is read at all.
  __device__ bool read_task(int64_t row, RowTask& task, int& label) const {
    task.scale = scale(row);
    if (task.scale == 0) return false;
    task.beta = row_beta(row);
    task.temperature = temperature_with(task.beta, row);
    task.teacher_temperature = row_teacher_temperature(row);
    task.divergence_scale = square_temperature ? task.temperature * task.temperature : 1;
    label = read_label(row, task);
    task.mix_probs = mix_probs;
    task.teacher_weight = teacher_count == 1 && teacher_weights ? teacher_weights.number(row) : 1;
    task.student_gradient = bool(student_gradient);
    task.teacher_gradient = bool(teacher_gradient);
    return true;
  }
};

// Writes zeros to columns [begin, end) of a gradient. Columns beyond the vocabulary belong to no token.
inline __device__ void zero_columns(const DeviceRows& gradient, int64_t row, int begin, int end, const Team& team) {
  if (!gradient) return;
  const int threads = team.threads * int(team.blocks);
  if (begin >= end) return;
  char* const first = gradient.at(row);
  for (int column = begin + int(team.rank) * team.threads + team.thread; column < end; column += threads) {
    gradient.put(first + column * gradient.column_stride * gradient.element_size, 0);
  }
}

inline __device__ void zero_beyond_vocab(const RowArguments& arguments, int64_t row, const Team& team) {
  zero_columns(arguments.student_gradient, row, arguments.vocab, arguments.student_width, team);
  zero_columns(arguments.teacher_gradient, row, arguments.vocab, arguments.teacher_width, team);
}

// Student, one teacher and gradients of one dtype, contiguous along the vocabulary and with equal offsets from 16-byte
// boundaries: read and written in packs. With `launch.resident` the first load stores the packs in shared memory.
template <class T>
struct PackedSource {
  using Real = float;
  using P = Packed<T>;
  static constexpr int kSize = P::kSize;
  static constexpr bool kPacked = true;

  const RowArguments& arguments;
  const int64_t row;
  const PackedRow<T> student, teacher, student_gradient, teacher_gradient;
  P *student_kept, *teacher_kept;
  const bool resident;
  int begin, end;  // this block's packs

  __device__ PackedSource(const RowArguments& a, int64_t r, const RowLaunch& launch, unsigned rank, unsigned char*,
                          unsigned char* kept)
      : arguments(a),
        row(r),
        student(a.student.at(r), a.vocab),
        teacher(a.teachers[0].at(r), a.vocab),
        student_gradient(a.student_gradient ? a.student_gradient.at(r) : nullptr, a.vocab),
        teacher_gradient(a.teacher_gradient ? a.teacher_gradient.at(r) : nullptr, a.vocab),
        student_kept(reinterpret_cast<P*>(kept)),
        teacher_kept(reinterpret_cast<P*>(kept + launch.slice_bytes)),
        resident(launch.resident) {
    const int all = student.packs(), share = launch.cluster > 1 ? int(launch.slice_bytes / 16) : all;
    begin = int(rank) * share < all ? int(rank) * share : all;
    end = begin + share < all ? begin + share : all;
  }

  __device__ __forceinline__ int packs() const { return end - begin; }
  __device__ __forceinline__ int column(int pack) const { return student.column(begin + pack); }
  // A pack's number counted from the beginning of the row, across all blocks.
  __device__ __forceinline__ int whole_pack(int pack) const { return begin + pack; }
  __device__ __forceinline__ int pack_of(int column) const { return (column + student.lead) / kSize; }

  __device__ void normalize_teachers(const Team&, double) {}

  struct Raw {
    P student, teacher;
  };

  // Reads from global memory in the first pass, later from where the first pass stored it. Each thread reads only what
  // it stored itself, so no barrier is needed in between.
  template <bool kFirst>
  __device__ __forceinline__ Raw fetch(int pack) const {
    const T outside = element<T>(float(-INFINITY));
    const bool alone = arguments.teacher_count == 0;
    Raw raw;
    if (!kFirst && resident) {
      raw.student = shared_load(student_kept + pack);
      raw.teacher = alone ? raw.student : shared_load(teacher_kept + pack);
    } else if (kFirst && resident) {
      raw.student = student.template load<true>(begin + pack, outside);
      raw.teacher = alone ? raw.student : teacher.template load<true>(begin + pack, outside);
    } else {
      raw.student = student.template load<false>(begin + pack, outside);
      raw.teacher = alone ? raw.student : teacher.template load<false>(begin + pack, outside);
    }
    return raw;
  }

  __device__ __forceinline__ void keep(int pack, const Raw& raw) const {
    if (!resident) return;
    shared_store(student_kept + pack, raw.student);
    if (arguments.teacher_count > 0) shared_store(teacher_kept + pack, raw.teacher);
  }

  // How many logits are in 4 bytes. next_word moves the next word's logits to the place of the first.
  static constexpr int kWord = 4 / int(sizeof(T));
  static __device__ __forceinline__ void next_word(Raw& raw) {
    raw.student.rotate();
    raw.teacher.rotate();
  }
  // 16-bit logits are widened to float where they are used, which halves the registers that hold them.
  static __device__ __forceinline__ Real student_of(const Raw& raw, int j) { return to_float(raw.student.item[j]); }
  static __device__ __forceinline__ Real teacher_of(const Raw& raw, int j) { return to_float(raw.teacher.item[j]); }

  __device__ float student_logit(int column) const { return to_float(global_load(student.data + column)); }

  // A pack of a gradient. It is filled from the end: each new word moves the previous ones forward.
  using Out = P;
  static __device__ __forceinline__ void next_word(Out& out) { out.rotate(); }
  static __device__ __forceinline__ void put_last(Out& out, int j, Real x) {
    out.item[kSize - kWord + j] = element<T>(x);
  }
  __device__ __forceinline__ void store_student(int pack, const Out& out) const {
    student_gradient.store(begin + pack, out);
  }
  __device__ __forceinline__ void store_teacher(int pack, const Out& out) const {
    teacher_gradient.store(begin + pack, out);
  }

  __device__ void write_zeros(const Team& team) const {
    const Out zero{};
    for (int i = team.thread; i < packs(); i += team.threads) {
      if (arguments.teacher_gradient) store_teacher(i, zero);
      if (arguments.student_gradient) store_student(i, zero);
    }
    zero_beyond_vocab(arguments, row, team);
  }
};

// Not inlined: the kernels' code without a map stays as small as it is, and so does what the compiler makes of it.
__device__ __noinline__ inline float mapped_logit(const LogitFunction<float> map, float z) { return map.value(z); }
__device__ __noinline__ inline float slope_at(const LogitFunction<float> map, float z) { return map.slope(z); }

// Any dtypes, strides, maps of logits and number of teachers, one element at a time; nothing is stored in shared memory
// between passes.
struct AnySource {
  using Real = float;
  static constexpr int kSize = 1;
  static constexpr bool kPacked = false;

  const RowArguments& arguments;
  const int64_t row;
  char *const student, *const teacher, *const student_gradient, *const teacher_gradient;  // beginnings of the rows
  OriginSum<double>* const normalizers;  // one per teacher; for mixed logits only the origin; in shared memory
  char** const firsts;                   // beginning of each teacher's row; in shared memory
  Real scale;                            // log2(e) / teacher_temperature

  __device__ AnySource(const RowArguments& a, int64_t r, const RowLaunch&, unsigned, unsigned char* shared,
                       unsigned char*)
      : arguments(a),
        row(r),
        student(a.student.at(r)),
        teacher(a.teachers[0].at(r)),
        student_gradient(a.student_gradient ? a.student_gradient.at(r) : nullptr),
        teacher_gradient(a.teacher_gradient ? a.teacher_gradient.at(r) : nullptr),
        normalizers(reinterpret_cast<OriginSum<double>*>(shared)),
        firsts(reinterpret_cast<char**>(normalizers + kMaxTeachers)),
        scale(0) {}

  __device__ __forceinline__ int packs() const { return arguments.vocab; }
  __device__ __forceinline__ int column(int pack) const { return pack; }
  __device__ __forceinline__ int whole_pack(int pack) const { return pack; }
  __device__ __forceinline__ int pack_of(int column) const { return column; }

  static __device__ __forceinline__ char* place(const DeviceRows& rows, char* first, int column) {
    return first + column * rows.column_stride * rows.element_size;
  }
  static __device__ __forceinline__ Real logit(const DeviceRows& rows, char* first, int column) {
    return rows.float_at(place(rows, first, column));
  }
  // Mapped logits. `first`: where the teacher's row begins.
  __device__ __forceinline__ Real student_logit(int column) const {
    const Real z = logit(arguments.student, student, column);
    return arguments.student_map ? mapped_logit(arguments.student_map, z) : z;
  }
  __device__ __forceinline__ Real teacher_logit(int k, char* first, int column) const {
    const Real z = logit(arguments.teachers[k], first, column);
    return arguments.teacher_map ? mapped_logit(arguments.teacher_map, z) : z;
  }
  __device__ double teacher_weight(int k) const {
    return arguments.teacher_weights ? arguments.teacher_weights.number(row, k) : 1.0 / arguments.teacher_count;
  }

  // Whether the teacher is a mixture or weighted, not one tensor whose logits are used unchanged.
  __device__ __forceinline__ bool mixed() const {
    return arguments.teacher_count > 1 || (arguments.teacher_count == 1 && arguments.teacher_weights);
  }

  // Prepares a mixture: where its teachers' rows begin and, for probabilities, the normaliser of each teacher.
  __device__ void normalize_teachers(const Team& team, double teacher_temperature) {
    scale = Real(kLog2E / teacher_temperature);
    if (!mixed()) return;
    if (team.leads()) {
#pragma unroll 1
      for (int k = 0; k < arguments.teacher_count; ++k) shared_store(firsts + k, arguments.teachers[k].at(row));
    }
    team.sync();
    for (int k = 0; k < arguments.teacher_count; ++k) {
      if (!arguments.mix_probs) {
        const OriginSum<double> some{some_logit(k, team), 1};
        if (team.leads()) shared_store(normalizers + k, some);
        continue;
      }
      Real top = Real(-INFINITY), sum = 0;
      char* const first = shared_load(firsts + k);
      for (int i = team.thread; i < arguments.vocab; i += team.threads) {
        const Real z = teacher_logit(k, first, i);
        if (z > top) {
          sum = top == Real(-INFINITY) ? Real(0) : sum * exp2_of((top - z) * scale);
          top = z;
        }
        sum += exp2_of((z - (top == Real(-INFINITY) ? Real(0) : top)) * scale);
      }
      const OriginSum<double> all =
          team.sum(OriginSum<double>{double(top), double(sum)},
                   [&](OriginSum<double>& a, const OriginSum<double>& b) { a.merge(b, double(scale)); });
      if (team.leads()) shared_store(normalizers + k, all);
    }
    team.sync();
    if (arguments.mix_probs && team.leads()) store_shares();
    team.sync();
  }

  // The largest logit of teacher k among the first columns that are not all masked; 0 if there are none.
  __device__ double some_logit(int k, const Team& team) const {
    char* const first = shared_load(firsts + k);
    Real top = Real(-INFINITY);
#pragma unroll 1
    for (int begin = 0; begin < arguments.vocab && !(top > Real(kMasked)); begin += team.threads) {
      const int i = begin + team.thread;
      const Real z = i < arguments.vocab ? teacher_logit(k, first, i) : Real(-INFINITY);
      top = at_least(top, team.block_sum(z, [](Real& a, const Real& b) { a = b > a ? b : a; }, /*everywhere=*/true));
    }
    return top > Real(-INFINITY) ? double(top) : 0;
  }

  // For a mixture of probabilities: replaces each teacher's sum by its share, log2 of its weight divided by its sum.
  // The largest share is subtracted, which moves the values that matter near 0, where a float is most accurate.
  __device__ void store_shares() const {
    double most = -double(INFINITY);
#pragma unroll 1
    for (int k = 0; k < arguments.teacher_count; ++k) {
      OriginSum<double> all = shared_load(normalizers + k);
      const double weight = teacher_weight(k);
      all.sum = ::log2(weight) - all.log2();
      shared_store(normalizers + k, all);
      if (weight != 0) most = at_least(most, all.sum);
    }
#pragma unroll 1
    for (int k = 0; k < arguments.teacher_count; ++k) {
      OriginSum<double> all = shared_load(normalizers + k);
      all.sum -= most;
      shared_store(normalizers + k, all);
    }
  }

  struct Raw {
    Real student, teacher;
  };
  template <bool kFirst>
  __device__ __forceinline__ Raw fetch(int column) const {
    const Real u = student_logit(column);
    return {u, arguments.teacher_count == 0 ? u
               : !mixed()                   ? teacher_logit(0, teacher, column)
               : arguments.mix_probs        ? mixed_probs(column)
                                            : mixed_logits(column)};
  }
  __device__ __forceinline__ void keep(int, const Raw&) const {}
  static constexpr int kWord = 1;
  static __device__ __forceinline__ void next_word(Raw&) {}
  static __device__ __forceinline__ Real student_of(const Raw& raw, int) { return raw.student; }
  static __device__ __forceinline__ Real teacher_of(const Raw& raw, int) { return raw.teacher; }

  // sum_k w_k (z_k - origin_k), or -inf where z_k is impossible for a teacher with a weight other than 0.
  __device__ Real mixed_logits(int column) const {
    Real mixed = 0;
    bool gone = false;
    for (int k = 0; k < arguments.teacher_count; ++k) {
      const Real weight = Real(teacher_weight(k));
      if (weight == Real(0)) continue;
      const Real z = teacher_logit(k, shared_load(firsts + k), column);
      const Real x = z - Real(shared_load(normalizers + k).origin);
      const bool dead = x < Real(-kDead);
      gone = gone || dead;
      mixed += weight * (dead ? Real(0) : x);
    }
    return gone ? mixed + Real(-INFINITY) : mixed;
  }

  // log2 sum_k w_k softmax(z_k / teacher_temperature) up to a constant. It is computed relative to the largest term, so
  // that no small probability underflows.
  __device__ Real mixed_probs(int column) const {
    Real top = Real(-INFINITY), sum = 0;
    for (int k = 0; k < arguments.teacher_count; ++k) {
      const double weight = teacher_weight(k);
      if (weight == 0) continue;
      const OriginSum<double> share = shared_load(normalizers + k);
      const Real z = teacher_logit(k, shared_load(firsts + k), column);
      const Real x = (z - Real(share.origin)) * scale + Real(share.sum), all = at_least(top, x);
      const Real safe = all == Real(-INFINITY) ? Real(0) : all;
      sum = sum * exp2_of(top - safe) + exp2_of(x - safe);
      top = all;
    }
    return top + log2_of(at_least(Real(1), sum)) + (sum - sum);  // keeps NaN
  }

  using Out = Real;
  static __device__ __forceinline__ void next_word(Out&) {}
  static __device__ __forceinline__ void put_last(Out& out, int, Real x) { out = x; }
  __device__ __forceinline__ void store_student(int column, Out out) const {
    if (arguments.student_map) out *= slope_at(arguments.student_map, logit(arguments.student, student, column));
    arguments.student_gradient.put(place(arguments.student_gradient, student_gradient, column), out);
  }
  __device__ __forceinline__ void store_teacher(int column, Out out) const {
    if (arguments.teacher_map) out *= slope_at(arguments.teacher_map, logit(arguments.teachers[0], teacher, column));
    arguments.teacher_gradient.put(place(arguments.teacher_gradient, teacher_gradient, column), out);
  }

  __device__ void write_zeros(const Team& team) const {
    zero_columns(arguments.student_gradient, row, 0, arguments.student_width, team);
    zero_columns(arguments.teacher_gradient, row, 0, arguments.teacher_width, team);
  }
};

// Calls body(pack, raw logits) for this thread's packs, forwards or backwards, while the next pack is being loaded.
template <bool kFirst, class Source, class Body>
__device__ __forceinline__ void for_packs(const Source& source, const Team& team, bool backwards, const Body& body) {
  const int packs = source.packs(), thread = team.thread, threads = team.threads;
  if (thread >= packs) return;
  const int last = thread + (packs - 1 - thread) / threads * threads;
  const int step = backwards ? -threads : threads;
  const int begin = backwards ? last : thread;
  typename Source::Raw next = source.template fetch<kFirst>(begin);
#pragma unroll 1
  for (int pack = begin; pack >= 0 && pack < packs; pack += step) {
    const typename Source::Raw raw = next;
    const int ahead = pack + step;
    if (ahead >= 0 && ahead < packs) next = source.template fetch<kFirst>(ahead);
    if (kFirst) source.keep(pack, raw);
    body(pack, raw);
  }
}

enum class SourceKind { kPackedFloat32, kPackedBFloat16, kPackedFloat16, kAny };

// Packs need one dtype, contiguous columns, and rows with equal offsets from 16-byte boundaries.
SourceKind source_kind(const RowArguments& arguments);

// Calls body with the Source type, and the size of its elements.
template <class Source>
struct SourceType {
  using Type = Source;
};
template <class Body>
void with_source(SourceKind kind, const Body& body) {
  switch (kind) {
    case SourceKind::kPackedFloat32:
      return body(SourceType<PackedSource<float>>(), 4);
    case SourceKind::kPackedBFloat16:
      return body(SourceType<PackedSource<BFloat16>>(), 2);
    case SourceKind::kPackedFloat16:
      return body(SourceType<PackedSource<Float16>>(), 2);
    case SourceKind::kAny:
      return body(SourceType<AnySource>(), 4);
  }
}

}  // namespace fastkd::cuda
