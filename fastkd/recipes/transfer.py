"""Several source models: which is near to a task, and how they teach together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd._ops.arguments import check_no_gradient, to_integer
from fastkd._ops.checks import check_positive
from fastkd._ops.names import Reduction
from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.recipes._chunks import check_integers, check_mask, check_range
from fastkd.recipes._features import (
    as_numbers,
    check_factors,
    check_like,
    check_rank,
    check_reduction,
    product,
    unit,
)
from fastkd.recipes._rows import check_row_values, number_type


def distill_weighted(
    student_logits: Sequence[Tensor],
    teacher_logits: Sequence[Tensor],
    scores: Tensor | Sequence[float],
    *,
    power: float = 1.0,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""DistillWeighted: one student head for each source model, weighted by their scores. A term.

    :math:`\sum_k a_k KL(p_k \| q_k)` with :math:`a_k = \max(0, s_k)^c / \sum_j \max(0, s_j)^c`:
    a sum of divergences, each with its own head and classes, not one from a mean teacher.
    DistillNearest is the call with the best source alone. Sources with weight 0 are not read; if no
    score is positive the loss is 0.

    Args:
        student_logits: K tensors ``[..., C_k]`` with the same leading dimensions.
        teacher_logits: K tensors of the same shapes; they get no gradient.
        scores: K numbers, for example from :func:`parc`.
        power: c. Which power the paper uses, and the weight of this term beside the cross-entropy,
            were not found (recalled, not verified).
        temperature: of both sides, positive.
        weight: float, one a row.
        mask: bool, one a row.
        reduction: see :func:`fastkd.softmax_divergence`; not ``"elementmean"``.
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: DistillNearest and DistillWeighted (arXiv 2304.12314).

    >>> import torch, fastkd
    >>> students, teachers = [torch.zeros(2, 3)] * 2, [torch.zeros(2, 3), torch.eye(2, 3)]
    >>> one = fastkd.softmax_divergence(students[1], teachers[1])
    >>> both = fastkd.recipes.distill_weighted(students, teachers, [1.0, 3.0])
    >>> round((both / one).item(), 4)
    0.75
    """
    name = "distill_weighted"
    for argument, value in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if not isinstance(value, (list, tuple)) or not value:
            raise TypeError(
                f"{name}: {argument} must be a list of tensors, got {type(value).__name__}"
            )
    if len(student_logits) != len(teacher_logits):
        raise ValueError(
            f"{name}: teacher_logits must have {len(student_logits)} tensors, as student_logits "
            f"has, got {len(teacher_logits)}"
        )
    for place, (student, teacher) in enumerate(zip(student_logits, teacher_logits, strict=True)):
        check_like(name, f"teacher_logits[{place}]", teacher, f"student_logits[{place}]", student)
        if student.shape[:-1] != student_logits[0].shape[:-1]:
            raise ValueError(
                f"{name}: student_logits[{place}] must have the leading dimensions "
                f"{list(student_logits[0].shape[:-1])}, got {list(student.shape)}"
            )
        check_no_gradient(name, teacher_logits=teacher)
    first = student_logits[0]
    check_no_gradient(name, scores=scores, weight=weight, power=power)
    found = as_numbers(name, "scores", scores, first).double()
    if found.shape != (len(student_logits),):
        raise ValueError(
            f"{name}: scores must be {len(student_logits)} numbers, got {list(found.shape)}"
        )
    check_factors(name, "power", (power,), 1)
    check_positive(name, "temperature", temperature)
    check_mask(name, "mask", mask, first.shape[:-1], first.device)
    if weight is not None:
        check_row_values(name, "weight", weight, first.shape[:-1])
    check_reduction(name, reduction, normalizer)
    if reduction == "elementmean":
        raise ValueError(f"{name}: reduction elementmean has no meaning for heads of other widths")
    shares = torch.where(found > 0, found.clamp(min=0) ** power, 0)
    total = shares.sum()
    shares = shares / torch.where(total > 0, total, 1)
    rows = torch.ones(first.shape[:-1], device=first.device) if weight is None else weight
    rows = rows.to(number_type(first))
    losses = [
        softmax_divergence(
            student,
            teacher,
            temperature=temperature,
            weight=rows * share.to(rows.dtype),
            mask=mask,
            reduction=reduction,
            normalizer=normalizer,
        )
        for student, teacher, share in zip(student_logits, teacher_logits, shares, strict=True)
    ]
    return torch.stack(losses).sum(0)


@torch.no_grad()
def parc(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    r"""PARC: how well a source model's features separate a task's classes, at most 100.

    100 times Spearman's rank correlation, over all pairs of examples, between two dissimilarities:
    1 minus Pearson's correlation of their features, each feature standardised over the examples;
    and whether their labels differ (1 minus the correlation of one-hot labels has the same ranks).
    Higher is better. NaN if all labels are equal or all different.

    Args:
        features: ``[N, D]``.
        labels: int64 or int32 ``[N]``, in [0, num_classes).
        num_classes: number of classes.

    Returns:
        a scalar, float64. Memory grows with N².

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value, shape or type.

    Source: Bolya et al. 2021 (arXiv 2111.06977; code dbolya/parc).

    >>> import torch, fastkd
    >>> labels = torch.tensor([0, 1, 2, 0, 1, 2])
    >>> round(fastkd.recipes.parc(torch.eye(3)[labels], labels, 3).item(), 4)
    100.0
    """
    check_rank("parc", "features", features, "N", "D")
    num_classes = to_integer("parc", "num_classes", num_classes)
    if num_classes < 1:
        raise ValueError(f"parc: num_classes must be positive, got {num_classes}")
    check_integers("parc", "labels", labels, features.shape[:1], features.device)
    check_range("parc", "labels", labels, 0, num_classes)
    values = features.double()
    spread = values.std(0, correction=0)
    values = (values - values.mean(0)) / torch.where(spread > 0, spread, 1)
    values = unit(values - values.mean(1, keepdim=True))
    count = values.size(0)
    first, second = torch.triu_indices(count, count, 1, device=values.device)
    # Rounded: equal examples must have equal ranks.
    apart = (1 - product(values, values.mT))[first, second].round(decimals=10)
    ranks = [_ranks(x) for x in (apart, (labels[first] != labels[second]).double())]
    a, b = (x - x.mean() for x in ranks)
    return 100 * (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1, equal values the mean of theirs."""
    ordered = values.sort().values
    below = torch.searchsorted(ordered, values)
    upto = torch.searchsorted(ordered, values, right=True)
    return (below + upto + 1) / 2.0
