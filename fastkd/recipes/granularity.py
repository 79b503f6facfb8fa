"""Multi-granularity semantic revision: texts, tokens and spans."""

import math

import torch
from torch import Tensor

from fastkd._ops.arguments import check_no_gradient
from fastkd._ops.checks import check_tensors
from fastkd._ops.names import ClippedTail, Renormalize, TextReduction
from fastkd.losses._clipped_divergence import clipped_divergence
from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.losses._token_stats import token_stats
from fastkd.recipes._chunks import check_integers, check_mask, reduced, softmax, wide
from fastkd.recipes._features import check_factors
from fastkd.recipes._rows import (
    check_choice,
    check_rows,
    kept_rows,
    number_type,
    row_options,
    scaled_weight,
)
from fastkd.recipes._rowwise import at_rows, by_blocks, chosen, placed


def mgsr(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    spans: Tensor,
    lower: float | Tensor,
    upper: float | Tensor,
    *,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    renormalize: Renormalize = "none",
    tail: ClippedTail = "drop",
    softness: float | None = 0.01,
    quantile: bool = True,
    distance: str = "l2",
    mask: Tensor | None = None,
    reduction: TextReduction = "mean",
) -> Tensor:
    r"""Cross-entropy, clipped KL and span relations (MGSR; recalled, not verified). The total.

    :math:`w_0 CE + w_1 DAC\text{-}KL + w_2 L_{span}`: the first two are
    :func:`fastkd.clipped_divergence` with the labels, in one read, the third is :func:`mgsr_span`.
    :func:`mgsr_position` is the method's revision of texts.

    Args:
        student_logits: ``[B, T, vocab]``: row t scores ``labels[t]``.
        teacher_logits: the same shape; gets no gradient.
        labels: int64 or int32 ``[B, T]``; -100 for rows without one, which drop out.
        spans: int64 or int32 ``[B, T]``, the span (a phrase) of each row's label, -1 for none.
        lower, upper: bounds of the teacher's probability, numbers or one a row, which a small
            network learns: gradients flow to them where there is a ``softness``.
        weights: of the three terms; the second is positive.
        renormalize, tail, softness, quantile: see :func:`fastkd.clipped_divergence`. Whether the
            authors renormalise is not known to us.
        distance: see :func:`mgsr_span`.
        mask: bool ``[B, T]``: rows with False are not read.
        reduction: of each term: ``"mean"``, ``"sum"``, ``"batchmean"`` or ``"sequence_mean"`` (over
            a text's rows, then over texts).

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type.

    Source: arXiv 2407.10068, by accounts of it.

    >>> import torch, fastkd
    >>> z, labels, spans = torch.zeros(1, 2, 4), torch.tensor([[1, 2]]), torch.tensor([[0, 0]])
    >>> loss = fastkd.recipes.mgsr(z, z, labels, spans, 0.0, 1.0)  # equal models: log 4
    >>> round(loss.item(), 4)
    1.3863
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_tensors("mgsr", {**tensors, "labels": labels})
    check_rows("mgsr", tensors, mask=mask, labels=labels)
    check_no_gradient("mgsr", teacher_logits=teacher_logits)
    check_choice("mgsr", "reduction", reduction, ("mean", "sum", "batchmean", "sequence_mean"))
    check_factors("mgsr", "weights", weights, 3)
    label_weight, clipped_weight, span_weight = weights
    if not clipped_weight > 0:
        raise ValueError(f"mgsr: weights must have a positive second number, got {weights}")
    loss = clipped_divergence(
        student_logits,
        teacher_logits,
        lower,
        upper,
        labels=labels,
        label_weight=label_weight / clipped_weight,
        renormalize=renormalize,
        tail=tail,
        softness=softness,
        quantile=quantile,
        **row_options(
            "mgsr",
            student_logits,
            mask=mask,
            labels=labels,
            weight=scaled_weight(student_logits, clipped_weight, None),
            reduction=reduction,
        ),
    )
    kept = kept_rows(student_logits, mask, labels)
    relations = mgsr_span(
        student_logits, teacher_logits, spans, kept, distance=distance, reduction=reduction
    )
    return loss + span_weight * relations


def mgsr_span(
    student_logits: Tensor,
    teacher_logits: Tensor,
    spans: Tensor,
    mask: Tensor | None = None,
    *,
    distance: str = "l2",
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""How neighbouring tokens of a span relate, in both models (recalled, not verified). A term.

    The relation of rows t and t + 1 of one span is the product of their distributions.
    ``"l2"``: :math:`\sum_v (p_{t,v} p_{t+1,v} - q_{t,v} q_{t+1,v})^2`, computed in blocks of rows.
    ``"kl"``: the KL divergence of the products made to sum to 1, which are
    :math:`\mathrm{softmax}(z_t + z_{t+1})`. Which distance the authors take was not found.

    Args:
        student_logits, teacher_logits, spans, mask: see :func:`mgsr`.
        distance: see above.
        reduction: over the pairs of rows: ``"none"`` (``[B, T - 1]``), ``"sum"``, ``"mean"``,
            ``"batchmean"`` or ``"sequence_mean"`` (over a text's pairs, then over texts).
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    >>> import torch, fastkd
    >>> student, teacher = torch.zeros(1, 2, 2), torch.tensor([[[0.0, 50.0], [0.0, 50.0]]])
    >>> fastkd.recipes.mgsr_span(student, teacher, torch.tensor([[0, 0]])).item()  # 1/16 + 9/16
    0.625
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_rows("mgsr_span", tensors, mask=mask)
    check_integers("mgsr_span", "spans", spans, student_logits.shape[:-1], student_logits.device)
    check_choice("mgsr_span", "distance", distance, ("l2", "kl"))
    check_no_gradient("mgsr_span", teacher_logits=teacher_logits)
    if student_logits.dim() != 3 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "mgsr_span: student_logits and teacher_logits must be [B, T, vocab], got "
            f"{list(student_logits.shape)} and {list(teacher_logits.shape)}"
        )
    kept = kept_rows(student_logits, mask)
    pairs = kept[:, :-1] & kept[:, 1:] & (spans[:, :-1] == spans[:, 1:]) & (spans[:, 1:] >= 0)
    if distance == "kl":
        losses = softmax_divergence(
            wide(student_logits[:, :-1]) + wide(student_logits[:, 1:]),  # not rounded to bfloat16
            [teacher_logits[:, :-1], teacher_logits[:, 1:]],
            teacher_weights=[1.0, 1.0],
            mask=pairs,
            reduction="none",
        )
    else:
        losses = _squared_differences(student_logits, teacher_logits, pairs)
    return reduced("mgsr_span", losses, pairs, reduction, normalizer)


def _squared_differences(student_logits: Tensor, teacher_logits: Tensor, pairs: Tensor) -> Tensor:
    length = student_logits.size(1)
    texts = torch.arange(pairs.size(0), device=pairs.device).unsqueeze(-1)
    places = texts * length + torch.arange(max(0, length - 1), device=pairs.device)
    rows = chosen(places, pairs)
    student, teacher = (x.flatten(0, 1) for x in (student_logits, teacher_logits))

    def loss(block: slice, first: Tensor, second: Tensor) -> Tensor:
        q = softmax(first) * softmax(second)
        others = (at_rows(teacher, rows[block] + later, pairs) for later in (0, 1))
        p, following = (softmax(x) for x in others)
        return (p * following - q).square().sum(-1)

    # Two tensors: a gradient for each, also for second derivatives.
    both = [student.view_as(student) for _ in range(2)]
    values = by_blocks(loss, both, [rows, rows + 1], pairs, student.size(-1))
    return placed(values, pairs).to(torch.promote_types(number_type(student), number_type(teacher)))


def mgsr_position(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> Tensor:
    r"""Row of each text at which the teacher is to correct the student, int64 ``[B]``.

    That with the largest :math:`KL(p \| q)` among those where the two models' likeliest tokens
    differ; -1 where they agree everywhere. The authors replace the token by the teacher's and let
    the student go on from there, once a text.

    Args:
        student_logits: ``[B, T, vocab]``.
        teacher_logits: the same shape.
        mask: bool ``[B, T]``, rows of the student's text.

    >>> import torch, fastkd
    >>> student = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]])
    >>> mask = torch.tensor([[True, True]])
    >>> fastkd.recipes.mgsr_position(student, student.flip(-1), mask).tolist()
    [1]
    >>> fastkd.recipes.mgsr_position(student, student, mask).tolist()
    [-1]
    """
    check_tensors("mgsr_position", {"student_logits": student_logits, "mask": mask})
    check_mask("mgsr_position", "mask", mask, student_logits.shape[:-1], student_logits.device)
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_rows("mgsr_position", tensors)
    if mask.dim() != 2:
        raise ValueError(f"mgsr_position: mask must be [B, T], got shape {list(mask.shape)}")
    stats = token_stats(student_logits.detach(), teacher_logits.detach())
    assert stats.forward_kl is not None
    differ = mask & (stats.student_argmax != stats.teacher_argmax)
    if not mask.size(1):
        return torch.full_like(mask.sum(1), -1)
    worst = torch.where(differ, stats.forward_kl, -math.inf).argmax(1)
    return torch.where(differ.any(1), worst, -1)
