"""Methods that learn from some of the tokens, or from some more than from others."""

import math
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.arguments import check_no_gradient
from fastkd._ops.checks import check_finite, check_tensors
from fastkd._ops.names import Divergence, Reduction, Tail, TextReduction
from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.losses._token_stats import token_stats
from fastkd.losses._topk_divergence import topk_divergence
from fastkd.recipes._chunks import check_mask
from fastkd.recipes._rows import (
    best_log_probs,
    check_row_values,
    check_rows,
    check_share,
    kept_rows,
    number_type,
    row_divergence,
    row_options,
)
from fastkd.teachers._teacher_topk import teacher_topk


def token_budget(scores: Tensor, *, keep: float, mask: Tensor | None = None) -> Tensor:
    r"""The rows with the largest scores, bool: a mask for any loss over rows.

    These are the rows whose score is at least the quantile 1 - ``keep`` of the scores of the rows
    that count, linearly interpolated as by ``torch.quantile``; rows of equal score stay together.

    Args:
        scores: float, one a row. SE-KD keeps 0.2 by the student's entropy, which
            :func:`fastkd.token_stats` has.
        keep: share of the rows, in [0, 1].
        mask: bool, one a row: False for rows that do not count.

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Sources: SE-KD (arXiv 2602.01395), TA-OPD (2605.26844); the quantile is AdaSPEC's.

    >>> import torch, fastkd
    >>> fastkd.recipes.token_budget(torch.tensor([0.1, 0.9, 0.5, 0.7]), keep=0.5)
    tensor([False,  True, False,  True])
    """
    check_tensors("token_budget", {"scores": scores})
    check_row_values("token_budget", "scores", scores, scores.shape)
    check_mask("token_budget", "mask", mask, scores.shape, scores.device)
    check_share("token_budget", "keep", keep)
    scores = scores.detach()
    scores = scores if scores.dtype == torch.float64 else scores.float()
    counted = scores if mask is None else torch.where(mask, scores, math.nan)
    if not scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    # A product, as a number would be a constant of a compiled graph.
    level = torch.ones((), dtype=scores.dtype, device=scores.device) * (1 - keep)
    # Of NaN alone the quantile is NaN, and no score is at least that.
    return counted >= torch.nanquantile(counted.flatten(), level)


def adaspec(
    student_logits: Tensor,
    teacher_logits: Tensor,
    reference: Tensor,
    *,
    mask: Tensor | None = None,
    keep: float = 0.4,
    divergence: Divergence = "forward_kl",
    temperature: float | Tensor = 1.0,
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""A draft model learns the tokens where it is most behind a distilled copy (AdaSPEC). A term.

    The rows kept are the share ``keep`` with the largest :math:`KL(p \| q) - KL(p \| q_{ref})`, by
    :func:`token_budget`; the loss is their :math:`KL(p \| q)`. All rows are read once to choose,
    the chosen ones once more for the gradient.

    Args:
        student_logits: of the draft, ``[..., vocab]``. Row t scores the token that follows it.
        teacher_logits: of the target, the same shape.
        reference: logits of a copy of the draft that was distilled on all tokens, the same shape;
            or its divergence of each row, stored once: ``[...]``.
        mask: bool, one a row: rows with False are not read.
        keep: share of the rows.
        divergence: see :func:`fastkd.softmax_divergence`, of the student and of the reference.
        temperature: of all three.
        reduction: over the rows kept: ``"none"``, ``"sum"``, ``"mean"``, ``"batchmean"``,
            ``"elementmean"`` or ``"sequence_mean"`` (over a text's rows, then over texts).
        normalizer: replaces the denominator. The authors' trainer divides by all tokens
            (``num_items_in_batch``), so that their loss is about ``keep`` times the mean.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Source: Hu et al. 2025 (arXiv 2510.19779) and its code (yuezhouhu/adaspec).

    >>> import torch, fastkd
    >>> student, teacher = torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    >>> stored = torch.zeros(2)  # a reference that equals the teacher
    >>> round(fastkd.recipes.adaspec(student, teacher, stored, keep=0.5).item(), 4)
    0.3278
    >>> round(fastkd.recipes.adaspec(student, teacher, stored, keep=1.0).item(), 4)
    0.1639
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_tensors("adaspec", {**tensors, "reference": reference})
    stored = reference.dim() == student_logits.dim() - 1
    if stored:
        check_row_values("adaspec", "reference", reference, student_logits.shape[:-1])
    check_rows("adaspec", tensors if stored else {**tensors, "reference": reference}, mask=mask)
    check_share("adaspec", "keep", keep)

    def rows(logits: Tensor) -> Tensor:
        return softmax_divergence(
            logits,
            teacher_logits,
            divergence=divergence,
            temperature=temperature,
            mask=mask,
            reduction="none",
        )

    with torch.no_grad():
        behind = rows(student_logits) - (reference if stored else rows(reference))
        chosen = token_budget(behind, keep=keep, mask=mask)
    return row_divergence(
        "adaspec",
        student_logits,
        teacher_logits,
        divergence=divergence,
        temperature=temperature,
        mask=chosen,
        reduction=reduction,
        normalizer=normalizer,
    )


def tip(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    keep: float = 0.5,
    divergence: Divergence = "reverse_kl",
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Tokens where the student is uncertain or far from the teacher (TIP). A term.

    The rows kept are the share ``keep`` with the largest :math:`h + d - h d`, by
    :func:`token_budget`. h is the student's entropy and d its divergence, each scaled to [0, 1] by
    its extremes among the rows that count. Which divergence the authors take was not found
    (recalled, not verified): here it is that of the loss.

    Args:
        student_logits, teacher_logits, mask: see :func:`adaspec`.
        keep: share of the rows.
        divergence: see :func:`fastkd.softmax_divergence`.
        temperature: of both sides.
        reduction, normalizer: see :func:`adaspec`.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Source: arXiv 2604.14084.

    >>> import torch, fastkd
    >>> student = torch.tensor([[0.0, 0.0], [0.0, 4.0], [4.0, 0.0]])
    >>> teacher = torch.tensor([[0.0, 0.0], [0.0, 4.0], [0.0, 4.0]])
    >>> loss = fastkd.recipes.tip(student, teacher, keep=0.7)  # not the second row
    >>> round(loss.item(), 4)
    1.9281
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_rows("tip", tensors, mask=mask)
    check_share("tip", "keep", keep)
    kept = kept_rows(student_logits, mask)
    with torch.no_grad():
        uncertain = token_stats(student_logits, temperature=temperature).student_entropy
        distance = softmax_divergence(
            student_logits,
            teacher_logits,
            divergence=divergence,
            temperature=temperature,
            mask=mask,
            reduction="none",
        )
        h, d = (_from_extremes(x, kept) for x in (uncertain, distance))
        chosen = token_budget(h + d - h * d, keep=keep, mask=mask)
    return row_divergence(
        "tip",
        student_logits,
        teacher_logits,
        divergence=divergence,
        temperature=temperature,
        mask=chosen,
        reduction=reduction,
        normalizer=normalizer,
    )


def _from_extremes(values: Tensor, kept: Tensor) -> Tensor:
    """The values of the rows that count, the least as 0 and the largest as 1."""
    if not values.numel():
        return values
    low = torch.where(kept, values, math.inf).amin()
    high = torch.where(kept, values, -math.inf).amax()
    span = high - low
    return torch.where(kept & (span > 0), (values - low) / torch.where(span > 0, span, 1), 0)


def select_tkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    k: int = 5,
    rejected_weight: float = 0.01,
    divergence: Divergence = "forward_kl",
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Tokens on which the teacher would accept the student's choice (SelecTKD). A term.

    A row where the student's likeliest token is not among the teacher's k likeliest has the weight
    ``rejected_weight``, any other 1. The loss is the weighted divergence.

    Args:
        student_logits, teacher_logits, mask: see :func:`adaspec`.
        k: tokens of the teacher.
        rejected_weight: see above; with 0 such rows are not read again.
        divergence: see :func:`fastkd.softmax_divergence`; the method fits any.
        temperature: of both sides.
        reduction: as :func:`adaspec`, over all rows that count.
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Source: arXiv 2510.24021.

    >>> import torch, fastkd
    >>> student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    >>> round(fastkd.recipes.select_tkd(student, teacher, k=1).item(), 6)
    0.004621
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_rows("select_tkd", tensors, mask=mask)
    check_finite("select_tkd", "rejected_weight", rejected_weight)
    check_no_gradient("select_tkd", rejected_weight=rejected_weight)
    if not rejected_weight >= 0:
        raise ValueError(f"select_tkd: rejected_weight must not be negative, got {rejected_weight}")
    choice = token_stats(student_logits).student_argmax.unsqueeze(-1)
    accepted = (teacher_topk(teacher_logits, k).indices == choice).any(-1)
    one = torch.ones((), dtype=number_type(student_logits), device=accepted.device)
    weight = torch.where(accepted, one, one * rejected_weight)
    return row_divergence(
        "select_tkd",
        student_logits,
        teacher_logits,
        divergence=divergence,
        temperature=temperature,
        mask=mask,
        weight=weight,
        reduction=reduction,
        normalizer=normalizer,
    )


def eopd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    k: int,
    entropy: float = 0.8,
    tail: Tail = "lump",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Reverse KL, and forward KL where the teacher is uncertain (entropy-aware OPD). A term.

    :math:`KL(q \| p)` of all rows, plus :math:`KL(p \| q)` over the teacher's k likeliest tokens in
    rows where the teacher's entropy is at least ``entropy`` nats.

    Args:
        student_logits, mask: see :func:`adaspec`.
        teacher_logits: the same shape; gets no gradient.
        k: tokens of the forward term; the authors' number was not found (recalled, not verified).
        entropy: see above.
        tail: what becomes of the other tokens, see :func:`fastkd.topk_divergence`.
        temperature: of both sides, also of the entropy.
        reduction: of both terms over all rows that count: ``"none"``, ``"sum"``, ``"mean"``,
            ``"batchmean"``, ``"elementmean"`` or ``"sequence_mean"``.
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Source: arXiv 2603.07079.

    >>> import torch, fastkd
    >>> student, teacher = torch.tensor([[0.0, 2.0, 0.0]]), torch.zeros(1, 3)
    >>> both = fastkd.recipes.eopd(student, teacher, k=3)
    >>> reverse = fastkd.softmax_divergence(student, teacher, divergence="reverse_kl")
    >>> forward = fastkd.softmax_divergence(student, teacher)
    >>> torch.allclose(both, reverse + forward)
    True
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_rows("eopd", tensors, mask=mask)
    check_no_gradient("eopd", teacher_logits=teacher_logits)
    check_finite("eopd", "entropy", entropy)
    kept = kept_rows(student_logits, mask)
    spread = token_stats(teacher_logits, temperature=temperature).student_entropy
    best = best_log_probs(teacher_logits, k, temperature)
    uncertain = (kept & (spread >= entropy)).to(number_type(student_logits))
    options: dict[str, Any] = {"mask": mask, "reduction": reduction, "normalizer": normalizer}
    reverse = row_divergence(
        "eopd",
        student_logits,
        teacher_logits,
        divergence="reverse_kl",
        temperature=temperature,
        **options,
    )
    forward = topk_divergence(
        student_logits,
        best.log_probs,
        best.indices,
        tail=tail,
        temperature=temperature,
        stored_temperature=temperature,
        **row_options("eopd", student_logits, weight=uncertain, **options),
    )
    return reverse + forward
