"""Checks and reductions of functions that compose ops, and of gated routing."""

import math
import sys
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd._ops.arguments import (
    CHOICES,
    can_be_read,
    check_dense,
    check_device_has_kernels,
    has_values,
)
from fastkd._ops.library import is_tracing
from fastkd._ops.names import Reduction

_REDUCTIONS = tuple(CHOICES["softmax_divergence.reduction"])


def check_tensors(function: str, tensors: Mapping[str, Any]) -> None:
    """Raise unless all are dense tensors on one device, which has kernels."""
    for name, value in tensors.items():
        check_dense(function, name, value)
    name, first = next(iter(tensors.items()))
    check_device_has_kernels(function, name, first)
    for other, value in tensors.items():
        check_device(function, other, value, first.device, name)


def check_device(
    function: str, name: str, value: Tensor, device: torch.device, of: str = ""
) -> None:
    """Raise unless the tensor is on this device, which may be that `of` another argument."""
    if value.device != device:
        words = (
            f"on the device of {of}, {device}" if of else f"on the other tensors' device, {device}"
        )
        raise ValueError(f"{function}: {name} must be {words}, got {value.device}")


def is_number(value: Any) -> bool:
    """Whether the value is a number, or a tensor or array of one element."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dtype != torch.bool
    return isinstance(value, Real) or (isinstance(value, np.ndarray) and value.ndim == 0)


def _is_unknown(number: Any) -> bool:
    """Whether a number is a tensor that is traced, on the meta device or of a transform."""
    return isinstance(number, Tensor) and (is_tracing(number) or not has_values(number))


def is_too_large(value: Any) -> bool:
    """Whether it is an integer larger than any float."""
    known = isinstance(value, int) and not torch.compiler.is_compiling()
    return known and abs(value) > sys.float_info.max


def _is_between(value: Any, low: float, high: float) -> bool:
    """Whether a number's value is, or is unknown."""
    return _is_unknown(value) or (not is_too_large(value) and low < value < high)


def check_finite(function: str, name: str, value: Any) -> None:
    """Raise unless the value is a finite number, if it can be read."""
    if not is_number(value):
        raise TypeError(f"{function}: {name} must be a number, got {type(value).__name__}")
    if not _is_between(value, -math.inf, math.inf):
        raise ValueError(f"{function}: {name} must be finite, got {value}")


def check_positive(function: str, name: str, value: Any) -> None:
    """Raise unless the value is a positive, finite number, if it can be read."""
    if not is_number(value):
        raise TypeError(f"{function}: {name} must be a number, got {type(value).__name__}")
    if not _is_between(value, 0, math.inf):
        raise ValueError(f"{function}: {name} must be positive and finite, got {value}")


def check_normalizer(function: str, normalizer: Any) -> None:
    """Raise unless the normalizer is None, a number or a 0-d tensor."""
    wanted = f"{function}: normalizer must be a number or a 0-d tensor"
    if isinstance(normalizer, Tensor):
        if normalizer.dim():
            raise ValueError(f"{wanted}, got shape {list(normalizer.shape)}")
        if can_be_read(normalizer) and normalizer < 0:
            raise ValueError(f"{function}: normalizer must not be negative, got {normalizer}")
    elif normalizer is not None and not is_number(normalizer):
        raise TypeError(f"{wanted}, got {type(normalizer).__name__}")
    elif is_too_large(normalizer):
        raise ValueError(f"{wanted}, got an integer larger than any float")


def reduced(
    function: str,
    losses: Tensor,
    kept: Tensor,
    reduction: Reduction,
    normalizer: float | Tensor | None,
) -> Tensor:
    """The reduced losses. ``kept``: those that ``"mean"`` counts; the others are 0."""
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"{function}: reduction must be one of {', '.join(_REDUCTIONS)}; got {reduction!r}"
        )
    check_normalizer(function, normalizer)
    if reduction == "none":
        if normalizer is not None:
            raise ValueError(
                f"{function}: normalizer has no meaning with reduction='none', which divides by "
                "nothing"
            )
        return losses
    if normalizer is None:
        if reduction == "mean":
            normalizer = kept.sum()
        elif reduction == "batchmean":
            normalizer = losses.size(0)
        else:
            normalizer = losses.numel() if reduction == "elementmean" else 1
    if isinstance(normalizer, Tensor):
        divisor = normalizer.detach().reshape(()).to(losses.device, torch.float64)
    else:
        if not torch.compiler.is_compiling() and not normalizer >= 0:
            raise ValueError(f"{function}: normalizer must not be negative, got {normalizer}")
        if isinstance(normalizer, np.ndarray):
            normalizer = normalizer.item()
        # A product: torch.full would make the number a constant of a compiled graph.
        divisor = torch.ones((), dtype=torch.float64, device=losses.device) * normalizer
    empty = divisor == 0
    return torch.where(empty, 0, losses.sum() / torch.where(empty, 1, divisor)).to(losses.dtype)


def check_devices(
    function: str,
    values: Mapping[str, Any],
    tensors: Sequence[str],
    called: Mapping[str, str],
) -> None:
    """Raise if a tensor is on another device, also for meta tensors, which use the fake kernel."""
    device = values[tensors[0]].device
    for field in tensors:
        value = values[field]
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if tensor is not None:
                check_device(function, called.get(field, field), tensor, device, tensors[0])
