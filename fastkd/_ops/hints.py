"""Warnings, once a process, about arguments that are allowed but probably wrong. Eager only."""

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd._ops.library import is_tracing, transforms_active

#: Code that stands between a user's line and a warning: fastkd's, and torch's (modules, autograd).
_PACKAGES = tuple(
    os.path.join(os.path.dirname(os.path.abspath(file)), "")
    for file in (os.path.dirname(__file__), torch.__file__)
)
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


def warn(message: str) -> None:
    """Warn at the line outside of fastkd and torch that called."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGES):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def hint(key: str, message: str) -> None:
    """Warn once for each key."""
    if key not in _seen:
        _seen.add(key)
        warn(message)


def check_label_weight(function: str, label_weight: Any) -> None:
    """Hint at a label weight other than 0 in a module's call without labels."""
    if torch.compiler.is_compiling():
        return
    of_rows = isinstance(label_weight, Tensor)
    if of_rows or label_weight != 0:
        hint(
            f"{function}.label_weight",
            f"{function}: label_weight is {'given' if of_rows else label_weight}, but labels is "
            "None: there is no label term",
        )


def check_boundaries(function: str, boundaries: Mapping[str, Tensor | np.ndarray]) -> None:
    """Hint at a vocabulary without a boundary. Tensors are read on the CPU alone."""
    if torch.compiler.is_compiling() or _silent.get() or transforms_active():
        return
    for name, boundary in boundaries.items():
        if isinstance(boundary, Tensor) and (boundary.device.type != "cpu" or is_tracing(boundary)):
            continue
        if not boundary.any():
            hint(
                f"{function}.{name}",
                f"{function}: no token of {name} begins a word (see ByteVocab.boundary): with "
                "debias=True no chunk has a gradient",
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
