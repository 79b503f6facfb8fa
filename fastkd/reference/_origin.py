"""Logits relative to the largest of their row, which does not change a softmax."""

import math

from torch import Tensor

from fastkd.reference._rows import DEAD, from_largest


def relative_to_largest(logits: Tensor) -> Tensor:
    """Logits minus their row's largest, so that rounding does not depend on a common constant."""
    if logits.size(-1) == 0:
        return logits
    relative = from_largest(logits)
    return relative.masked_fill(relative < -DEAD, -math.inf)
