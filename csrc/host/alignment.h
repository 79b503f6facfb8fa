// Aligns two tokenizations of one text: divides their tokens into chunks. A chunk ends where tokens of both sides end
// at the same byte.
//
// The tokens' bytes are joined to one text per side, and token ends are marked in an array of the places between bytes.
// The places where both sides' tokens end are found by a loop over all places, which vectorises; no step of it branches
// on a token's length.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "byte_vocab.h"
#include "text_difference.h"

namespace fastkd {

struct Token {
  const char* data;
  size_t length;
  bool special;  // the token has no bytes, and a chunk must not contain it in its middle
};

// Copies a token's bytes. Tokens are mostly so short that a call of memcpy would cost more than the copy.
inline void copy_short(char* to, const char* from, size_t length) {
  if (length > 16) {
    std::memcpy(to, from, length);
  } else if (length >= 8) {
    std::memcpy(to, from, 8);
    std::memcpy(to + length - 8, from + length - 8, 8);
  } else if (length >= 4) {
    std::memcpy(to, from, 4);
    std::memcpy(to + length - 4, from + length - 4, 4);
  } else if (length > 0) {
    to[0] = from[0];
    to[length / 2] = from[length / 2];
    to[length - 1] = from[length - 1];
  }
}

// The tokens of one side.
class Side {
 public:
  // Reads token_at(i) for each token. At least kSlack bytes can be read from a token's data, however short the token
  // is.
  template <size_t kSlack, class TokenAt>
  void read(const char* name, int64_t count, const TokenAt& token_at) {
    make_room_for_ends(count);
    special_.clear();
    int32_t* const ends = ends_.get();
    char* text = text_.get();
    size_t end = 0, room = room_;
    for (int64_t i = 0; i < count; ++i) {
      const Token token = token_at(i);
      const size_t written = std::max(token.length, kSlack);
      if (end + written > room) {
        make_room(name, end, end + written);
        text = text_.get();
        room = room_;
      }
      if (token.length <= kSlack) {
        std::memcpy(text + end, token.data, kSlack);
      } else {
        copy_short(text + end, token.data, token.length);
      }
      end += token.length;
      ends[i] = int32_t(end);
      if (token.special) special_.push_back(int32_t(end));
    }
    count_ = count;
    size_ = int64_t(end);
  }

 private:
  friend class Aligner;

  void make_room(const char* name, size_t used, size_t needed);
  void make_room_for_ends(int64_t count);
  void mark_ends();
  int64_t meeting_from(int64_t place) const;
  std::string_view text() const { return {text_.get(), size_t(size_)}; }
  int64_t number_tokens(int64_t chunks, int32_t* out) const;

  size_t room_ = 64;
  int64_t ends_room_ = 0, size_ = 0, count_ = 0;
  std::unique_ptr<char[]> text_{new char[room_]};
  std::unique_ptr<int32_t[]> ends_;  // for each token the place of its end
  std::vector<int32_t> special_;     // places of the special tokens
  Places places_;                    // for each place kEnd, kMeeting, kClosing
};

struct ChunkCount {
  int64_t chunks, dropped_student, dropped_teacher;  // dropped: tokens with bytes in no chunk
};

class Aligner {
 public:
  Side student, teacher;

  // Writes the number of each token's chunk, or -1.
  ChunkCount align(int32_t* student_chunks, int32_t* teacher_chunks);

 private:
  std::vector<Block> agreeing_parts(int64_t student_extra, int64_t teacher_extra);
  int64_t meet(const Block& block);
  int64_t drop_broken(const std::vector<Block>& blocks, bool in_student);
};

// Token ids [batch, length]; in row b the first lengths[b] ids count.
struct IdRows {
  const char* name;
  const int64_t* ids;
  const int64_t* lengths;
  int64_t length;
  const ByteVocab* vocab;
  std::optional<int64_t> pad;
  int32_t* chunks;
  int64_t* dropped;
};

// Aligns all rows, in up to `threads` threads. Throws std::out_of_range and std::invalid_argument.
void align_batch(const IdRows& student, const IdRows& teacher, int64_t batch, int64_t* chunks, int threads);

}  // namespace fastkd
