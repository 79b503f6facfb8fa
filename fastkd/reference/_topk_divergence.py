"""topk_divergence and teacher_topk."""

import math
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.op import declared
from fastkd.reference._origin import relative_to_largest
from fastkd.reference._rows import (
    Rows,
    divergence_rows,
    exp,
    from_largest,
    log_softmax,
    log_sum_exp,
    safe_log,
    shifted,
)

#: The largest log-probability of padding. Here only a repeated index of a row is padding.
PADDING_LOG_PROB = -1e4


def topk_divergence_op(
    student_logits: Tensor,
    teacher_log_probs: Tensor,
    teacher_indices: Tensor,
    divergence: str,
    beta: float,
    betas: Tensor | None,
    tail: str,
    stored_temperature: float,
    teacher_temperature: float,
    teacher_temperatures: Tensor | None,
    min_log_prob: float,
    max_token_loss: float,
    **row_options: Any,
) -> Tensor:
    """The raw op's loss, from its fields."""
    rows = Rows(student_logits, [teacher_log_probs], **row_options)
    as_given = rows.student
    rows.student = relative_to_largest(as_given)
    stored = (teacher_indices >= 0) & rows.read.unsqueeze(-1)
    at = torch.where(stored, teacher_indices, 0).long()
    times = torch.zeros_like(rows.student, dtype=torch.int64).scatter_add(-1, at, stored.long())
    stored = stored & ~((times.gather(-1, at) > 1) & (teacher_log_probs <= PADDING_LOG_PROB))
    log_q_all = log_softmax(rows.student, rows.tau)
    inside = torch.zeros_like(log_q_all, dtype=torch.int64).scatter_add(-1, at, stored.long()) > 0
    log_q = torch.where(stored, log_q_all.gather(-1, at), -math.inf)
    log_q_rest = log_q_all.masked_fill(inside, -math.inf)
    others = rows.vocab - stored.sum(-1, keepdim=True)

    ratio = stored_temperature / rows.per_row(teacher_temperature, teacher_temperatures)
    share = rows.share(beta, betas)
    log_p, log_p_rest, some = teacher_entries(
        teacher_log_probs, stored, others, ratio, plain(divergence, share)[1], tail, rows.dtype
    )
    if tail == "renormalize":
        # Relative to the support's own largest logit, which may be far below the row's largest.
        log_q = torch.where(stored, as_given.gather(-1, at), -math.inf)
        log_q, some_q = normalized(from_largest(log_q) / rows.tau)
        some = some & some_q
    outcomes = stored
    if tail == "lump":
        log_p, log_q = (
            torch.cat([log_p, log_p_rest], -1),
            torch.cat([log_q, log_sum_exp(log_q_rest)], -1),
        )
        outcomes = torch.cat([stored, others > 0], -1)
    elif tail == "uniform":
        spread = others.clamp(min=1).to(rows.dtype).log()
        each = torch.where(inside, -math.inf, log_p_rest - spread)
        where_stored = torch.where(stored, log_p, 0.0)
        placed = torch.zeros_like(log_q_all).scatter_add(
            -1, at, where_stored.nan_to_num(neginf=0.0)
        )
        dead = torch.zeros_like(inside, dtype=torch.int64).scatter_add(
            -1, at, (stored & (log_p == -math.inf)).long()
        )
        log_p = torch.where(inside, torch.where(dead > 0, -math.inf, placed), each)
        log_q = log_q_all
        outcomes = torch.ones_like(inside)
    loss = support_loss(log_p, log_q, outcomes, divergence, share, tail, min_log_prob)
    if tail == "renormalize":  # NaN for rows without mass on the support
        loss = torch.where((some | ~stored.any(-1, True)).squeeze(-1), loss, math.nan)
    poison = log_q_all.masked_fill(log_q_all == -math.inf, 0).sum(-1) * 0
    loss = loss + poison.detach()
    if rows.square_temperature:
        loss = loss * (rows.tau.squeeze(-1) if isinstance(rows.tau, Tensor) else rows.tau) ** 2
    return rows.reduce(torch.where(loss > max_token_loss, max_token_loss, loss))


def teacher_entries(
    teacher_log_probs: Tensor,
    stored: Tensor,
    others: Tensor,
    ratio: float | Tensor,
    reverse: bool | Tensor,
    tail: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher at its temperature: log p of the entries, of the rest, whether there is any mass.

    ``stored``: which entries count. ``others``: how many tokens are no entries. ``ratio``: the
    stored temperature divided by the teacher's. ``reverse``: see :func:`plain`.
    """
    log_p = torch.where(stored, teacher_log_probs.to(dtype), -math.inf)
    as_stored = torch.as_tensor(ratio == 1, device=log_p.device)
    mass = exp(log_p).sum(-1, keepdim=True)
    rest_mass = torch.where((others > 0) & (mass < 1), 1 - mass, 0.0)
    if reverse is not False:
        # Rounding may hide so much of the rest, and would decide whether KL(q || p) is infinite.
        rounding = max(torch.finfo(x).eps / 2 for x in (teacher_log_probs.dtype, torch.float32))
        entropy = -(exp(log_p) * log_p.masked_fill(log_p == -math.inf, 0)).sum(-1, keepdim=True)
        hidden = rounding * entropy.detach().clamp(min=rounding)
        fixed = torch.as_tensor(reverse, device=mass.device).unsqueeze(-1)
        rest_mass = torch.where(fixed & (others > 0) & (rest_mass < hidden), hidden, rest_mass)
    log_p = torch.where(stored & (log_p != -math.inf), log_p.masked_fill(~stored, 0) * ratio, log_p)
    spread = others.clamp(min=1).to(dtype).log()
    log_p_rest = torch.where(
        rest_mass > 0, safe_log(rest_mass) * ratio + (1 - ratio) * spread, -math.inf
    )
    if tail == "renormalize":
        log_z = log_sum_exp(log_p)
    else:
        log_z = log_sum_exp(torch.cat([log_p, log_p_rest], -1))
        whole = as_stored & ((others > 0) & (mass <= 1) | torch.as_tensor(tail == "drop"))
        log_z = torch.where(whole, 0.0, log_z)
    some = log_z != -math.inf
    log_z = torch.where(some, log_z, 0.0)
    return shifted(log_p, log_z), shifted(log_p_rest, log_z), some


def normalized(log: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms less their log-sum-exp, and whether there is any mass."""
    log_z = log_sum_exp(log)
    some = log_z != -math.inf
    return shifted(log, torch.where(some, log_z, 0.0)), some


def support_loss(
    log_p: Tensor,
    log_q: Tensor,
    outcomes: Tensor,
    divergence: str,
    share: float | Tensor,
    tail: str,
    min_log_prob: float,
) -> Tensor:
    """The divergence of rows of outcomes, which need not sum to 1."""
    if min_log_prob > -math.inf:
        log_p = torch.where(outcomes & (log_p < min_log_prob), min_log_prob, log_p)
        log_q = torch.where(outcomes & (log_q < min_log_prob), min_log_prob, log_q)
    loss = divergence_rows(log_p, log_q, divergence, share)
    # divergence_rows adds q - p to each term of KL(p || q), in sum 0 for two distributions.
    if tail == "drop" or min_log_prob > -math.inf:
        excess = (exp(log_p) - exp(log_q)).sum(-1)
        for rows_of, sign in zip(plain(divergence, share), (1, -1), strict=True):
            if rows_of is not False:
                of_these = torch.as_tensor(rows_of, device=loss.device)
                loss = loss + torch.where(of_these, sign * excess, 0.0)
    return loss


def plain(divergence: str, beta: float | Tensor) -> tuple[bool | Tensor, bool | Tensor]:
    """Whether the divergence is forward KL, and whether reverse KL, as jsd with beta 0 or 1 is.

    For all rows, or where beta is one a row for each.
    """
    if divergence == "jsd":
        ends = beta == 0, beta == 1
        return ends if isinstance(beta, Tensor) else (bool(ends[0]), bool(ends[1]))
    return divergence == "forward_kl", divergence == "reverse_kl"


def topk_divergence(
    student_logits: Tensor, teacher_log_probs: Tensor, teacher_indices: Tensor, **options: Any
) -> Tensor:
    """`fastkd.topk_divergence` in plain PyTorch, with the same arguments."""
    return declared("topk_divergence").by_definition(
        student_logits, teacher_log_probs, teacher_indices, **options
    )


def teacher_topk(
    teacher_logits: Tensor,
    k: int,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`fastkd.teacher_topk` in plain PyTorch, in the precision of its input (float32 at least)."""
    dtype = torch.float64 if teacher_logits.dtype == torch.float64 else torch.float32
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature.to(dtype).unsqueeze(-1)
    log_probs = log_softmax(
        relative_to_largest(teacher_logits[..., :vocab_size].to(dtype)), temperature
    )
    values, indices = torch.sort(log_probs, dim=-1, descending=True, stable=True)
    lost = values.isnan().any(-1, keepdim=True)
    values = torch.where(lost, math.nan, values)
    indices = torch.where(lost, torch.arange(values.size(-1), device=values.device), indices)
    return values[..., :k], indices[..., :k].int()
