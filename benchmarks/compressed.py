"""Compressed teachers and statistics: an op at a shape, its definition, its contestants.

Every contestant turns a student's and a teacher's logits into one scalar. What is stored before
training (a teacher's best k) is made once for a teacher and kept; ops that return no loss are
compared by a sum over what they return.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from benchmarks.baselines import beside_eager, wide
from benchmarks.cases import MIDDLE_ROWS, MIDDLE_VOCAB
from benchmarks.harness import Case, Contestant, Loss
from benchmarks.shapes import DTYPES, Shape, correlated_logits

K = 64
LOWER, UPPER = 1e-6, 0.5


class Stored:
    """A teacher's best k, made once for each tensor of logits."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Any, tuple[Tensor, Tensor]]] = {}

    def __call__(self, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """log-probabilities and indices."""
        found = self._kept.get(id(teacher))
        if found is None or found[0]() is not teacher:
            values = fastkd.teacher_topk(teacher, K)
            found = self._kept[id(teacher)] = (weakref.ref(teacher), tuple(values))
        return found[1]


def _case(
    name: str,
    exact: Callable[[Tensor, Tensor], Tensor],
    ours: Loss,
    eager: Loss,
    setting: dict[str, Any],
    *,
    reads: int,
    gradient: bool,
) -> Case:
    shape = Shape(setting["rows"], setting["vocab"], DTYPES[setting["dtype"]])
    contestants = beside_eager(ours, eager, setting["peers"], 7)
    return Case(name, shape, correlated_logits, exact, contestants, gradient, reads)


def topk_divergence_case(
    dtype: str = "float32",
    vocab: int = MIDDLE_VOCAB,
    rows: int = MIDDLE_ROWS,
    *,
    peers: bool = True,
) -> Case:
    """KL of the best k and the lumped rest, loss and gradient."""
    stored = Stored()

    def exact(student: Tensor, teacher: Tensor) -> Tensor:
        values, indices = fastkd.reference.teacher_topk(teacher, K)
        return fastkd.reference.topk_divergence(student, values, indices, reduction="none")

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        return fastkd.topk_divergence(student, *stored(teacher), reduction="batchmean")

    def eager(student: Tensor, teacher: Tensor) -> Tensor:
        return _eager_topk(student, *stored(teacher))

    @torch.compile(dynamic=False)
    def compiled(student: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        return _eager_topk(student, values, indices)

    setting = {"dtype": dtype, "vocab": vocab, "rows": rows, "peers": peers}
    case = _case("topk_divergence", exact, ours, eager, setting, reads=1, gradient=True)
    if peers:  # what is stored is no part of the step
        case.contestants[-1] = Contestant(
            "torch.compile", lambda s, t: compiled(s, *stored(t)), copies=7
        )
    return case


def _eager_topk(student: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    log_q = F.log_softmax(wide(student), dim=-1).gather(-1, indices.long())
    rest = torch.log1p(-log_q.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))
    teacher_rest = torch.log1p(-values.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))
    log_q, log_p = torch.cat([log_q, rest], -1), torch.cat([values, teacher_rest], -1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def clipped_divergence_case(
    dtype: str = "float32",
    vocab: int = MIDDLE_VOCAB,
    rows: int = MIDDLE_ROWS,
    *,
    peers: bool = True,
) -> Case:
    """Forward KL where the teacher's probability lies in a range, the rest lumped."""
    options = {"tail": "lump"}

    def exact(student: Tensor, teacher: Tensor) -> Tensor:
        return fastkd.reference.clipped_divergence(
            student, teacher, LOWER, UPPER, reduction="none", **options
        )

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        return fastkd.clipped_divergence(
            student, teacher, LOWER, UPPER, reduction="batchmean", **options
        )

    def eager(student: Tensor, teacher: Tensor) -> Tensor:
        log_q, log_p = (F.log_softmax(wide(x), dim=-1) for x in (student, teacher))
        p = log_p.exp()
        inside = (p >= LOWER) & (p <= UPPER)
        loss = torch.where(inside, p * (log_p - log_q), 0.0).sum(-1)
        rest, rest_q = (torch.where(inside, 0.0, x).sum(-1) for x in (p, log_q.exp()))
        return (loss + rest * (rest.log() - rest_q.log())).mean()

    setting = {"dtype": dtype, "vocab": vocab, "rows": rows, "peers": peers}
    return _case("clipped_divergence", exact, ours, eager, setting, reads=2, gradient=True)


def teacher_topk_case(
    dtype: str = "float32",
    vocab: int = MIDDLE_VOCAB,
    rows: int = MIDDLE_ROWS,
    *,
    peers: bool = True,
) -> Case:
    """The best k log-probabilities of one tensor of logits."""

    def total(values: Tensor, indices: Tensor) -> Tensor:
        return values.sum(-1) + indices.sum(-1) / vocab

    def exact(student: Tensor, teacher: Tensor) -> Tensor:
        return total(*fastkd.reference.teacher_topk(student, K))

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        return total(*fastkd.teacher_topk(student, K)).mean()

    def eager(student: Tensor, teacher: Tensor) -> Tensor:
        return total(*F.log_softmax(wide(student), dim=-1).topk(K)).mean()

    setting = {"dtype": dtype, "vocab": vocab, "rows": rows, "peers": peers}
    return _case("teacher_topk", exact, ours, eager, setting, reads=1, gradient=False)


def token_stats_case(
    dtype: str = "float32",
    vocab: int = MIDDLE_VOCAB,
    rows: int = MIDDLE_ROWS,
    *,
    peers: bool = True,
) -> Case:
    """Every statistic of a pair, with labels."""

    def labels(logits: Tensor) -> Tensor:
        return torch.arange(logits.size(0), device=logits.device) % logits.size(-1)

    def total(fields: tuple[Tensor, ...]) -> Tensor:
        return torch.stack(
            [x.double() / (vocab if x.dtype == torch.int64 else 1) for x in fields]
        ).sum(0)

    def exact(student: Tensor, teacher: Tensor) -> Tensor:
        return total(fastkd.reference.token_stats(student, teacher, labels=labels(student) % 8))

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        return total(fastkd.token_stats(student, teacher, labels=labels(student) % 8)).mean()

    def eager(student: Tensor, teacher: Tensor) -> Tensor:
        at = (labels(student) % 8).unsqueeze(-1)
        fields = []
        logs = [F.log_softmax(wide(x), dim=-1) for x in (student, teacher)]
        for logits, log_p in zip((student, teacher), logs, strict=True):
            p = log_p.exp()
            top, argmax = p.max(-1)
            entropy, label = -(p * log_p).sum(-1), log_p.gather(-1, at).squeeze(-1)
            fields += [torch.logsumexp(wide(logits), -1), entropy, argmax, top, label]
        q, p = (x.exp() for x in logs)
        fields += [(p * (logs[1] - logs[0])).sum(-1), (q * (logs[0] - logs[1])).sum(-1)]
        return total((*fields, 0.5 * (p - q).abs().sum(-1))).mean()

    setting = {"dtype": dtype, "vocab": vocab, "rows": rows, "peers": peers}
    return _case("token_stats", exact, ours, eager, setting, reads=2, gradient=False)
