"""Logits relative to the largest of their row: a softmax does not see the constant."""

import torch
from torch import Tensor


def relative_to_largest(logits: Tensor) -> Tensor:
    """Logits less their row's largest, so that no logarithm of a sum is added to a huge number."""
    if logits.size(-1) == 0:
        return logits
    top = logits.detach().amax(-1, keepdim=True)
    return logits - torch.where(torch.isfinite(top), top, 0.0)
