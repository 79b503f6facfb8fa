"""Code shared by the definitions: safe logarithms, divergences of rows, reductions."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Replaces an infinite log-ratio in gradients, as if the probability 0 were 2^-126.
LARGEST_LOG_RATIO = 126 * math.log(2)
#: Logits that are this much below the largest are probability 0, as -inf is.
DEAD = 1e25
#: Below this log-probability the probability is 0 in float64: such an entry adds nothing.
NO_WEIGHT = -1075 * math.log(2)


def from_largest(logits: Tensor) -> Tensor:
    """Logits minus the row's largest finite one, before scaling; this does not change a softmax."""
    top = logits.detach().amax(-1, keepdim=True)
    return logits - torch.where(torch.isfinite(top), top, 0.0)


def log_softmax(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Log-softmax whose gradient stays finite where logits are -inf."""
    scaled = from_largest(logits) / temperature
    dead = scaled == -math.inf
    lse = torch.logsumexp(scaled, -1, keepdim=True)
    lse = torch.where(torch.isfinite(lse), lse, math.nan)
    return torch.where(dead & ~lse.isnan(), -math.inf, scaled.masked_fill(dead, 0) - lse)


def exp(log: Tensor) -> Tensor:
    # Where the result is 0, so is the gradient: its product with an overflow would be NaN.
    dead = log < NO_WEIGHT
    return torch.where(dead, 0.0, log.masked_fill(dead, 0).exp())


def finite(log: Tensor) -> Tensor:
    """-inf replaced by a large negative constant without gradient, for 0 x log 0 = 0."""
    return log.masked_fill(log == -math.inf, -LARGEST_LOG_RATIO)


def log_sum_exp(log: Tensor) -> Tensor:
    """Log-sum-exp over the last dimension (kept); its gradient is finite where all are -inf."""
    if log.size(-1) == 0:
        return log.new_full((*log.shape[:-1], 1), -math.inf)
    top = log.detach().amax(-1, keepdim=True)
    top = torch.where(torch.isfinite(top), top, 0.0)
    total = exp(log - top).sum(-1, keepdim=True)
    return torch.where(total == 0, -math.inf, torch.where(total == 0, 1.0, total).log() + top)


def safe_log(x: Tensor) -> Tensor:
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).log(), -math.inf)


def shifted(log: Tensor, by: Tensor) -> Tensor:
    """log - by, and -inf where log is -inf, whatever `by` is."""
    dead = log == -math.inf
    return torch.where(dead, -math.inf, log.masked_fill(dead, 0) - by)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Row-wise KL(p || q) = sum p (d + expm1(-d)) with d = log p - log q: never negative."""
    p, q = exp(log_p), exp(log_q)
    both = (log_p != -math.inf) & (log_q != -math.inf)
    d = torch.where(both, log_p.masked_fill(~both, 0) - log_q.masked_fill(~both, 0), 0.0)
    near = d.abs() < 0.5
    gap = torch.where(near, d.masked_fill(~near, 0) + torch.expm1(-d.masked_fill(~near, 0)), 0.0)
    far = p * d + q - p
    terms = torch.where(near & both, p * gap, far)
    # Mass where the other side's is 0: the value is inf, the gradient as if that were 2^-126.
    lost = (log_p >= NO_WEIGHT) & (log_q == -math.inf)
    capped = p * LARGEST_LOG_RATIO - p
    terms = torch.where(lost, capped + (math.inf - capped).detach(), terms)
    return terms.sum(-1)


def mixture(log_p: Tensor, log_q: Tensor, beta: float | Tensor) -> Tensor:
    """Log of beta p + (1 - beta) q, 0 < beta < 1."""
    share: Any
    rest: Any
    if isinstance(beta, Tensor):
        share, rest = (x.unsqueeze(-1) for x in (beta.log(), torch.log1p(-beta)))
    else:
        share, rest = math.log(beta), math.log1p(-beta)
    dead = (log_p == -math.inf) & (log_q == -math.inf)
    mixed = torch.logaddexp(log_p.masked_fill(dead, 0) + share, log_q.masked_fill(dead, 0) + rest)
    return torch.where(dead, -math.inf, mixed)


def by_beta(
    beta: float | Tensor,
    zero: Callable[[], Tensor],
    one: Callable[[], Tensor],
    inside: Callable[[Any], Tensor],
) -> Tensor:
    """The rows' values: zero() where beta is 0, one() where it is 1, else inside(beta)."""
    if not isinstance(beta, Tensor):
        return zero() if beta == 0 else one() if beta == 1 else inside(beta)
    ends = (beta == 0) | (beta == 1)
    mixed = inside(torch.where(ends, 0.5, beta))
    return torch.where(beta == 0, zero(), torch.where(beta == 1, one(), mixed))


def alpha_beta(log_p: Tensor, log_q: Tensor, alpha: float | Tensor, beta: float | Tensor) -> Tensor:
    """The Alpha-Beta divergence of rows, as (w(s) - w(beta)) / alpha, s = alpha + beta.

    w(c) = p^s (e^(c d) - 1) / c with d = log q - log p. Both sides and both numbers are exchanged
    where |alpha| < |beta|, so that nothing is divided by the smaller one.
    """
    a, b = (
        x.unsqueeze(-1) if isinstance(x, Tensor) else torch.full_like(log_p[..., :1], x)
        for x in (alpha, beta)
    )
    other = a.abs() < b.abs()
    log_p, log_q = torch.where(other, log_q, log_p), torch.where(other, log_p, log_q)
    a, b, s = torch.where(other, b, a), torch.where(other, a, b), a + b
    no_p, no_q = log_p == -math.inf, log_q == -math.inf
    neither = no_p & no_q
    # Infinite where mass meets an impossible token; the gradient as if that were 2^-126 of it.
    lost_p = no_p & ~no_q & ~((a > 0) & (s > 0))
    lost_q = no_q & ~no_p & ~((b > 0) & (s > 0))
    log_p, log_q = log_p.masked_fill(no_p, 0), log_q.masked_fill(no_q, 0)
    log_p, log_q = (
        torch.where(no_p, torch.where(neither, 0, log_q.detach() - LARGEST_LOG_RATIO), log_p),
        torch.where(no_q, torch.where(neither, 0, log_p.detach() - LARGEST_LOG_RATIO), log_q),
    )
    without_p, without_q = neither | (no_p & ~lost_p), neither | (no_q & ~lost_q)
    p_power = exp(torch.where(without_p, -math.inf, s * log_p))
    q_power = exp(torch.where(without_q, -math.inf, s * log_q))
    both = exp(torch.where(without_p | without_q, -math.inf, a * log_p + b * log_q))
    d = log_q - log_p
    per = lambda c: 1 / torch.where(c == 0, 1, c)  # noqa: E731
    of_s, of_b = torch.where(a == 0, 1, s * per(a)), b * per(a)

    def curve(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whether |x| < 1/2, and there e(x) = (e^x - 1 - x) / x^2 and 1 + x e(x)."""
        near = x.abs() < 0.5
        x, value = x.masked_fill(~near, 0), torch.zeros_like(x)
        for n in range(17, 1, -1):
            value = value * x + 1 / math.factorial(n)
        return near, value, 1 + x * value

    near_s, curve_s, slope_s = curve(s * d)
    near_b, curve_b, slope_b = curve(b * d)
    nearby = near_s & near_b
    straight = p_power * d
    w_s = torch.where(near_s, straight * slope_s, (q_power - p_power) * per(s))
    w_b = torch.where(near_b, straight * slope_b, (both - p_power) * per(b))
    near = straight * d.masked_fill(~nearby, 0) * (of_s * curve_s - of_b * curve_b)
    terms = torch.where(nearby, near, (w_s - w_b) * per(a))
    mass = torch.where(no_p, log_q, log_p) >= NO_WEIGHT
    infinite = (lost_p | lost_q) & mass
    return torch.where(infinite, terms + (math.inf - terms).detach(), terms).sum(-1)


def decoupled_kl(
    log_p: Tensor, log_q: Tensor, labels: Tensor, alpha: float | Tensor, beta: float | Tensor
) -> Tensor:
    """alpha TCKD + beta NCKD of rows; labels: columns.

    TCKD: of "the label" and "another token"; NCKD: of the other tokens among themselves, 0 where a
    side has none.
    """
    at = labels.unsqueeze(-1)

    def split(log: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The two outcomes, the other tokens' distribution, whether there are any."""
        others = log.scatter(-1, at, -math.inf)
        lse = log_sum_exp(others)
        none = lse == -math.inf
        both = torch.cat([log.gather(-1, at), lse], -1)
        return both, shifted(others, lse.masked_fill(none, 0)), none.squeeze(-1)

    target_p, others_p, none_p = split(log_p)
    target_q, others_q, none_q = split(log_q)
    target = kl(target_p, target_q)
    rest = torch.where(none_p | none_q, 0.0, kl(others_p, others_q))

    def times(factor: float | Tensor, value: Tensor) -> Tensor:
        """0 x inf = 0."""
        zero = torch.as_tensor(factor, device=value.device) == 0
        return torch.where(zero & (value == math.inf), 0.0, factor * value)

    return times(alpha, target) + times(beta, rest)


def divergence_rows(
    log_p: Tensor,
    log_q: Tensor,
    divergence: str,
    beta: float | Tensor,
    alpha: float | Tensor = 1.0,
    labels: Tensor | None = None,
) -> Tensor:
    """Divergence of rows of normalised log-probabilities, teacher first.

    beta, alpha: one, or one a row. labels: columns, for decoupled_kl.
    """
    forward, reverse = lambda: kl(log_p, log_q), lambda: kl(log_q, log_p)
    if divergence == "forward_kl":
        return forward()
    if divergence == "reverse_kl":
        return reverse()
    if divergence == "jsd":

        def jsd(share: float | Tensor) -> Tensor:
            m = mixture(log_p, log_q, share)
            return share * kl(log_p, m) + (1 - share) * kl(log_q, m)

        return by_beta(beta, forward, reverse, jsd)
    if divergence == "mixed_kl":
        return by_beta(beta, reverse, forward, lambda b: b * forward() + (1 - b) * reverse())
    if divergence == "skew_kl":
        own = lambda: kl(log_p, log_p)  # noqa: E731
        return by_beta(beta, forward, own, lambda share: kl(log_p, mixture(log_p, log_q, share)))
    if divergence == "skew_reverse_kl":
        own = lambda: kl(log_q, log_q)  # noqa: E731
        return by_beta(beta, reverse, own, lambda share: kl(log_q, mixture(log_q, log_p, share)))
    if divergence == "skew_reverse_kl_detached":
        p, q = log_p.detach(), log_q.detach()
        value = by_beta(
            beta,
            lambda: kl(log_q, p),
            lambda: kl(log_q, q),
            lambda share: kl(log_q, mixture(q, p, share)),
        )
        return value + (log_p.masked_fill(log_p == -math.inf, 0) * 0).sum(-1)  # a gradient of 0
    if divergence == "alpha_beta":
        return alpha_beta(log_p, log_q, alpha, beta)
    if divergence == "decoupled_kl":
        if labels is None:
            raise ValueError(
                "softmax_divergence: labels must be given with divergence='decoupled_kl', got None"
            )
        return decoupled_kl(log_p, log_q, labels, alpha, beta)
    if divergence == "tvd":
        return 0.5 * (exp(log_p) - exp(log_q)).abs().sum(-1)
    if divergence == "cross_entropy":
        p = exp(log_p)
        lost = (log_p >= NO_WEIGHT) & (log_q == -math.inf)
        terms = -p * finite(log_q)
        return torch.where(lost, terms + (math.inf - terms).detach(), terms).sum(-1)
    raise ValueError(f"softmax_divergence: unknown divergence {divergence!r}")


def softcapped(logits: Tensor, cap: float | Tensor) -> Tensor:
    """cap tanh(logits / cap); infinite logits stay, so that a mask stays one. inf is no cap."""
    if not isinstance(cap, Tensor) and cap == math.inf:
        return logits
    infinite = logits.isinf()
    finite_logits = logits.masked_fill(infinite, 0)
    return torch.where(infinite, logits, cap * torch.tanh(finite_logits / cap))


def ahead(x: Tensor | None, shift: int) -> Tensor | None:
    """Each sequence rotated by `shift` towards its front; the last `shift` entries are not used."""
    if x is None or shift == 0:
        return x
    return torch.cat([x[..., shift:], x[..., : min(shift, x.size(-1))]], -1)


class Rows:
    """Options shared by the losses over rows: rows that are read, temperature, label, reduction."""

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
        label_weights: Tensor | None,
        student_logit_softcap: float,
        teacher_logit_softcap: float,
        ignore_index: int,
        vocab_size: int,
        shift: int,
        square_temperature: bool,
        reduction: str,
        denominator: float,
        normalizer: Tensor | None,
        taught: Tensor | None = None,
    ) -> None:
        double = any(x.dtype == torch.float64 for x in (student_logits, *others))
        self.dtype = torch.float64 if double else torch.float32
        self.vocab = vocab_size if vocab_size >= 0 else student_logits.size(-1)
        self.tau = self.per_row(temperature, temperatures)
        kept = torch.ones(student_logits.shape[:-1], dtype=torch.bool, device=student_logits.device)
        if shift:
            kept[..., max(kept.size(-1) - shift, 0) :] = False
            rest = (ahead(x, shift) for x in (labels, label_weights, mask, weight))
            labels, label_weights, mask, weight = rest
        if mask is not None:
            kept = kept & mask
        if labels is not None:
            kept = kept & (labels != ignore_index)
        if taught is not None:
            kept = kept & taught
        self.shifted_rows = (
            math.prod((*kept.shape[:-1], max(kept.size(-1) - shift, 0))) if shift else kept.numel()
        )
        self.batch = student_logits.size(0)
        self.kept, self.shift = kept, shift
        self.read = kept if weight is None else kept & (weight != 0)
        self.weight, self.labels = weight, labels
        self.label_weight: float | Tensor = label_weight
        if label_weights is not None:
            self.label_weight = torch.where(self.read, label_weights.to(self.dtype), 0.0)
        self.square_temperature, self.reduction = square_temperature, reduction
        self.denominator, self.normalizer = denominator, normalizer
        self.student = self._logits(student_logits, student_logit_softcap)
        self.teacher_softcap = teacher_logit_softcap

    def per_row(self, number: float, numbers: Tensor | None) -> float | Tensor:
        """The number for all rows, or a column with one a row."""
        return number if numbers is None else numbers.to(self.dtype).unsqueeze(-1)

    def teacher(self, logits: Tensor) -> Tensor:
        """A teacher's logits as they are read."""
        return self._logits(logits, self.teacher_softcap)

    def _logits(self, logits: Tensor, softcap: float) -> Tensor:
        """The columns below vocab_size, capped; rows that are not read are 0."""
        logits = logits[..., : self.vocab].to(self.dtype)
        return softcapped(torch.where(self.read.unsqueeze(-1), logits, 0.0), softcap)

    def share(self, number: float, numbers: Tensor | None) -> float | Tensor:
        """The beta of all rows, or one of each."""
        return number if numbers is None else numbers.to(self.dtype)

    def columns(self) -> Tensor:
        """The labels as columns, 0 in rows that are not read."""
        assert self.labels is not None
        return torch.where(self.read, self.labels, 0).long()

    def finish(self, loss: Tensor) -> Tensor:
        """The op's result from the divergence of each row."""
        if self.square_temperature:
            loss = loss * (self.tau.squeeze(-1) if isinstance(self.tau, Tensor) else self.tau) ** 2
        return self.reduce(loss)

    def reduce(self, loss: Tensor) -> Tensor:
        """Add the label's term, weight and reduce."""
        # With label_weight 0 even a label of probability 0 adds nothing.
        if self.labels is not None and not (
            isinstance(self.label_weight, float | int) and self.label_weight == 0
        ):
            at = self.columns().unsqueeze(-1)
            log_q = log_softmax(self.student, 1.0).gather(-1, at).squeeze(-1)
            if isinstance(self.label_weight, Tensor):
                log_q = torch.where(self.label_weight == 0, 0.0, log_q)
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
            divisor = torch.tensor(
                {"batchmean": self.batch, "elementmean": self.shifted_rows * self.vocab}.get(
                    self.reduction, self.denominator
                ),
                dtype=self.dtype,
                device=loss.device,
            )
        empty = divisor == 0
        return torch.where(empty, 0.0, loss.sum() / torch.where(empty, 1.0, divisor))
