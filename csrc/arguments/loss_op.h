// Losses over rows of logits, whose gradients are computed together with the value. One declaration (op.h) defines
// three ops:
//
//   _name(fields, int gradients) -> (loss, gradient of each differentiable tensor, pending)
//   _name_into(Tensor(a!) gradient, fields, int gradients) -> (loss, the other gradients, pending)
//       the student's gradient goes into `gradient`, which may be the logits themselves
//   name(fields, int gradients)
//       the same as _name, for compiled and exported graphs. fastkd/_ops/op.py gives it an autograd formula. The eager
//       path calls _name, which has none and therefore costs less
//
// gradients: bit i requests the gradient of the i-th differentiable tensor; gradients not requested are returned empty.
// pending: a factor still to be applied to the gradients (empty: 1), see gradient_waits in row_problem.h.
//
// Arguments needs kName, kLogits (the name of its logits), kGradients, fields, differentiable(i) (the first one is the
// student's logits), and solve<Backend>(std::array of pointers to gradients, null where not requested) -> (loss,
// pending).
#pragma once
#include "allocate.h"
#include "op.h"
#include "overlap.h"

namespace fastkd {

inline Tensor empty_like_nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

template <class Arguments>
void define_loss(torch::stable::detail::StableLibrary& m) {
  const std::string name = Arguments::kName, fields = schema_fields<Arguments>() + ", int gradients";
  const std::string results = schema_tensors(Arguments::kGradients + 2);
  for (const char* prefix : {"", "_"}) m.def((prefix + name + "(" + fields + ") -> " + results).c_str());
  m.def(("_" + name + "_into(Tensor(a!) gradient, " + fields + ") -> " + schema_tensors(Arguments::kGradients + 1))
            .c_str());
}

// Checks the tensor passed for the student's gradient: it must be like the logits, and may be their own memory.
template <class Arguments>
void check_destination(const Tensor& gradient, Arguments& arguments) {
  const Tensor& student = arguments.differentiable(0);
  const char *const function = Arguments::kName, *const logits = Arguments::kLogits;
  FASTKD_CHECK_VALUE(gradient.is_cpu() == student.is_cpu() && gradient.get_device_index() == student.get_device_index(),
                     function, "gradient must be on the device of ", logits);
  FASTKD_CHECK_VALUE(gradient.dim() == student.dim() && same_leading(gradient, student, student.dim()) &&
                         gradient.scalar_type() == student.scalar_type(),
                     function, "gradient must be like ", logits, ", shape ", shape_of(student), ", got shape ",
                     shape_of(gradient));
  if (student.dim() == 0 || gradient.data_ptr() != student.data_ptr()) return;
  FASTKD_CHECK_VALUE(!overlaps_itself(gradient), function, "inplace needs ", logits,
                     " with memory of its own for every element, got a tensor whose "
                     "elements overlap (expanded, or as_strided)");
  OverlapFinder finder{gradient};
  arguments.fields(finder);
  FASTKD_CHECK_VALUE(finder.found == nullptr, function, "inplace would overwrite ", finder.found,
                     ", which shares memory with ", logits, "; pass a copy of it");
}

template <class Arguments, class Backend, bool kInto>
void boxed_loss(StableIValue* stack, uint64_t, uint64_t) {
  constexpr int kGradients = Arguments::kGradients;
  StableIValue* next = stack;
  std::array<Tensor, kGradients> gradients;
  if constexpr (kInto) gradients[0] = torch::stable::detail::to<Tensor>(*next++);
  Arguments arguments{};
  unbox(arguments, next);
  const int64_t wanted = torch::stable::detail::to<int64_t>(*next);
  FASTKD_CHECK_VALUE(wanted >= 0 && wanted < (1 << kGradients), Arguments::kName, "gradients must lie in [0, ",
                     1 << kGradients, "), got ", wanted);
  if constexpr (kInto) check_destination(gradients[0], arguments);
  arguments.check_gradients(wanted);
  std::array<const Tensor*, kGradients> places{};
  for (int i = 0; i < kGradients; ++i) {
    const bool given = kInto && i == 0, want = given || (wanted >> i & 1);
    if (!given) {
      gradients[i] =
          want ? gradient_like(arguments.differentiable(i)) : empty_like_nothing(arguments.differentiable(i));
    }
    places[i] = want ? &gradients[i] : nullptr;
  }
  const auto [loss, pending] = arguments.template solve<Backend>(places);
  stack[0] = torch::stable::detail::from<Tensor>(loss);
  for (int i = kInto ? 1 : 0; i < kGradients; ++i) {
    stack[i + (kInto ? 0 : 1)] = torch::stable::detail::from<Tensor>(gradients[i]);
  }
  stack[kGradients + (kInto ? 0 : 1)] = torch::stable::detail::from<Tensor>(pending);
}

template <class Arguments, class Backend>
void implement_loss(torch::stable::detail::StableLibrary& m) {
  const std::string name = Arguments::kName;
  m.impl(name.c_str(), &boxed_loss<Arguments, Backend, false>);
  m.impl(("_" + name).c_str(), &boxed_loss<Arguments, Backend, false>);
  m.impl(("_" + name + "_into").c_str(), &boxed_loss<Arguments, Backend, true>);
}

// --- Ops with a separate backward pass that reads the logits again. Backward is its argument struct, with logits and
// run<Backend>(gradient):
//
//   name_backward(fields) -> Tensor, for graphs      _name_backward_into(Tensor(a!) gradient, fields) -> ()
//
// The forward op is defined as `name` and `_name`, as above.
template <class Forward, class Backward>
void define_differentiable(torch::stable::detail::StableLibrary& m) {
  for (const char* prefix : {"", "_"}) define_op<Forward>(m, prefix);
  const std::string name = Forward::kName, fields = schema_fields<Backward>();
  m.def((name + "_backward(" + fields + ") -> Tensor").c_str());
  m.def(("_" + name + "_backward_into(Tensor(a!) gradient, " + fields + ") -> ()").c_str());
}

template <class Backward, class Backend, bool kInto>
void boxed_backward(StableIValue* stack, uint64_t, uint64_t) {
  StableIValue* next = stack;
  Tensor gradient;
  if constexpr (kInto) gradient = torch::stable::detail::to<Tensor>(*next++);
  Backward arguments{};
  unbox(arguments, next);
  if constexpr (!kInto) gradient = gradient_like(arguments.logits);
  arguments.template run<Backend>(gradient);
  if constexpr (!kInto) stack[0] = torch::stable::detail::from<Tensor>(gradient);
}

template <class Forward, class Backward, class Backend>
void implement_differentiable(torch::stable::detail::StableLibrary& m) {
  for (const char* prefix : {"", "_"}) implement_op<Forward, Backend>(m, prefix);
  const std::string name = Forward::kName;
  m.impl((name + "_backward").c_str(), &boxed_backward<Backward, Backend, false>);
  m.impl(("_" + name + "_backward_into").c_str(), &boxed_backward<Backward, Backend, true>);
}

}  // namespace fastkd
