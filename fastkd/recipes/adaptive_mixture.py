"""AlignDistil: preferences as a teacher's distribution for each token."""

import torch
from torch import Tensor

from fastkd._ops.arguments import check_no_gradient
from fastkd._ops.checks import check_positive
from fastkd._ops.names import TextReduction
from fastkd.recipes._rows import (
    check_choice,
    check_rows,
    number_type,
    row_divergence,
    scaled_weight,
)

_VARIANTS = ("aligndistil", "theorem1", "theorem1_adaptive", "theorem1_contrast")
#: `teacher_mix` of the variants whose weights depend on how far the two models are apart.
_ADAPTIVE = {"aligndistil": "contrast", "theorem1_adaptive": "share"}


def align_distil(
    student_logits: Tensor,
    teacher_logits: Tensor,
    reference_logits: Tensor,
    *,
    variant: str = "aligndistil",
    beta: float = 0.1,
    beta2: float = 10.0,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: TextReduction = "sequence_mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Reverse KL to a contrast of two models, as strong as they differ (AlignDistil). A term.

    With the logits :math:`z_S`, :math:`z_T` and :math:`z_R` of student, teacher and reference, p
    the softmaxes at temperature 1, :math:`a = \beta_2 \sum_v |p_T - p_R| + 10^{-3}` of each row
    (twice :math:`\beta_2` times the total variation distance) and :math:`w = \beta / \beta_2`, a
    row's loss is a coefficient times
    :math:`KL(\mathrm{softmax}(z_S / \tau) \| \mathrm{softmax}(z^* / \tau_T))`:

    ======================  ======================================  ========================
    variant                 :math:`z^*`                             coefficient
    ======================  ======================================  ========================
    ``aligndistil``         :math:`z_T + a (z_T - z_R)`             :math:`\beta / a`
    ``theorem1_adaptive``   :math:`a z_T + (1 - a) z_R`             :math:`\beta / a`
    ``theorem1_contrast``   :math:`z_T + w (z_T - z_R)`             :math:`\beta_2`
    ``theorem1``            :math:`w z_T + (1 - w) z_R`             :math:`\beta_2`
    ======================  ======================================  ========================

    The mixture is not stored. One op finds a and the divergence of a row: on the CPU each model's
    logits are read from memory once. It is :func:`fastkd.softmax_divergence` with the divergence
    ``"reverse_kl"`` and the ``teacher_weights`` :math:`(\beta_2, \beta)`; ``teacher_mix`` is
    ``"contrast"`` for ``aligndistil`` and ``"share"`` for ``theorem1_adaptive``.

    Args:
        student_logits: ``[B, T, vocab]``. Row t scores the token that follows it.
        teacher_logits: of the model trained by DPO, the same shape; gets no gradient.
        reference_logits: of the model trained by DPO on swapped preferences; gets no gradient.
        variant: one of the table.
        beta: weight of the divergence in the objective, positive.
        beta2: strength of the contrast, positive: 10 for texts of others, 15 for the student's own.
        temperature: of the student.
        teacher_temperature: of the mixture; None: the same. For texts of others the authors divide
            only the mixture by their temperature.
        mask: bool ``[B, T]``: rows with False are not read. Both of the authors' trainers leave out
            the first token of each response: a mask of all response tokens, moved by one row
            (``is_response[:, 1:]`` with ``logits[:, :-1]``), has it.
        vocab_size: only the first ``vocab_size`` columns are used.
        reduction: ``"sequence_mean"`` (over a text's rows, then over texts), or one of
            :func:`fastkd.softmax_divergence`.
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if an input is).

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Source: Zhang et al. 2025 (arXiv 2503.02832) and its code (songmzhang/AlignDistil).

    >>> import torch, fastkd
    >>> student, teacher = torch.zeros(1, 1, 2), torch.tensor([[[0.0, 1.0]]])
    >>> reference = torch.tensor([[[0.0, -1.0]]])
    >>> round(fastkd.recipes.align_distil(student, teacher, reference).item(), 4)
    0.0979
    >>> stats = fastkd.token_stats(teacher, reference)  # what the authors log
    >>> [round(20 * x + 1e-3, 4) for x in stats.tvd.flatten().tolist()]  # a
    [9.2433]
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    tensors["reference_logits"] = reference_logits
    check_rows("align_distil", tensors, mask=mask)
    fixed = {"teacher_logits": teacher_logits, "reference_logits": reference_logits}
    check_no_gradient("align_distil", **fixed, beta=beta, beta2=beta2)
    check_choice("align_distil", "variant", variant, _VARIANTS)
    check_positive("align_distil", "beta", beta)
    check_positive("align_distil", "beta2", beta2)
    # Products: numbers in a list would be constants of a compiled graph.
    one = torch.ones((), dtype=number_type(student_logits), device=student_logits.device)
    share, weight = one * (beta / beta2), None
    pair = (one * beta2, one * beta)
    if variant not in _ADAPTIVE:
        weight = scaled_weight(student_logits, beta2, None)
        pair = (1 + share, -share) if variant == "theorem1_contrast" else (share, 1 - share)
    return row_divergence(
        "align_distil",
        student_logits,
        [teacher_logits, reference_logits],
        divergence="reverse_kl",
        teacher_weights=torch.stack(pair),
        teacher_mix=_ADAPTIVE.get(variant, "logits"),
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        vocab_size=vocab_size,
        mask=mask,
        weight=weight,
        reduction=reduction,
        normalizer=normalizer,
    )
