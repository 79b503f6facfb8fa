"""How a trainer distils."""

import math
from dataclasses import dataclass
from typing import Literal

from fastkd._ops.arguments import choices, to_flag, to_number
from fastkd._ops.names import Divergence, Tail
from fastkd._ops.padding import positive_or_none


@dataclass(frozen=True)
class KDOptions:
    """How a trainer distils: the loss, and where the student's logits come from.

    Args:
        divergence: see :func:`fastkd.softmax_divergence`; with a stored teacher one of those of
            :func:`fastkd.topk_divergence`.
        beta: number of a divergence that has one (``"jsd"``, for example).
        temperature: of the softmax of both sides.
        stored_temperature: at which a stored teacher's rows were computed: the store's
            ``temperature``. See :func:`fastkd.topk_divergence`.
        label_weight: weight of the labels' cross-entropy, which is added to the divergence; 0: it
            is not computed.
        tail: how tokens that a stored teacher does not have count: see
            :func:`fastkd.topk_divergence`.
        square_temperature: multiplies the divergence by temperature².
        head: ``"fused"``: from hidden states, logits are never stored
            (:func:`fastkd.linear_softmax_divergence`); ``"logits"``: the models' logits as they
            are. Where the output layer is no plain linear layer on the backbone's output,
            ``"fused"`` becomes ``"logits"``.
        chunk_size: rows of logits that the fused head computes at a time; None: by size.

    Raises:
        ValueError, TypeError: an option has the wrong value or type.

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
    stored_temperature: float = 1.0

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
        for name in ("beta", "temperature", "label_weight", "stored_temperature"):
            to_number("KDOptions", name, getattr(self, name))
        to_flag("KDOptions", "square_temperature", self.square_temperature)
        for name in ("temperature", "stored_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"KDOptions: {name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.label_weight < math.inf:
            raise ValueError(
                f"KDOptions: label_weight must not be negative, got {self.label_weight}"
            )
        positive_or_none("KDOptions", "chunk_size", self.chunk_size)
