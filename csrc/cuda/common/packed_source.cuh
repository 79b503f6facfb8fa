// The logits of one row that is read and written 16 bytes at a time (in packs), and where its gradients are written.
//
// A row goes from global to shared memory by asynchronous copies, which need no registers, so that many are under way.
//
// resident: the whole row, or the block's part of it, stays in shared memory. It is copied once, in kAhead groups of
// packs; every pass reads it there. From sm_90 on the leading thread copies each group at once (in bulk), and the first
// pass waits for a group before it reads its first pack. Otherwise each thread copies the packs that it will read
// itself, and waits only for its own copies.
//
// Not resident: each thread has kAhead slots. After a pass has read a pack, it copies the one kAhead packs further into
// the same slot, and every pass reads the row from global memory again.
#pragma once
#include "bulk_copy.cuh"
#include "row_arguments.cuh"
#include "row_packs.cuh"

namespace fastkd::cuda {

// Student, one teacher (kPair) and gradients, contiguous along the vocabulary and with rows that begin at the same
// place of a pack; of one dtype T, or of two (T: Mixed). Without a teacher the student's logits are also returned as
// the teacher's.
template <class T, bool kPair = true>
struct PackedSource {
  using Real = float;
  using Packs = RowPacks<T>;
  using Item = typename Packs::Item;
  static constexpr int kSize = Packs::kSize;
  static constexpr bool kPacked = true;

  const RowArguments& arguments;
  const int64_t row;
  const Packs student, teacher;
  const int lead;                                    // how many elements of pack 0 lie before the row
  uint4 *const student_slots, *const teacher_slots;  // in shared memory
  const int all_slots;                               // of a tensor
  const bool resident;
  int begin, end;  // this block's packs
  // Those of them that lie in the row as a whole: all but at most the row's first and last.
  int first_whole, whole_count;

  // shared: rows_bytes(launch, ...), for barriers, then for the slots of the student and of the teacher
  __device__ PackedSource(const RowArguments& a, int64_t r, const RowLaunch& launch, unsigned rank, unsigned char*,
                          unsigned char* shared)
      : arguments(a),
        row(r),
        student(a.student, r),
        teacher(kPair ? Packs(a.teachers[0], a.teacher_row(r)) : Packs()),
        lead(Packs::lead(a.student, r)),
        student_slots(reinterpret_cast<uint4*>(shared + kRowBarrierBytes)),
        teacher_slots(student_slots + launch.slice_bytes / 16),
        all_slots(int(launch.slice_bytes / 16)),
        resident(launch.resident) {
    const PackedRow<Item> whole_row(nullptr, a.vocab, lead);
    const int all = whole_row.packs(), share = (all + launch.cluster - 1) >> highest_bit(launch.cluster);
    begin = int(rank) * share < all ? int(rank) * share : all;
    end = begin + share < all ? begin + share : all;
    first_whole = begin == 0 && !whole_row.whole(0) ? 1 : 0;
    whole_count = end - begin - first_whole;
    if (end == all && whole_count > 0 && !whole_row.whole(all - 1)) --whole_count;
  }

  __device__ __forceinline__ int packs() const { return end - begin; }
  __device__ __forceinline__ int column(int pack) const { return (begin + pack) * kSize - lead; }
  // A pack's number counted from the beginning of the row, across all blocks.
  __device__ __forceinline__ int whole_pack(int pack) const { return begin + pack; }
  __device__ __forceinline__ int pack_of(int column) const { return (column + lead) / kSize; }

  __device__ void normalize_teachers(const Team&, double) {}

  struct Pair {
    uint4 student, teacher;
  };
  struct Single {
    uint4 student;
  };
  using Raw = typename std::conditional<kPair, Pair, Single>::type;

  __device__ __forceinline__ bool is_whole(int pack) const {
    return unsigned(pack - first_whole) < unsigned(whole_count);
  }
  // The slots besides the edges'.
  __device__ __forceinline__ int slots() const { return all_slots - (resident ? 0 : kEdges); }
  // Where a pack is read from. Packs that extend beyond the row have slots of their own, unless the row stays.
  __device__ __forceinline__ int slot_of(int pack, int slot) const {
    return resident ? pack : is_whole(pack) ? slot : slots() + int(pack != 0);
  }

  // Starts the copies of a pack, if it is a whole one.
  __device__ __forceinline__ void copy(int pack, int slot) const {
    if (!is_whole(pack)) return;
    student.copy(student_slots + slot, begin + pack);
    if constexpr (kPair) teacher.copy(teacher_slots + slot, begin + pack);
  }
  // Loads the packs that extend beyond the row, with -inf in the columns outside, if this thread will read them.
  __device__ __forceinline__ void load_edges(const Team& team) const {
#pragma unroll 1
    for (int edge = 0; edge < kEdges; ++edge) {
      const int pack = edge == 0 ? 0 : packs() - 1;
      const bool cut = edge == 0 ? first_whole > 0 : first_whole + whole_count < packs();
      if (!cut || pack % team.threads != team.thread) continue;
      student.load_cut(student_slots + slot_of(pack, 0), begin + pack, lead, arguments.vocab);
      if constexpr (kPair) teacher.load_cut(teacher_slots + slot_of(pack, 0), begin + pack, lead, arguments.vocab);
    }
  }
  __device__ __forceinline__ Raw read(int slot) const {
    if constexpr (kPair) {
      return {student.read(student_slots + slot), teacher.read(teacher_slots + slot)};
    } else {
      return {student.read(student_slots + slot)};
    }
  }

  // The order of a thread's packs in a pass, and of the slots that it reads them from. They are copied in kAhead
  // groups: of one pack each, or of a part of all its packs, as many for each thread.
  struct Order {
    int first, step, slot, slot_step, group;
  };
  __device__ __forceinline__ Order order(const Team& team, bool backwards) const {
    const int thread = team.thread, threads = team.threads, all = rounds(threads);
    int last = thread + (all - 1) * threads;  // negative if the thread has no packs
    if (last >= packs()) last -= threads;
    const int first = backwards ? last : thread, step = backwards ? -threads : threads;
    return {first, step, resident ? first : thread, resident ? step : threads, resident ? group_rounds(all) : 1};
  }
  // How many packs the first thread has, and how many of them are in a group.
  __device__ __forceinline__ int rounds(int threads) const { return (packs() + threads - 1) / threads; }
  static __device__ __forceinline__ int group_rounds(int rounds) { return (rounds + kAhead - 1) / kAhead; }

  // Starts the copies of a pass's first packs, or of all where the row stays. To be called once for the row's first
  // pass, before it, as early as possible.
  __device__ __forceinline__ void start(const Team& team, bool backwards = false) const {
    if (!in_bulk()) {
      start_packs(team, backwards);
    } else if constexpr (kBulk) {
      start_in_bulk(team);
    }
    load_edges(team);
  }

  // Rows of two dtypes are not copied in bulk: 16-bit packs lie closer to each other in memory than their slots.
  static constexpr bool kBulk = !std::is_same<T, Mixed>::value;
  __device__ __forceinline__ bool in_bulk() const { return kBulk && has_bulk_copies() && resident; }
  // Waits for a group of the row's bulk copies.
  __device__ __forceinline__ void wait_in_bulk(const Team& team, int group) const {
    wait_for_copies(barriers() + group, team.copies_parity());
  }

 private:
  __device__ __forceinline__ CopyBarrier* barriers() const {
    return reinterpret_cast<CopyBarrier*>(reinterpret_cast<unsigned char*>(student_slots) - kRowBarrierBytes);
  }

  // A group has the packs of group_rounds rounds of all threads. A barrier has a phase for each row, even where its
  // group has no whole packs, so that all of them have the same parity.
  __device__ __forceinline__ void start_in_bulk(const Team& team) const {
    const bool first = team.begin_copies();
    if (team.leads()) {
      if (first) init_barriers(barriers(), kAhead);
      start_groups(team);
    }
    if (first) team.sync();  // before others wait at the barriers
  }
  __device__ __forceinline__ void start_groups(const Team& team) const {
    const int stride = group_rounds(rounds(team.threads)) * team.threads;
    int next = first_whole, left = whole_count;
#pragma unroll 1
    for (int group = 0; group < kAhead; ++group) {
      int count = (group + 1) * stride - next;
      count = count < left ? count : left;
      const unsigned bytes = count > 0 ? unsigned(count) * 16 : 0;
      expect_bytes(barriers() + group, kPair ? 2 * bytes : bytes);
      if (bytes == 0) continue;
      bulk_copy(student_slots + next, student.first + begin + next, bytes, barriers() + group);
      if constexpr (kPair) bulk_copy(teacher_slots + next, teacher.first + begin + next, bytes, barriers() + group);
      next += count;
      left -= count;
    }
  }

  __device__ __forceinline__ void start_packs(const Team& team, bool backwards) const {
    const Order order = this->order(team, backwards);
    int pack = order.first, slot = order.slot;
#pragma unroll 1
    for (int group = 0; group < kAhead; ++group) {
#pragma unroll 1
      for (int i = 0; i < order.group; ++i, pack += order.step, slot += order.slot_step) {
        if (unsigned(pack) < unsigned(packs())) copy(pack, slot);
      }
      async_commit();
    }
  }

 public:
  // Waits for all copies of the first pass. Other threads see them after the next barrier.
  __device__ __forceinline__ void finish_copies(const Team& team) const {
    if (in_bulk()) {
#pragma unroll 1
      for (int group = 0; group < kAhead; ++group) wait_in_bulk(team, group);
    } else {
      async_wait<0>();
    }
  }
  // Whether the column is in one of this block's packs.
  __device__ __forceinline__ bool has(int column) const {
    return unsigned(pack_of(column) - begin) < unsigned(packs());
  }
  // Replaces a column's logit by -inf in a row that stays, if the column is in this block.
  __device__ __forceinline__ void drop(int column) const {
    if (has(column))
      shared_store(reinterpret_cast<Item*>(student_slots) + (column + lead - begin * kSize),
                   element<Item>(float(-INFINITY)));
  }

  // Other rows that begin at the same place of a pack, with slots of their own or with those of like.
  __device__ PackedSource(const PackedSource<T, true>& like, const Packs& first, uint4* first_slots,
                          const Packs& second = Packs(), uint4* second_slots = nullptr)
      : arguments(like.arguments),
        row(like.row),
        student(first),
        teacher(second),
        lead(like.lead),
        student_slots(first_slots),
        teacher_slots(second_slots),
        all_slots(like.all_slots),
        resident(like.resident),
        begin(like.begin),
        end(like.end),
        first_whole(like.first_whole),
        whole_count(like.whole_count) {}
  __device__ __forceinline__ PackedSource<T, false> student_alone() const { return {*this, student, student_slots}; }
  __device__ __forceinline__ PackedSource<T, false> teacher_alone() const { return {*this, teacher, teacher_slots}; }

  // How many logits are in 4 bytes. next_word moves the next word's logits to the place of the first.
  static constexpr int kWord = 4 / int(sizeof(Item));
  static __device__ __forceinline__ void rotate(uint4& pack) { pack = {pack.y, pack.z, pack.w, pack.x}; }
  static __device__ __forceinline__ void next_word(Raw& raw) {
    rotate(raw.student);
    if constexpr (kPair) rotate(raw.teacher);
  }
  static __device__ __forceinline__ Real student_of(const Raw& raw, int j) { return item_of<Item>(raw.student, j); }
  static __device__ __forceinline__ Real teacher_of(const Raw& raw, int j) {
    if constexpr (kPair) {
      return item_of<Item>(raw.teacher, j);
    } else {
      return student_of(raw, j);
    }
  }

  // With -inf at a place of the pack.
  static __device__ __forceinline__ Raw without(const Raw& raw, int place) {
    Raw out = raw;
    blank(out.student, place);
    if constexpr (kPair) blank(out.teacher, place);
    return out;
  }
  static __device__ __forceinline__ void blank(uint4& pack, int place) {
#pragma unroll
    for (int k = 0; k < kSize / kWord; ++k) {
      Real word[kWord];
#pragma unroll
      for (int j = 0; j < kWord; ++j) {
        const int at = k * kWord + j;
        word[j] = at == place ? Real(-INFINITY) : item_of<Item>(pack, at);
      }
      set_word(pack, k, word_from<Item>(word));
    }
  }

  __device__ float student_logit(int column) const { return student.logit(column, lead); }
  __device__ float teacher_logit(int column) const { return teacher.logit(column, lead); }

  // A pack of a gradient: filled word by word from the end, or all at once.
  using Out = uint4;
  static __device__ __forceinline__ void append(Out& out, const Real (&x)[kWord]) {
    rotate(out);
    out.w = word_from<Item>(x);
  }

  // Where the gradients are written. Made when the gradients are: until then their addresses take no registers.
  struct Gradients {
    const PackedSource& source;
    const Packs student, teacher;

    __device__ __forceinline__ void store_student(int pack, const Out& out) const { store(student, pack, out); }
    __device__ __forceinline__ void store_teacher(int pack, const Out& out) const { store(teacher, pack, out); }
    __device__ __forceinline__ void store_column(int column, Real x) const { student.put(column, x, source.lead); }
    // For a pack that is_whole().
    __device__ __forceinline__ void store_whole_student(int pack, const Out& out) const {
      student.store(source.begin + pack, out);
    }

   private:
    __device__ __forceinline__ void store(const Packs& packs, int pack, const Out& out) const {
      if (source.is_whole(pack)) {
        packs.store(source.begin + pack, out);
      } else {
        packs.store_cut(source.begin + pack, out, source.lead, source.arguments.vocab);
      }
    }
  };
  __device__ __forceinline__ Gradients gradients() const {
    return {*this, Packs(arguments.student_gradient, row), kPair ? Packs(arguments.teacher_gradient, row) : Packs()};
  }

  __device__ void write_zeros(const Team& team) const {
    const Gradients out = gradients();
    for (int i = team.thread; i < packs(); i += team.threads) {
      if (out.teacher) out.store_teacher(i, Out{});
      if (out.student) out.store_student(i, Out{});
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
      : source_(source),
        team_(team),
        step_(backwards ? -team.threads : team.threads),
        slot_(kFirst && source.in_bulk() ? 0 : team.thread) {
    const typename Source::Order order = source.order(team, backwards);
    pack = order.first;
    group_ = order.group;
    if (!kFirst && !source.resident) source.start(team, backwards);
    until_ = kFirst || !source.resident ? 1 : 0;  // 0: never, since the copies are there
  }

  __device__ __forceinline__ bool more() const { return more(source_.packs()); }
  // Whether there are packs below `end`, in a pass that runs forwards.
  __device__ __forceinline__ bool more(int end) const { return unsigned(pack) < unsigned(end); }

  // Reads the pack's logits, and starts the copies of a later pack where the row does not stay.
  __device__ __forceinline__ typename Source::Raw take() {
    if (--until_ != 0) return source_.read(pack);
    until_ = group_;
    if (kFirst && source_.in_bulk()) {
      source_.wait_in_bulk(team_, slot_++);
      return source_.read(pack);
    }
    async_wait<kAhead - 1>();
    const typename Source::Raw raw = source_.read(source_.slot_of(pack, slot_));
    if (!source_.resident) {
      const int next = pack + kAhead * step_;
      if (unsigned(next) < unsigned(source_.packs())) source_.copy(next, slot_);
      slot_ += step_ < 0 ? -step_ : step_;
      if (slot_ >= source_.slots()) slot_ -= source_.slots();
    }
    async_commit();
    return raw;
  }
  __device__ __forceinline__ void advance() { pack += step_; }

 private:
  const Source& source_;
  const Team& team_;
  const int step_;
  int slot_;  // where the next pack is, if the row does not stay; else the number of bulk copies waited for
  int group_;
  int until_;  // how many packs until the next wait
};

}  // namespace fastkd::cuda
