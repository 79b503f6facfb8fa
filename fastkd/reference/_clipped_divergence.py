"""clipped_divergence."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._ops.op import declared
from fastkd.reference._origin import relative_to_largest
from fastkd.reference._rows import NO_WEIGHT, Rows, exp, finite, log_softmax, log_sum_exp


def _quantile(log_p: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A quantile of each row by linear interpolation, and the two log-probabilities around it.

    The two are the same where the quantile is one of the row's probabilities.
    """
    ordered = log_p.detach().sort(-1).values
    place = level.detach().double() * (log_p.size(-1) - 1)
    below = place.floor().long().clamp(0, log_p.size(-1) - 1)
    above = (below + 1).clamp(max=log_p.size(-1) - 1)
    first, second = (ordered.gather(-1, i.unsqueeze(-1)).squeeze(-1) for i in (below, above))
    # From the level and not `place`, which is detached, for the gradient.
    share = level.to(log_p.dtype) * (log_p.size(-1) - 1) - below
    at = first.exp() + share * (second.exp() - first.exp())
    return at, first, torch.where(place > below, second, first)


def product(log_x: Tensor, log_y: Tensor) -> Tensor:
    """The logarithm of x y, whose gradient stays finite where one of them is 0."""
    dead = (log_x == -math.inf) | (log_y == -math.inf)
    return torch.where(dead, -math.inf, log_x.masked_fill(dead, 0) + log_y.masked_fill(dead, 0))


def total(log: Tensor) -> Tensor:
    return log_sum_exp(log).squeeze(-1)


def log_shares(p: Tensor, low: Tensor, high: Tensor, softness: float) -> tuple[Tensor, Tensor]:
    """The logarithms of the weight s of soft edges and of 1 - s."""
    above, below = (p - low.unsqueeze(-1)) / softness, (high.unsqueeze(-1) - p) / softness
    inside = F.logsigmoid(above) + F.logsigmoid(below)
    outside = torch.stack(
        [F.logsigmoid(-above), F.logsigmoid(above) + F.logsigmoid(-below)], dim=-1
    )
    return inside, total(outside)


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
    log_p = log_softmax(relative_to_largest(rows.teacher(teacher_logits)), tau)
    p, q = exp(log_p), exp(log_q)
    low, high = (torch.where(rows.read, x, 0.0).to(rows.dtype) for x in (lower, upper))
    if softness:
        if quantile:
            low, high = _quantile(log_p, low)[0], _quantile(log_p, high)[0]
        log_share, log_rest = log_shares(p, low, high, softness)
    else:
        if quantile:
            least, most = _quantile(log_p, low)[2], _quantile(log_p, high)[1]
            inside = (log_p >= least.unsqueeze(-1)) & (log_p <= most.unsqueeze(-1))
        else:
            inside = (p >= low.unsqueeze(-1)) & (p <= high.unsqueeze(-1))
        log_share = torch.zeros_like(p).masked_fill(~inside, -math.inf)
        log_rest = torch.zeros_like(p).masked_fill(inside, -math.inf)
    if keep_label and rows.labels is not None:
        at = torch.where(rows.read, rows.labels, 0).long().unsqueeze(-1)
        kept = torch.zeros_like(p, dtype=torch.bool).scatter(-1, at, True)
        log_share = log_share.masked_fill(kept, 0)
        log_rest = log_rest.masked_fill(kept, -math.inf)
    # Masses are kept as logarithms, so that small ones do not underflow.
    own = product(log_share, log_p)
    by_p, by_q = torch.zeros_like(p[..., :1]), torch.zeros_like(p[..., :1])
    infinite = torch.zeros_like(rows.read)
    if renormalize != "none":
        log_mass = log_sum_exp(own)
        by_p = torch.where(log_mass == -math.inf, 0.0, log_mass)
        if renormalize == "both":
            log_other = log_sum_exp(product(log_share, log_q))
            infinite = ((log_mass != -math.inf) & (log_other == -math.inf)).squeeze(-1)
            by_q = torch.where(log_other == -math.inf, 0.0, log_other)
    weight = product(own, -by_p) if renormalize != "none" else own
    # Entries of weight 0 add nothing, whatever the other side's probability.
    infinite = infinite | ((weight >= NO_WEIGHT) & (log_q == -math.inf)).any(-1)
    ratio = (finite(log_p) - by_p) - (finite(log_q) - by_q)
    loss = torch.where(weight == -math.inf, 0.0, exp(weight) * ratio).sum(-1)
    if renormalize == "none" and tail == "lump":
        rest, rest_q = total(product(log_rest, log_p)), total(product(log_rest, log_q))
        infinite = infinite | ((rest != -math.inf) & (rest_q == -math.inf))
        loss = loss + torch.where(
            rest == -math.inf, 0.0, exp(rest) * (finite(rest) - finite(rest_q))
        )
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
    return declared("clipped_divergence").by_definition(
        student_logits, teacher_logits, lower, upper, **options
    )
