"""clipped_divergence."""

import math
from typing import Any

import torch
from torch import Tensor

from fastkd.reference._origin import relative_to_largest
from fastkd.reference._rows import Rows, exp, finite, log_softmax, log_sum_exp, safe_log


def _quantile(p: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A quantile of each row by linear interpolation, and the two probabilities it lies between."""
    ordered = p.detach().sort(-1).values
    place = level.detach().double() * (p.size(-1) - 1)
    below = place.floor().long().clamp(0, p.size(-1) - 1)
    above = (below + 1).clamp(max=p.size(-1) - 1)
    first, second = (ordered.gather(-1, i.unsqueeze(-1)).squeeze(-1) for i in (below, above))
    # By the level, for the gradient.
    share = level.to(p.dtype) * (p.size(-1) - 1) - below
    return first + share * (second - first), first, torch.where(place > below, second, first)


def clipped_divergence_op(
    student_logits: Tensor,
    teacher_logits: Tensor,
    lower: Tensor,
    upper: Tensor,
    keep_label: bool,
    renormalize: str,
    tail: str,
    softness: float,
    quantile: bool,
    teacher_temperature: float,
    teacher_temperatures: Tensor | None,
    **row_options: Any,
) -> Tensor:
    """The raw op's loss, from its fields."""
    rows = Rows(student_logits, [teacher_logits], **row_options)
    rows.student = relative_to_largest(rows.student)
    log_q = log_softmax(rows.student, rows.tau)
    tau = rows.per_row(teacher_temperature, teacher_temperatures)
    log_p = log_softmax(relative_to_largest(rows.logits(teacher_logits)), tau)
    p, q = exp(log_p), exp(log_q)
    low, high = (torch.where(rows.read, x, 0.0).to(rows.dtype) for x in (lower, upper))
    least, most = low, high
    if quantile:
        low, _, least = _quantile(p, low)
        high, most, _ = _quantile(p, high)
    if softness:
        share = torch.sigmoid((p - low.unsqueeze(-1)) / softness)
        share = share * torch.sigmoid((high.unsqueeze(-1) - p) / softness)
    else:
        share = ((p >= least.unsqueeze(-1)) & (p <= most.unsqueeze(-1))).to(rows.dtype)
    if keep_label and rows.labels is not None:
        at = torch.where(rows.read, rows.labels, 0).long().unsqueeze(-1)
        kept = torch.zeros_like(share, dtype=torch.bool).scatter(-1, at, True)
        share = torch.where(kept, 1.0, share)
    # s p (d + expm1(-d)) with d = log p - log q, and what the masses add.
    lost = (log_p != -math.inf) & (log_q == -math.inf)
    terms = p * (
        finite(log_p) - torch.where(lost, finite(log_q), log_q.masked_fill(log_q == -math.inf, 0))
    )
    terms = torch.where(log_p == -math.inf, 0.0, terms)
    infinite = (lost & (share > 0)).any(-1)
    whole = (share * terms).sum(-1)
    mass = (share * p).sum(-1)
    if renormalize == "none":
        loss = whole
        if tail == "lump":
            rest, rest_q = ((1 - share) * p).sum(-1), ((1 - share) * q).sum(-1)
            some = rest > 0
            infinite = infinite | (some & (rest_q == 0))
            ratio = torch.where(some, rest, 1.0).log() - torch.where(rest_q > 0, rest_q, 1.0).log()
            loss = loss + torch.where(some, rest * ratio, 0.0)
    else:
        some = mass > 0
        safe = torch.where(some, mass, 1.0)
        loss = whole / safe - safe.log()
        if renormalize == "both":
            # Relative to the support's own largest: its mass may underflow.
            inside = (share > 0) & (log_q != -math.inf)
            own = log_q.masked_fill(~inside, 0) + safe_log(share).masked_fill(~inside, 0)
            log_other = log_sum_exp(torch.where(inside, own, -math.inf)).squeeze(-1)
            infinite = infinite | (some & (log_other == -math.inf))
            loss = loss + torch.where(log_other == -math.inf, 0.0, log_other)
        loss = torch.where(some, loss, 0.0)
        infinite = infinite & some
    loss = torch.where(infinite & ~loss.isnan(), loss + (math.inf - loss).detach(), loss)
    poison = (p.sum(-1) + q.sum(-1)).detach() * 0
    return rows.finish(loss + poison)


def clipped_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    lower: float | Tensor,
    upper: float | Tensor,
    **options: Any,
) -> Tensor:
    """`fastkd.clipped_divergence` in plain PyTorch, with the same arguments."""
    from fastkd._ops.arguments import with_defaults
    from fastkd.clipped_divergence import OP, clipped_divergence, given

    options = with_defaults(clipped_divergence, options)
    return OP.define(student_logits, given(student_logits, teacher_logits, lower, upper, options))
