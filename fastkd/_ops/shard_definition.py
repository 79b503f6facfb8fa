"""Definitions of what is summed over the columns of all processes, in plain PyTorch.

They are what second derivatives differentiate. A number of a row is the same on every process, a
column is on one of them, and two collectives lead from one to the other. Each one's gradient is the
other, so that derivatives of any order are those of one process:

- :func:`total` sums columns' parts. The gradient of each part is that of the sum.
- :func:`copied` gives each process a copy of a number. The gradient of the number is the sum of
  those of the copies.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.shards import Shards

#: Logits that are this much below the largest are probability 0, as in fastkd/reference/_rows.py.
DEAD = 1e25


def total(shards: Shards, parts: Tensor) -> Tensor:
    """The sum over all processes, added up in the order of their ranks."""
    return _Total.apply(shards, parts)


def gathered(shards: Shards, numbers: Tensor) -> Tensor:
    """[processes, ...]: the numbers of all processes. Each one's gradient is that of its place."""
    none = torch.zeros_like(numbers)
    own = [numbers if i == shards.rank else none for i in range(shards.size)]
    return total(shards, torch.stack(own))


def copied(shards: Shards, numbers: Tensor) -> Tensor:
    """Numbers that are the same on every process, for use with this process's columns."""
    return _Copied.apply(shards, numbers)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shards, parts):
        ctx.shards = shards
        return shards.gather(parts, torch.float64).sum(0)

    @staticmethod
    def backward(ctx, grad):
        return None, copied(ctx.shards, grad)


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shards, numbers):
        ctx.shards = shards
        return numbers.clone()

    @staticmethod
    def backward(ctx, grad):
        return None, total(ctx.shards, grad)


def capped(shards: Shards, logits: Tensor, read: Tensor, cap: Tensor) -> Tensor:
    """This process's columns as they are read, float64 [rows, columns]; rows not read are 0.

    A process without columns has an impossible one, so that its graph has the same collectives.
    """
    z = logits.reshape(read.numel(), logits.size(-1))[:, : shards.columns].to(torch.float64)
    if shards.columns == 0:
        return z.sum(1, keepdim=True) - torch.inf
    return softcapped(torch.where(read.unsqueeze(1), z, 0.0), cap.unsqueeze(1))


def softcapped(logits: Tensor, cap: Tensor) -> Tensor:
    """cap tanh(logits / cap); infinite logits stay. An infinite cap is none."""
    none = logits.isinf() | cap.isinf()
    capped = cap.masked_fill(cap.isinf(), 1) * (logits / cap).masked_fill(none, 0).tanh()
    return torch.where(none, logits, capped)


def among(shards: Shards, holes: Tensor) -> Tensor:
    """[rows, columns]: whether a column of this process is among those that its row names."""
    some, width = (holes >= 0) & (holes < shards.columns), max(shards.columns, 1)
    found = torch.zeros((holes.size(0), width + 1), dtype=torch.bool, device=holes.device)
    return found.scatter(1, torch.where(some, holes, width), True)[:, :-1]


def relative(shards: Shards, z: Tensor) -> Tensor:
    """Logits less the largest of their row."""
    largest = top(shards, z)
    return z - torch.where(largest.isfinite(), largest, 0.0).unsqueeze(1)


def alive(relative: Tensor) -> Tensor:
    """The same; -inf of those so far below the largest that they mean probability 0."""
    return relative.masked_fill(relative < -DEAD, -math.inf)


def top(shards: Shards, z: Tensor) -> Tensor:
    """[rows]: the largest of each row of all processes. No gradient."""
    return shards.gather(z.detach().amax(1), torch.float64).amax(0)


def chosen(shards: Shards, values: Tensor, columns: Tensor) -> Tensor:
    """[rows, n] of [rows, columns]: the values of columns of this process, ids below 0 for none.

    0 where no process has the column.
    """
    here = (columns >= 0) & (columns < shards.columns)
    found = values.gather(1, torch.where(here, columns, 0))
    return total(shards, torch.where(here, found, 0.0))


def log_sum_exp(shards: Shards, scaled: Tensor) -> Tensor:
    """[rows]: of all processes; -inf, with a finite gradient, where all are -inf."""
    largest = top(shards, scaled)
    largest = torch.where(largest.isfinite(), largest, 0.0)
    sums = total(shards, exp(scaled - largest.unsqueeze(1)).sum(1))
    none = sums == 0
    found = torch.where(none, -math.inf, sums.masked_fill(none, 1).log() + largest)
    return torch.where(found == math.inf, math.nan, found)


def log_softmax(shards: Shards, scaled: Tensor, *, empty: bool = False) -> tuple[Tensor, Tensor]:
    """The logarithms of this process's probabilities, and the log-sum-exp of all.

    NaN where a row has no finite number, except with ``empty``.
    """
    lse = log_sum_exp(shards, scaled)
    own = copied(shards, torch.where(lse == -math.inf, 0.0 if empty else math.nan, lse))
    own, dead = own.unsqueeze(1), scaled == -math.inf
    log_q = scaled.masked_fill(dead, 0) - own
    return torch.where(dead & ~own.isnan(), -math.inf, log_q), lse


def exp(log: Tensor) -> Tensor:
    """The exponential; the gradient of exp(-inf) is 0."""
    dead = log == -math.inf
    return log.masked_fill(dead, 0).exp().masked_fill(dead, 0)


def entropy(shards: Shards, log_q: Tensor) -> Tensor:
    """[rows]: of probabilities of all processes."""
    q = exp(log_q)
    return total(shards, -(q * log_q.masked_fill(log_q == -math.inf, 0)).sum(1))


def differentiated(outputs: Any, inputs: Any, grads: Any) -> list[Tensor | None]:
    """The gradients of a definition, which can be differentiated again."""
    pairs = zip(outputs, grads, strict=True)
    kept = [(x, g) for x, g in pairs if x is not None and g is not None and x.requires_grad]
    return list(
        torch.autograd.grad(
            [x for x, _ in kept],
            inputs,
            [g for _, g in kept],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )
