// The logits of one row that is read and written 16 bytes at a time (in packs), and where its gradients are written.
//
// A row goes from global to shared memory by asynchronous copies, which need no registers, so that a thread has many
// of them under way. Each thread copies the packs that it will read itself, and waits only for its own copies.
//   resident   the whole row, or the block's part of it, stays in shared memory: it is copied once, and every pass reads
//              it there
//   otherwise  each thread has kAhead slots. After a pass has read a pack, it copies the one kAhead packs further into
//              the same slot. Every pass reads the row from global memory again
#pragma once
#include "row_arguments.cuh"
#include "vec.cuh"

namespace fastkd::cuda {

// Student, one teacher (kPair) and gradients of one dtype, contiguous along the vocabulary and with equal offsets from
// 16-byte boundaries. Without a teacher the student's logits are also returned as the teacher's.
template <class T, bool kPair = true>
struct PackedSource {
  using Real = float;
  static constexpr int kSize = Packed<T>::kSize;
  static constexpr bool kPacked = true;
  using Item = T;

  const RowArguments& arguments;
  const int64_t row;
  const PackedRow<T> student, teacher, student_gradient, teacher_gradient;
  uint4 *const student_slots, *const teacher_slots;  // in shared memory
  const int slots;
  const bool resident;
  int begin, end;  // this block's packs

  // shared: for the slots of the student, then of the teacher, launch.slice_bytes each
  __device__ PackedSource(const RowArguments& a, int64_t r, const RowLaunch& launch, unsigned rank, unsigned char*,
                          unsigned char* shared)
      : arguments(a),
        row(r),
        student(a.student.at(r), a.vocab),
        teacher(kPair ? a.teachers[0].at(r) : nullptr, a.vocab),
        student_gradient(a.student_gradient ? a.student_gradient.at(r) : nullptr, a.vocab),
        teacher_gradient(kPair && a.teacher_gradient ? a.teacher_gradient.at(r) : nullptr, a.vocab),
        student_slots(reinterpret_cast<uint4*>(shared)),
        teacher_slots(reinterpret_cast<uint4*>(shared + launch.slice_bytes)),
        slots(int(launch.slice_bytes / 16)),
        resident(launch.resident) {
    const int all = student.packs(), share = (all + launch.cluster - 1) / launch.cluster;
    begin = int(rank) * share < all ? int(rank) * share : all;
    end = begin + share < all ? begin + share : all;
  }

  __device__ __forceinline__ int packs() const { return end - begin; }
  __device__ __forceinline__ int column(int pack) const { return student.column(begin + pack); }
  // A pack's number counted from the beginning of the row, across all blocks.
  __device__ __forceinline__ int whole_pack(int pack) const { return begin + pack; }
  __device__ __forceinline__ int pack_of(int column) const { return (column + student.lead) / kSize; }

  __device__ void normalize_teachers(const Team&, double) {}

  struct Pair {
    uint4 student, teacher;
  };
  struct Single {
    uint4 student;
  };
  using Raw = typename std::conditional<kPair, Pair, Single>::type;

  // Starts the copies of a pack, of columns outside the row as -inf.
  __device__ __forceinline__ void copy(int pack, int slot) const {
    const T outside = element<T>(float(-INFINITY));
    student.copy(student_slots + slot, begin + pack, outside);
    if constexpr (kPair) teacher.copy(teacher_slots + slot, begin + pack, outside);
  }
  __device__ __forceinline__ Raw read(int slot) const {
    if constexpr (kPair) {
      return {shared_load(student_slots + slot), shared_load(teacher_slots + slot)};
    } else {
      return {shared_load(student_slots + slot)};
    }
  }

  // The two rows as sources of their own, which share the slots.
  __device__ __forceinline__ PackedSource<T, false> teacher_alone() const { return {*this, teacher, teacher_slots}; }
  __device__ PackedSource(const PackedSource<T, true>& both, const PackedRow<T>& one, uint4* its_slots)
      : arguments(both.arguments),
        row(both.row),
        student(one),
        teacher(nullptr, 0),
        student_gradient(nullptr, 0),
        teacher_gradient(nullptr, 0),
        student_slots(its_slots),
        teacher_slots(nullptr),
        slots(both.slots),
        resident(both.resident),
        begin(both.begin),
        end(both.end) {}

  // How many logits are in 4 bytes. next_word moves the next word's logits to the place of the first.
  static constexpr int kWord = 4 / int(sizeof(T));
  static __device__ __forceinline__ void rotate(uint4& pack) { pack = {pack.y, pack.z, pack.w, pack.x}; }
  static __device__ __forceinline__ void next_word(Raw& raw) {
    rotate(raw.student);
    if constexpr (kPair) rotate(raw.teacher);
  }
  static __device__ __forceinline__ Real student_of(const Raw& raw, int j) { return item_of<T>(raw.student, j); }
  static __device__ __forceinline__ Real teacher_of(const Raw& raw, int j) {
    if constexpr (kPair) {
      return item_of<T>(raw.teacher, j);
    } else {
      return student_of(raw, j);
    }
  }

  __device__ float student_logit(int column) const { return to_float(global_load(student.data + column)); }

  // A pack of a gradient: filled word by word from the end, or all at once.
  using Out = uint4;
  static __device__ __forceinline__ void append(Out& out, const Real (&x)[kWord]) {
    rotate(out);
    out.w = word_from<T>(x);
  }
  __device__ __forceinline__ void store_student(int pack, const Out& out) const {
    student_gradient.store_words(begin + pack, out);
  }
  __device__ __forceinline__ void store_teacher(int pack, const Out& out) const {
    teacher_gradient.store_words(begin + pack, out);
  }

  __device__ void write_zeros(const Team& team) const {
    for (int i = team.thread; i < packs(); i += team.threads) {
      if (arguments.teacher_gradient) store_teacher(i, Out{});
      if (arguments.student_gradient) store_student(i, Out{});
    }
    zero_beyond_vocab(arguments, row, team);
  }
};

// A thread's packs in one pass over a row.
template <bool kFirst, class T, bool kPair>
class RowPass<kFirst, PackedSource<T, kPair>> {
  using Source = PackedSource<T, kPair>;

 public:
  int pack;

  __device__ __forceinline__ RowPass(const Source& source, const Team& team, bool backwards)
      : source_(source), step_(backwards ? -team.threads : team.threads), threads_(team.threads) {
    const int packs = source.packs(), thread = team.thread;
    const int count = thread < packs ? (packs - 1 - thread) / threads_ + 1 : 0;
    pack = backwards && count > 0 ? thread + (count - 1) * threads_ : thread;
    slot_ = source.resident ? pack : thread;
    if (kFirst || !source.resident) {
      // kAhead groups of copies: of one pack each, or of a part of all of the thread's packs.
      group_ = source.resident ? (count + kAhead - 1) / kAhead : 1;
      int next = pack, slot = slot_;
#pragma unroll 1
      for (int group = 0; group < kAhead; ++group) {
#pragma unroll 1
        for (int i = 0; i < group_; ++i, next += step_, slot += threads_) {
          if (unsigned(next) < unsigned(packs)) source.copy(next, slot);
        }
        async_commit();
      }
      until_ = 1;
    } else {
      group_ = 0;
      until_ = 0;  // never: the copies are there
    }
  }

  __device__ __forceinline__ bool more() const { return more(source_.packs()); }
  // Whether there are packs below `end`, in a pass that runs forwards.
  __device__ __forceinline__ bool more(int end) const { return unsigned(pack) < unsigned(end); }

  // Reads the pack's logits, and starts the copies of a later pack where the row does not stay.
  __device__ __forceinline__ typename Source::Raw take() {
    if (--until_ != 0) return source_.read(slot_);
    async_wait<kAhead - 1>();
    const typename Source::Raw raw = source_.read(slot_);
    const int next = pack + kAhead * step_;
    if (!source_.resident && unsigned(next) < unsigned(source_.packs())) source_.copy(next, slot_);
    async_commit();
    until_ = group_;
    return raw;
  }
  __device__ __forceinline__ void advance() {
    pack += step_;
    slot_ += source_.resident ? step_ : threads_;
    if (slot_ >= source_.slots) slot_ -= source_.slots;
  }

 private:
  const Source& source_;
  const int step_, threads_;
  int slot_, group_, until_;
};

}  // namespace fastkd::cuda
