"""Recipes beside their formulas: each definition once, a value a row, eager and as float64's truth.

The formulas are those of the papers or of their authors' code, as training loops spell them:
logits widened to float32, then log_softmax and what follows. What a method needs besides student
and teacher is made of them without rounding: a second teacher is half of the teacher's logits, and
labels are tokens of their own; none of it is in anybody's time.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastkd
from benchmarks.baselines import beside_eager, wide
from benchmarks.cases import MIDDLE_ROWS, MIDDLE_VOCAB
from benchmarks.harness import DISTINCT_ROWS, Case
from benchmarks.moved_bytes import Counter
from benchmarks.shapes import DTYPES, Shape, correlated_logits
from benchmarks.student_only import tokens_of
from fastkd import recipes

KEEP, BETA2, TOP, HEAD = 0.5, 10.0, 100, 1024


class Prepared:
    """What is made once of a tensor, before the clock starts."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        self._make = make
        self._kept: dict[int, tuple[Any, Tensor]] = {}

    def __call__(self, source: Tensor) -> Tensor:
        """The tensor made of `source`."""
        found = self._kept.get(id(source))
        if found is None or found[0]() is not source:
            with torch.no_grad():
                made = self._make(source.detach())
            found = self._kept[id(source)] = (weakref.ref(source), made)
        return found[1]


#: Of a teacher, another one. Halving rounds nothing.
second = Prepared(lambda teacher: 0.5 * teacher)
labels_of = Prepared(tokens_of)


def _half_right(student: Tensor) -> Tensor:
    even = torch.arange(student.size(0), device=student.device) % 2 == 0
    best = fastkd.token_stats(student).student_argmax
    return torch.where(even, best, tokens_of(student))


half_right = Prepared(_half_right)
#: A share for each text of one row, as DistiLLM-2 has one for each text.
shares = Prepared(
    lambda s: 0.05 + 0.01 * (torch.arange(s.size(0), device=s.device) % DISTINCT_ROWS).float()
)


def _logs(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log q, log p."""
    student, teacher = wide(student) / temperature, wide(teacher) / temperature
    return student.log_softmax(-1), teacher.log_softmax(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _mix(first: Tensor, second: Tensor, share: float | Tensor) -> Tensor:
    share = torch.as_tensor(share, dtype=first.dtype, device=first.device)
    return torch.logaddexp(first + share.log(), second + torch.log1p(-share))


def _label(log_q: Tensor, labels: Tensor) -> Tensor:
    return log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def gkd(student: Tensor, teacher: Tensor) -> Tensor:
    """JSD."""
    log_q, log_p = _logs(student, teacher)
    log_m = _mix(log_p, log_q, 0.5)
    return 0.5 * _kl(log_p, log_m) + 0.5 * _kl(log_q, log_m)


def distillm(student: Tensor, teacher: Tensor) -> Tensor:
    """Skewed KL, share 0.1."""
    log_q, log_p = _logs(student, teacher)
    return _kl(log_p, _mix(log_p, log_q, 0.1))


def distillm2(student: Tensor, teacher: Tensor) -> Tensor:
    """Skewed reverse KL, the mixture constant, a share for each row."""
    log_q, log_p = _logs(student, teacher)
    share = shares(student).to(log_q.dtype).unsqueeze(-1)
    return _kl(log_q, _mix(log_q, log_p, share).detach())


def mixed_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Half forward, half reverse KL."""
    log_q, log_p = _logs(student, teacher)
    return 0.5 * _kl(log_p, log_q) + 0.5 * _kl(log_q, log_p)


def abkd(student: Tensor, teacher: Tensor) -> Tensor:
    """Alpha-beta divergence, 0.2 and 0.7."""
    log_q, log_p = _logs(student, teacher)
    a, b = 0.2, 0.7
    terms = (a * log_p + b * log_q).exp()
    terms = terms - a / (a + b) * ((a + b) * log_p).exp() - b / (a + b) * ((a + b) * log_q).exp()
    return -terms.sum(-1) / (a * b)


def akl(student: Tensor, teacher: Tensor) -> Tensor:
    """Forward KL by the gap's share in the teacher's head, reverse KL by the rest."""
    log_q, log_p = _logs(student, teacher)
    with torch.no_grad():
        p, order = log_p.exp().sort(dim=-1, descending=True, stable=True)
        gap = (p - log_q.exp().gather(-1, order)).abs()
        head = p.cumsum(-1) <= 0.5
        head[..., 0] = True
        share = (gap * head).sum(-1) / gap.sum(-1)
    return share * _kl(log_p, log_q) + (1 - share) * _kl(log_q, log_p)


def kd(student: Tensor, teacher: Tensor) -> Tensor:
    """0.9 x 4 KL at temperature 2 + 0.1 x cross-entropy."""
    log_q, log_p = _logs(student, teacher, 2.0)
    surprise = -_label(wide(student).log_softmax(-1), labels_of(student))
    return 3.6 * _kl(log_p, log_q) + 0.1 * surprise


def dkd(student: Tensor, teacher: Tensor) -> Tensor:
    """16 (TCKD + 8 NCKD) at temperature 4, the target's logit masked as in the authors' code."""
    labels = labels_of(student).unsqueeze(-1)
    log_q, log_p = _logs(student, teacher, 4.0)
    q, p = (x.exp().gather(-1, labels).squeeze(-1) for x in (log_q, log_p))
    target = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    rest = [(wide(z) / 4.0).scatter(-1, labels, -1e3).log_softmax(-1) for z in (student, teacher)]
    return 16 * (target + 8 * _kl(rest[1], rest[0]))


def align_distil(student: Tensor, teacher: Tensor) -> Tensor:
    """Reverse KL to logits extrapolated by each token's own weight."""
    other = second(teacher)
    gap = (wide(teacher).softmax(-1) - wide(other).softmax(-1)).abs().sum(-1)
    weight = BETA2 * gap + 1e-3
    target = wide(teacher) + weight.unsqueeze(-1) * (wide(teacher) - wide(other))
    log_q = wide(student).log_softmax(-1)
    return 0.1 / weight * _kl(log_q, target.log_softmax(-1))


def dparallel(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy, and the entropy of the rows that are right, averaged over these."""
    labels = half_right(student)
    surprise = -_label(wide(student).log_softmax(-1), labels)
    log_a = (wide(student) / 0.5).log_softmax(-1)
    entropy = -(log_a.exp() * log_a).sum(-1)
    right = student.argmax(-1) == labels
    return surprise + 2.0 * entropy * right * (right.numel() / right.sum())


def adaspec(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of the half of the rows that are furthest behind a reference."""
    log_q, log_p = _logs(student, teacher)
    loss = _kl(log_p, log_q)
    behind = loss.detach() - _kl(log_p, wide(second(teacher)).log_softmax(-1))
    kept = behind >= behind.quantile(1 - KEEP)
    return loss * kept * (kept.numel() / kept.sum())


def taid(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with interpolated logits, t = 0.4."""
    target = (0.6 * wide(student.detach()) + 0.4 * wide(teacher)).softmax(-1)
    return -(target * wide(student).log_softmax(-1)).sum(-1)


def meal_v2(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the mean of two softmaxes."""
    target = 0.5 * (wide(teacher).softmax(-1) + wide(second(teacher)).softmax(-1))
    return -(target * wide(student).log_softmax(-1)).sum(-1)


def mft(student: Tensor, teacher: Tensor) -> Tensor:
    """KL to the teacher moved towards the label."""
    labels = labels_of(student)
    log_q, log_p = _logs(student, teacher)
    p = log_p.exp()
    best, at = p.max(-1)
    own = _label(p, labels)
    ahead = (best - own + 0.2) / (1 + best - own)
    share = torch.where(at == labels, 0.2 / (1 - own), ahead).clamp(0, 1)
    moved = (1 - share).unsqueeze(-1) * p
    moved = moved.scatter_add(-1, labels.unsqueeze(-1), share.unsqueeze(-1))
    return (torch.xlogy(moved, moved) - moved * log_q).sum(-1)


def opd_topk(student: Tensor, teacher: Tensor) -> Tensor:
    """Reverse KL over the student's best 100 and one outcome for all others."""
    log_q, log_p = _logs(student, teacher)
    best = log_q.detach().topk(TOP).indices
    log_q, log_p = log_q.gather(-1, best), log_p.gather(-1, best)
    rest_q, rest_p = 1 - log_q.exp().sum(-1), 1 - log_p.exp().sum(-1)
    return _kl(log_q, log_p) + rest_q * (rest_q / rest_p).log()


def opd(student: Tensor, teacher: Tensor) -> Tensor:
    """The policy gradient of one token."""
    log_q, log_p = (_label(x, labels_of(student)) for x in _logs(student, teacher))
    return (log_q - log_q.detach()).exp() * (log_q - log_p).detach()


def uld(student: Tensor, teacher: Tensor) -> Tensor:
    """Distance of sorted probabilities."""
    q, p = (x.exp().sort(-1, descending=True).values for x in _logs(student, teacher))
    return (q - p).abs().sum(-1)


@dataclass(frozen=True)
class Recipe:
    """A formula and its recipe."""

    definition: Callable[[Tensor, Tensor], Tensor]
    ours: Callable[[Tensor, Tensor], Tensor]
    #: About how many float32 tensors [rows, vocab] the eager formula holds at a time.
    copies: float = 8


RECIPES = {
    "gkd": Recipe(gkd, recipes.gkd, 13),
    "distillm": Recipe(distillm, recipes.distillm, 10),
    "distillm2": Recipe(
        distillm2,
        lambda s, t: fastkd.softmax_divergence(
            s, t, divergence="skew_reverse_kl_detached", beta=shares(s)
        ),
        10,
    ),
    "mixed_kl": Recipe(mixed_kl, partial(fastkd.softmax_divergence, divergence="mixed_kl"), 10),
    "abkd": Recipe(abkd, recipes.abkd, 14),
    "akl": Recipe(akl, partial(recipes.akl, k=HEAD), 14),
    "kd": Recipe(kd, lambda s, t: recipes.kd(s, t, labels_of(s)), 10),
    "dkd": Recipe(dkd, lambda s, t: recipes.dkd(s, t, labels_of(s)), 12),
    "align_distil": Recipe(
        align_distil,
        lambda s, t: recipes.align_distil(s, t, second(t), beta2=BETA2, reduction="mean"),
        12,
    ),
    "dparallel": Recipe(
        dparallel,
        lambda s, t: recipes.dparallel(s, half_right(s), torch.ones_like(half_right(s)).bool()),
    ),
    "adaspec": Recipe(adaspec, lambda s, t: recipes.adaspec(s, t, second(t), keep=KEEP), 9),
    "taid": Recipe(taid, lambda s, t: recipes.taid(s, t, 0.4)),
    "meal_v2": Recipe(meal_v2, lambda s, t: recipes.meal_v2(s, [t, second(t)])),
    "mft": Recipe(mft, lambda s, t: recipes.mft(s, t, labels_of(s)), 9),
    "opd_topk": Recipe(opd_topk, partial(recipes.opd_topk, k=TOP)),
    "opd": Recipe(opd, lambda s, t: recipes.opd(s, t, labels_of(s)), 6),
    "uld": Recipe(uld, recipes.uld, 14),
}


def recipe_case(
    name: str,
    dtype: str = "float32",
    vocab: int = MIDDLE_VOCAB,
    rows: int = MIDDLE_ROWS,
    *,
    peers: bool = True,
) -> Case:
    """A recipe beside its formula, eager and compiled."""
    recipe = RECIPES[name]

    def eager(student: Tensor, teacher: Tensor) -> Tensor:
        return recipe.definition(student, teacher).mean()

    shape = Shape(rows, vocab, DTYPES[dtype])
    contestants = beside_eager(recipe.ours, eager, peers, recipe.copies)
    return Case(name, shape, correlated_logits, recipe.definition, contestants)


def tables_moved(loss: Callable[[Tensor, Tensor], Tensor], rows: int = 16) -> float:
    """Tables [rows, vocab] of bfloat16 that a step reads and writes, operator by operator."""
    student, teacher = (x.bfloat16() for x in correlated_logits(rows, 4096))
    student.requires_grad_()
    for prepared in (second, labels_of, half_right, shares):
        prepared(teacher if prepared is second else student)
    with Counter() as counter:
        loss(student, teacher).mean().backward()
    return counter.bytes / (student.numel() * student.element_size())
