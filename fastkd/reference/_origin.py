"""Logits relative to the largest of their row: a softmax does not see the constant."""

import math

import torch
from torch import Tensor

#: Logits that lie this far below the largest are probability 0, as are those of -inf: the smallest
#: finite number, which masks put there, is one of them.
IMPOSSIBLE = 1e25


def relative_to_largest(logits: Tensor) -> Tensor:
    """Logits less their row's largest, so that no logarithm of a sum is added to a huge number."""
    if logits.size(-1) == 0:
        return logits
    top = logits.detach().amax(-1, keepdim=True)
    relative = logits - torch.where(torch.isfinite(top), top, 0.0)
    return relative.masked_fill(relative < -IMPOSSIBLE, -math.inf)
