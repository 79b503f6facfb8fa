"""topk_stats."""

from typing import Any

import torch
from torch import Tensor

from fastkd.reference._rows import log_softmax
from fastkd.reference._topk_divergence import PADDING_LOG_PROB, topk_divergence


def topk_stats(
    student_logits: Tensor,
    teacher_log_probs: Tensor,
    teacher_indices: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """`fastkd.topk_stats` in plain PyTorch; the same fields in the same order."""
    logits = student_logits[..., :vocab_size].double()
    each = temperature
    if isinstance(each, Tensor) and each.dim():
        each = each.double().unsqueeze(-1)
    log_q = log_softmax(logits, each)
    stored = (teacher_indices >= 0) & (teacher_log_probs > PADDING_LOG_PROB)
    at = torch.where(stored, teacher_indices, 0).long()
    count = stored.sum(-1, keepdim=True)
    best = logits.sort(-1, descending=True).values
    least = best.gather(-1, (count - 1).clamp(min=0))
    among = logits.gather(-1, at) >= least
    lost = log_q.isnan().any(-1)

    def row(x: Tensor) -> Tensor:
        x = torch.where(lost, torch.nan, x)
        return x if mask is None else torch.where(mask, x, 0)

    return (
        row(torch.where(stored, log_q.gather(-1, at).exp(), 0).sum(-1)),
        row(torch.where(stored, teacher_log_probs.double().exp(), 0).sum(-1)),
        row((among & stored).sum(-1) / count.squeeze(-1)),
        topk_divergence(
            *(logits, teacher_log_probs, teacher_indices),
            temperature=temperature,
            mask=mask,
            reduction="none",
            **options,
        ),
    )
