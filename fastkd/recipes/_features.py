"""Code shared by the recipes on features: checks, rows that count, unit vectors."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._ops.arguments import choices, numbers_tensor
from fastkd._ops.checks import check_normalizer, check_tensors, is_number
from fastkd._ops.gradient import savable
from fastkd._ops.linear.logits import without_autocast
from fastkd._ops.names import Reduction
from fastkd.recipes._chunks import check_integers, check_mask, check_range, reduced, wide
from fastkd.recipes._rows import check_choice

#: Kinds of distances between rows.
KINDS = ("mse", "l1", "smooth_l1", "cosine", "log_sigmoid_cosine", "pkd")


def check_floats(function: str, **tensors: Any) -> None:
    """Raise unless all are floating-point tensors on one device."""
    check_tensors(function, tensors)
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise TypeError(f"{function}: {name} must be floating-point, got {value.dtype}")


def check_like(function: str, name: str, values: Tensor, other: str, like: Tensor) -> None:
    """Raise unless both are floating-point tensors of one shape."""
    check_floats(function, **{other: like, name: values})
    if values.shape != like.shape:
        raise ValueError(
            f"{function}: {name} must have the shape {list(like.shape)} of {other}, got "
            f"{list(values.shape)}"
        )


def check_rank(function: str, name: str, values: Tensor, *layout: str) -> None:
    """Raise unless the tensor has one dimension for each name."""
    check_floats(function, **{name: values})
    if values.dim() != len(layout):
        raise ValueError(
            f"{function}: {name} must be [{', '.join(layout)}], got {list(values.shape)}"
        )


def check_factors(function: str, name: str, values: Any, count: int) -> None:
    """Raise unless the values are `count` numbers, finite and not negative."""
    if not isinstance(values, (tuple, list)) or len(values) != count:
        raise ValueError(f"{function}: {name} must be {count} numbers, got {values!r}")
    for value in values:
        if not is_number(value):
            raise TypeError(
                f"{function}: {name} must be {count} numbers, got a {type(value).__name__}"
            )
        if not 0 <= value < math.inf:
            raise ValueError(
                f"{function}: {name} must be finite and not negative, got {tuple(values)}"
            )


def as_numbers(function: str, name: str, values: Any, like: Tensor) -> Tensor:
    """A tensor, or a sequence of numbers as float64, on the device of ``like``."""
    if not isinstance(values, Tensor):
        return numbers_tensor(function, name, values, like)
    check_tensors(function, {name: values})
    return values.to(like.device)


def check_classes(function: str, labels: Tensor, logits: Tensor) -> None:
    """Raise unless the labels are one for each row of logits, -100 or in range."""
    check_integers(function, "labels", labels, logits.shape[:-1], logits.device)
    check_range(
        function, "labels", torch.where(labels == -100, 0, labels), 0, max(logits.size(-1), 1)
    )


def only(values: Tensor, mask: Tensor | None) -> Tensor:
    """The values with 0 in the rows that do not count, also where these hold NaN."""
    if mask is None:
        return values
    mask = savable(mask)
    return torch.where(mask.reshape(*mask.shape, *[1] * (values.dim() - mask.dim())), values, 0)


def mean(values: Tensor) -> Tensor:
    """The mean of all values, 0 if there are none."""
    return values.sum() / max(values.numel(), 1)


def unit(values: Tensor, dim: int = -1) -> Tensor:
    """Vectors of length 1 along `dim`; a zero vector stays zero and gets no gradient."""
    square = values.square().sum(dim, keepdim=True)
    empty = square == 0
    return torch.where(empty, 0, values * torch.where(empty, 1, square).rsqrt())


def product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product in the wider precision of its arguments, also where autocast is on."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    with without_autocast(a.device):
        return a.to(dtype) @ b.to(dtype)


def cosine(student: Tensor, teacher: Tensor, dim: int = -1) -> Tensor:
    """Cosines along `dim`, 0 where a vector is zero."""
    return (unit(student, dim) * unit(teacher, dim)).sum(dim)


def masked_pair(function: str, mask: Tensor | None, **pair: Tensor) -> tuple[Tensor, Tensor]:
    """Student's and teacher's features of one shape, checked; rows that do not count are 0."""
    (student_name, student), (teacher_name, teacher) = pair.items()
    check_like(function, teacher_name, teacher, student_name, student)
    check_mask(function, "mask", mask, student.shape[:-1], student.device)
    return wide(only(student, mask)), wide(only(teacher, mask))


def check_reduction(function: str, reduction: Reduction, normalizer: float | Tensor | None) -> None:
    """Raise unless an op over rows reduces so."""
    check_choice(function, "reduction", reduction, choices("softmax_divergence", "reduction"))
    check_normalizer(function, normalizer)


def count_over(kept: Tensor, factor: float) -> Tensor:
    """The normalizer that makes `factor` times a mean of a sum over the rows that count."""
    return kept.sum().double() / factor


def mean_of_rows(function: str, losses: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over rows that count of losses that are finite where they do not."""
    kept = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask
    return reduced(function, only(losses, mask), kept, "mean", None)


def distances(kind: str, student: Tensor, teacher: Tensor, beta: float = 1.0) -> Tensor:
    """Distance of a kind between each row, the last dimension, of the student and the teacher."""
    if kind == "mse":
        return (student - teacher).square().mean(-1)
    if kind == "l1":
        return (student - teacher).abs().mean(-1)
    if kind == "smooth_l1":
        # Not torch's, which makes beta a constant of a compiled graph.
        size = (student - teacher).abs()
        return torch.where(size < beta, size.square() / (2 * beta), size - beta / 2).mean(-1)
    if kind == "pkd":
        return (unit(student) - unit(teacher)).square().sum(-1)
    found = cosine(student, teacher)
    return 1 - found if kind == "cosine" else -F.logsigmoid(found)
