// Lookup of divergences by their place in a type list.
#pragma once
#include <array>
#include <string_view>

#include "../math/divergence.h"
#include "op.h"

namespace fastkd {

// The names of the divergences in a list, for a Choice.
template <class List>
struct DivergenceNames;
template <class... Divergence>
struct DivergenceNames<portable::TypeList<Divergence...>> {
  static std::array<const char*, sizeof...(Divergence)> names() { return {Divergence::kName...}; }
};

// The divergence's place in List. At the ends of a mixture's beta this is the plain divergence.
template <class List>
int find_divergence(const char* function, const Choice<DivergenceNames<List>>& divergence, double beta) {
  FASTKD_CHECK_VALUE(beta >= 0 && beta <= 1, function, "beta must lie in [0, 1], got ", beta);
  const std::string_view name = divergence.name();
  const char* plain = nullptr;
  if (beta == 0 && (name == "jsd" || name == "skew_kl")) plain = "forward_kl";
  if ((beta == 1 && name == "jsd") || (beta == 0 && name == "skew_reverse_kl")) plain = "reverse_kl";
  if (plain == nullptr) return int(divergence.place);
  const auto names = DivergenceNames<List>::names();
  for (size_t i = 0; i < names.size(); ++i) {
    if (std::string_view(names[i]) == plain) return int(i);
  }
  return int(divergence.place);
}

}  // namespace fastkd
