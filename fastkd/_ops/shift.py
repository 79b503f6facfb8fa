"""The shift of causal models: row t scores token t + 1."""

import torch.nn.functional as F
from torch import Tensor

#: The label of rows that do not count, unless a caller says another.
IGNORED = -100


def following(values: Tensor, fill: int) -> Tensor:
    """The value of t + 1 at t, along the last dimension, and ``fill`` at the end."""
    return F.pad(values[..., 1:], (0, min(1, values.size(-1))), value=fill)
