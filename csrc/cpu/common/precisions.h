// A kernel in both precisions of its arithmetic.
#pragma once

namespace fastkd {

template <class Kernel>
struct Precisions {
  Kernel of_float, of_double;
  const Kernel& at(bool float64) const { return float64 ? of_double : of_float; }
};

}  // namespace fastkd
