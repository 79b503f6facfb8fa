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
  static std::array<bool, sizeof...(Divergence)> any_beta() { return {Divergence::kAnyBeta...}; }
  static std::array<bool, sizeof...(Divergence)> excludes_label() { return {Divergence::kExcludesLabel...}; }
  static std::array<bool, sizeof...(Divergence)> constant_teacher() { return {Divergence::kConstantTeacher...}; }
};

// Where the divergence, and what it is at the ends of beta, stand in List.
template <class List>
portable::DivergencePlaces find_divergence(const Choice<DivergenceNames<List>>& divergence) {
  using Names = DivergenceNames<List>;
  const auto names = Names::names();
  const auto place_of = [&](std::string_view name) {
    for (size_t i = 0; i < names.size(); ++i) {
      if (names[i] == name) return int(i);
    }
    return int(divergence.place);
  };
  const size_t place = size_t(divergence.place);
  return {int(place), place_of(Names::names_at_zero()[place]), place_of(Names::names_at_one()[place])};
}

}  // namespace fastkd
