"""token_stats."""

import math

import torch
from torch import Tensor

from fastkd.reference._rows import divergence_rows, exp, finite, log_softmax


def token_stats(
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    reference_logits: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """`fastkd.token_stats` in plain PyTorch; the same fields in the same order."""
    given = [student_logits] if teacher_logits is None else [student_logits, teacher_logits]
    double = any(x.dtype == torch.float64 for x in given)
    dtype = torch.float64 if double else torch.float32
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature.to(dtype).unsqueeze(-1)
    logs = [log_softmax(x[..., :vocab_size].to(dtype), temperature) for x in given]
    fields: list[Tensor | None] = []
    for logits, log_q in zip(given, logs, strict=True):
        kept = logits[..., :vocab_size].to(dtype)
        lse = (kept / temperature).logsumexp(-1)
        lost = log_q.isnan().any(-1)
        lse = torch.where(lost, math.nan, lse)
        # The lowest index: torch.argmax may return any of equal ones.
        columns = torch.arange(log_q.size(-1), device=log_q.device)
        best = kept == kept.amax(-1, keepdim=True)
        argmax = torch.where(best, columns, log_q.size(-1)).amin(-1)
        label = None
        if labels is not None:
            at = labels.clamp(min=0).long().unsqueeze(-1)
            label = torch.where(labels == -100, math.nan, log_q.gather(-1, at).squeeze(-1))
        entropy = -(exp(log_q) * finite(log_q)).sum(-1)
        fields += [lse, entropy, torch.where(lost, -1, argmax), log_q.amax(-1).exp(), label]
    if teacher_logits is None:
        return (*fields, *[None] * 9)
    q, p = logs
    pair = [divergence_rows(p, q, name, 0.5) for name in ("forward_kl", "reverse_kl", "tvd")]
    reference_kl = None
    if reference_logits is not None:
        reference = log_softmax(reference_logits[..., :vocab_size].to(dtype), temperature)
        reference_kl = divergence_rows(p, reference, "forward_kl", 0.5)
    return (*fields, *pair, reference_kl)
