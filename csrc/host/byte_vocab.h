// Token ids and their bytes: one flat buffer, and the ids sorted by their bytes. In this order the tokens that start
// with a prefix are one interval, and among them those that continue with the same byte are one interval again.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fastkd {

// Columns that answer which token can follow a prefix: one per next byte, one for the token's end, then one per class
// of special ids.
constexpr int kBytes = 256;
constexpr int kEndColumn = kBytes;
constexpr int kFirstClass = kBytes + 1;

using Segment = std::array<int32_t, 2>;  // begin and end in the sorted order

class ByteVocab {
 public:
  using Classes = std::vector<std::pair<std::string, std::vector<int64_t>>>;

  // `bytes` holds the tokens' bytes one after the other; `lengths` are their lengths, 0 for an id without bytes. The
  // bytes of ids named in `classes` are removed. Ids without bytes in no class form the class "other". Throws
  // std::out_of_range and std::invalid_argument.
  // std::invalid_argument.
  ByteVocab(std::string bytes, const std::vector<int64_t>& lengths, const Classes& classes);

  int64_t size() const { return int64_t(begins_.size()) - 1; }
  int num_columns() const { return kFirstClass + int(class_names_.size()); }
  const std::vector<std::string>& class_names() const { return class_names_; }
  const std::vector<int32_t>& order() const { return order_; }
  const std::vector<int16_t>& columns() const { return columns_; }

  // At least this many bytes can be read from the beginning of each token.
  static constexpr size_t kReadable = 16;

  // The bytes of an id in [0, size()); empty if it has none.
  std::string_view token(int64_t id) const {
    return {bytes_.data() + begins_[size_t(id)], begins_[size_t(id) + 1] - begins_[size_t(id)]};
  }
  Segment interval(std::string_view prefix) const;
  // The tokens with exactly these bytes, which are the first ones of their interval.
  Segment equal_to(std::string_view prefix) const;
  // Writes one segment per column to `out`.
  void segments(std::string_view prefix, Segment* out) const;

  bool operator==(const ByteVocab& other) const;

 private:
  std::string_view at(int32_t place) const { return token(order_[size_t(place)]); }
  void sort();

  std::string bytes_;             // followed by kReadable more
  std::vector<uint32_t> begins_;  // size() + 1
  std::vector<int32_t> order_;
  std::vector<int32_t> class_begins_;  // places in the order, and the end of the last class
  std::vector<std::string> class_names_;
  std::vector<int16_t> columns_;
};

}  // namespace fastkd
