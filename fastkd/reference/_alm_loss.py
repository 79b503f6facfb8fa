"""alm_loss, text by text and chunk by chunk."""

import math
from typing import Any

import torch
from torch import Tensor

from fastkd.reference._chunk_log_likelihood import chunk_log_likelihood_op


def _chunk_loss(divergence: str, t: Tensor, s: Tensor, temperature: float, eps: float) -> Tensor:
    """The loss of a chunk from its two log-likelihoods, which must be finite."""
    if divergence == "binary_kl_limit":
        t, s = t - eps, s - eps
        return t - s + t * torch.log(-s) - t * torch.log(-t)
    a, b = t / temperature - eps, s / temperature - eps
    p, q = a.exp(), b.exp()
    not_p, not_q = torch.log1p(-p), torch.log1p(-q)
    return {
        "binary_ce": lambda: -(p * b + (1 - p) * not_q),
        "reverse_binary_kl": lambda: q * (b - a) + (1 - q) * (not_q - not_p),
        "abs": lambda: (a - b).abs(),
        "abs_exp": lambda: (p - q).abs(),
        "renyi": lambda: -2 * torch.log((p * q).sqrt() + ((1 - p) * (1 - q)).sqrt()),
        "k2": lambda: (a - b) ** 2 / 2,
        "k3": lambda: torch.exp(a - b) - 1 - (a - b),
    }[divergence]()


def alm_loss(
    student_logits: Tensor,
    student_ids: Tensor,
    student_chunks: Tensor,
    teacher_logits: Tensor,
    teacher_ids: Tensor,
    teacher_chunks: Tensor,
    num_chunks: int,
    *,
    divergence: str = "binary_ce",
    temperature: float = 100.0,
    epsilon: float = 1e-6,
    student_boundary: Tensor | None = None,
    teacher_boundary: Tensor | None = None,
    debias: bool = True,
    merge_threshold: float | None = None,
    reduction: str = "mean",
    normalizer: Any = None,
) -> Tensor:
    """`fastkd.alm_loss` in plain PyTorch, with the same arguments; likelihoods must be finite."""
    sides: list[Any] = [
        chunk_log_likelihood_op(logits.double(), ids, chunks, num_chunks, boundary, 1.0)
        for logits, ids, chunks, boundary in (
            (student_logits, student_ids, student_chunks, student_boundary),
            (teacher_logits, teacher_ids, teacher_chunks, teacher_boundary),
        )
    ]
    debias = debias and student_boundary is not None
    losses, total = [], 0
    for text in range(student_logits.size(0)):
        ends = {int(chunks[text, -1]) for chunks in (student_chunks, teacher_chunks)}
        groups: list[list[int]] = []
        joined = False
        for chunk in range(num_chunks):
            if min(int(count[text, chunk]) for _, _, count in sides) == 0:
                continue
            if joined:
                groups[-1].append(chunk)
            else:
                groups.append([chunk])
            if merge_threshold is not None:
                joined = math.exp(sides[1][1][text, chunk].item()) <= merge_threshold
        total += len(groups)
        row = student_logits.new_zeros(num_chunks, dtype=torch.float64)
        for place, group in enumerate(groups):
            s, t = (likelihood[text, group].sum() for likelihood, _, _ in sides)
            if debias and group[-1] not in ends:
                s, t = (
                    x + boundary[text, group[-1]]
                    for x, (_, boundary, _) in zip((s, t), sides, strict=True)
                )
            at = place if merge_threshold is not None else group[0]
            loss = _chunk_loss(divergence, t, s, temperature, epsilon)
            row = row + loss * torch.nn.functional.one_hot(torch.tensor(at), num_chunks)
        losses.append(row)
    loss = torch.stack(losses) if losses else student_logits.new_zeros((0, num_chunks)).double()
    if reduction == "none":
        return loss
    sizes = {"sum": 1, "mean": total, "batchmean": loss.size(0), "elementmean": loss.numel()}
    divisor = sizes[reduction] if normalizer is None else float(normalizer)
    return loss.sum() / divisor if divisor else loss.sum() * 0
