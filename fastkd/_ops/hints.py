"""Warnings, once a process, about arguments that are allowed but probably wrong. Eager only."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd._ops.library import transforms_active

_seen: set[str] = set()
_silent: ContextVar[bool] = ContextVar("_silent", default=False)


@contextmanager
def silent() -> Iterator[None]:
    """Give no warning inside, nor count it as given: for calls that only check arguments."""
    before = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(before)


def hint(key: str, message: str, stacklevel: int = 5) -> None:
    """Warn once for each key. ``stacklevel``: how many calls above this one the user's is."""
    if key not in _seen:
        _seen.add(key)
        # hint, check_loss, Op.__call__, the public function, and its caller
        warnings.warn(message, stacklevel=stacklevel)


def check_label_weight(function: str, label_weight: Any) -> None:
    """Hint at a label weight other than 0 in a module's call without labels."""
    if torch.compiler.is_compiling():
        return
    of_rows = isinstance(label_weight, Tensor)
    if of_rows or label_weight != 0:
        # hint, this, forward, two of nn.Module, and their caller
        hint(
            f"{function}.label_weight",
            f"{function}: label_weight is {'given' if of_rows else label_weight}, but labels is "
            "None: there is no label term",
            stacklevel=6,
        )


def check_boundaries(function: str, boundaries: Mapping[str, np.ndarray]) -> None:
    """Hint at a vocabulary without a boundary; called by the public function itself."""
    for name, boundary in boundaries.items():
        if not boundary.any():
            hint(
                f"{function}.{name}",
                f"{function}: no token of {name} begins a word (see ByteVocab.boundary): with "
                "debias=True no chunk has a gradient",
                stacklevel=4,
            )


def check_loss(function: str, logits: Tensor, given: dict[str, Any]) -> None:
    """Cheap hints about the arguments of a loss over rows, which are checked already."""
    if _silent.get():
        return
    label_weight = given["label_weight"]
    of_rows = given.get("label_weights") is not None
    if given["labels"] is None and (of_rows or (type(label_weight) is float and label_weight != 1)):
        hint(
            f"{function}.label_weight",
            f"{function}: label_weight is {'given' if of_rows else label_weight}, but labels is "
            "None: there is no label term",
        )
    if type(given["denominator"]) is float and given["denominator"] == 0:
        hint(
            f"{function}.normalizer",
            f"{function}: normalizer is 0: the loss and its gradients are 0",
        )
    if function not in _seen and not transforms_active():
        _seen.add(function)
        if _first_row_sums_to_1(logits):
            name = "logits" if "logits" in given else "student_logits"
            hint(
                f"{function}.{name}",
                f"{function}: the first row of {name} sums to 1 and has no negative "
                "entry: logits are expected, not probabilities",
            )


def _first_row_sums_to_1(logits: Tensor) -> bool:
    """Whether the first row sums to 1. On the CPU only, as it would synchronise elsewhere."""
    if logits.device.type != "cpu" or logits.numel() == 0 or logits.size(-1) < 4:
        return False
    row = logits.detach()
    while row.dim() > 1:
        row = row[0]
    row = row.double()
    return bool((row >= 0).all()) and abs(row.sum().item() - 1) < 1e-3


def forget() -> None:
    """Reset, so that all warnings are given again; for tests."""
    _seen.clear()
