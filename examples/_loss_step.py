"""The loss step, forward and backward on logits, by fastkd, eager PyTorch and torch.compile."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

TEMPERATURE = 1.0
LABEL_WEIGHT = 0.5


@dataclass(frozen=True)
class Batch:
    """Logits [windows, length, vocab] of both sides, next tokens, and which of them count."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    mask: Tensor


class Loss(Protocol):
    """Mean over the unmasked rows of KL(teacher || student) + LABEL_WEIGHT x cross-entropy."""

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Return a scalar; student and teacher are logits [..., vocab]."""
        ...


def fastkd_loss(student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """The loss in one fused call."""
    return fastkd.softmax_divergence(
        student,
        teacher,
        divergence="forward_kl",
        temperature=TEMPERATURE,
        square_temperature=True,
        labels=labels,
        label_weight=LABEL_WEIGHT,
        mask=mask,
    )


def eager_loss(student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """The same as training loops spell it: float32 copies, log_softmax, kl_div, cross_entropy."""
    student = student.flatten(0, -2).float()
    teacher = teacher.flatten(0, -2).float()
    log_q = F.log_softmax(student / TEMPERATURE, dim=-1)
    p = F.softmax(teacher / TEMPERATURE, dim=-1)
    kl = F.kl_div(log_q, p, reduction="none").sum(dim=-1) * TEMPERATURE**2
    nll = F.cross_entropy(student, labels.flatten(), reduction="none")
    keep = mask.flatten()
    return torch.where(keep, kl + LABEL_WEIGHT * nll, 0.0).sum() / keep.sum().clamp(min=1)


@dataclass(frozen=True)
class Contestant:
    """What one spelling of the loss costs on one batch; the problem where it could not run."""

    name: str
    milliseconds: float | None = None
    extra_bytes: int | None = None
    training_tokens_per_second: float | None = None
    problem: str | None = None


def compare(
    batch: Batch,
    train_step: Callable[[Loss], object],
    *,
    rounds: int,
    advance: Callable[[], None],
) -> list[Contestant]:
    """Time the losses alone and within `train_step`, in turn, and read each one's peak memory."""
    losses: dict[str, Loss] = {
        "fastkd": fastkd_loss,
        "eager": eager_loss,
        "torch.compile": torch.compile(eager_loss, dynamic=False),
    }
    problems: dict[str, str] = {}
    for name, loss in losses.items():
        try:
            loss_step(loss, batch)
            train_step(loss)
        except Exception as error:  # without a C++ compiler torch.compile may raise anything
            problems[name] = _reason(error)
        advance()

    running = {name: loss for name, loss in losses.items() if name not in problems}
    alone: dict[str, list[float]] = {name: [] for name in running}
    within: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, loss in running.items():
            alone[name].append(_seconds(partial(loss_step, loss, batch)))
        for name, loss in running.items():
            within[name].append(_seconds(partial(train_step, loss)))
        advance()

    tokens = int(batch.mask.sum())
    return [
        Contestant(
            name,
            milliseconds=statistics.median(alone[name]) * 1e3,
            extra_bytes=peak_extra_bytes(partial(loss_step, loss, batch)),
            training_tokens_per_second=tokens / statistics.median(within[name]),
        )
        if name in running
        else Contestant(name, problem=problems[name])
        for name, loss in losses.items()
    ]


def loss_step(loss: Loss, batch: Batch) -> float:
    """Run the loss forward and backward; the student's logits are a leaf and get their gradient."""
    leaf = batch.student.detach().requires_grad_()
    value = loss(leaf, batch.teacher, batch.labels, batch.mask)
    value.backward()
    return value.item()


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith("backend=")), repr(error))


def peak_extra_bytes(step: Callable[[], object]) -> int | None:
    """Return how far resident memory rises above its start while `step` runs, None if unknown.

    Linux keeps the high-water mark (VmHWM) and lets a process reset its own. Free memory that the
    allocator keeps resident would hide what the step takes, so it is given back first.
    """
    fastkd.release_memory()
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        step()
        return max(0, _status_bytes("VmHWM") - before)
    except OSError:
        return None


def memory_probe_ratio(size: int = 1 << 26) -> float | None:
    """Return what peak_extra_bytes reads for an allocation of `size` bytes, over `size`."""
    seen = peak_extra_bytes(lambda: torch.ones(size, dtype=torch.uint8))
    return None if seen is None else seen / size


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")
