"""The student's optimisation, its score on text, and the check of its gradients."""

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import torch
from _corpus import Windows
from _loss_step import Loss, eager_loss, fastkd_loss
from torch import Tensor, nn

import fastkd

PEAK_LEARNING_RATE = 2e-3
WARM_UP = 0.1


@dataclass(frozen=True)
class Score:
    """Means over the tokens of some windows; bits per byte of the text they stand for."""

    kl: float
    cross_entropy: float
    bits_per_byte: float


@dataclass
class History:
    """Loss of every step, and KL to the teacher at some of them."""

    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    train_kl: list[float] = field(default_factory=list)
    held_kl: list[float] = field(default_factory=list)


class Distillation:
    """A student, its optimiser, and a learning rate that warms up and falls along a cosine."""

    def __init__(self, student: nn.Module, *, steps: int, dtype: torch.dtype) -> None:
        self.student = student
        self.dtype = dtype
        self.optimizer = torch.optim.AdamW(
            student.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: (
                min(1.0, (step + 1) / (WARM_UP * steps))
                * (0.525 + 0.475 * math.cos(math.pi * min(1.0, step / steps)))
            ),
        )

    def autocast(self) -> AbstractContextManager[None]:
        """Multiply matrices in the dtype that is fast here."""
        return torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32)

    def step(self, windows: Windows, teacher_logits: Tensor, loss: Loss = fastkd_loss) -> float:
        """Take one step and return the loss before it."""
        with self.autocast():
            logits = self.student(windows.ids)
        value = loss(logits, teacher_logits, windows.labels, windows.mask)
        value.backward()
        self.update()
        return value.item()

    def update(self) -> None:
        """Move the parameters along the gradients that are there, and forget these."""
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    @torch.no_grad()
    def logits(self, windows: Windows, *, batch: int) -> Iterator[Tensor]:
        """Yield the student's logits, `batch` windows at a time."""
        for ids in windows.ids.split(batch):
            with self.autocast():
                logits = self.student(ids)
            yield logits


@torch.no_grad()
def score(
    logits: Iterable[Tensor], windows: Windows, teacher_logits: Tensor, token_bytes: Tensor
) -> Score:
    """Score logits, given in runs of windows, against the teacher and the text."""
    kl = nll = 0.0
    first = 0
    for some in logits:
        here = slice(first, first + len(some))
        first += len(some)
        total = partial(
            fastkd.softmax_divergence,
            some,
            teacher_logits[here],
            mask=windows.mask[here],
            reduction="sum",
        )
        divergence = total().item()
        kl += divergence
        nll += total(labels=windows.labels[here], label_weight=1.0).item() - divergence
    size = int(token_bytes[windows.labels[windows.mask]].sum())
    return Score(kl / windows.tokens, nll / windows.tokens, nll / math.log(2) / size)


def gradient_error(student: nn.Module, windows: Windows, teacher_logits: Tensor) -> float:
    """Return |g_fastkd - g_eager| / |g_eager| over all parameters, on one batch in float32."""

    def gradients(loss: Loss) -> Tensor:
        student.zero_grad()
        logits = student(windows.ids)
        loss(logits, teacher_logits, windows.labels, windows.mask).backward()
        return _flat(p.grad for p in student.parameters() if p.grad is not None)

    ours, eager = gradients(fastkd_loss), gradients(eager_loss)
    student.zero_grad()
    return float((ours - eager).norm() / eager.norm())


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors])
