// The module fastkd._host. Error messages name the public function, the argument, what was expected and what was
// passed; std::out_of_range becomes IndexError, std::invalid_argument ValueError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <unordered_map>

#include "alignment.h"
#include "byte_vocab.h"

namespace py = pybind11;

namespace fastkd {
namespace {

using Ids = py::array_t<int64_t, py::array::c_style>;

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

// The entries of a sequence. Valid while no other Python code runs.
class Entries {
 public:
  Entries(const char* argument, const py::sequence& sequence) : argument_(argument) {
    const Py_ssize_t announced = PyObject_Size(sequence.ptr());
    if (announced < 0) throw py::error_already_set();
    if (announced > kMost) {
      throw py::value_error(std::string(argument) + " must have at most 2147483647 entries, got " +
                            std::to_string(announced));
    }
    fast_ = py::reinterpret_steal<py::object>(PySequence_Fast(sequence.ptr(), "expected a sequence"));
    if (!fast_) throw py::error_already_set();
    items_ = PySequence_Fast_ITEMS(fast_.ptr());
    size_ = PySequence_Fast_GET_SIZE(fast_.ptr());
  }

  Py_ssize_t size() const { return size_; }
  // The bytes of entry i; empty for None.
  std::string_view operator[](Py_ssize_t i) const {
    PyObject* const item = items_[i];
    if (PyBytes_Check(item)) return {PyBytes_AS_STRING(item), size_t(Py_SIZE(item))};
    if (item != Py_None) refuse(i);
    return "";
  }

 private:
  [[noreturn]] void refuse(Py_ssize_t i) const {
    throw py::type_error(std::string(argument_) + "[" + std::to_string(i) + "] must be bytes or None, got " +
                         type_name(items_[i]));
  }

  const char* argument_;
  py::object fast_;
  PyObject* const* items_;
  Py_ssize_t size_;
};

ByteVocab make_vocab(const py::sequence& sequence, const std::vector<std::pair<std::string, Ids>>& special) {
  const Entries tokens("ByteVocab: tokens", sequence);
  std::vector<int64_t> lengths;
  lengths.reserve(size_t(tokens.size()));
  uint64_t total = 0;
  for (Py_ssize_t i = 0; i < tokens.size(); ++i) {
    lengths.push_back(int64_t(tokens[i].size()));
    total += tokens[i].size();
  }
  if (total > uint64_t(kMost)) {
    throw py::value_error("ByteVocab: tokens must have at most 2147483647 bytes in all, got " + std::to_string(total));
  }
  std::string bytes;
  bytes.reserve(size_t(total) + ByteVocab::kReadable);
  for (Py_ssize_t i = 0; i < tokens.size(); ++i) bytes += tokens[i];
  ByteVocab::Classes classes;
  for (const auto& [name, ids] : special) {
    classes.emplace_back(name, std::vector<int64_t>(ids.data(), ids.data() + ids.size()));
  }
  const py::gil_scoped_release release;
  return ByteVocab(std::move(bytes), lengths, classes);
}

py::bytes to_bytes(std::string_view text) { return py::bytes(text.data(), text.size()); }

// The bytes of an id in range, or None.
py::object token(const ByteVocab& vocab, int64_t id) {
  const std::string_view found = vocab.token(id);
  if (found.empty()) return py::none();
  return to_bytes(found);
}

py::bytes decode(const ByteVocab& vocab, const Ids& ids) {
  std::string text;
  for (py::ssize_t i = 0; i < ids.size(); ++i) {
    const int64_t id = ids.data()[i];
    if (id < 0 || id >= vocab.size()) {
      throw std::out_of_range("ByteVocab.decode: ids must lie in [0, " + std::to_string(vocab.size()) + "), got " +
                              std::to_string(id) + " at " + std::to_string(i));
    }
    text += vocab.token(id);
  }
  return to_bytes(text);
}

// A read-only array over the values that `owner` holds.
template <class T>
py::array view(const std::vector<T>& values, py::handle owner) {
  py::array_t<T> array({py::ssize_t(values.size())}, values.data(), owner);
  array.attr("setflags")(py::arg("write") = false);
  return std::move(array);
}

std::string_view as_view(const py::bytes& bytes) {
  return {PyBytes_AS_STRING(bytes.ptr()), size_t(PyBytes_GET_SIZE(bytes.ptr()))};
}

py::array_t<int32_t> segments(const ByteVocab& vocab, const std::vector<std::string_view>& prefixes) {
  const size_t columns = size_t(vocab.num_columns());
  py::array_t<int32_t> found({prefixes.size(), columns, size_t(2)});
  static_assert(sizeof(Segment) == 2 * sizeof(int32_t));
  Segment* const out = reinterpret_cast<Segment*>(found.mutable_data());
  const py::gil_scoped_release release;
  for (size_t i = 0; i < prefixes.size(); ++i) vocab.segments(prefixes[i], out + i * columns);
  return found;
}

py::tuple segments_of(const ByteVocab& vocab, const py::tuple& prefixes) {
  std::unordered_map<std::string_view, int64_t> seen;
  std::vector<std::string_view> unique;
  py::array_t<int64_t> index(py::ssize_t(prefixes.size()));
  for (size_t i = 0; i < prefixes.size(); ++i) {
    if (!PyBytes_Check(prefixes[i].ptr())) {
      throw py::type_error("ByteVocab.segments_of: prefixes[" + std::to_string(i) + "] must be bytes, got " +
                           type_name(prefixes[i]));
    }
    const std::string_view prefix = as_view(py::reinterpret_borrow<py::bytes>(prefixes[i]));
    const auto [entry, is_new] = seen.emplace(prefix, int64_t(unique.size()));
    if (is_new) unique.push_back(prefix);
    index.mutable_data()[i] = entry->second;
  }
  return py::make_tuple(segments(vocab, unique), index);
}

py::array_t<int32_t> read(const char* argument, const py::sequence& sequence, Side& side) {
  const Entries tokens(argument, sequence);
  side.read<0>(argument, tokens.size(), [&](int64_t i) -> Token {
    const std::string_view token = tokens[i];
    return {token.data(), token.size(), token.empty()};
  });
  return py::array_t<int32_t>(tokens.size());
}

py::tuple align(const py::sequence& student_tokens, const py::sequence& teacher_tokens) {
  Aligner aligner;
  py::array_t<int32_t> student_chunks = read("align: student_tokens", student_tokens, aligner.student);
  py::array_t<int32_t> teacher_chunks = read("align: teacher_tokens", teacher_tokens, aligner.teacher);
  const ChunkCount count = aligner.align(student_chunks.mutable_data(), teacher_chunks.mutable_data());
  return py::make_tuple(student_chunks, teacher_chunks, count.chunks, count.dropped_student, count.dropped_teacher);
}

struct Batch {
  py::array_t<int32_t> chunks;
  py::array_t<int64_t> dropped;
  IdRows rows;

  Batch(const char* name, const Ids& ids, const Ids& lengths, const ByteVocab& vocab, std::optional<int64_t> pad)
      : chunks({ids.shape(0), ids.shape(1)}),
        dropped(ids.shape(0)),
        rows{name,   ids.data(), lengths.data(),        ids.shape(1),
             &vocab, pad,        chunks.mutable_data(), dropped.mutable_data()} {}
};

py::tuple align_ids(const Ids& student_ids, const Ids& student_lengths, const ByteVocab& student_vocab,
                    std::optional<int64_t> student_pad, const Ids& teacher_ids, const Ids& teacher_lengths,
                    const ByteVocab& teacher_vocab, std::optional<int64_t> teacher_pad, int threads) {
  Batch student("align_batch: student_ids", student_ids, student_lengths, student_vocab, student_pad);
  Batch teacher("align_batch: teacher_ids", teacher_ids, teacher_lengths, teacher_vocab, teacher_pad);
  py::array_t<int64_t> chunks(student_ids.shape(0));
  int64_t* const counts = chunks.mutable_data();
  const int64_t batch = student_ids.shape(0);
  {
    const py::gil_scoped_release release;
    align_batch(student.rows, teacher.rows, batch, counts, threads);
  }
  return py::make_tuple(student.chunks, teacher.chunks, chunks, student.dropped, teacher.dropped);
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  py::class_<ByteVocab>(module, "ByteVocab")
      .def(py::init(&make_vocab))
      .def("__len__", &ByteVocab::size)
      .def("token", &token)
      .def("tokens",
           [](const ByteVocab& vocab) {
             py::list tokens(size_t(vocab.size()));
             for (int64_t id = 0; id < vocab.size(); ++id) tokens[size_t(id)] = token(vocab, id);
             return tokens;
           })
      .def("class_names", &ByteVocab::class_names)
      .def("num_columns", &ByteVocab::num_columns)
      .def("order", [](py::object self) { return view(self.cast<const ByteVocab&>().order(), self); })
      .def("columns", [](py::object self) { return view(self.cast<const ByteVocab&>().columns(), self); })
      .def("decode", &decode)
      .def("interval",
           [](const ByteVocab& vocab, const py::bytes& prefix) {
             const Segment found = vocab.interval(as_view(prefix));
             return py::make_tuple(found[0], found[1]);
           })
      .def("find",
           [](const ByteVocab& vocab, const py::bytes& bytes) {
             const Segment found = vocab.equal_to(as_view(bytes));
             return std::vector<int32_t>(vocab.order().begin() + found[0], vocab.order().begin() + found[1]);
           })
      .def("segments_of", &segments_of)
      .def("__eq__", &ByteVocab::operator==);
  module.def("align", &align);
  module.def("align_batch", &align_ids);
}

}  // namespace fastkd
