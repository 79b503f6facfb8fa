// Where two texts agree although they differ elsewhere.
//
// Common ends are taken off; what lies between is compared by its shortest edit path (Myers, O((n + m) d)) as long as
// that has at most kMaxEdits edits. Beyond, runs of 32, then 16, then 8 bytes that occur once on both sides and in the
// same order are matched first, and what lies between them is compared likewise. Where there are none, as in repetitive
// texts, the path is followed on while at most every fourth byte of both sides is an edit; what then is left differs.
// The time is O(n log n) for texts that have nothing in common.
//
// A run of equal bytes between two differences counts as agreement if it has at least 4 bytes and at least a quarter
// of the bytes of the smaller of these differences; 32 bytes are always enough. What is shorter agrees by chance.
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

namespace fastkd {

// `length` bytes of one text, from `student` on, that equal those of the other one from `teacher` on.
struct Block {
  int64_t student, teacher, length;

  int64_t student_end() const { return student + length; }
  int64_t teacher_end() const { return teacher + length; }
};

// Marks at the places between bytes, the text's ends included: odd where a token ends.
using Places = std::vector<uint8_t>;

// Disjoint, in order on both sides, apart on at least one.
std::vector<Block> agreeing_blocks(std::string_view student, std::string_view teacher);

// Where a stretch of one text is missing in the other and could as well begin a few bytes later or earlier ("a b b c"
// without one "b "), it is put where it begins and ends with tokens.
void settle_on_tokens(std::vector<Block>& blocks, std::string_view student, std::string_view teacher,
                      const Places& student_ends, const Places& teacher_ends);

// Number of leading bytes that are equal, up to the end of the shorter one.
int64_t common_prefix(std::string_view a, std::string_view b);

}  // namespace fastkd
