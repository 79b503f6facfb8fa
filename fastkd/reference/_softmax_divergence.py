"""softmax_divergence and kl_div."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.op import declared
from fastkd.reference._rows import DEAD, Rows, divergence_rows, exp, from_largest, log_softmax


def _teacher_log_probs(
    teachers: Sequence[Tensor],
    weights: Tensor | None,
    mix: str,
    temperature: float | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    if len(teachers) == 1 and (weights is None or mix == "probs"):
        return log_softmax(teachers[0].to(dtype), temperature)
    count = len(teachers)
    if weights is None:
        weights = teachers[0].new_full((count,), 1 / count, dtype=dtype)
    weights = weights.to(dtype)
    if mix == "logits":
        stacked = torch.stack([from_largest(t.to(dtype)) for t in teachers], -1)
    else:
        stacked = torch.stack([log_softmax(t.to(dtype), temperature) for t in teachers], -1)
    counts = (weights != 0).unsqueeze(-2) if weights.dim() > 1 else weights != 0
    per_row = weights.unsqueeze(-2) if weights.dim() > 1 else weights
    if mix == "logits":
        dead = (stacked < -DEAD) & counts
        live = torch.where(dead | ~counts, 0.0, stacked)
        mixed = (live * per_row).sum(-1)
        # NaN and +inf give NaN, also together with -inf.
        mixed = torch.where(dead.any(-1) & mixed.isfinite(), -math.inf, mixed + (mixed - mixed))
        return log_softmax(mixed, temperature)
    logs = stacked + per_row.log()
    return torch.log_softmax(logs.masked_fill(~counts, -math.inf).logsumexp(-1), -1)


def _adapted(
    teachers: Sequence[Tensor], weights: Tensor | None, mix: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The weights of two teachers' logits by their distance, and the divergence's factor."""
    if weights is None:
        weights = teachers[0].new_full((2,), 0.5, dtype=dtype)
    strength, coefficient = weights.to(dtype).unbind(-1)
    p, other = (exp(log_softmax(t.to(dtype), 1.0)) for t in teachers)
    a = strength * (p - other).abs().sum(-1) + 1e-3
    pair = (1 + a, -a) if mix == "contrast" else (a, 1 - a)
    return torch.stack(pair, -1), coefficient / a


def softmax_divergence_op(
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor],
    divergence: str,
    beta: float,
    betas: Tensor | None,
    alpha: float,
    alphas: Tensor | None,
    teacher_temperature: float,
    teacher_temperatures: Tensor | None,
    teacher_weights: Tensor | None,
    teacher_mix: str,
    teacher_rows: Tensor | None,
    **row_options: Any,
) -> Tensor:
    """The raw op's loss, from its fields."""
    if teacher_rows is not None:
        # Only rows that are read may have numbers that mean nothing.
        row_options["taught"] = taught = teacher_rows >= 0
        at = torch.where(taught, teacher_rows, 0).long()
        some = [t.reshape(-1, t.size(-1)) for t in teacher_logits]
        teacher_logits = [t[at] if len(t) else t.new_zeros((*at.shape, t.size(-1))) for t in some]
    rows = Rows(student_logits, teacher_logits, **row_options)
    log_q = log_softmax(rows.student, rows.tau)
    teachers, factor = [rows.teacher(t) for t in teacher_logits], None
    if teacher_mix in ("contrast", "share"):
        teacher_weights, factor = _adapted(teachers, teacher_weights, teacher_mix, rows.dtype)
        teacher_mix = "logits"
    log_p = _teacher_log_probs(
        teachers,
        teacher_weights,
        teacher_mix,
        rows.per_row(teacher_temperature, teacher_temperatures),
        rows.dtype,
    )
    shares = rows.share(beta, betas), rows.share(alpha, alphas)
    labels = None if rows.labels is None else rows.columns()
    value = divergence_rows(log_p, log_q, divergence, *shares, labels=labels)
    return rows.finish(value if factor is None else factor * value)


def softmax_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    **options: Any,
) -> Tensor:
    """`fastkd.softmax_divergence` in plain PyTorch, with the same arguments except `inplace`."""
    return declared("softmax_divergence").by_definition(student_logits, teacher_logits, **options)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """torch.nn.functional.kl_div itself."""
    return torch.nn.functional.kl_div(input, target, size_average, reduce, reduction, log_target)
