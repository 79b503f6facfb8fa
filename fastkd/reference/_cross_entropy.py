"""cross_entropy."""

import math
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.op import declared
from fastkd.reference._origin import relative_to_largest
from fastkd.reference._rows import DEAD, Rows, ahead, exp, finite, from_largest, log_softmax


def _is(number: Any, value: float) -> bool:
    """Whether it is that number; while tracing it may be a tensor, whose value is not known."""
    return isinstance(number, float | int) and number == value


def cross_entropy_op(
    logits: Tensor,
    label_smoothing: float,
    entropy_weight: float,
    entropy_temperature: float,
    z_loss_weight: float,
    entropy_mask: Tensor | None,
    entropy_correct: bool,
    **row_options: Any,
) -> Tensor:
    """The raw op's loss, from its fields."""
    rows = Rows(logits, (), **{**row_options, "label_weight": 0.0, "label_weights": None})
    assert rows.labels is not None
    z, labels = rows.student, torch.where(rows.read, rows.labels, 0).long()
    lse = (relative_to_largest(z) / rows.tau).logsumexp(-1, keepdim=True)
    lse = torch.where(lse.isfinite(), lse, math.nan)
    relative = from_largest(z)
    label = relative.gather(-1, labels.unsqueeze(-1))
    loss = lse.squeeze(-1) * 0
    if not _is(label_smoothing, 1):
        # Of a label of probability 0 the value is inf, and the gradient q_v - 1[v = label], too.
        impossible = torch.where(label < -DEAD, -math.inf, 0.0)
        log_prob = (label / rows.tau + impossible - lse).squeeze(-1)
        loss = loss - (1 - label_smoothing) * log_prob
    if not _is(label_smoothing, 0):
        even = lse - (relative / rows.tau).mean(-1, keepdim=True)
        loss = loss + label_smoothing * even.squeeze(-1)
    if not _is(z_loss_weight, 0):
        top = z.detach().amax(-1, keepdim=True)
        top = torch.where(top.isfinite(), top, 0.0)
        loss = loss + z_loss_weight * (lse + top / rows.tau).squeeze(-1) ** 2
    if not _is(entropy_weight, 0):
        log_a = log_softmax(z, entropy_temperature)
        entropy = -(exp(log_a) * finite(log_a)).sum(-1)
        chosen = ahead(entropy_mask, rows.shift)
        if chosen is not None:
            entropy = torch.where(chosen, entropy, 0.0)
        if entropy_correct:
            columns = torch.arange(z.size(-1), device=z.device)
            best = torch.where(z == z.amax(-1, keepdim=True), columns, z.size(-1)).amin(-1)
            entropy = torch.where(best == labels, entropy, 0.0)
        loss = loss + entropy_weight * entropy
    return rows.reduce(loss)


def cross_entropy(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """`fastkd.cross_entropy` in plain PyTorch, with the same arguments."""
    return declared("cross_entropy").by_definition(logits, labels, **options)
