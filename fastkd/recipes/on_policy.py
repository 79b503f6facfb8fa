"""Methods that learn from the student's own texts."""

from torch import Tensor

from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.recipes._rows import check_rows, row_options


def gkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float | Tensor = 0.5,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Generalised Jensen-Shannon divergence, on the student's texts or on others (GKD). A term.

    :math:`\beta KL(p \| m) + (1-\beta) KL(q \| m)` with :math:`m = \beta p + (1-\beta) q`, p the
    teacher's and q the student's distribution. ``beta`` 0 is forward and 1 is reverse KL.

    Args:
        student_logits: ``[..., vocab]``. Row t scores the token that follows it.
        teacher_logits: the same shape.
        beta: share of the teacher in the mixture. TRL's GKD trainer has 0.5, its trainer of
            distillation 1.0.
        temperature: of both sides; TRL samples at 0.9.
        mask, weight, vocab_size: see :func:`fastkd.softmax_divergence`.
        reduction: as there, or ``"sequence_mean"``: over a text's rows, then over texts.
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Source: Agarwal et al. 2023 (arXiv 2306.13649); TRL's convention of ``beta``.

    >>> import torch, fastkd
    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> round(fastkd.recipes.gkd(student, teacher, beta=0.0).item(), 4)  # KL(p || q)
    0.1109
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_rows("gkd", tensors, mask=mask, weight=weight)
    return softmax_divergence(
        student_logits,
        teacher_logits,
        divergence="jsd",
        beta=beta,
        temperature=temperature,
        vocab_size=vocab_size,
        **row_options(
            "gkd",
            student_logits,
            mask=mask,
            weight=weight,
            reduction=reduction,
            normalizer=normalizer,
        ),
    )
