// Divergences by name.
#pragma once
#include "../math/divergence.h"
#include "check.h"

namespace fastkd {

template <class... Divergence>
int place_of(portable::TypeList<Divergence...>, const char* function, const std::string& name) {
  const char* const names[] = {Divergence::kName...};
  std::ostringstream known;
  for (size_t i = 0; i < sizeof...(Divergence); ++i) {
    if (name == names[i]) return int(i);
    known << (i ? ", " : "") << names[i];
  }
  fail("ValueError", function, "divergence must be one of ", known.str(), "; got '", name, "'");
}

// The place in List; the ends of a mixture are the plain divergences.
template <class List>
int find_divergence(const char* function, std::string name, double beta) {
  FASTKD_CHECK_VALUE(beta >= 0 && beta <= 1, function, "beta must lie in [0, 1], got ", beta);
  if (name == "jsd" && beta == 0) name = "forward_kl";
  if (name == "jsd" && beta == 1) name = "reverse_kl";
  if (name == "skew_kl" && beta == 0) name = "forward_kl";
  if (name == "skew_reverse_kl" && beta == 0) name = "reverse_kl";
  return place_of(List{}, function, name);
}

}  // namespace fastkd
