"""What a trainer is told about distillation."""

import math
from dataclasses import dataclass
from typing import Literal

from fastkd._ops.arguments import choices
from fastkd._ops.names import Divergence, Tail


@dataclass(frozen=True)
class KDOptions:
    """How a trainer distils: the loss, and where the student's logits come from.

    Args:
        divergence: see :func:`fastkd.softmax_divergence`; with a stored teacher one of those of
            :func:`fastkd.topk_divergence`.
        beta: of divergences that have one.
        temperature: of both sides.
        label_weight: of the labels' cross-entropy, added to the divergence.
        tail: what a stored teacher says of the other tokens: see :func:`fastkd.topk_divergence`.
        square_temperature: multiplies the divergence by temperature².
        head: ``"fused"``: from hidden states, logits are never stored
            (:func:`fastkd.linear_softmax_divergence`); ``"logits"``: the models' logits as they
            are. Where the output layer is no plain linear layer, ``"fused"`` becomes ``"logits"``.
        chunk_size: rows of a chunk of the fused head; None: by size.

    Raises:
        ValueError: an option has the wrong value.

    >>> from fastkd.integrations import KDOptions
    >>> KDOptions(divergence="jsd", head="logits").beta
    0.5
    """

    divergence: Divergence = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    label_weight: float = 0.0
    tail: Tail = "lump"
    square_temperature: bool = False
    head: Literal["fused", "logits"] = "fused"
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        allowed = {
            "divergence": choices("softmax_divergence", "divergence"),
            "tail": choices("topk_divergence", "tail"),
            "head": ("fused", "logits"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"KDOptions: {name} must be one of {', '.join(values)}, "
                    f"got {getattr(self, name)!r}"
                )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"KDOptions: temperature must be positive, got {self.temperature}")
        if not 0 <= self.label_weight < math.inf:
            raise ValueError(
                f"KDOptions: label_weight must not be negative, got {self.label_weight}"
            )
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"KDOptions: chunk_size must be 1 or more, got {self.chunk_size}")
