"""Relations between the tokens of a text or image: attention, and softmaxes of scores."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastkd._ops.checks import check_positive
from fastkd._ops.gradient import savable
from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.recipes._chunks import check_callable, check_mask, wide
from fastkd.recipes._features import (
    KINDS,
    check_classes,
    check_factors,
    check_floats,
    check_like,
    check_rank,
    count_over,
    distances,
    masked_pair,
    mean_of_rows,
    only,
    product,
)
from fastkd.recipes._rows import check_choice, kept_rows, label_log_probs, masked_mean


def ernie_tiny(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_attention: Tensor,
    teacher_attention: Tensor,
    *,
    projection: Callable[[Tensor], Tensor] | None = None,
    student_logits: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    labels: Tensor | None = None,
    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0),
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    r"""ERNIE-Tiny's stages: hidden states and attention, soft and hard labels. The total.

    :math:`w_0 \mathrm{MSE}(h_S, h_T) + w_1 KL(A_T \| A_S) + w_2 KL(p \| q) + w_3 CE`, the last two
    where their arguments are given: the stages GD, GED and TAD use the first two terms, with
    different teachers and texts; TSD uses all four. Each term is a mean over its rows.

    The four stages are in the paper's abstract. The formulas are ours (recalled, not verified).

    Args:
        student_hidden: ``[B, T, D_S]``, of the last layer.
        teacher_hidden: ``[B, T, D]``.
        student_attention: ``[B, H, T, T]``, probabilities of the last layer's attention. Zeros are
            probability 0, as above the diagonal of a causal model.
        teacher_attention: ``[B, H, T, T]``.
        projection: from the student's width to the teacher's, for example a ``Linear``.
        student_logits: ``[..., classes]``; with them teacher_logits or labels or both.
        teacher_logits: ``[..., classes]``.
        labels: int64, one a row of student_logits; rows with -100 do not count.
        weights: of the four terms. A term of weight 0 is not computed.
        temperature: of the soft labels. Their term is not multiplied by its square.
        mask: bool ``[B, T]``: tokens whose hidden states and attention rows count.

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value, shape or type.

    Source: ERNIE-Tiny (arXiv 2106.02241).

    >>> import torch, fastkd
    >>> hidden, attention = torch.ones(1, 2, 3), torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    >>> fastkd.recipes.ernie_tiny(hidden, hidden + 1, attention, attention).item()
    1.0
    """
    name = "ernie_tiny"
    check_factors(name, "weights", weights, 4)
    check_positive(name, "temperature", temperature)
    check_callable(name, "projection", projection)
    check_rank(name, "student_hidden", student_hidden, "B", "T", "D")
    check_rank(name, "student_attention", student_attention, "B", "H", "T", "T")
    check_like(name, "teacher_attention", teacher_attention, "student_attention", student_attention)
    batch, length, _ = student_hidden.shape
    if student_attention.size(0) != batch or student_attention.size(2) != length:
        raise ValueError(
            f"{name}: student_attention must be [{batch}, H, {length}, {length}], as "
            f"student_hidden is, got {list(student_attention.shape)}"
        )
    if (student_logits is None) != (teacher_logits is None and labels is None):
        raise ValueError(
            f"{name}: student_logits must be given with teacher_logits or labels, and only then"
        )
    check_mask(name, "mask", mask, student_hidden.shape[:-1], student_hidden.device)
    total = wide(student_hidden).new_zeros(())
    if weights[0]:
        student_hidden = only(student_hidden, mask)
        if projection is not None:
            student_hidden = projection(student_hidden)
        student, teacher = masked_pair(
            name, mask, student_hidden=student_hidden, teacher_hidden=teacher_hidden
        )
        total = total + weights[0] * mean_of_rows(name, distances("mse", student, teacher), mask)
    if weights[1]:
        if mask is not None:
            used = mask[:, None, :, None] & mask[:, None, None, :]
            student_attention = torch.where(used, student_attention, 0)
            teacher_attention = torch.where(used, teacher_attention, 0)
        student, teacher = _log(student_attention), _log(teacher_attention)
        total = total + weights[1] * _relation_loss(name, "kl", student, teacher, mask)
    if student_logits is None:
        return total
    check_floats(name, student_hidden=student_hidden, student_logits=student_logits)
    kept = kept_rows(student_logits, None)
    if labels is not None:
        check_classes(name, labels, student_logits)
        kept = labels != -100
        if weights[3]:
            total = total + weights[3] * masked_mean(-label_log_probs(student_logits, labels), kept)
    if teacher_logits is not None and weights[2]:
        check_like(name, "teacher_logits", teacher_logits, "student_logits", student_logits)
        total = total + softmax_divergence(
            student_logits,
            teacher_logits,
            temperature=temperature,
            mask=kept,
            normalizer=count_over(kept, weights[2]),
        )
    return total


def _log(probabilities: Tensor) -> Tensor:
    """Logarithms, -inf with no gradient for 0."""
    empty = probabilities == 0
    return torch.where(empty, -math.inf, torch.where(empty, 1, probabilities).log())


def _relation_loss(
    function: str, kind: str, student: Tensor, teacher: Tensor, mask: Tensor | None
) -> Tensor:
    """Mean over rows ``[B, H, P]`` of a distance between softmaxes over the last dimension.

    Tokens that do not count are neither rows nor columns.
    """
    rows = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    if mask is not None:
        mask = savable(mask)
        rows = rows & mask.unsqueeze(1)
        student, teacher = (
            torch.where(mask[:, None, None, :], x, -math.inf) for x in (student, teacher)
        )
    if kind == "kl":
        return softmax_divergence(student, teacher, mask=rows)
    q, p = (wide(only(x, rows)).softmax(-1) for x in (student, teacher))
    return mean_of_rows(function, distances(kind, q, p), rows)


def token_relations(query: Tensor, key: Tensor) -> Tensor:
    r"""Scores of each token with each other one, :math:`q k^T / \sqrt d`.

    The logits of attention. With values in both places, the VV relations of MiniLM.

    Args:
        query: ``[B, H, P, d]``.
        key: ``[B, H, P, d]``.

    Returns:
        ``[B, H, P, P]``, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong shape or type.

    >>> import torch, fastkd
    >>> fastkd.recipes.token_relations(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4)).tolist()
    [[[[2.0, 2.0], [2.0, 2.0]]]]
    """
    check_rank("token_relations", "query", query, "B", "H", "P", "d")
    check_like("token_relations", "key", key, "query", query)
    return product(wide(query), wide(key).mT) / math.sqrt(query.size(-1))


def hybrid_distill(
    student_relations: Tensor,
    teacher_relations: Tensor,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    *,
    weights: tuple[float, float] = (1.0, 1.0),
    relation: str = "kl",
    feature: str = "smooth_l1",
    mask: Tensor | None = None,
) -> Tensor:
    r"""Hybrid Distill: token relations of one teacher, output features of another. A term.

    :math:`w_0` times the mean distance between the softmaxes of the rows of relations, of a teacher
    trained by masked image modelling, plus :math:`w_1` times the mean distance between the features
    at the output, of a contrastive or supervised teacher. With relations of several layers, add up
    the calls.

    Which relations (queries with keys, or values with values) and which distances the paper uses
    was not found (recalled, not verified): they are arguments. The weights are the paper's.

    Args:
        student_relations: ``[B, H, P, P]`` scores, see :func:`token_relations`; -inf is
            probability 0.
        teacher_relations: ``[B, H, P, P]``.
        student_hidden: ``[B, P, D]``, projected to the teacher's width.
        teacher_hidden: ``[B, P, D]``.
        weights: of the two terms.
        relation: ``"kl"`` (of the teacher's from the student's), ``"smooth_l1"`` or ``"mse"``, of
            probabilities.
        feature: a kind of :func:`feature_distance`.
        mask: bool ``[B, P]``: tokens that count, as rows and as columns.

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: Hybrid Distillation (arXiv 2306.15876), the weights from its reviews.

    >>> import torch, fastkd
    >>> relations, hidden = torch.zeros(1, 2, 3, 3), torch.ones(1, 3, 4)
    >>> fastkd.recipes.hybrid_distill(relations, relations + 1, hidden, hidden + 1).item()
    0.5
    """
    name = "hybrid_distill"
    check_factors(name, "weights", weights, 2)
    check_choice(name, "relation", relation, ("kl", "smooth_l1", "mse"))
    check_choice(name, "feature", feature, KINDS)
    check_rank(name, "student_relations", student_relations, "B", "H", "P", "P")
    check_like(name, "teacher_relations", teacher_relations, "student_relations", student_relations)
    check_rank(name, "student_hidden", student_hidden, "B", "P", "D")
    student, teacher = masked_pair(
        name, mask, student_hidden=student_hidden, teacher_hidden=teacher_hidden
    )
    if student_relations.shape[::2] != student.shape[:2]:
        raise ValueError(
            f"{name}: student_relations must have student_hidden's texts and tokens "
            f"{list(student.shape[:2])}, got {list(student_relations.shape)}"
        )
    relations = _relation_loss(name, relation, student_relations, teacher_relations, mask)
    features = mean_of_rows(name, distances(feature, student, teacher), mask)
    return weights[0] * relations + weights[1] * features
