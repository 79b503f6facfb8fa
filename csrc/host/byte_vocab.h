// Token ids and their bytes: one flat buffer, and the ids in the order of their bytes, in which the tokens that start
// with a prefix are one interval, and those of them that go on with the same byte are one interval again.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fastkd {

// Columns of an answer to "what follows this prefix": the next byte, the token's end, then one a class of special ids.
constexpr int kBytes = 256;
constexpr int kEndColumn = kBytes;
constexpr int kFirstClass = kBytes + 1;

using Segment = std::array<int32_t, 2>;  // begin and end in the order

class ByteVocab {
 public:
  using Classes = std::vector<std::pair<std::string, std::vector<int64_t>>>;

  // `lengths` of the tokens that lie in `bytes` one after the other; 0: the id has no bytes. Ids named in `classes`
  // lose theirs. Ids without bytes in no class form the class "other". Throws std::out_of_range and
  // std::invalid_argument.
  ByteVocab(std::string bytes, const std::vector<int64_t>& lengths, const Classes& classes);

  int64_t size() const { return int64_t(begins_.size()) - 1; }
  int num_columns() const { return kFirstClass + int(class_names_.size()); }
  const std::vector<std::string>& class_names() const { return class_names_; }
  const std::vector<int32_t>& order() const { return order_; }
  const std::vector<int16_t>& columns() const { return columns_; }

  // As many bytes can be read from each token's begin on.
  static constexpr size_t kReadable = 16;

  // Of an id in [0, size()); empty if it has none.
  std::string_view token(int64_t id) const {
    return {bytes_.data() + begins_[size_t(id)], begins_[size_t(id) + 1] - begins_[size_t(id)]};
  }
  Segment interval(std::string_view prefix) const;
  // The tokens with exactly these bytes: the first ones of their interval.
  Segment equal_to(std::string_view prefix) const;
  // One a column, to `out`.
  void segments(std::string_view prefix, Segment* out) const;

  bool operator==(const ByteVocab& other) const;

 private:
  std::string_view at(int32_t place) const { return token(order_[size_t(place)]); }
  void sort();

  std::string bytes_;             // and kReadable more
  std::vector<uint32_t> begins_;  // size() + 1
  std::vector<int32_t> order_;
  std::vector<int32_t> class_begins_;  // in the order, and the end of the last
  std::vector<std::string> class_names_;
  std::vector<int16_t> columns_;
};

}  // namespace fastkd
