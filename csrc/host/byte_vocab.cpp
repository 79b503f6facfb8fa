#include "byte_vocab.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace fastkd {
namespace {

constexpr int16_t kUnclassed = -1;

// The first eight bytes as a number that sorts in their order; missing bytes count as 0.
uint64_t leading_bytes(std::string_view token) {
  uint64_t key = 0;
  for (size_t i = 0; i < 8; ++i) key = key << 8 | (i < token.size() ? uint8_t(token[i]) : 0);
  return key;
}

std::string quoted(const std::string& name) { return "'" + name + "'"; }

// The class of each id, kUnclassed if it has none.
std::vector<int16_t> classes_of(const ByteVocab::Classes& classes, int64_t size) {
  std::vector<int16_t> found(size_t(size), kUnclassed);
  for (size_t c = 0; c < classes.size(); ++c) {
    for (const int64_t id : classes[c].second) {
      const std::string& name = classes[c].first;
      if (id < 0 || id >= size) {
        throw std::out_of_range("ByteVocab: special[" + quoted(name) + "] must hold ids in [0, " +
                                std::to_string(size) + "), got " + std::to_string(id));
      }
      int16_t& mine = found[size_t(id)];
      if (mine != kUnclassed) {
        throw std::invalid_argument("ByteVocab: special must name an id once, got " + std::to_string(id) + " in " +
                                    quoted(classes[size_t(mine)].first) + " and in " + quoted(name));
      }
      mine = int16_t(c);
    }
  }
  return found;
}

}  // namespace

ByteVocab::ByteVocab(std::string bytes, const std::vector<int64_t>& lengths, const Classes& classes) {
  const int64_t size = int64_t(lengths.size());
  if (classes.size() >= size_t(std::numeric_limits<int16_t>::max() - kFirstClass)) {
    throw std::invalid_argument("ByteVocab: special must name at most 32509 classes, got " +
                                std::to_string(classes.size()));
  }
  std::vector<int16_t> found = classes_of(classes, size);
  for (const auto& named : classes) class_names_.push_back(named.first);

  // The bytes of ids in a class are removed, and the following ones moved up.
  begins_.reserve(lengths.size() + 1);
  columns_.reserve(lengths.size());
  const int16_t other = int16_t(classes.size());
  bool others = false;
  size_t from = 0, to = 0;
  for (size_t id = 0; id < lengths.size(); ++id) {
    begins_.push_back(uint32_t(to));
    const size_t length = size_t(lengths[id]);
    if (length && found[id] == kUnclassed) {
      columns_.push_back(uint8_t(bytes[from]));
      std::memmove(&bytes[to], &bytes[from], length);
      to += length;
    } else {
      if (found[id] == kUnclassed) found[id] = other, others = true;
      columns_.push_back(int16_t(kFirstClass + found[id]));
    }
    from += length;
  }
  begins_.push_back(uint32_t(to));
  bytes.resize(to);
  bytes.resize(to + kReadable);
  bytes.shrink_to_fit();
  bytes_ = std::move(bytes);

  if (others) {
    if (std::find(class_names_.begin(), class_names_.end(), "other") != class_names_.end()) {
      throw std::invalid_argument(
          "ByteVocab: special must not name a class 'other' while ids without bytes are in no class: they form the "
          "class of this name");
    }
    class_names_.push_back("other");
  }
  sort();
}

void ByteVocab::sort() {
  struct Entry {
    uint64_t key;
    int32_t id;
  };
  std::vector<Entry> entries;
  std::vector<std::vector<int32_t>> classes(class_names_.size());
  for (int32_t id = 0; id < size(); ++id) {
    const int16_t column = columns_[size_t(id)];
    if (column < kFirstClass) {
      entries.push_back({leading_bytes(token(id)), id});
    } else {
      classes[size_t(column - kFirstClass)].push_back(id);
    }
  }
  std::sort(entries.begin(), entries.end(), [this](const Entry& a, const Entry& b) {
    if (a.key != b.key) return a.key < b.key;
    const int compared = token(a.id).compare(token(b.id));
    return compared ? compared < 0 : a.id < b.id;
  });
  order_.reserve(size_t(size()));
  for (const Entry& entry : entries) order_.push_back(entry.id);
  for (const std::vector<int32_t>& ids : classes) {
    class_begins_.push_back(int32_t(order_.size()));
    order_.insert(order_.end(), ids.begin(), ids.end());
  }
  class_begins_.push_back(int32_t(order_.size()));
}

Segment ByteVocab::interval(std::string_view prefix) const {
  const auto begin = order_.begin(), end = begin + class_begins_.front();
  const auto low =
      std::lower_bound(begin, end, prefix, [this](int32_t id, std::string_view wanted) { return token(id) < wanted; });
  const auto high = std::upper_bound(low, end, prefix, [this](std::string_view wanted, int32_t id) {
    return wanted < token(id).substr(0, wanted.size());
  });
  return {int32_t(low - begin), int32_t(high - begin)};
}

Segment ByteVocab::equal_to(std::string_view prefix) const {
  const Segment all = interval(prefix);
  const auto longer = std::partition_point(order_.begin() + all[0], order_.begin() + all[1],
                                           [&](int32_t id) { return token(id).size() == prefix.size(); });
  return {all[0], int32_t(longer - order_.begin())};
}

void ByteVocab::segments(std::string_view prefix, Segment* out) const {
  const Segment all = interval(prefix), equal = equal_to(prefix);
  out[kEndColumn] = equal;
  int32_t place = equal[1];
  for (int byte = 0; byte < kBytes; ++byte) {
    const int32_t begin = place;
    if (place < all[1] && uint8_t(at(place)[prefix.size()]) == byte) {
      const auto next = std::partition_point(order_.begin() + place, order_.begin() + all[1],
                                             [&](int32_t id) { return uint8_t(token(id)[prefix.size()]) <= byte; });
      place = int32_t(next - order_.begin());
    }
    out[byte] = {begin, place};
  }
  for (size_t c = 0; c < class_names_.size(); ++c) {
    const int32_t begin = class_begins_[c];
    out[size_t(kFirstClass) + c] = {begin, prefix.empty() ? class_begins_[c + 1] : begin};
  }
}

bool ByteVocab::operator==(const ByteVocab& other) const {
  return begins_ == other.begins_ && bytes_ == other.bytes_ && class_names_ == other.class_names_ &&
         columns_ == other.columns_;
}

}  // namespace fastkd
