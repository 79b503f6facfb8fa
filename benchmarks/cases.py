"""The comparisons themselves: an op at a shape, its definition in float64, its contestants."""

from torch import Tensor

from benchmarks.baselines import (
    exact_divergence,
    exact_kl_div,
    kl_div_contestants,
    softmax_divergence_contestants,
)
from benchmarks.harness import Case
from benchmarks.shapes import DTYPES, LLAMA_3, Shape, correlated_logits

MIDDLE_ROWS, MIDDLE_VOCAB = 256, LLAMA_3


def softmax_divergence_case(
    divergence: str = "forward_kl",
    dtype: str = "float32",
    vocab: int = MIDDLE_VOCAB,
    rows: int = MIDDLE_ROWS,
    *,
    gradient: bool = True,
    peers: bool = True,
    packages: bool = True,
) -> Case:
    """From logits; `peers` are PyTorch's spellings, `packages` other people's."""
    return Case(
        divergence,
        Shape(rows, vocab, DTYPES[dtype]),
        correlated_logits,
        exact_divergence(divergence),
        softmax_divergence_contestants(divergence, peers=peers, packages=packages),
        gradient,
    )


def kl_div_case(
    dtype: str = "float32",
    vocab: int = MIDDLE_VOCAB,
    rows: int = MIDDLE_ROWS,
    *,
    peers: bool = True,
) -> Case:
    """From log-probabilities and a target of probabilities."""
    contestants = kl_div_contestants(peers=peers)
    shape = Shape(rows, vocab, DTYPES[dtype])
    return Case("kl_div", shape, _log_probs_and_target, exact_kl_div, contestants)


def _log_probs_and_target(rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    student, teacher = correlated_logits(rows, vocab)
    return student.log_softmax(-1), teacher.softmax(-1)
