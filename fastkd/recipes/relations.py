"""Relations between the examples or channels of a batch, as each model's features have them."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._ops.checks import check_positive
from fastkd.recipes._chunks import wide
from fastkd.recipes._features import check_factors, check_floats, check_rank, mean, product, unit


def _flat(function: str, **features: Any) -> list[Tensor]:
    """Features ``[N, ...]`` as ``[N, D]`` in float32 or float64, all of one N."""
    check_floats(function, **features)
    (first_name, first), *_ = features.items()
    found = []
    for name, values in features.items():
        if values.dim() < 2 or values.size(0) != first.size(0):
            raise ValueError(
                f"{function}: {name} must be [N, D] with {first_name}'s N, got "
                f"{list(values.shape)}" + ("" if values is first else f" and {list(first.shape)}")
            )
        found.append(wide(values).flatten(1))
    return found


def _pair_distances(values: Tensor) -> Tensor:
    """Euclidean distances of all pairs of rows; no gradient where one is 0."""
    return torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist")


def sp(student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
    r"""Similarity-preserving distillation.

    :math:`\| \hat G_S - \hat G_T \|_F^2 / b^2` with :math:`\hat G` the Gram matrix
    :math:`F F^T` of the flattened features of a batch of b examples, its rows scaled to length 1.

    Args:
        student_hidden: ``[b, ...]``.
        teacher_hidden: ``[b, ...]``, of any width.

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong shape or type.

    Source: Tung and Mori (arXiv 1907.09682); code lliai/DisWOT-CVPR2023.

    >>> import torch, fastkd
    >>> round(fastkd.recipes.sp(torch.eye(2), torch.ones(2, 3)).item(), 4)  # 1 - sqrt(1 / 2)
    0.2929
    """
    student, teacher = _flat("sp", student_hidden=student_hidden, teacher_hidden=teacher_hidden)
    difference = unit(product(student, student.mT)) - unit(product(teacher, teacher.mT))
    return mean(difference.square())


def ickd(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    r"""Inter-channel correlation distillation.

    For each example the Gram matrix ``[C, C]`` of its channels, rows scaled to length 1; the sum of
    squared differences between student and teacher, over b C.

    Args:
        student_maps: ``[b, C, ...]``, with the teacher's C: project the student's channels first.
        teacher_maps: ``[b, C, ...]``; its pixels may be others in number.

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong shape or type.

    Source: Liu et al. (arXiv 2202.03680); code lliai/DisWOT-CVPR2023.

    >>> import torch, fastkd
    >>> maps = torch.randn(2, 3, 4, 4)
    >>> fastkd.recipes.ickd(maps, 2 * maps.flip(-1)).item() < 1e-6
    True
    """
    check_floats("ickd", student_maps=student_maps, teacher_maps=teacher_maps)
    shapes = [x.shape[:2] for x in (student_maps, teacher_maps)]
    if student_maps.dim() < 3 or teacher_maps.dim() < 3 or shapes[0] != shapes[1]:
        raise ValueError(
            "ickd: student_maps and teacher_maps must be [b, C, ...] with equal b and C, got "
            f"{list(student_maps.shape)} and {list(teacher_maps.shape)}"
        )
    grams = [
        unit(product(x, x.mT)) for x in (wide(m).flatten(2) for m in (student_maps, teacher_maps))
    ]
    return (grams[0] - grams[1]).square().sum() / max(math.prod(shapes[0]), 1)


def rkd(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    *,
    weights: tuple[float, float] = (25.0, 50.0),
) -> Tensor:
    r"""Relational distillation: distances of pairs and angles of triples.

    :math:`w_0` times the mean over pairs of SmoothL1 between distances, each side's divided by the
    mean of its positive ones, plus :math:`w_1` times the mean over triples (i, j, k) of SmoothL1
    between the cosines of the angle at i. Means are over all :math:`N^2` and :math:`N^3`. Memory
    grows with N³.

    Args:
        student_hidden: ``[N, ...]``.
        teacher_hidden: ``[N, ...]``, of any width.
        weights: of distances and angles.

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: Park et al. (arXiv 1904.05068); code lliai/DisWOT-CVPR2023.

    >>> import torch, fastkd
    >>> hidden = torch.randn(4, 3)
    >>> fastkd.recipes.rkd(hidden, 3 * hidden + 1).item() < 1e-6
    True
    """
    check_factors("rkd", "weights", weights, 2)
    sides = _flat("rkd", student_hidden=student_hidden, teacher_hidden=teacher_hidden)
    total = sides[0].new_zeros(())
    differences = [side - side.unsqueeze(1) for side in sides]
    if weights[0]:
        student, teacher = (_relative_distances(x) for x in differences)
        distances = mean(F.smooth_l1_loss(student, teacher, reduction="none"))
        total = total + weights[0] * distances
    if weights[1]:
        student, teacher = (product(x, x.mT) for x in map(unit, differences))
        angles = mean(F.smooth_l1_loss(student, teacher, reduction="none"))
        total = total + weights[1] * angles
    return total


def _relative_distances(differences: Tensor) -> Tensor:
    """Lengths of the differences over the mean of those that are not 0."""
    square = differences.square().sum(-1)
    apart = square > 0
    lengths = torch.where(apart, torch.where(apart, square, 1).sqrt(), 0)
    scale = lengths.sum() / apart.sum().clamp(min=1)
    return lengths / torch.where(scale > 0, scale, 1)


def diswot(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_gradients: Tensor,
    teacher_gradients: Tensor,
) -> Tensor:
    r"""DisWOT's score of an untrained student: higher is better.

    Minus the sum of :func:`sp` of the features and :func:`ickd` of the class-activation gradients,
    the gradients of the classifier's weights. How the paper adds up the two is not in the authors'
    code (recalled, not verified).

    Args:
        student_hidden: ``[b, ...]``.
        teacher_hidden: ``[b, ...]``.
        student_gradients: ``[classes, D]``, of the classifier's weight, or ``[b, C, ...]``.
        teacher_gradients: ``[classes, D']``, or ``[b, C, ...]``.

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong shape or type.

    Source: DisWOT (arXiv 2303.15678; code lliai/DisWOT-CVPR2023).

    >>> import torch, fastkd
    >>> hidden, gradients = torch.randn(4, 3), torch.randn(10, 3)
    >>> fastkd.recipes.diswot(hidden, hidden, gradients, gradients).item()
    -0.0
    """
    check_floats("diswot", student_gradients=student_gradients, teacher_gradients=teacher_gradients)
    maps = [x.unsqueeze(0) if x.dim() == 2 else x for x in (student_gradients, teacher_gradients)]
    if min(x.dim() for x in maps) < 3 or maps[0].shape[:2] != maps[1].shape[:2]:
        raise ValueError(
            "diswot: teacher_gradients must have student_gradients' classes or channels, got "
            f"{list(teacher_gradients.shape)} and {list(student_gradients.shape)}"
        )
    _flat("diswot", student_hidden=student_hidden, teacher_hidden=teacher_hidden)
    return -(sp(student_hidden, teacher_hidden) + ickd(maps[0], maps[1]))


def linear_cka(student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
    r"""Centred kernel alignment of two sets of features, in [0, 1]: a similarity.

    :math:`\| X^T Y \|_F^2 / (\| X^T X \|_F \| Y^T Y \|_F)` of centred features: 1 if they are equal
    up to rotation and scale. No N x N matrix is built unless N is below the widths. 0 if a side is
    constant. As a loss take 1 minus it.

    Args:
        student_hidden: ``[N, ...]``.
        teacher_hidden: ``[N, ...]``, of any width.

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong shape or type.

    Source: Kornblith et al. (arXiv 1905.00414).

    >>> import torch, fastkd
    >>> hidden = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 1.0]])
    >>> round(fastkd.recipes.linear_cka(hidden, 5 * hidden.flip(-1) + 2).item(), 4)
    1.0
    """
    x, y = (
        side - side.mean(0)
        for side in _flat(
            "linear_cka", student_hidden=student_hidden, teacher_hidden=teacher_hidden
        )
    )
    if x.size(0) < min(x.size(1), y.size(1)):
        x, y = product(x, x.mT), product(y, y.mT)  # ||X^T Y||^2 = <X X^T, Y Y^T>
        joint, own, other = (x * y).sum(), x.square().sum().sqrt(), y.square().sum().sqrt()
    else:
        joint, own, other = (
            product(x.mT, y).square().sum(),
            torch.linalg.vector_norm(product(x.mT, x)),
            torch.linalg.vector_norm(product(y.mT, y)),
        )
    size = own * other
    return joint / torch.where(size > 0, size, 1)


def mmd(student_hidden: Tensor, teacher_hidden: Tensor, *, bandwidth: float) -> Tensor:
    r"""Squared maximum mean discrepancy of two sets of features, Gaussian kernel.

    :math:`E\,k(s, s') + E\,k(t, t') - 2 E\,k(s, t)` over all pairs, pairs of an example with itself
    included, :math:`k(a, b) = \exp(-\|a - b\|^2 / 2 \sigma^2)`. It compares distributions: no row
    of one side belongs to a row of the other, and N may differ. No second derivatives.

    Args:
        student_hidden: ``[N, D]``.
        teacher_hidden: ``[M, D]``.
        bandwidth: :math:`\sigma`, positive.

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: Gretton et al. 2012; named by the survey of LLM distillation (arXiv 2402.13116).

    >>> import torch, fastkd
    >>> round(fastkd.recipes.mmd(torch.zeros(1, 1), torch.ones(1, 1), bandwidth=1.0).item(), 4)
    0.7869
    """
    check_rank("mmd", "student_hidden", student_hidden, "N", "D")
    check_rank("mmd", "teacher_hidden", teacher_hidden, "M", "D")
    check_positive("mmd", "bandwidth", bandwidth)
    if student_hidden.size(1) != teacher_hidden.size(1):
        raise ValueError(
            f"mmd: teacher_hidden must have student_hidden's {student_hidden.size(1)} channels, "
            f"got {teacher_hidden.size(1)}"
        )
    dtype = torch.promote_types(wide(student_hidden).dtype, wide(teacher_hidden).dtype)
    s, t = (wide(x).to(dtype) for x in (student_hidden, teacher_hidden))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        return mean(torch.exp(-distances.square() / (2 * bandwidth**2)))

    return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)


def distance_covariance(x: Tensor, y: Tensor) -> Tensor:
    r"""Squared distance covariance of two variables, from N examples of both.

    The mean over pairs of :math:`A_{ij} B_{ij}`, A and B the distances between the examples of x
    and of y, centred by rows and columns. 0 in the limit only if x and y are independent: the
    penalty that makes the teacher of :func:`fair_latent` fair. No second derivatives.

    Args:
        x: ``[N, ...]``.
        y: ``[N, ...]``, of any width.

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong shape or type.

    Source: Székely et al. 2007 (arXiv 0803.4101).

    >>> import torch, fastkd
    >>> x = torch.tensor([[0.0], [1.0]])
    >>> fastkd.recipes.distance_covariance(x, 2 * x).item()
    0.5
    """
    a, b = (_centred(side) for side in _flat("distance_covariance", x=x, y=y))
    return mean(a * b)


def distance_correlation(x: Tensor, y: Tensor) -> Tensor:
    r"""Distance correlation of two variables, in [0, 1].

    The square root of :func:`distance_covariance` of x and y over the geometric mean of those of x
    with x and y with y; 0 if a variable is constant. Its gradient is large near 0: penalise the
    covariance instead.

    Args:
        x: ``[N, ...]``.
        y: ``[N, ...]``, of any width.

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong shape or type.

    Source: Székely et al. 2007 (arXiv 0803.4101).

    >>> import torch, fastkd
    >>> x = torch.tensor([[0.0], [1.0], [3.0]])
    >>> round(fastkd.recipes.distance_correlation(x, 2 * x + 1).item(), 4)
    1.0
    """
    a, b = (_centred(side) for side in _flat("distance_correlation", x=x, y=y))
    joint, size = mean(a * b), mean(a * a) * mean(b * b)
    useful = (joint > 0) & (size > 0)
    ratio = torch.where(useful, joint, 1) / torch.where(useful, size, 1).sqrt()
    return torch.where(useful, ratio.sqrt(), 0)


def _centred(values: Tensor) -> Tensor:
    distances = _pair_distances(values)
    rows = distances.mean(0)
    return distances - rows - rows.unsqueeze(-1) + rows.mean()
