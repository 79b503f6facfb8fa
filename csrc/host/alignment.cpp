#include "alignment.h"

#include <atomic>
#include <exception>
#include <limits>
#include <mutex>
#include <thread>

namespace fastkd {
namespace {

constexpr uint8_t kEnd = 1;      // a token of this side ends here, or the text begins
constexpr uint8_t kMeeting = 2;  // tokens of both sides end here, in parts that agree
constexpr uint8_t kClosing = 4;  // a kMeeting place where a chunk ends

int64_t leading_spaces(std::string_view text) { return int64_t(std::min(text.find_first_not_of(' '), text.size())); }

// 1 where the text begins with exactly one space more than the other text, as SentencePiece's texts do; else 0.
int64_t extra_space(std::string_view text, std::string_view other) {
  const bool extra = leading_spaces(text) == leading_spaces(other) + 1;
  return extra && text.size() > 1 && !other.empty() && text[1] == other[0];
}

}  // namespace

// Buffers are not initialised with zeros: for a long text, that would take a good part of the time of reading it.
void Side::make_room(const char* name, size_t used, size_t needed) {
  if (needed > size_t(std::numeric_limits<int32_t>::max())) {
    throw std::invalid_argument(std::string(name) + " must have less than 2^31 bytes in a text");
  }
  const size_t room = std::max({needed, 2 * room_, 6 * size_t(ends_room_)});
  std::unique_ptr<char[]> wider(new char[room]);
  std::memcpy(wider.get(), text_.get(), used);
  text_ = std::move(wider);
  room_ = room;
}

void Side::make_room_for_ends(int64_t count) {
  if (count > ends_room_) {
    ends_.reset(new int32_t[size_t(count)]);
    ends_room_ = count;
  }
}

void Side::mark_ends() {
  places_.assign(size_t(size_) + 1, 0);
  places_[0] = kEnd;
  for (int64_t i = 0; i < count_; ++i) places_[size_t(ends_[size_t(i)])] = kEnd;
}

// The first kMeeting place at or after `place`; size_ + 1 if there is none.
int64_t Side::meeting_from(int64_t place) const {
  while (place <= size_ && !(places_[size_t(place)] & kMeeting)) ++place;
  return place;
}

ChunkCount Aligner::align(int32_t* student_chunks, int32_t* teacher_chunks) {
  student.mark_ends();
  teacher.mark_ends();
  const int64_t student_extra = extra_space(student.text(), teacher.text());
  const int64_t teacher_extra = extra_space(teacher.text(), student.text());
  // The place after the extra space counts as a token's end, whatever token contains the space, so that the texts meet
  // there. (The swap below makes the first chunk begin before the space.)
  student.places_[size_t(student_extra)] |= kEnd;
  teacher.places_[size_t(teacher_extra)] |= kEnd;
  const std::vector<Block> blocks = agreeing_parts(student_extra, teacher_extra);
  int64_t chunks = 0;
  for (const Block& block : blocks) chunks += meet(block);
  // The first chunk begins before the extra space.
  if (student_extra) std::swap(student.places_[0], student.places_[1]);
  if (teacher_extra) std::swap(teacher.places_[0], teacher.places_[1]);
  chunks -= drop_broken(blocks, true);
  chunks -= drop_broken(blocks, false);
  return {chunks, student.number_tokens(chunks, student_chunks), teacher.number_tokens(chunks, teacher_chunks)};
}

std::vector<Block> Aligner::agreeing_parts(int64_t student_extra, int64_t teacher_extra) {
  const std::string_view a = student.text().substr(size_t(student_extra));
  const std::string_view b = teacher.text().substr(size_t(teacher_extra));
  const int64_t most = int64_t(std::min(a.size(), b.size()));
  if (std::memcmp(a.data(), b.data(), size_t(most)) == 0) return {{student_extra, teacher_extra, most}};
  std::vector<Block> blocks = agreeing_blocks(a, b);
  for (Block& block : blocks) {
    block.student += student_extra;
    block.teacher += teacher_extra;
  }
  settle_on_tokens(blocks, student.text(), teacher.text(), student.places_, teacher.places_);
  return blocks;
}

// Marks the places in the block, its beginning included, where tokens of both sides end. Returns the number of chunks
// between these places.
int64_t Aligner::meet(const Block& block) {
  uint8_t* __restrict const a = student.places_.data() + block.student;
  uint8_t* __restrict const b = teacher.places_.data() + block.teacher;
  int64_t i = 0;
  while (i <= block.length && !(a[i] & b[i] & kEnd)) ++i;
  if (i > block.length) return 0;
  a[i] |= kMeeting;
  b[i] |= kMeeting;
  int64_t chunks = 0;
  for (++i; i <= block.length;) {
    constexpr int64_t kStrip = 128;  // so many fit into a uint8_t count
    const int64_t end = std::min(i + kStrip, block.length + 1);
    uint8_t count = 0;
    for (; i < end; ++i) {
      const uint8_t both = a[i] & b[i] & kEnd;
      const uint8_t marks = uint8_t(both * (kMeeting | kClosing));
      a[i] |= marks;
      b[i] |= marks;
      count = uint8_t(count + both);
    }
    chunks += count;
  }
  return chunks;
}

// Removes the chunks that contain a special token of one side in their middle. Returns their number.
int64_t Aligner::drop_broken(const std::vector<Block>& blocks, bool in_student) {
  Side &side = in_student ? student : teacher, &other = in_student ? teacher : student;
  int64_t dropped = 0, closing = -1;
  auto block = blocks.begin();
  for (const int64_t place : side.special_) {
    if (place <= closing || side.places_[size_t(place)] & kMeeting) continue;
    closing = side.meeting_from(place);
    if (closing > side.size_) break;
    if (!(side.places_[size_t(closing)] & kClosing)) continue;
    const auto end = [&] { return in_student ? block->student_end() : block->teacher_end(); };
    while (end() < closing) ++block;
    const int64_t ahead = in_student ? block->teacher - block->student : block->student - block->teacher;
    side.places_[size_t(closing)] &= uint8_t(~kClosing);
    other.places_[size_t(closing + ahead)] &= uint8_t(~kClosing);
    ++dropped;
  }
  return dropped;
}

// Writes each token's chunk, from the last token to the first, since a chunk is marked at its end. Returns the number
// of tokens that have bytes and belong to no chunk.
int64_t Side::number_tokens(int64_t chunks, int32_t* out) const {
  const uint8_t* const places = places_.data();
  int32_t first = int32_t(chunks), current = -1, numbered = 0;
  int64_t with_bytes = 0;
  const int32_t* const ends = ends_.get();
  for (int64_t i = count_; i-- > 0;) {
    const int32_t end = ends[i];
    // Masks of all bits or none, instead of branches, which would be unpredictable.
    const int32_t has_bytes = -int32_t(end != (i ? ends[i - 1] : 0));
    const int32_t mark = places[size_t(end)] & has_bytes;
    const int32_t meets = -(mark / kMeeting & 1), closes = -(mark / kClosing);
    first += closes;
    current ^= (current ^ (first | ~closes)) & meets;
    out[i] = current | ~has_bytes;
    numbered += out[i] >= 0;
    with_bytes -= has_bytes;
  }
  return with_bytes - numbered;
}

namespace {

void read(const IdRows& rows, int64_t row, Side& side) {
  const int64_t* const ids = rows.ids + row * rows.length;
  const uint64_t size = uint64_t(rows.vocab->size());
  const bool padded = rows.pad.has_value();
  const int64_t pad = rows.pad.value_or(0);
  static constexpr char kNothing[ByteVocab::kReadable] = {};
  side.read<ByteVocab::kReadable>(rows.name, rows.lengths[row], [&](int64_t position) -> Token {
    const int64_t id = ids[position];
    if (padded && id == pad) return {kNothing, 0, false};
    if (uint64_t(id) >= size) {
      throw std::out_of_range(std::string(rows.name) + " must hold ids in [0, " + std::to_string(size) + "), got " +
                              std::to_string(id) + " at [" + std::to_string(row) + ", " + std::to_string(position) +
                              "]");
    }
    const std::string_view token = rows.vocab->token(id);
    return {token.data(), token.size(), token.empty()};
  });
}

}  // namespace

void align_batch(const IdRows& student, const IdRows& teacher, int64_t batch, int64_t* chunks, int threads) {
  constexpr int64_t kLeastTokens = 16384;  // fewer do not keep a thread busy as long as it takes to start
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;
  int64_t error_row = batch;
  const auto work = [&] {
    Aligner aligner;
    for (int64_t row; (row = next++) < batch;) {
      try {
        read(student, row, aligner.student);
        read(teacher, row, aligner.teacher);
        int32_t* const student_chunks = student.chunks + row * student.length;
        int32_t* const teacher_chunks = teacher.chunks + row * teacher.length;
        const ChunkCount count = aligner.align(student_chunks, teacher_chunks);
        std::fill(student_chunks + student.lengths[row], student_chunks + student.length, -1);
        std::fill(teacher_chunks + teacher.lengths[row], teacher_chunks + teacher.length, -1);
        chunks[row] = count.chunks;
        student.dropped[row] = count.dropped_student;
        teacher.dropped[row] = count.dropped_teacher;
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (row < error_row) error_row = row, error = std::current_exception();
      }
    }
  };
  const int64_t tokens = batch * (student.length + teacher.length);
  const int64_t workers = std::min({int64_t(threads), batch, tokens / kLeastTokens});
  std::vector<std::thread> others;
  others.reserve(size_t(workers));
  try {
    for (int64_t i = 1; i < workers; ++i) others.emplace_back(work);
  } catch (const std::exception&) {  // if no more threads can be started, those that run do all the work
  }
  work();
  for (std::thread& thread : others) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace fastkd
