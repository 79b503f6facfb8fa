// An op is declared once: its argument struct names its fields in `fields(visitor)`. The schema, the unboxing of a call
// and the names of its choices are derived from that.
//
// A field is a tensor, a list of tensors, an optional tensor, a number (double), an integer, a flag or a Choice. In the
// schema,
//   integers are SymInt: one compiled graph serves every value;
//   choices are integers: a str argument would leak a std::string in every call (torch's boxing does not free it);
//   numbers are floats. torch.compile makes a float argument a constant of the graph. While it traces, Python therefore
//   passes the numbers in the optional tensor `traced`, float64 on the CPU, in the order of the fields; the float
//   arguments are then ignored.
#pragma once
#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"

namespace fastkd {

using torch::stable::Tensor;

// A name out of List::names(), held as its place there.
template <class List>
struct Choice {
  int64_t place = 0;
  const char* name() const { return List::names()[size_t(place)]; }
};

template <class T>
struct SchemaType;
template <>
struct SchemaType<Tensor> {
  static constexpr const char* kName = "Tensor";
};
template <>
struct SchemaType<std::vector<Tensor>> {
  static constexpr const char* kName = "Tensor[]";
};
template <>
struct SchemaType<std::optional<Tensor>> {
  static constexpr const char* kName = "Tensor?";
};
template <>
struct SchemaType<double> {
  static constexpr const char* kName = "float";
};
template <>
struct SchemaType<int64_t> {
  static constexpr const char* kName = "SymInt";
};
template <>
struct SchemaType<bool> {
  static constexpr const char* kName = "bool";
};
template <class List>
struct SchemaType<Choice<List>> {
  static constexpr const char* kName = "int";
};

// "Tensor student_logits, float beta, ..."
struct SchemaWriter {
  std::string text;
  bool numbers = false;
  template <class T>
  void operator()(const char* name, T&) {
    text += (text.empty() ? "" : ", ") + std::string(SchemaType<T>::kName) + " " + name;
    numbers = numbers || std::is_same_v<T, double>;
  }
};

// "op.field=name,name;" for every choice.
struct ChoiceWriter {
  const char* op;
  std::string text;
  template <class T>
  void operator()(const char*, T&) {}
  template <class List>
  void operator()(const char* name, Choice<List>&) {
    text += std::string(op) + "." + name + "=";
    const auto names = List::names();
    for (size_t i = 0; i < names.size(); ++i) text += (i ? "," : "") + std::string(names[i]);
    text += ";";
  }
};

struct Unboxer {
  const char* function;
  StableIValue* next;
  std::array<double*, 16> numbers{};
  size_t count = 0;

  template <class T>
  void operator()(const char*, T& field) {
    field = torch::stable::detail::to<T>(*next++);
  }
  void operator()(const char*, double& field) {
    field = torch::stable::detail::to<double>(*next++);
    numbers.at(count++) = &field;
  }
  template <class List>
  void operator()(const char* name, Choice<List>& field) {
    field.place = torch::stable::detail::to<int64_t>(*next++);
    const int64_t size = int64_t(List::names().size());
    FASTKD_CHECK_VALUE(field.place >= 0 && field.place < size, function, name, " must lie in [0, ", size, "), got ",
                       field.place);
  }

  void take_traced() {
    if (count == 0) return;
    const auto traced = torch::stable::detail::to<std::optional<Tensor>>(*next++);
    if (!traced) return;
    FASTKD_CHECK_VALUE(traced->is_cpu() && traced->scalar_type() == torch::headeronly::ScalarType::Double &&
                           traced->dim() == 1 && traced->size(0) == int64_t(count) && traced->is_contiguous(),
                       function, "traced must be float64 on the CPU, shape [", count, "], got shape ",
                       shape_of(*traced));
    for (size_t i = 0; i < count; ++i) *numbers[i] = static_cast<const double*>(traced->data_ptr())[i];
  }
};

// The fields of Arguments as a schema lists them.
template <class Arguments>
std::string schema_fields() {
  Arguments arguments{};
  SchemaWriter writer;
  arguments.fields(writer);
  return writer.text + (writer.numbers ? ", Tensor? traced" : "");
}

template <class Arguments>
std::string choices_of() {
  Arguments arguments{};
  ChoiceWriter writer{Arguments::kName, {}};
  arguments.fields(writer);
  return writer.text;
}

// Sets the fields from the stack and advances the stack pointer past them.
template <class Arguments>
void unbox(Arguments& arguments, StableIValue*& stack) {
  Unboxer unboxer{Arguments::kName, stack};
  arguments.fields(unboxer);
  unboxer.take_traced();
  stack = unboxer.next;
}

template <class... T, size_t... I>
void put_results(StableIValue* stack, const std::tuple<T...>& results, std::index_sequence<I...>) {
  ((stack[I] = torch::stable::detail::from<T>(std::get<I>(results))), ...);
}
template <class... T>
void put_results(StableIValue* stack, const std::tuple<T...>& results) {
  put_results(stack, results, std::index_sequence_for<T...>());
}

// "(Tensor, Tensor, ...)"
inline std::string schema_tensors(int count) {
  std::string text = "(";
  for (int i = 0; i < count; ++i) text += i ? ", Tensor" : "Tensor";
  return text + ")";
}

// --- Ops that return tensors and have no autograd formula of their own: `_name`.
//
// Arguments needs kName, kResults (how many tensors), fields, run<Backend>() -> std::tuple of tensors.
template <class Arguments>
void define_op(torch::stable::detail::StableLibrary& m, const char* prefix = "_") {
  m.def((prefix + std::string(Arguments::kName) + "(" + schema_fields<Arguments>() + ") -> " +
         schema_tensors(Arguments::kResults))
            .c_str());
}

template <class Arguments, class Backend>
void boxed_op(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments{};
  StableIValue* next = stack;
  unbox(arguments, next);
  put_results(stack, arguments.template run<Backend>());
}

template <class Arguments, class Backend>
void implement_op(torch::stable::detail::StableLibrary& m, const char* prefix = "_") {
  m.impl((prefix + std::string(Arguments::kName)).c_str(), &boxed_op<Arguments, Backend>);
}

}  // namespace fastkd
