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
  static std::array<const char*, sizeof...(Divergence)> names_at_zero() { return {Divergence::kAtZero...}; }
  static std::array<const char*, sizeof...(Divergence)> names_at_one() { return {Divergence::kAtOne...}; }
};

// The divergence's place in List. At the ends of a mixture's beta this is the plain divergence.
template <class List>
int find_divergence(const char* function, const Choice<DivergenceNames<List>>& divergence, double beta) {
  FASTKD_CHECK_VALUE(beta >= 0 && beta <= 1, function, "beta must lie in [0, 1], got ", beta);
  using Names = DivergenceNames<List>;
  if (beta > 0 && beta < 1) return int(divergence.place);
  const auto ends = beta == 0 ? Names::names_at_zero() : Names::names_at_one();
  const auto names = Names::names();
  for (size_t i = 0; i < names.size(); ++i) {
    if (std::string_view(names[i]) == ends[size_t(divergence.place)]) return int(i);
  }
  return int(divergence.place);
}

}  // namespace fastkd
