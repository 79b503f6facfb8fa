"""Code shared by the recipes whose rows are tokens: checks, reductions, values of a row."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.arguments import check_no_gradient
from fastkd._ops.checks import check_device, check_normalizer, check_tensors, is_number
from fastkd._ops.gradient import savable
from fastkd._ops.names import TextReduction
from fastkd._ops.shift import IGNORED
from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.losses._token_log_probs import TokenLogProbs, token_log_probs
from fastkd.losses._token_stats import token_stats
from fastkd.recipes._chunks import check_dtype, check_integers, check_mask, readable
from fastkd.teachers._teacher_topk import TopK, teacher_topk


def check_rows(
    function: str,
    tensors: Mapping[str, Any],
    *,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    weight: Tensor | None = None,
) -> None:
    """Raise unless all tensors ``[..., width]`` have the rows of the first, and the rest fits."""
    check_tensors(function, tensors)
    (name, first), *others = tensors.items()
    if not first.dim():
        raise ValueError(f"{function}: {name} must be [..., width], got a 0-d tensor")
    rows = first.shape[:-1]
    for other, values in tensors.items():
        check_dtype(function, other, values)
    for other, values in others:
        if values.shape[:-1] != rows or not values.dim():
            raise ValueError(
                f"{function}: {other} must have the leading dimensions {list(rows)} of {name}, "
                f"got shape {list(values.shape)}"
            )
    check_mask(function, "mask", mask, rows, first.device)
    if labels is not None:
        check_integers(function, "labels", labels, rows, first.device)
    if weight is not None:
        check_row_values(function, "weight", weight, rows, first.device)


def check_width(function: str, name: str, values: Tensor, other: str, like: Tensor) -> None:
    """Raise unless the rows of one tensor are as wide as those of another."""
    if values.size(-1) != like.size(-1):
        raise ValueError(
            f"{function}: {name} must have the {like.size(-1)} columns of {other}, got "
            f"{values.size(-1)}"
        )


def check_row_values(
    function: str, name: str, values: Any, rows: torch.Size, device: torch.device | None = None
) -> None:
    """Raise unless the values are a float tensor with one entry a row."""
    check_tensors(function, {name: values})
    if device is not None:
        check_device(function, name, values, device)
    if not values.is_floating_point() or values.shape != rows:
        raise ValueError(
            f"{function}: {name} must be float {list(rows)}, got {values.dtype} "
            f"{list(values.shape)}"
        )


def check_share(function: str, name: str, value: Any) -> None:
    """Raise unless the number lies in [0, 1], if it can be read."""
    if not is_number(value) or (isinstance(value, Tensor) and value.is_complex()):
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{function}: {name} must be a number, got {kind}")
    if isinstance(value, Tensor) and not readable(value):
        return
    if not 0 <= value <= 1:
        raise ValueError(f"{function}: {name} must lie in [0, 1], got {value}")


def check_choice(function: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{function}: {name} must be one of {', '.join(choices)}; got {value!r}")


def kept_rows(like: Tensor, mask: Tensor | None, labels: Tensor | None = None) -> Tensor:
    """Bool, one a row of ``like``, ``[..., width]``: those that count."""
    kept = mask
    if labels is not None:
        labelled = labels != IGNORED
        kept = labelled if kept is None else kept & labelled
    if kept is None:
        return torch.ones(like.shape[:-1], dtype=torch.bool, device=like.device)
    return savable(kept)


def number_type(values: Tensor) -> torch.dtype:
    """The dtype of losses of these logits: float32, or float64 for float64."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def row_options(
    function: str,
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
) -> dict[str, Any]:
    """Arguments of an op over rows that make it reduce so, also by ``"sequence_mean"``.

    That is the mean over a text's rows, then over the texts (dimension 0): the sum with the weight
    1 / (the text's rows), over the number of texts.
    """
    options = {"mask": mask, "weight": weight, "reduction": reduction, "normalizer": normalizer}
    if reduction != "sequence_mean":
        return options
    if logits.dim() < 3:
        raise ValueError(
            f"{function}: reduction sequence_mean needs logits of texts, rows and columns, got "
            f"shape {list(logits.shape)}"
        )
    check_normalizer(function, normalizer)
    kept = kept_rows(logits, mask, labels)
    texts = kept.size(0)
    count = kept.flatten(1).sum(1).clamp(min=1).to(number_type(logits))
    share = (1 / count).view(-1, *[1] * (kept.dim() - 1)).expand(kept.shape)
    options["weight"] = share if weight is None else weight * share
    options["reduction"] = "sum"
    options["normalizer"] = texts if normalizer is None else normalizer
    return options


def row_divergence(
    function: str,
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
    **options: Any,
) -> Tensor:
    """:func:`fastkd.softmax_divergence` with the reductions of recipes, see :func:`row_options`."""
    rows = row_options(
        function,
        student_logits,
        mask=mask,
        labels=labels,
        weight=weight,
        reduction=reduction,
        normalizer=normalizer,
    )
    return softmax_divergence(student_logits, teacher_logits, labels=labels, **options, **rows)


def scaled_weight(logits: Tensor, factor: float | Tensor, weight: Tensor | None) -> Tensor:
    """A constant times the weight of each row; it scales a loss before its gradient is written."""
    if weight is not None:
        return weight * factor
    # A product: torch.full would make the number a constant of a compiled graph.
    one = torch.ones((), dtype=number_type(logits), device=logits.device)
    return (one * factor).expand(logits.shape[:-1])


def label_log_probs(
    logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    r"""Log-probability of each row's label, :math:`\log q(y)`, with its gradient.

    ``logits`` ``[..., vocab]``, ``labels`` ``[...]``. Rows that do not count, by the mask or
    by the label -100, are not read: 0. The logits are read once, and once more for the gradient.
    """
    found = token_log_probs(logits, labels, mask=mask, temperature=temperature)
    assert isinstance(found, Tensor)
    return found


def log_probs_at(
    logits: Tensor, indices: Tensor, lse: Tensor, temperature: float | Tensor = 1.0
) -> Tensor:
    """Log-probabilities of some columns of each row, ``[..., k]``, by the row's log-sum-exp."""
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature.unsqueeze(-1)
    found = logits.gather(-1, indices.long()).to(lse.dtype)
    return found / temperature - lse.unsqueeze(-1)


def best_log_probs(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The k likeliest tokens as :func:`fastkd.teacher_topk` gives them, in float64 for float64."""
    best = teacher_topk(logits, k, temperature=temperature)
    if logits.dtype != torch.float64:
        return best
    lse = token_stats(logits, temperature=temperature).student_lse
    return TopK(log_probs_at(logits, best.indices, lse, temperature), best.indices)


def entropy(
    logits: Tensor, *, temperature: float | Tensor = 1.0, mask: Tensor | None = None
) -> Tensor:
    r"""Entropy of each row in nats, with its gradient; 0 where the mask is False.

    The logits are read once, and once more for the gradient.
    """
    some = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    found = token_log_probs(logits, some, mask=mask, temperature=temperature, entropy=True)
    assert isinstance(found, TokenLogProbs)
    return found.entropy


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the rows that count; 0 if there is none."""
    return torch.where(savable(mask), values, 0).sum() / mask.sum().clamp(min=1)


def other_label_log_probs(
    function: str,
    name: str,
    other: Tensor,
    student_logits: Tensor,
    labels: Tensor,
    kept: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Another model's log-probability of each label without gradient, from logits or as given.

    ``other``, the argument ``name``: its logits, ``[..., vocab]``, or the log-probabilities
    themselves, one a row.
    """
    check_tensors(function, {name: other})
    check_no_gradient(function, **{name: other})
    if other.dim() == labels.dim():
        check_row_values(function, name, other, labels.shape, labels.device)
        return torch.where(kept, other.to(number_type(student_logits)), 0)
    check_rows(function, {"student_logits": student_logits, name: other})
    found = token_stats(
        other, labels=torch.where(kept, labels, IGNORED), temperature=temperature
    ).student_label_log_prob
    assert found is not None
    return torch.where(kept, found, 0)
