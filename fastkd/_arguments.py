"""Checks and reductions of functions that compose ops, and of gated routing."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.arguments import CHOICES, check_device_has_kernels

_REDUCTIONS = tuple(CHOICES["softmax_divergence.reduction"])


def check_tensors(function: str, tensors: Mapping[str, Any]) -> None:
    """Each must be a tensor, and where the first one lies there must be kernels."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{function}: {name} must be a tensor, got {type(value).__name__}")
    name, first = next(iter(tensors.items()))
    check_device_has_kernels(function, name, first)


def is_number(value: Any) -> bool:
    """Also in a tensor that holds one."""
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real)


def check_positive(function: str, name: str, value: Any) -> None:
    """A number to divide by."""
    if not is_number(value):
        raise TypeError(f"{function}: {name} must be a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{function}: {name} must be positive and finite, got {value}")


def check_normalizer(function: str, normalizer: Any) -> None:
    """None, a number or a 0-d tensor."""
    wanted = f"{function}: normalizer must be a number or a 0-d tensor"
    if isinstance(normalizer, Tensor):
        if normalizer.dim():
            raise ValueError(f"{wanted}, got shape {list(normalizer.shape)}")
    elif normalizer is not None and not isinstance(normalizer, Real):
        raise TypeError(f"{wanted}, got {type(normalizer).__name__}")


def check_no_group(function: str, group: Any) -> None:
    """Vocabularies split across processes come later."""
    if group is not None:
        raise NotImplementedError(
            f"{function}: group (a vocabulary split across processes) is not available yet"
        )


def reduction_of(
    function: str,
    reduction: str,
    normalizer: float | Tensor | None,
    student: Tensor,
    vocab_size: int | None,
) -> tuple[str, float, Tensor | None]:
    """The ops' own reduction (none, sum over a denominator, mean), its denominator, normalizer."""
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"{function}: reduction must be one of {', '.join(_REDUCTIONS)}; got {reduction!r}"
        )
    if reduction == "none":
        if normalizer is not None:
            raise ValueError(
                f"{function}: normalizer has no meaning with reduction='none', which divides by "
                "nothing"
            )
        return "none", 1.0, None
    if isinstance(normalizer, Tensor):
        return "sum", 1.0, normalizer.detach().to(student.device, torch.float64)
    if normalizer is not None:
        if not normalizer >= 0:
            raise ValueError(f"{function}: normalizer must not be negative, got {normalizer}")
        return "sum", float(normalizer), None
    if reduction == "mean":
        return "mean", 1.0, None
    if reduction == "sum":
        return "sum", 1.0, None
    if reduction == "batchmean":
        return "sum", float(student.size(0)), None
    columns = student.size(-1) if vocab_size is None else vocab_size
    return "sum", float(student.numel() // max(student.size(-1), 1) * columns), None
