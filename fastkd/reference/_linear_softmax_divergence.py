"""linear_softmax_divergence."""

from typing import Any

import torch
from torch import Tensor

from fastkd._ops.linear.logits import LinearLogits
from fastkd.reference._softmax_divergence import softmax_divergence


def linear_softmax_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    logit_scale: float | tuple[float, float] = 1.0,
    **options: Any,
) -> Tensor:
    """`fastkd.linear_softmax_divergence` in plain PyTorch.

    It takes the same arguments, except those that say how: `chunk_size`, `compact`, `logits_dtype`,
    `return_stats` and `reduce_hidden_grad`.
    """
    scales = logit_scale if isinstance(logit_scale, tuple) else (logit_scale, logit_scale)
    student = _logits(student_hidden, student_weight, student_bias, scales[0])
    teacher: Any
    if options.get("teacher_rows") is None:
        teacher = _logits(teacher_hidden, teacher_weight, teacher_bias, scales[1])
    else:  # a head, whose chosen rows have gradients
        teacher = LinearLogits(teacher_hidden, teacher_weight, teacher_bias, scale=scales[1])
    return softmax_divergence(student, teacher, **options)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Scale x hidden @ weight.T + bias, in float32 at least."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    found = scale * (hidden.to(wide) @ weight.to(wide).mT)
    return found if bias is None else found + bias.to(wide)
