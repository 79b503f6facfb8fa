"""decoupled_kl of columns split across processes.

The first collective has both sides' sums over all columns but the label's, and the label's logits.
They give the label's log-odds, x = log q_t / (1 - q_t) of the student and y of the teacher, which
are the same on every process. TCKD is the KL divergence of the two outcomes (label, others), whose
probabilities are sigmoid(y), sigmoid(-y) of the teacher and sigmoid(x), sigmoid(-x) of the student.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd._ops import shard_definition as definition
from fastkd._ops import shards as ops
from fastkd._ops.shards import Merged
from fastkd.losses._sharded_pair import PairCall
from fastkd.reference._rows import LARGEST_LOG_RATIO, kl

_INFINITE = 1e20  # of log-ratios


class DecoupledCall(PairCall):
    """The numbers: NCKD, both log-odds, whether a side has the label alone, x at temperature 1."""

    def losses(self, base: Tensor, found: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        lost = found[1].isnan() | found[2].isnan()
        value, x, y, *at_one = (ops.cleaned(x, lost) for x in found if x.is_floating_point())
        alone = found[3]
        alpha, beta = base[4], torch.where(alone, 0.0, base[3])
        nckd = torch.where(alone, 0.0, value)
        loss = _times(alpha, _target(x, y)) + _times(beta, nckd)
        label = None
        if self.labelled:
            label = -torch.nn.functional.logsigmoid(at_one[0] if self.apart else x)
        return ops.poisoned(loss, lost), label

    def normalised(
        self, base: Tensor, token_ids: Tensor, student: Tensor, teacher: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        keep, tau, tau_t, _, _, softcap, softcap_t = base
        rows, one, label = self.rows, torch.ones_like(tau), token_ids.unsqueeze(1).contiguous()
        sent = []
        given = ((student, tau, softcap), (teacher, tau_t, softcap_t))
        for side, (z, temperature, cap) in enumerate(given):
            apart = self.apart and side == 0
            table = torch.stack([keep, temperature, one, cap])
            own = ops.statistics(self.shards, z, table, token_ids, ops.SECOND * apart, holes=label)
            sent += [own[ops.ORIGIN], own[ops.SUM], own[ops.TOKEN_LOGIT]]
            if apart:
                sent.append(own[ops.SECOND_SUM])
        every = self.shards.gather_first(torch.stack(sent), ops.dtype_of(student, teacher)).unbind(
            1
        )
        second = every[3:4] if self.apart else ()
        sides = []
        for temperature, numbers in ((tau, every[:3]), (tau_t, every[-3:])):
            logit = rows.owned(numbers[2].amax(0))
            sides.append(_Side(logit, numbers[0], numbers[1], temperature))
        left, right = sides
        odds = [left.log_odds(left.log_sum, tau), right.log_odds(right.log_sum, tau_t)]
        at_one = []
        label_log_sum = left.log_sum
        if second:
            label_log_sum = left.merged(second[0], one)
            at_one = [left.log_odds(label_log_sum, one)]
        frame = (left.origin, left.log_sum, right.origin, right.log_sum, label_log_sum)
        return frame, (*odds, left.alone | right.alone, *at_one)

    def factors(
        self, base: Tensor, grads: Sequence[Tensor], of_teacher: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        into_value, into_x, into_y, _, *into_one = grads
        odds = (into_y if of_teacher else into_x) / base[1 + of_teacher]
        at_one = into_one[0] if self.apart and not of_teacher else torch.zeros_like(odds)
        return into_value, -odds, odds + at_one, -at_one

    def define(
        self, base: Tensor, token_ids: Tensor, student: Tensor, teacher: Tensor
    ) -> tuple[Tensor | None, ...]:
        shards, (keep, tau, tau_t, _, _, cap, cap_t) = self.shards, base
        label = definition.among(shards, token_ids.unsqueeze(1))
        logs, odds, at_one = [], [], None
        alone = torch.zeros_like(keep, dtype=torch.bool)
        given = ((student, tau, cap), (teacher, tau_t, cap_t))
        for side, (x, temperature, softcap) in enumerate(given):
            z = definition.capped(shards, x, keep != 0, softcap)
            largest = definition.top(shards, z.masked_fill(label, -torch.inf))
            z = z - torch.where(largest.isfinite(), largest, 0.0).unsqueeze(1)
            others = definition.alive(z.masked_fill(label, -torch.inf))
            scaled = others / temperature.unsqueeze(1)
            log, lse = definition.log_softmax(shards, scaled, empty=True)
            target = definition.chosen(shards, z, token_ids.unsqueeze(1)).squeeze(1)
            logs.append(log)
            odds.append(target / temperature - lse)
            alone = alone | (lse == -torch.inf)
            if side == 0 and self.apart:
                at_one = target - definition.log_sum_exp(shards, others)
        value = definition.total(shards, kl(logs[1], logs[0]))
        return torch.where(alone, 0.0, value), *odds, None, *([at_one] if self.apart else [])


class _Side:
    """One side's columns but the label's. ``alone``: none is possible, and the label has all."""

    def __init__(self, logit: Tensor, origins: Tensor, sums: Tensor, tau: Tensor) -> None:
        self.logit = logit
        self.alone = (sums == 0).all(0)
        self._origins = Merged(origins, empty=True)
        # NaN if the label is impossible, too.
        self.origin = torch.where(self.alone, logit, self._origins.origin)
        self.log_sum = self.merged(sums, tau)

    def merged(self, sums: Tensor, tau: Tensor) -> Tensor:
        found = self._origins.log_sum(sums, tau)
        return torch.where(self.alone, self.logit - self.logit, found)

    def log_odds(self, log_sum: Tensor, tau: Tensor) -> Tensor:
        odds = torch.where(
            self.alone, torch.inf + log_sum, (self.logit - self.origin) / tau - log_sum
        )
        return torch.where(self.logit < torch.inf, odds, torch.nan)


def _times(factor: Tensor, value: Tensor) -> Tensor:
    """0 x inf = 0."""
    return torch.where((factor == 0) & (value == torch.inf), 0.0, factor * value)


def _target(x: Tensor, y: Tensor) -> Tensor:
    """TCKD of log-odds (csrc/math/target_term.h)."""
    return _Target.apply(x, y)


class _Target(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        label = _term(y.sigmoid(), x.sigmoid(), _log_ratio(x, y))
        return label + _term((-y).sigmoid(), (-x).sigmoid(), _log_ratio(-x, -y))

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        p, others = y.sigmoid(), (-y).sigmoid()
        # q - p without a difference of equals.
        apart = _apart(x, y)
        above = -torch.expm1(-apart.clamp(min=0)) * x.sigmoid() * others
        below = torch.expm1(apart.clamp(max=0)) * (-x).sigmoid() * p
        by_x = torch.where(apart >= 0, above, below) + 0 * x.sigmoid()
        by_y = p * others * (_limited(_log_ratio(-x, -y)) - _limited(_log_ratio(x, y)))
        return grad * by_x, grad * by_y


def _apart(x: Tensor, y: Tensor) -> Tensor:
    """x - y; 0 of equal infinities."""
    return torch.where((x == y) & x.isinf(), 0.0, x - y)


def _log_ratio(x: Tensor, y: Tensor) -> Tensor:
    """log q - log p of the label; of the others from the negative log-odds."""
    apart = _apart(x, y)
    near = apart.abs() < 1
    close = torch.log1p((-x).sigmoid() * torch.expm1(torch.where(near, apart, 0.0)))
    far = torch.nn.functional.logsigmoid(x) - torch.nn.functional.logsigmoid(y)
    return torch.where(near, close, torch.where(near, 0.0, far))


def _limited(ratio: Tensor) -> Tensor:
    """A log-ratio for gradients; of an impossible outcome a finite one."""
    return torch.where(ratio.abs() > _INFINITE, ratio.sign() * LARGEST_LOG_RATIO, ratio)


def _term(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """p (e^d - 1 - d), without e^d where p is 0."""
    near = d.abs() < 0.5
    gap = torch.expm1(torch.where(near, d, 0.0)) - torch.where(near, d, 0.0)
    far = (q - p) - torch.where(p == 0, 0.0, p * d)
    return torch.where(p == 0, q, torch.where(near, p * gap, far))
