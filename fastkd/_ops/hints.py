"""Warnings, once a process, about arguments that are allowed and seldom meant. Eager mode only."""

import warnings
from typing import Any

from torch import Tensor

_seen: set[str] = set()


def hint(key: str, message: str) -> None:
    """Warn unless this was said before."""
    if key not in _seen:
        _seen.add(key)
        warnings.warn(message, stacklevel=5)


def check_loss(function: str, logits: Tensor, given: dict[str, Any]) -> None:
    """What is cheap to know of the arguments of a loss over rows."""
    label_weight = given["label_weight"]
    if given["labels"] is None and type(label_weight) is float and label_weight != 1:
        hint(
            f"{function}.label_weight",
            f"{function}: label_weight is {label_weight}, but labels is None: there is no "
            "label term",
        )
    normalizer = given["normalizer"]
    if isinstance(normalizer, (int, float)) and normalizer == 0:
        hint(
            f"{function}.normalizer",
            f"{function}: normalizer is 0: the loss and its gradients are 0",
        )
    if function not in _seen:
        _seen.add(function)
        _check_first_row(function, logits)


def _check_first_row(function: str, logits: Tensor) -> None:
    """Of the first call's logits: are they probabilities? On the CPU only, where nothing waits."""
    if logits.device.type != "cpu" or logits.numel() == 0 or logits.size(-1) < 4:
        return
    row = logits.detach()
    while row.dim() > 1:
        row = row[0]
    row = row.double()
    if bool((row >= 0).all()) and abs(row.sum().item() - 1) < 1e-3:
        hint(
            f"{function}.student_logits",
            f"{function}: the first row of student_logits sums to 1 and has no negative entry: "
            "logits are expected, not probabilities",
        )


def forget() -> None:
    """Warn again; for tests."""
    _seen.clear()
