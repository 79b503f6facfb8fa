// Finds where two texts agree, although they differ elsewhere.
//
// Common prefixes and suffixes are removed. What lies between them is compared by its shortest edit path (Myers, time
// O((n + m) d)), provided that the path has at most kMaxEdits edits. Otherwise runs of 32, then 16, then 8 bytes that
// occur once on both sides and in the same order are matched first, and the parts between them are compared in the same
// way. Where there are no such runs, as in repetitive texts, the path is continued while at most every fourth byte of
// both sides is an edit; what is left then counts as different. The time is O(n log n) for texts that have nothing in
// common.
//
// A run of equal bytes between two differences counts as agreement if it has at least 4 bytes and at least a quarter of
// the bytes of the smaller of these differences; 32 bytes are always enough. Shorter runs are equal by chance.
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

namespace fastkd {

// `length` bytes of one text from `student` on, which equal those of the other text from `teacher` on.
struct Block {
  int64_t student, teacher, length;

  int64_t student_end() const { return student + length; }
  int64_t teacher_end() const { return teacher + length; }
};

// Marks at the places between bytes, the text's beginning and end included. A mark is odd where a token ends.
using Places = std::vector<uint8_t>;

// Disjoint blocks, in order on both sides. Between two blocks there are bytes on at least one side.
std::vector<Block> agreeing_blocks(std::string_view student, std::string_view teacher);

// Moves differences to token boundaries. Where a stretch of one text is missing in the other and could as well begin a
// few bytes later or earlier ("a b b c" without one "b "), it is moved so that it begins and ends with tokens.
void settle_on_tokens(std::vector<Block>& blocks, std::string_view student, std::string_view teacher,
                      const Places& student_ends, const Places& teacher_ends);

// The number of leading bytes that are equal, at most the length of the shorter text.
int64_t common_prefix(std::string_view a, std::string_view b);

}  // namespace fastkd
