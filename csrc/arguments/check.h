// Argument errors. A message names the function, the argument, what was expected and what was passed. Its first word is
// the Python exception that the public function raises (the raw op itself raises RuntimeError).
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace fastkd {

template <class... Parts>
[[noreturn]] inline void fail(const char* kind, const char* function, const Parts&... parts) {
  std::ostringstream message;
  message << kind << ": " << function << ": ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

#define FASTKD_CHECK_VALUE(condition, ...) \
  if (!(condition)) ::fastkd::fail("ValueError", __VA_ARGS__)
#define FASTKD_CHECK_TYPE(condition, ...) \
  if (!(condition)) ::fastkd::fail("TypeError", __VA_ARGS__)
#define FASTKD_CHECK_INDEX(condition, ...) \
  if (!(condition)) ::fastkd::fail("IndexError", __VA_ARGS__)

// The first `leading` sizes, formatted as Python prints them.
inline std::string leading_of(const torch::stable::Tensor& tensor, int64_t leading) {
  std::ostringstream out;
  out << "[";
  for (int64_t i = 0; i < leading; ++i) out << (i ? ", " : "") << tensor.size(i);
  out << "]";
  return out.str();
}

inline std::string shape_of(const torch::stable::Tensor& tensor) { return leading_of(tensor, tensor.dim()); }

}  // namespace fastkd
