"""Arguments that the losses over rows of logits share: checks without kernels, and reductions."""

import math
import operator
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastkd._library import CUDA_ARCHITECTURES

_REDUCTIONS = ("none", "mean", "sum", "batchmean", "elementmean")


def check_tensors(function: str, tensors: Mapping[str, Any]) -> None:
    """Each must be a tensor, and where the first one lies there must be kernels."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{function}: {name} must be a tensor, got {type(value).__name__}")
    name, first = next(iter(tensors.items()))
    if first.device.type == "cuda" and not CUDA_ARCHITECTURES:
        raise RuntimeError(
            f"{function}: {name} is a CUDA tensor, but this fastkd has no CUDA kernels; build it "
            "where nvcc is found: `pip install --no-build-isolation .`"
        )


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


def integer(function: str, name: str, value: Any) -> int:
    """The value as an int, from Python's, numpy's or a 0-d tensor's integer."""
    if isinstance(value, (int, torch.SymInt)):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{function}: {name} must be an integer, got {type(value).__name__}"
        ) from None


def check_no_gradient(function: str, **values: Any) -> None:
    """Gradients that nobody would compute are an error, not a silent zero."""
    if not torch.is_grad_enabled():
        return
    for name, value in values.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{function}: {name} takes no gradient, but it requires one; detach it, or use "
                "reduction='none' and multiply the losses by it"
            )


def check_no_group(function: str, group: Any) -> None:
    """Vocabularies split across processes come later."""
    if group is not None:
        raise NotImplementedError(
            f"{function}: group (a vocabulary split across processes) is not available yet"
        )


def per_row(value: float | Tensor, student: Tensor) -> tuple[float, Tensor | None]:
    """A number for all rows, or one a row, as the raw ops take it."""
    if not isinstance(value, Tensor):
        return value, None
    if value.dim() == 0:
        value = value.to(student.device).expand(student.shape[:-1])
    return 1.0, value


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


def row_options(
    function: str,
    student: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    square_temperature: bool = False,
) -> tuple[Any, ...]:
    """What `RowOptions` in csrc/tensor/row_problem.h holds, in its order."""
    check_no_gradient(function, weight=weight, temperature=temperature)
    scalar, rows = per_row(temperature, student)
    mode, denominator, divisor = reduction_of(function, reduction, normalizer, student, vocab_size)
    return (
        scalar,
        rows,
        weight,
        mask,
        labels,
        label_weight,
        ignore_index,
        -1 if vocab_size is None else vocab_size,
        square_temperature,
        mode,
        denominator,
        divisor,
    )


def loss_like(student: Tensor, inputs: tuple[Tensor, ...], mode: str) -> Tensor:
    """A fake of the loss that the raw ops return."""
    float64 = any(x.dtype == torch.float64 for x in inputs)
    return student.new_empty(
        student.shape[:-1] if mode == "none" else (),
        dtype=torch.float64 if float64 else torch.float32,
    )


def pending_like(student: Tensor, gradients: list[Tensor], mode: str) -> Tensor:
    """A fake of the factor still to be applied to the gradients."""
    wait = mode != "none" and any(g.dtype == torch.float16 for g in gradients)
    return student.new_empty(() if wait else (0,), dtype=torch.float32)
