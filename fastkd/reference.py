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


class _Rows:
    """What the losses over rows share: which rows are read, their temperature, label, reduction."""

    def __init__(
        self,
        student_logits: Tensor,
        others: Sequence[Tensor],
        temperature: float,
        temperatures: Tensor | None,
        weight: Tensor | None,
        mask: Tensor | None,
        labels: Tensor | None,
        label_weight: float,
        ignore_index: int,
        vocab_size: int,
        square_temperature: bool,
        reduction: str,
        denominator: float,
        normalizer: Tensor | None,
    ) -> None:
        double = any(x.dtype == torch.float64 for x in (student_logits, *others))
        self.dtype = torch.float64 if double else torch.float32
        self.vocab = vocab_size if vocab_size >= 0 else student_logits.size(-1)
        self.tau = self.per_row(temperature, temperatures)
        kept = torch.ones(student_logits.shape[:-1], dtype=torch.bool, device=student_logits.device)
        if mask is not None:
            kept = kept & mask
        if labels is not None:
            kept = kept & (labels != ignore_index)
        self.kept = kept
        self.read = kept if weight is None else kept & (weight != 0)
        self.weight, self.labels, self.label_weight = weight, labels, label_weight
        self.square_temperature, self.reduction = square_temperature, reduction
        self.denominator, self.normalizer = denominator, normalizer
        self.student = self.logits(student_logits)

    def per_row(self, number: float, numbers: Tensor | None) -> float | Tensor:
        """A number for all rows, or a column of them."""
        return number if numbers is None else numbers.to(self.dtype).unsqueeze(-1)

    def logits(self, logits: Tensor) -> Tensor:
        """The columns that count; rows that are not read are 0."""
        return torch.where(self.read.unsqueeze(-1), logits[..., : self.vocab].to(self.dtype), 0.0)

    def finish(self, loss: Tensor) -> Tensor:
        """From the divergence of each row to what the op returns."""
        if self.square_temperature:
            loss = loss * (self.tau.squeeze(-1) if isinstance(self.tau, Tensor) else self.tau) ** 2
        return self.reduce(loss)

    def reduce(self, loss: Tensor) -> Tensor:
        """With the label's term, weighted and reduced."""
        if self.labels is not None:
            at = torch.where(self.read, self.labels, 0).long().unsqueeze(-1)
            log_q = _log_softmax(self.student, 1.0).gather(-1, at).squeeze(-1)
            loss = loss - self.label_weight * log_q
        if self.weight is not None:
            loss = loss * torch.where(self.read, self.weight.to(self.dtype), 0.0)
        loss = torch.where(self.read, loss, 0.0)
        if self.reduction == "none":
            return loss
        if self.normalizer is not None:
            divisor = self.normalizer.to(self.dtype).reshape(())
        elif self.reduction == "mean":
            divisor = self.kept.sum().to(self.dtype)
        else:
            divisor = torch.tensor(self.denominator, dtype=self.dtype, device=loss.device)
        empty = divisor == 0
        return torch.where(empty, 0.0, loss.sum() / torch.where(empty, 1.0, divisor))


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
    *others: Any,
) -> Tensor:
    """The raw op's loss, its arguments as `softmax_divergence` in fastkd/ passes them on."""
    rows = _Rows(student_logits, teacher_logits, temperature, temperatures, weight, mask, *others)
    log_q = _log_softmax(rows.student, rows.tau)
    log_p = _teacher_log_probs(
        [rows.logits(t) for t in teacher_logits],
        teacher_weights,
        teacher_mix,
        rows.per_row(teacher_temperature, teacher_temperatures),
        rows.dtype,
    )
    return rows.finish(divergence_rows(log_p, log_q, divergence, beta))


def _log_sum_exp(log: Tensor) -> Tensor:
    """Log-sum-exp over the last dimension, kept, whose gradient stays finite where all are -inf."""
    if log.size(-1) == 0:
        return log.new_full((*log.shape[:-1], 1), -math.inf)
    top = log.detach().amax(-1, keepdim=True)
    top = torch.where(torch.isfinite(top), top, 0.0)
    total = _exp(log - top).sum(-1, keepdim=True)
    return torch.where(total == 0, -math.inf, torch.where(total == 0, 1.0, total).log() + top)


def _safe_log(x: Tensor) -> Tensor:
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).log(), -math.inf)


def _shifted(log: Tensor, by: Tensor) -> Tensor:
    """log - by, and -inf where log is, whatever `by` is."""
    dead = log == -math.inf
    return torch.where(dead, -math.inf, log.masked_fill(dead, 0) - by)


def topk_divergence_op(
    student_logits: Tensor,
    teacher_log_probs: Tensor,
    teacher_indices: Tensor,
    divergence: str,
    beta: float,
    tail: str,
    stored_temperature: float,
    teacher_temperature: float,
    teacher_temperatures: Tensor | None,
    min_log_prob: float,
    max_token_loss: float,
    *row_options: Any,
) -> Tensor:
    """The raw op's loss, its arguments as `topk_divergence` in fastkd/ passes them on."""
    rows = _Rows(student_logits, [teacher_log_probs], *row_options)
    stored = (teacher_indices >= 0) & rows.read.unsqueeze(-1)
    at = torch.where(stored, teacher_indices, 0).long()
    log_q_all = _log_softmax(rows.student, rows.tau)
    inside = torch.zeros_like(log_q_all, dtype=torch.int64).scatter_add(-1, at, stored.long()) > 0
    log_q = torch.where(stored, log_q_all.gather(-1, at), -math.inf)
    log_q_rest = log_q_all.masked_fill(inside, -math.inf)
    others = rows.vocab - stored.sum(-1, keepdim=True)

    # The teacher at its temperature: stored entries, and the mass of the rest.
    log_p = torch.where(stored, teacher_log_probs.to(rows.dtype), -math.inf)
    ratio = stored_temperature / rows.per_row(teacher_temperature, teacher_temperatures)
    as_stored = torch.as_tensor(ratio == 1, device=log_p.device)
    mass = _exp(log_p).sum(-1, keepdim=True)
    rest_mass = torch.where((others > 0) & (mass < 1), 1 - mass, 0.0)
    log_p = torch.where(stored & (log_p != -math.inf), log_p.masked_fill(~stored, 0) * ratio, log_p)
    spread = others.clamp(min=1).to(rows.dtype).log()
    log_p_rest = torch.where(
        rest_mass > 0, _safe_log(rest_mass) * ratio + (1 - ratio) * spread, -math.inf
    )
    if tail == "renormalize":
        log_z = _log_sum_exp(log_p)
        student_log_z = _log_sum_exp(log_q)
        log_q = _shifted(log_q, torch.where(student_log_z == -math.inf, 0.0, student_log_z))
    else:
        log_z = _log_sum_exp(torch.cat([log_p, log_p_rest], -1))
        whole = as_stored & ((others > 0) & (mass <= 1) | torch.as_tensor(tail == "drop"))
        log_z = torch.where(whole, 0.0, log_z)
    log_z = torch.where(log_z == -math.inf, 0.0, log_z)
    log_p, log_p_rest = _shifted(log_p, log_z), _shifted(log_p_rest, log_z)

    if tail == "lump":
        log_p, log_q = (
            torch.cat([log_p, log_p_rest], -1),
            torch.cat([log_q, _log_sum_exp(log_q_rest)], -1),
        )
        outcomes = torch.cat([stored, others > 0], -1)
    elif tail == "uniform":
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
    else:
        outcomes = stored
    if min_log_prob > -math.inf:
        log_p = torch.where(outcomes & (log_p < min_log_prob), min_log_prob, log_p)
        log_q = torch.where(outcomes & (log_q < min_log_prob), min_log_prob, log_q)
    loss = divergence_rows(log_p, log_q, divergence, beta)
    # divergence_rows adds q - p to each term of KL(p || q): nothing, over two distributions.
    if tail == "drop" or min_log_prob > -math.inf:
        excess = (_exp(log_p) - _exp(log_q)).sum(-1)
        loss = loss + {"forward_kl": excess, "reverse_kl": -excess}.get(
            _plain(divergence, beta), 0.0
        )
    poison = log_q_all.masked_fill(log_q_all == -math.inf, 0).sum(-1) * 0
    loss = loss + poison.detach()
    if rows.square_temperature:
        loss = loss * (rows.tau.squeeze(-1) if isinstance(rows.tau, Tensor) else rows.tau) ** 2
    return rows.reduce(torch.where(loss > max_token_loss, max_token_loss, loss))


def _plain(divergence: str, beta: float) -> str:
    """The ends of a mixture are the plain divergences."""
    ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
    return ends.get(beta, divergence) if divergence == "jsd" else divergence


def topk_divergence(
    student_logits: Tensor, teacher_log_probs: Tensor, teacher_indices: Tensor, **options: Any
) -> Tensor:
    """`fastkd.topk_divergence` in plain PyTorch, with the same arguments."""
    from fastkd.topk_divergence import op_arguments

    arguments = op_arguments(student_logits, teacher_log_probs, teacher_indices, **options)
    return topk_divergence_op(student_logits, teacher_log_probs, teacher_indices, *arguments)


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
    log_probs = _log_softmax(teacher_logits[..., :vocab_size].to(dtype), temperature)
    values, indices = torch.sort(log_probs, dim=-1, descending=True, stable=True)
    lost = values.isnan().any(-1, keepdim=True)
    values = torch.where(lost, math.nan, values)
    indices = torch.where(lost, torch.arange(values.size(-1), device=values.device), indices)
    return values[..., :k], indices[..., :k].int()


def token_stats(
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
) -> tuple[Tensor | None, ...]:
    """`fastkd.token_stats` in plain PyTorch; the same fields in the same order."""
    given = [student_logits] if teacher_logits is None else [student_logits, teacher_logits]
    double = any(x.dtype == torch.float64 for x in given)
    dtype = torch.float64 if double else torch.float32
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature.to(dtype).unsqueeze(-1)
    logs = [_log_softmax(x[..., :vocab_size].to(dtype), temperature) for x in given]
    fields: list[Tensor | None] = []
    for logits, log_q in zip(given, logs, strict=True):
        scaled = logits[..., :vocab_size].to(dtype) / temperature
        lse = scaled.logsumexp(-1)
        lost = log_q.isnan().any(-1)
        lse = torch.where(lost, math.nan, lse)
        # torch.argmax may take any of equals.
        columns = torch.arange(log_q.size(-1), device=log_q.device)
        best = log_q == log_q.amax(-1, keepdim=True)
        argmax = torch.where(best, columns, log_q.size(-1)).amin(-1)
        label = None
        if labels is not None:
            at = labels.clamp(min=0).long().unsqueeze(-1)
            label = torch.where(labels == -100, math.nan, log_q.gather(-1, at).squeeze(-1))
        entropy = -(_exp(log_q) * _finite(log_q)).sum(-1)
        fields += [lse, entropy, torch.where(lost, -1, argmax), log_q.amax(-1).exp(), label]
    if teacher_logits is None:
        return (*fields, *[None] * 8)
    q, p = logs
    pair = [divergence_rows(p, q, name, 0.5) for name in ("forward_kl", "reverse_kl", "tvd")]
    return (*fields, *pair)


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
    *row_options: Any,
) -> Tensor:
    """The raw op's loss, its arguments as `clipped_divergence` in fastkd/ passes them on."""
    rows = _Rows(student_logits, [teacher_logits], *row_options)
    log_q = _log_softmax(rows.student, rows.tau)
    tau = rows.per_row(teacher_temperature, teacher_temperatures)
    log_p = _log_softmax(rows.logits(teacher_logits), tau)
    p, q = _exp(log_p), _exp(log_q)
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
        _finite(log_p) - torch.where(lost, _finite(log_q), log_q.masked_fill(log_q == -math.inf, 0))
    )
    terms = torch.where(log_p == -math.inf, 0.0, terms)
    infinite = (lost & (share > 0)).any(-1)
    whole = (share * terms).sum(-1)
    mass, other = (share * p).sum(-1), (share * q).sum(-1)
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
            infinite = infinite | (some & (other == 0))
            loss = loss + torch.where(other > 0, other, 1.0).log()
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
    from fastkd.clipped_divergence import op_arguments

    bounds, arguments = op_arguments(student_logits, teacher_logits, lower, upper, **options)
    return clipped_divergence_op(student_logits, teacher_logits, *bounds, *arguments)
