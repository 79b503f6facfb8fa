"""Every op in plain PyTorch: its definition, and the only oracle of tests, benchmarks and docs.

Written for clarity and for all derivatives, not for speed; give it float64 inputs for float64
arithmetic. The ops themselves use it for second derivatives and under torch.func transforms.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: Stands for an infinite log-ratio in gradients: as if the impossible entry had probability 2^-126.
LARGEST_LOG_RATIO = 126 * math.log(2)


def _log_softmax(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Log-softmax whose gradient stays finite where logits are -inf."""
    scaled = logits / temperature
    dead = scaled == -math.inf
    lse = torch.logsumexp(scaled, -1, keepdim=True)
    lse = torch.where(torch.isfinite(lse), lse, math.nan)
    return torch.where(dead & ~lse.isnan(), -math.inf, scaled.masked_fill(dead, 0) - lse)


def _exp(log: Tensor) -> Tensor:
    dead = log == -math.inf
    return torch.where(dead, 0.0, log.masked_fill(dead, 0).exp())


def _finite(log: Tensor) -> Tensor:
    """-inf replaced by a large negative constant that takes no gradient, for 0 x log 0 = 0."""
    return log.masked_fill(log == -math.inf, -LARGEST_LOG_RATIO)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Row-wise KL(p || q) = sum p (d + expm1(-d)) with d = log p - log q: never negative."""
    p, q = _exp(log_p), _exp(log_q)
    both = (log_p != -math.inf) & (log_q != -math.inf)
    d = torch.where(both, log_p.masked_fill(~both, 0) - log_q.masked_fill(~both, 0), 0.0)
    near = d.abs() < 0.5
    gap = torch.where(near, d.masked_fill(~near, 0) + torch.expm1(-d.masked_fill(~near, 0)), 0.0)
    far = p * d + q - p
    terms = torch.where(near & both, p * gap, far)
    # Mass where the other side has none: the value is inf, the gradient that of 2^-126 there.
    lost = (log_p != -math.inf) & (log_q == -math.inf)
    capped = p * LARGEST_LOG_RATIO - p
    terms = torch.where(lost, capped + (math.inf - capped).detach(), terms)
    return terms.sum(-1)


def _mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Log of beta p + (1 - beta) q."""
    if beta in (0.0, 1.0):
        return log_p if beta == 1.0 else log_q
    dead = (log_p == -math.inf) & (log_q == -math.inf)
    a = log_p.masked_fill(dead, 0) + math.log(beta)
    b = log_q.masked_fill(dead, 0) + math.log1p(-beta)
    return torch.where(dead, -math.inf, torch.logaddexp(a, b))


def divergence_rows(log_p: Tensor, log_q: Tensor, divergence: str, beta: float) -> Tensor:
    """Divergence of rows of normalised log-probabilities, teacher first."""
    if divergence == "forward_kl" or (divergence == "jsd" and beta == 0):
        return _kl(log_p, log_q)
    if divergence == "reverse_kl" or (divergence == "jsd" and beta == 1):
        return _kl(log_q, log_p)
    if divergence == "jsd":
        m = _mixture(log_p, log_q, beta)
        return beta * _kl(log_p, m) + (1 - beta) * _kl(log_q, m)
    if divergence == "skew_kl":
        return _kl(log_p, _mixture(log_p, log_q, beta))
    if divergence == "skew_reverse_kl":
        return _kl(log_q, _mixture(log_q, log_p, beta))
    if divergence == "tvd":
        return 0.5 * (_exp(log_p) - _exp(log_q)).abs().sum(-1)
    if divergence == "cross_entropy":
        p = _exp(log_p)
        lost = (log_p != -math.inf) & (log_q == -math.inf)
        terms = -p * _finite(log_q)
        return torch.where(lost, terms + (math.inf - terms).detach(), terms).sum(-1)
    raise ValueError(f"softmax_divergence: unknown divergence {divergence!r}")


def _teacher_log_probs(
    teachers: Sequence[Tensor],
    weights: Tensor | None,
    mix: str,
    temperature: float | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    if len(teachers) == 1:
        return _log_softmax(teachers[0].to(dtype), temperature)
    count = len(teachers)
    if weights is None:
        weights = teachers[0].new_full((count,), 1 / count, dtype=dtype)
    weights = weights.to(dtype)
    stacked = torch.stack([t.to(dtype) for t in teachers], -1)
    counts = (weights != 0).unsqueeze(-2) if weights.dim() > 1 else weights != 0
    per_row = weights.unsqueeze(-2) if weights.dim() > 1 else weights
    if mix == "logits":
        dead = (stacked == -math.inf) & counts
        live = torch.where(dead | ~counts, 0.0, stacked)
        mixed = (live * per_row).sum(-1).masked_fill(dead.any(-1), -math.inf)
        return _log_softmax(mixed, temperature)
    if isinstance(temperature, Tensor):
        temperature = temperature.unsqueeze(-1)
    logs = torch.log_softmax(stacked / temperature, -2) + per_row.log()
    return torch.log_softmax(logs.masked_fill(~counts, -math.inf).logsumexp(-1), -1)


def softmax_divergence_op(
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor],
    divergence: str,
    beta: float,
    temperature: float,
    teacher_temperature: float,
    temperatures: Tensor | None,
    teacher_temperatures: Tensor | None,
    weight: Tensor | None,
    mask: Tensor | None,
    teacher_weights: Tensor | None,
    teacher_mix: str,
    labels: Tensor | None,
    label_weight: float,
    ignore_index: int,
    vocab_size: int,
    square_temperature: bool,
    reduction: str,
    denominator: float,
    normalizer: Tensor | None,
) -> Tensor:
    """The raw op's loss, its arguments as `softmax_divergence` in fastkd/ passes them on."""
    double = any(x.dtype == torch.float64 for x in (student_logits, *teacher_logits))
    dtype = torch.float64 if double else torch.float32
    vocab = vocab_size if vocab_size >= 0 else student_logits.size(-1)
    leading = student_logits.shape[:-1]
    tau = temperature if temperatures is None else temperatures.to(dtype).unsqueeze(-1)
    teacher_tau = (
        teacher_temperature
        if teacher_temperatures is None
        else teacher_temperatures.to(dtype).unsqueeze(-1)
    )

    kept = torch.ones(leading, dtype=torch.bool, device=student_logits.device)
    if mask is not None:
        kept = kept & mask
    if labels is not None:
        kept = kept & (labels != ignore_index)
    read = kept if weight is None else kept & (weight != 0)

    def rows(logits: Tensor) -> Tensor:
        return torch.where(read.unsqueeze(-1), logits[..., :vocab].to(dtype), 0.0)

    student = rows(student_logits)
    log_q = _log_softmax(student, tau)
    log_p = _teacher_log_probs(
        [rows(t) for t in teacher_logits], teacher_weights, teacher_mix, teacher_tau, dtype
    )
    loss = divergence_rows(log_p, log_q, divergence, beta)
    if square_temperature:
        loss = loss * (tau.squeeze(-1) if isinstance(tau, Tensor) else tau) ** 2
    if labels is not None:
        at = torch.where(read, labels, 0).long().unsqueeze(-1)
        loss = loss - label_weight * _log_softmax(student, 1.0).gather(-1, at).squeeze(-1)
    if weight is not None:
        loss = loss * torch.where(read, weight.to(dtype), 0.0)
    loss = torch.where(read, loss, 0.0)
    if reduction == "none":
        return loss
    if normalizer is not None:
        divisor = normalizer.to(dtype).reshape(())
    elif reduction == "mean":
        divisor = kept.sum().to(dtype)
    else:
        divisor = torch.tensor(denominator, dtype=dtype, device=loss.device)
    empty = divisor == 0
    return torch.where(empty, 0.0, loss.sum() / torch.where(empty, 1.0, divisor))


def softmax_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    **options: Any,
) -> Tensor:
    """`fastkd.softmax_divergence` in plain PyTorch, with the same arguments except `inplace`."""
    from fastkd.softmax_divergence import op_arguments

    teachers, arguments = op_arguments(student_logits, teacher_logits, **options)
    return softmax_divergence_op(student_logits, teachers, *arguments)


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
