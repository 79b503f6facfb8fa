// Mixtures of two teachers' logits whose weights depend on how far the two are apart in a row (AlignDistil): with
//   a = 2 strength TVD + 10^-3,   TVD of their softmaxes at temperature 1,
// the teacher is the softmax of z_1 + a (z_1 - z_2), a contrast, or of a z_1 + (1 - a) z_2, a share; and the divergence
// is multiplied by coefficient / a.
#pragma once
#include "platform.h"

namespace fastkd {

struct AdaptiveMix {
  double first, second;  // weights of the logits
  double scale;          // of the divergence
};

FASTKD_INLINE AdaptiveMix adaptive_mix(bool contrast, double distance, double strength, double coefficient) {
  const double a = 2 * strength * distance + 1e-3;
  return {contrast ? 1 + a : a, contrast ? -a : 1 - a, coefficient / a};
}

}  // namespace fastkd
