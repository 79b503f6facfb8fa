// The logits of one row of any dtype and layout, and where its gradients are written.
#pragma once
#include "row_arguments.cuh"

namespace fastkd::cuda {

// Where all of many logits are below this, they are probably masked, and none of them is near the largest of the row.
inline constexpr double kMasked = -1000;

// Not inlined: the kernels' code without a map stays as small as it is, and so does what the compiler makes of it.
__device__ __noinline__ inline float mapped_logit(const LogitFunction<float> map, float z) { return map.value(z); }
__device__ __noinline__ inline float slope_at(const LogitFunction<float> map, float z) { return map.slope(z); }

// Any dtypes, strides, maps of logits and number of teachers, one element at a time; nothing is stored in shared memory
// between passes.
struct AnySource {
  using Real = float;
  using Item = float;
  static constexpr int kSize = 1;
  static constexpr bool kPacked = false, resident = false;

  const RowArguments& arguments;
  const int64_t row;
  char *const student, *const teacher, *const student_gradient, *const teacher_gradient;  // beginnings of the rows
  OriginSum<double>* const normalizers;  // one per teacher; for mixed logits its origin and weight; in shared memory
  char** const firsts;                   // beginning of each teacher's row; in shared memory
  Real scale;                            // log2(e) / teacher_temperature

  __device__ AnySource(const RowArguments& a, int64_t r, const RowLaunch&, unsigned, unsigned char* shared,
                       unsigned char*)
      : arguments(a),
        row(r),
        student(a.student.at(r)),
        teacher(a.teachers[0].at(a.teacher_row(r))),
        student_gradient(a.student_gradient ? a.student_gradient.at(r) : nullptr),
        teacher_gradient(a.teacher_gradient ? a.teacher_gradient.at(r) : nullptr),
        normalizers(reinterpret_cast<OriginSum<double>*>(shared)),
        firsts(reinterpret_cast<char**>(normalizers + kMaxTeachers)),
        scale(0) {}

  __device__ void start(const Team&) const {}
  __device__ __forceinline__ void finish_copies(const Team&) const {}

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
  __device__ double teacher_weight(int k) const { return arguments.teacher_weight(row, k); }

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
      for (int k = 0; k < arguments.teacher_count; ++k)
        shared_store(firsts + k, arguments.teachers[k].at(arguments.teacher_row(row)));
    }
    team.sync();
    for (int k = 0; k < arguments.teacher_count; ++k) {
      if (!arguments.mix_probs) {
        const OriginSum<double> some{some_logit(k, team), teacher_weight(k)};
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
      top = at_least(top, team.block_sum<true>(z, [](Real& a, const Real& b) { a = b > a ? b : a; }));
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
  __device__ __forceinline__ Raw fetch(int column) const {
    const Real u = student_logit(column);
    return {u, arguments.teacher_count == 0 ? u
               : !mixed()                   ? teacher_logit(0, teacher, column)
               : arguments.mix_probs        ? mixed_probs(column)
                                            : mixed_logits(column)};
  }
  __device__ Real teacher_logit(int column) const { return fetch(column).teacher; }
  static __device__ __forceinline__ Raw without(const Raw&, int) { return {Real(-INFINITY), Real(-INFINITY)}; }
  static constexpr int kWord = 1;
  static __device__ __forceinline__ void next_word(Raw&) {}
  static __device__ __forceinline__ Real student_of(const Raw& raw, int) { return raw.student; }
  static __device__ __forceinline__ Real teacher_of(const Raw& raw, int) { return raw.teacher; }

  // sum_k w_k (z_k - origin_k), or -inf where z_k is impossible for a teacher with a weight other than 0.
  __device__ Real mixed_logits(int column) const {
    Real mixed = 0;
    bool gone = false;
    for (int k = 0; k < arguments.teacher_count; ++k) {
      const OriginSum<double> of = shared_load(normalizers + k);
      const Real weight = Real(of.sum);
      if (weight == Real(0)) continue;
      const Real z = teacher_logit(k, shared_load(firsts + k), column);
      const Real x = z - Real(of.origin);
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

  __device__ __forceinline__ const AnySource& gradients() const { return *this; }

  using Out = Real;
  static __device__ __forceinline__ void append(Out& out, const Real (&x)[1]) { out = x[0]; }
  __device__ __forceinline__ void store_student(int column, Out out) const {
    if (arguments.student_map) out *= slope_at(arguments.student_map, logit(arguments.student, student, column));
    arguments.student_gradient.put(place(arguments.student_gradient, student_gradient, column), out);
  }
  __device__ __forceinline__ void store_teacher(int column, Out out) const {
    if (arguments.teacher_map) out *= slope_at(arguments.teacher_map, logit(arguments.teachers[0], teacher, column));
    arguments.teacher_gradient.put(place(arguments.teacher_gradient, teacher_gradient, column), out);
  }

  __device__ __forceinline__ bool has(int) const { return true; }
  __device__ __forceinline__ void store_column(int column, Real x) const { store_student(column, x); }

  __device__ void write_zeros(const Team& team) const {
    zero_columns(arguments.student_gradient, row, 0, arguments.student_width, team);
    zero_columns(arguments.teacher_gradient, row, 0, arguments.teacher_width, team);
  }
};

// A thread's columns in one pass over a row. The next column is loaded while the last is being worked on.
template <bool kFirst>
class RowPass<kFirst, AnySource> {
 public:
  int pack;

  __device__ __forceinline__ RowPass(const AnySource& source, const Team& team, bool backwards)
      : source_(source), step_(backwards ? -team.threads : team.threads) {
    const int packs = source.packs(), thread = team.thread;
    pack = backwards && thread < packs ? thread + (packs - 1 - thread) / team.threads * team.threads : thread;
    if (more()) next_ = source.fetch(pack);
  }
  __device__ __forceinline__ bool more() const { return more(source_.packs()); }
  // Whether there are columns below `end`, in a pass that runs forwards.
  __device__ __forceinline__ bool more(int end) const { return unsigned(pack) < unsigned(end); }
  __device__ __forceinline__ AnySource::Raw take() {
    const AnySource::Raw raw = next_;
    if (unsigned(pack + step_) < unsigned(source_.packs())) next_ = source_.fetch(pack + step_);
    return raw;
  }
  __device__ __forceinline__ void advance() { pack += step_; }

 private:
  const AnySource& source_;
  const int step_;
  AnySource::Raw next_{};  // set before it is read, which not every compiler sees
};

}  // namespace fastkd::cuda
