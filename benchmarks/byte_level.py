"""Ops across tokenizers: an op at a shape, its definition, its contestants.

Rows are texts of a few tokens, all made of the same distinct rows, so that a text's loss, spread
evenly over its rows, is a loss of rows. Every row of logits is in a chunk, and the vocabulary is
made up with the first bytes of real ones: a third of its tokens begins with a space.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from benchmarks.baselines import beside_eager, wide
from benchmarks.cases import MIDDLE_ROWS, MIDDLE_VOCAB
from benchmarks.harness import DISTINCT_ROWS, Case
from benchmarks.shapes import DTYPES, Shape, correlated_logits

TOKENS_A_CHUNK, SPECIAL_IDS = 2, 17
LETTERS = b"etaoinshrdlcumwfgypbvkjxqz"
TEXT = b" the cat"


@lru_cache(maxsize=8)
def vocabulary(size: int) -> fastkd.ByteVocab:
    """Special ids, all single bytes, and words, a third of them after a space; cut to `size`."""
    random = np.random.default_rng(size)
    odds = 1 / np.arange(1, len(LETTERS) + 1)
    lengths = random.integers(2, 9, size)
    letters = random.choice(np.frombuffer(LETTERS, np.uint8), (size, 8), p=odds / odds.sum())
    letters[random.random(size) < 1 / 3, 0] = ord(" ")
    words = [row[:length].tobytes() for row, length in zip(letters, lengths, strict=True)]
    single = [bytes([value]) for value in range(256)]
    return fastkd.ByteVocab([*[None] * SPECIAL_IDS, *single, *words][:size])


class Texts:
    """Rows as texts: tokens, chunks and the boundary set, on a device."""

    def __init__(self, rows: int, vocab: int) -> None:
        self.length, self.vocab = math.gcd(rows, DISTINCT_ROWS), vocab
        self.num_chunks = math.ceil(self.length / TOKENS_A_CHUNK)
        self._made: dict[tuple[int, torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    def cut(self, logits: Tensor) -> Tensor:
        """``[texts, tokens, vocab]``."""
        return logits.view(-1, self.length, self.vocab)

    def of(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids and chunk ids of every text of these rows, and the boundary set."""
        key = logits.size(0), logits.device
        if key not in self._made:
            row = torch.arange(logits.size(0), device=logits.device)
            ids = (7919 * (row % DISTINCT_ROWS) % self.vocab).view(-1, self.length)
            chunks = (row % self.length // TOKENS_A_CHUNK).view(-1, self.length)
            boundary = torch.from_numpy(vocabulary(self.vocab).boundary()).to(logits.device)
            self._made[key] = ids, chunks, boundary
        return self._made[key]

    def ended(self) -> slice:
        """The rows of a text that score the token after a chunk."""
        return slice(TOKENS_A_CHUNK, None, TOKENS_A_CHUNK)

    def by_row(self, losses: Tensor) -> Tensor:
        """Each text's loss, spread over its rows."""
        return (losses / self.length).repeat_interleave(self.length)


def chunk_log_likelihood_case(
    dtype: str = "float32",
    vocab: int = MIDDLE_VOCAB,
    rows: int = MIDDLE_ROWS,
    *,
    gradient: bool = True,
    peers: bool = True,
) -> Case:
    """Likelihoods of chunks and of a boundary after each, added up."""
    texts = Texts(rows, vocab)

    def exact(student: Tensor, teacher: Tensor) -> Tensor:
        *arguments, boundary = texts.of(student)
        found = fastkd.reference.chunk_log_likelihood(
            texts.cut(student), *arguments, texts.num_chunks, boundary=boundary
        )
        return texts.by_row((found[0] + found[1]).sum(-1))

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        *arguments, boundary = texts.of(student)
        found = fastkd.chunk_log_likelihood(
            texts.cut(student), *arguments, texts.num_chunks, boundary=boundary
        )
        return (found.log_likelihood + found.boundary_log_prob).sum() / student.size(0)

    def eager(student: Tensor, teacher: Tensor) -> Tensor:
        likelihood, boundary = eager_chunks(texts, student)
        return (likelihood + boundary).sum() / student.size(0)

    reads = 2 if gradient else 1  # forward, and again for the gradient
    shape = Shape(rows, vocab, DTYPES[dtype])
    contestants = beside_eager(ours, eager, peers, 6)
    name = "chunk_log_likelihood"
    return Case(name, shape, correlated_logits, exact, contestants, gradient, reads)


def eager_chunks(texts: Texts, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Likelihoods of chunks, and the boundary's after each, 0 at a text's end: ``[texts, C]``."""
    ids, chunks, boundary = texts.of(logits)
    log_q = F.log_softmax(wide(texts.cut(logits)), dim=-1)
    label = log_q.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    places = chunks + texts.num_chunks * torch.arange(ids.size(0), device=ids.device).unsqueeze(1)
    likelihood = label.new_zeros(ids.size(0) * texts.num_chunks)
    likelihood = likelihood.index_add(0, places.flatten(), label.flatten())
    after = log_q[:, texts.ended()].masked_fill(~boundary, -math.inf).logsumexp(-1)
    return (
        likelihood.view(ids.size(0), texts.num_chunks),
        F.pad(after, (0, texts.num_chunks - after.size(1))),
    )


def alm_loss_case(
    dtype: str = "float32",
    vocab: int = MIDDLE_VOCAB,
    rows: int = MIDDLE_ROWS,
    *,
    peers: bool = True,
) -> Case:
    """Approximate likelihood matching, debiased, two models of one width."""
    texts = Texts(rows, vocab)

    def arguments(student: Tensor, teacher: Tensor) -> tuple[list[Any], dict[str, Any]]:
        ids, chunks, boundary = texts.of(student)
        sides = [texts.cut(student), ids, chunks, texts.cut(teacher), ids, chunks]
        boundaries = {"student_boundary": boundary, "teacher_boundary": boundary}
        return [*sides, texts.num_chunks], boundaries

    def exact(student: Tensor, teacher: Tensor) -> Tensor:
        tensors, options = arguments(student, teacher)
        losses = fastkd.reference.alm_loss(*tensors, **options, reduction="none")
        return texts.by_row(losses.sum(-1))

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        tensors, options = arguments(student, teacher)
        return fastkd.alm_loss(*tensors, **options, reduction="sum") / student.size(0)

    def eager(student: Tensor, teacher: Tensor) -> Tensor:
        b, a = (sum(eager_chunks(texts, x)) / 100 - 1e-6 for x in (student, teacher))
        return -(a.exp() * b - torch.expm1(a) * torch.log1p(-b.exp())).sum() / student.size(0)

    shape = Shape(rows, vocab, DTYPES[dtype])
    contestants = beside_eager(ours, eager, peers, 10)
    # The student's logits are read again for the gradient.
    return Case("alm_loss", shape, correlated_logits, exact, contestants, True, reads=3)


def byte_log_probs_case(
    dtype: str = "float32",
    vocab: int = MIDDLE_VOCAB,
    rows: int = MIDDLE_ROWS,
    *,
    gradient: bool = True,
    peers: bool = True,
) -> Case:
    """Cross-entropy of the next byte of a model of tokens."""
    made = vocabulary(vocab)

    def target(logits: Tensor) -> Tensor:
        row = torch.arange(logits.size(0), device=logits.device) % DISTINCT_ROWS
        return torch.tensor(list(TEXT), device=logits.device)[row].unsqueeze(-1)

    @lru_cache(maxsize=4)
    def columns(device: torch.device) -> Tensor:
        return torch.from_numpy(made.columns.astype(np.int64)).to(device)

    def exact(student: Tensor, teacher: Tensor) -> Tensor:
        found = fastkd.reference.byte_log_probs(student, made)
        return -found.gather(-1, target(student)).squeeze(-1)

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        return -fastkd.byte_log_probs(student, made).gather(-1, target(student)).mean()

    def eager(student: Tensor, teacher: Tensor) -> Tensor:
        q = F.softmax(wide(student), dim=-1)
        found = q.new_zeros(q.size(0), made.num_columns).index_add(1, columns(q.device), q)
        return -found.log().gather(-1, target(student)).mean()

    columns(torch.device("cpu"))
    reads = 2 if gradient else 1  # forward, and again for the gradient
    shape = Shape(rows, vocab, DTYPES[dtype])
    contestants = beside_eager(ours, eager, peers, 5)
    return Case("byte_log_probs", shape, correlated_logits, exact, contestants, gradient, reads)
