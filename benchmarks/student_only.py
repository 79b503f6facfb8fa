"""Ops over one model's logits: an op at a shape, its definition, its contestants."""

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from benchmarks.baselines import beside_eager, wide
from benchmarks.cases import MIDDLE_ROWS, MIDDLE_VOCAB
from benchmarks.harness import DISTINCT_ROWS, Case
from benchmarks.shapes import DTYPES, Shape, correlated_logits


def tokens_of(logits: Tensor) -> Tensor:
    """A token a row; repeated rows have the same."""
    row = torch.arange(logits.size(0), device=logits.device) % DISTINCT_ROWS
    return 7919 * row % logits.size(-1)


def cross_entropy_case(
    dtype: str = "float32",
    vocab: int = MIDDLE_VOCAB,
    rows: int = MIDDLE_ROWS,
    *,
    entropy: bool = False,
    gradient: bool = True,
    peers: bool = True,
) -> Case:
    """Cross-entropy of a label a row, with an entropy term at another temperature or without."""
    options = {"entropy_weight": 0.5, "entropy_temperature": 2.0} if entropy else {}

    def exact(student: Tensor, teacher: Tensor) -> Tensor:
        labels = tokens_of(student)
        return fastkd.reference.cross_entropy(student, labels, reduction="none", **options)

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        return fastkd.cross_entropy(student, tokens_of(student), **options)

    def eager(student: Tensor, teacher: Tensor) -> Tensor:
        loss = F.cross_entropy(wide(student), tokens_of(student))
        if entropy:
            log_a = F.log_softmax(wide(student) / 2.0, dim=-1)
            loss = loss - 0.5 * (log_a.exp() * log_a).sum(-1).mean()
        return loss

    shape = Shape(rows, vocab, DTYPES[dtype])
    contestants = beside_eager(ours, eager, peers, 5)
    name = "cross_entropy" + (" and entropy" if entropy else "")
    return Case(name, shape, correlated_logits, exact, contestants, gradient, 1)


def token_log_probs_case(
    dtype: str = "float32",
    vocab: int = MIDDLE_VOCAB,
    rows: int = MIDDLE_ROWS,
    *,
    entropy: bool = False,
    gradient: bool = True,
    peers: bool = True,
) -> Case:
    """Log-probabilities of tokens, with the rows' entropies or without."""

    def exact(student: Tensor, teacher: Tensor) -> Tensor:
        found = fastkd.reference.token_log_probs(student, tokens_of(student), entropy=entropy)
        return -found[0] - 0.1 * found[1] if entropy else -found

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        found = fastkd.token_log_probs(student, tokens_of(student), entropy=entropy)
        return -(found[0] + 0.1 * found[1]).mean() if entropy else -found.mean()

    def eager(student: Tensor, teacher: Tensor) -> Tensor:
        log_q = F.log_softmax(wide(student), dim=-1)
        loss = -log_q.gather(-1, tokens_of(student).unsqueeze(-1)).squeeze(-1)
        if entropy:
            loss = loss + 0.1 * (log_q.exp() * log_q).sum(-1)
        return loss.mean()

    reads = 2 if gradient else 1  # forward, and again for the gradient
    shape = Shape(rows, vocab, DTYPES[dtype])
    contestants = beside_eager(ours, eager, peers, 5)
    name = "token_log_probs" + (" and entropy" if entropy else "")
    return Case(name, shape, correlated_logits, exact, contestants, gradient, reads)
