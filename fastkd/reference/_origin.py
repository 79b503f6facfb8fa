"""Logits relative to the largest of their row: a softmax does not see the constant."""

import math

from torch import Tensor

from fastkd.reference._rows import DEAD, from_largest


def relative_to_largest(logits: Tensor) -> Tensor:
    """Logits less their row's largest, so that no logarithm of a sum is added to a huge number."""
    if logits.size(-1) == 0:
        return logits
    relative = from_largest(logits)
    return relative.masked_fill(relative < -DEAD, -math.inf)
