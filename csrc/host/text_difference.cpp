#include "text_difference.h"

#include <algorithm>
#include <cstring>

namespace fastkd {
namespace {

constexpr int64_t kMaxEdits = 256;
constexpr int64_t kLeastStride = 4 * kMaxEdits;  // bytes of both sides together
constexpr int64_t kGrams[] = {32, 16, 8};
constexpr int kLevels = 3;
constexpr int64_t kShortestRun = 4, kSureRun = 32;
constexpr int64_t kLongestSlide = 1024;

int64_t common_suffix(std::string_view a, std::string_view b) {
  const int64_t most = int64_t(std::min(a.size(), b.size()));
  int64_t count = 0;
  while (count < most && a[a.size() - 1 - size_t(count)] == b[b.size() - 1 - size_t(count)]) ++count;
  return count;
}

// A part of each text that is still to be compared.
struct Gap {
  int64_t student, student_end, teacher, teacher_end;

  int64_t students() const { return student_end - student; }
  int64_t teachers() const { return teacher_end - teacher; }
};

class Difference {
 public:
  Difference(std::string_view student, std::string_view teacher) : student_(student), teacher_(teacher) {}

  std::vector<Block> blocks() {
    compare({0, int64_t(student_.size()), 0, int64_t(teacher_.size())}, 0);
    drop_chance_agreements();
    grow();
    return std::move(blocks_);
  }

 private:
  std::string_view student(const Gap& gap) const {
    return student_.substr(size_t(gap.student), size_t(gap.students()));
  }
  std::string_view teacher(const Gap& gap) const {
    return teacher_.substr(size_t(gap.teacher), size_t(gap.teachers()));
  }

  void add(const Block& block) {
    if (block.length == 0) return;
    if (!blocks_.empty() && blocks_.back().student_end() == block.student &&
        blocks_.back().teacher_end() == block.teacher) {
      blocks_.back().length += block.length;
    } else {
      blocks_.push_back(block);
    }
  }

  // Compares the gap and adds its blocks, in order.
  void compare(Gap gap, int level) {
    const int64_t prefix = common_prefix(student(gap), teacher(gap));
    add({gap.student, gap.teacher, prefix});
    gap.student += prefix;
    gap.teacher += prefix;
    const int64_t suffix = common_suffix(student(gap), teacher(gap));
    gap.student_end -= suffix;
    gap.teacher_end -= suffix;
    if (gap.students() > 0 && gap.teachers() > 0) {
      bool done = std::abs(gap.students() - gap.teachers()) <= kMaxEdits && follow_edits(gap);
      for (; level < kLevels && !done; ++level) done = compare_between_anchors(gap, level);
      while (!done && !(done = follow_edits(gap)) && take_stride(gap)) {
      }
    }
    add({gap.student_end, gap.teacher_end, suffix});
  }

  // Finds the shortest edit path, if it has at most kMaxEdits edits, and adds its blocks. Row e of reached_ holds, for
  // each diagonal 2 i - e, i = 0..e, how far on the student's side e edits reach; -1 where the diagonal leaves the
  // texts. An entry follows from the previous row, by a byte that only the student has (from i - 1) or only the teacher
  // has (from i), and then continues along equal bytes.
  bool follow_edits(const Gap& gap) {
    const int64_t n = gap.students(), m = gap.teachers();
    reached_.clear();
    for (int64_t edits = 0; edits <= kMaxEdits; ++edits) {
      for (int64_t i = 0; i <= edits; ++i) {
        const int64_t diagonal = 2 * i - edits;
        int64_t x = step(gap, edits, i);
        if (x >= 0) {
          x += common_prefix(student(gap).substr(size_t(x)), teacher(gap).substr(size_t(x - diagonal)));
        }
        reached_.push_back(x);
        if (x == n && x - diagonal == m) {
          trace_back(gap, edits, i);
          return true;
        }
      }
    }
    return false;
  }

  static size_t entry(int64_t edits, int64_t i) { return size_t(edits * (edits + 1) / 2 + i); }

  int64_t from_student(const Gap& gap, int64_t edits, int64_t i) const {
    if (i == 0) return -1;
    const int64_t x = reached_[entry(edits - 1, i - 1)];
    return x < 0 || x == gap.students() ? -1 : x + 1;
  }
  int64_t from_teacher(const Gap& gap, int64_t edits, int64_t i) const {
    if (i == edits) return -1;
    const int64_t x = reached_[entry(edits - 1, i)];
    return x - (2 * i - edits) > gap.teachers() ? -1 : x;
  }
  int64_t step(const Gap& gap, int64_t edits, int64_t i) const {
    return edits == 0 ? 0 : std::max(from_student(gap, edits, i), from_teacher(gap, edits, i));
  }

  void trace_back(const Gap& gap, int64_t edits, int64_t i) {
    path_.clear();
    for (;; --edits) {
      const int64_t x = step(gap, edits, i);
      path_.push_back({gap.student + x, gap.teacher + x - (2 * i - edits), reached_[entry(edits, i)] - x});
      if (edits == 0) break;
      if (from_student(gap, edits, i) == x) --i;
    }
    for (auto block = path_.rbegin(); block != path_.rend(); ++block) add(*block);
  }

  // For the case that kMaxEdits edits did not suffice but lead through bytes that mostly agree: adds the path that goes
  // furthest, and leaves the rest of the texts in the gap. Returns false if the path is too short.
  bool take_stride(Gap& gap) {
    int64_t best = 0, most = -1;
    for (int64_t i = 0; i <= kMaxEdits; ++i) {
      const int64_t x = reached_[entry(kMaxEdits, i)];
      const int64_t both = x < 0 ? -1 : 2 * x - (2 * i - kMaxEdits);
      if (both > most) most = both, best = i;
    }
    if (most < kLeastStride) return false;
    trace_back(gap, kMaxEdits, best);
    const int64_t x = reached_[entry(kMaxEdits, best)];
    gap.student += x;
    gap.teacher += x - (2 * best - kMaxEdits);
    return true;
  }

  // Compares the gap between anchors (anchored_runs), if there are any, and adds all its blocks. Returns false if there
  // are no anchors.
  bool compare_between_anchors(const Gap& gap, int level) {
    const std::vector<Block> runs = anchored_runs(gap, kGrams[level]);
    if (runs.empty()) return false;
    Gap rest = gap;
    for (const Block& run : runs) {
      compare({rest.student, run.student, rest.teacher, run.teacher}, level + 1);
      add(run);
      rest.student = run.student_end();
      rest.teacher = run.teacher_end();
    }
    compare(rest, level + 1);
    return true;
  }

  // Calls body(place, hash) for each run of `width` bytes in the text.
  template <class Body>
  static void for_grams(std::string_view text, int64_t width, const Body& body) {
    constexpr uint64_t kBase = 0x9E3779B97F4A7C15u;
    uint64_t leaving = 1, hash = 0;
    for (int64_t i = 1; i < width; ++i) leaving *= kBase;
    for (int64_t i = 0; i < int64_t(text.size()); ++i) {
      hash = hash * kBase + uint8_t(text[size_t(i)]) + 1;
      if (i + 1 < width) continue;
      body(i + 1 - width, hash);
      hash -= leaving * (uint64_t(uint8_t(text[size_t(i + 1 - width)])) + 1);
    }
  }

  // Anchors: runs of `width` bytes that occur once on each side. Returns their longest sequence that is in order on
  // both sides, each extended as far as the bytes agree.
  std::vector<Block> anchored_runs(const Gap& gap, int64_t width) const {
    const std::string_view a = student(gap), b = teacher(gap);
    if (int64_t(std::min(a.size(), b.size())) < width) return {};
    constexpr int64_t kNowhere = -1, kOften = -2;
    struct Gram {
      uint64_t hash;
      int64_t student, teacher;
    };
    int bits = 4;
    while ((size_t(1) << bits) < 2 * b.size()) ++bits;
    const size_t mask = (size_t(1) << bits) - 1;
    std::vector<Gram> table(mask + 1, {0, kNowhere, kNowhere});
    const auto find = [&](uint64_t hash) -> Gram& {
      size_t slot = size_t((hash * 0xD1B54A32D192ED03u) >> (64 - bits));
      while (table[slot].teacher != kNowhere && table[slot].hash != hash) slot = (slot + 1) & mask;
      return table[slot];
    };
    for_grams(b, width, [&](int64_t place, uint64_t hash) {
      Gram& gram = find(hash);
      gram.hash = hash;
      gram.teacher = gram.teacher == kNowhere ? place : kOften;
    });
    for_grams(a, width, [&](int64_t place, uint64_t hash) {
      Gram& gram = find(hash);
      if (gram.teacher >= 0) gram.student = gram.student == kNowhere ? place : kOften;
    });

    std::vector<Gram> pairs;
    for_grams(a, width, [&](int64_t place, uint64_t hash) {
      const Gram& gram = find(hash);
      if (gram.teacher >= 0 && gram.student == place) pairs.push_back(gram);
    });
    std::vector<Block> runs;
    for (const size_t i : longest_increasing(pairs)) {
      grow_run({pairs[i].student, pairs[i].teacher, width}, a, b, runs);
    }
    for (Block& run : runs) run.student += gap.student, run.teacher += gap.teacher;
    return runs;
  }

  // Given pairs in the student's order, returns the longest subsequence that is in the teacher's order, too.
  template <class Pairs>
  static std::vector<size_t> longest_increasing(const Pairs& pairs) {
    std::vector<size_t> last, before(pairs.size());  // last[l]: the pair with the lowest end of a sequence of l + 1
    for (size_t i = 0; i < pairs.size(); ++i) {
      const auto place = std::partition_point(last.begin(), last.end(),
                                              [&](size_t other) { return pairs[other].teacher < pairs[i].teacher; });
      before[i] = place == last.begin() ? 0 : *(place - 1);
      if (place == last.end()) {
        last.push_back(i);
      } else {
        *place = i;
      }
    }
    std::vector<size_t> chosen(last.size());
    size_t at = last.empty() ? 0 : last.back();
    for (size_t l = chosen.size(); l-- > 0; at = before[at]) chosen[l] = at;
    return chosen;
  }

  static void grow_run(Block run, std::string_view a, std::string_view b, std::vector<Block>& runs) {
    const Block previous = runs.empty() ? Block{0, 0, 0} : runs.back();
    const int64_t gap_a = run.student - previous.student_end(), gap_b = run.teacher - previous.teacher_end();
    if (gap_a < 0 || gap_b < 0) return;  // overlaps the previous run, or crosses it
    const auto part = [](std::string_view text, int64_t begin, int64_t length) {
      return text.substr(size_t(begin), size_t(length));
    };
    if (part(a, run.student, run.length) != part(b, run.teacher, run.length)) return;  // only the hashes are equal
    const int64_t back = common_suffix(part(a, previous.student_end(), gap_a), part(b, previous.teacher_end(), gap_b));
    run.student -= back;
    run.teacher -= back;
    run.length = common_prefix(a.substr(size_t(run.student)), b.substr(size_t(run.teacher)));
    runs.push_back(run);
  }

  int64_t gap_between(const Block& left, const Block& right) const {
    return std::max(right.student - left.student_end(), right.teacher - left.teacher_end());
  }

  void drop_chance_agreements() {
    const Block start{0, 0, 0}, end{int64_t(student_.size()), int64_t(teacher_.size()), 0};
    std::vector<Block> kept;
    const auto drop_before = [&](const Block& next) {
      while (!kept.empty()) {
        const Block block = kept.back();
        const int64_t left = gap_between(kept.size() == 1 ? start : kept[kept.size() - 2], block);
        const int64_t right = gap_between(block, next);
        if (left == 0 || right == 0) return;
        if (block.length >= std::min(kSureRun, std::max(kShortestRun, std::min(left, right) / 4))) return;
        kept.pop_back();
      }
    };
    for (const Block& block : blocks_) {
      drop_before(block);
      kept.push_back(block);
    }
    drop_before(end);
    blocks_ = std::move(kept);
  }

  // Extends the remaining blocks: equal bytes next to them may have belonged to blocks that were dropped.
  void grow() {
    std::vector<Block> before = std::move(blocks_);
    blocks_.clear();
    before.push_back({int64_t(student_.size()), int64_t(teacher_.size()), 0});
    Gap gap{0, 0, 0, 0};
    for (Block& block : before) {
      gap.student_end = block.student;
      gap.teacher_end = block.teacher;
      const int64_t prefix = common_prefix(student(gap), teacher(gap));
      add({gap.student, gap.teacher, prefix});
      gap.student += prefix;
      gap.teacher += prefix;
      const int64_t suffix = common_suffix(student(gap), teacher(gap));
      add({block.student - suffix, block.teacher - suffix, block.length + suffix});
      gap.student = block.student_end();
      gap.teacher = block.teacher_end();
    }
  }

  const std::string_view student_, teacher_;
  std::vector<Block> blocks_, path_;
  std::vector<int64_t> reached_;
};

}  // namespace

int64_t common_prefix(std::string_view a, std::string_view b) {
  const int64_t most = int64_t(std::min(a.size(), b.size()));
  int64_t count = 0;
  for (uint64_t x, y; count + 8 <= most; count += 8) {
    std::memcpy(&x, a.data() + count, 8);
    std::memcpy(&y, b.data() + count, 8);
    if (x != y) break;
  }
  while (count < most && a[size_t(count)] == b[size_t(count)]) ++count;
  return count;
}

std::vector<Block> agreeing_blocks(std::string_view student, std::string_view teacher) {
  return Difference(student, teacher).blocks();
}

void settle_on_tokens(std::vector<Block>& blocks, std::string_view student, std::string_view teacher,
                      const Places& student_ends, const Places& teacher_ends) {
  for (size_t i = 1; i < blocks.size(); ++i) {
    Block &left = blocks[i - 1], &right = blocks[i];
    const bool in_student = left.teacher_end() == right.teacher;
    if (!in_student && left.student_end() != right.student) continue;
    const std::string_view text = in_student ? student : teacher;
    const Places& long_ends = in_student ? student_ends : teacher_ends;
    const Places& short_ends = in_student ? teacher_ends : student_ends;
    const int64_t begin = in_student ? left.student_end() : left.teacher_end();
    const int64_t end = in_student ? right.student : right.teacher;
    const int64_t place = in_student ? right.teacher : right.student;
    const int64_t most_earlier = std::min(left.length, kLongestSlide);
    const int64_t later = common_prefix(text.substr(size_t(begin)),
                                        text.substr(size_t(end), size_t(std::min(right.length, kLongestSlide))));
    const int64_t earlier =
        common_suffix(text.substr(size_t(begin - most_earlier), size_t(most_earlier)), text.substr(0, size_t(end)));
    int64_t move = later;
    // If the texts agree from here to their ends, the stretch is moved to the end of the longer text.
    const bool at_the_end = later == right.length && right.student_end() == int64_t(student.size()) &&
                            right.teacher_end() == int64_t(teacher.size());
    const auto on_tokens = [&] {
      return (long_ends[size_t(begin + move)] & long_ends[size_t(end + move)] & short_ends[size_t(place + move)] & 1) !=
             0;
    };
    if (!at_the_end) {
      while (move >= -earlier && !on_tokens()) --move;
      if (move < -earlier) continue;
    }
    left.length += move;
    right.student += move;
    right.teacher += move;
    right.length -= move;
  }
}

}  // namespace fastkd
