"""Rows of several lengths as one tensor: what collators of batches share."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.arguments import to_integer


def positive_or_none(function: str, name: str, value: Any) -> int | None:
    """An optional number of things, 1 or more."""
    if value is None:
        return None
    number: int = to_integer(function, name, value)
    if number < 1:
        raise ValueError(f"{function}: {name} must be 1 or more, got {number}")
    return number


def padded_length(lengths: Iterable[int], multiple: int) -> int:
    """The largest length, rounded up to a multiple."""
    return -(-max(lengths) // multiple) * multiple


def padded(rows: Sequence[Tensor], length: int, value: float, *, left: bool = False) -> Tensor:
    """``[len(rows), length, ...]``, of the first row's dtype: the rows, and ``value`` behind them.

    ``left``: before them.
    """
    first = rows[0]
    out = torch.full((len(rows), length, *first.shape[1:]), value, dtype=first.dtype)
    for place, row in zip(out, rows, strict=True):
        place[length - len(row) if left else 0 :][: len(row)] = row
    return out
