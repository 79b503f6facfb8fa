"""acm, acm.soft, acm.prefix_loss, acm.oracle: every learner on every row, then masks."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "identity": lambda x: x,
}


def _as_they_are(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Disable autocast in a function."""

    @functools.wraps(function)
    def run(x: Tensor, *others: Any, **options: Any) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *others, **options)

    return run


def _promoted(*tensors: Tensor | None) -> tuple[torch.dtype, list[Tensor]]:
    """The dtype of the result, and the tensors in the dtype of the computation."""
    given = [x for x in tensors if x is not None]
    dtype = given[0].dtype
    for x in given[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return dtype, [x.to(wide) for x in given]


def _learner(n: int, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, activation: str) -> Tensor:
    """Output of learner n, counted from 0."""
    return _ACTIVATIONS[activation](x @ w1[n] + b1[n]) @ w2[n]


@_as_they_are
def hard(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    choices: Tensor,
    *,
    activation: str = "gelu",
    bias: Tensor | None = None,
) -> Tensor:
    """`fastkd.acm` in plain PyTorch; rows with a choice out of range are NaN."""
    dtype, (x, w1, b1, w2, *others) = _promoted(x, w1, b1, w2, bias)
    learners, choices = w1.size(0), choices.long()
    out = x.new_zeros((*x.shape[:-1], w2.size(-1)))
    for n in range(learners):
        runs = (choices > n).unsqueeze(-1)
        # Rows that do not run a learner add nothing to its gradient, even where they hold NaN.
        learned = _learner(n, torch.where(runs, x, 0), w1, b1, w2, activation)
        out = out + torch.where(runs, learned, 0)
    for added in others:
        out = out + (added if added.dim() == 1 else added[choices.clamp(0, learners)])
    valid = (choices >= 0) & (choices <= learners)
    return torch.where(valid.unsqueeze(-1), out, torch.nan).to(dtype)


@_as_they_are
def soft(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    gates: Tensor,
    *,
    activation: str = "gelu",
    straight_through: bool = False,
) -> Tensor:
    """`fastkd.acm.soft` in plain PyTorch."""
    dtype = _promoted(x, w1, b1, w2)[0]
    x, w1, b1, w2, gates = _promoted(x, w1, b1, w2, gates)[1]
    learned = [_learner(n, x, w1, b1, w2, activation) for n in range(w1.size(0))]
    weights = [gates[..., n + 1 :].sum(-1, keepdim=True) for n in range(w1.size(0))]
    soft = torch.stack([g * y for g, y in zip(weights, learned, strict=True)]).sum(0)
    if not straight_through:
        return soft.to(dtype)
    choice = gates.argmax(-1, keepdim=True)
    hard = torch.stack([torch.where(choice > n, y, 0) for n, y in enumerate(learned)]).sum(
        0
    ) + torch.where(gates.isnan().any(-1, keepdim=True), torch.nan, 0)
    return (hard.detach() + (soft - soft.detach())).to(dtype)


@_as_they_are
def prefix_loss(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    target: Tensor,
    *,
    activation: str = "gelu",
    detach: bool = False,
) -> Tensor:
    """`fastkd.acm.prefix_loss` in plain PyTorch."""
    _, (x, w1, b1, w2, target) = _promoted(x, w1, b1, w2, target)
    prefix = torch.zeros_like(target)
    losses = [(prefix - target).square().sum()]
    for n in range(w1.size(0)):
        before = prefix.detach() if detach else prefix
        prefix = before + _learner(n, x, w1, b1, w2, activation)
        losses.append((prefix - target).square().sum())
    return torch.stack(losses) / max(target.numel(), 1)


@_as_they_are
def oracle(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    target: Tensor,
    *,
    activation: str = "gelu",
    threshold: float = 1 / 1.2,
    rule: str = "paper",
) -> Tensor:
    """`fastkd.acm.oracle` in plain PyTorch."""
    _, (x, w1, b1, w2, target) = _promoted(x, w1, b1, w2, target)
    learners = w1.size(0)
    prefix, distances = torch.zeros_like(target), []
    for n in range(learners + 1):
        if n:
            prefix = prefix + _learner(n - 1, x, w1, b1, w2, activation)
        distances.append((prefix - target).norm(dim=-1))
    labels = torch.full_like(distances[0], learners, dtype=torch.int64)
    # From the last learner down, so that the first one that stops is written last.
    for n in range(learners, 1 if rule == "paper" else 0, -1):
        before, after = threshold * distances[n - 1], distances[n]
        stops = after >= before if rule == "paper" else after > before
        labels = torch.where(stops, n if n > 1 else learners, labels)
    return labels
