"""Learning embedding linear projections: subclasses made from the teacher's embeddings."""

import torch
from torch import Tensor

from fastkd._ops.arguments import check_no_gradient, to_flag, to_integer
from fastkd._ops.checks import check_positive
from fastkd._ops.names import Reduction
from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.recipes._chunks import check_integers, check_mask, check_range, wide
from fastkd.recipes._features import check_floats, check_rank, check_reduction, only, product


@torch.no_grad()
def lelp_subclasses(
    hidden: Tensor,
    labels: Tensor,
    head: Tensor,
    num_sub: int,
    *,
    temperature: float = 1.0,
    null_space: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Soft assignments of the training examples to S subclasses of each class, made once.

    For each class: the principal directions of the embeddings of its examples, the S largest,
    turned by a random rotation; an example's assignment is the softmax of its coordinates in them,
    relative to the class's mean, over the temperature. A class with one example or none has
    uniform ones.

    Args:
        hidden: ``[N, D]``, the teacher's embeddings: the inputs of its head.
        labels: int64 or int32 ``[N]``, in [0, C).
        head: ``[C, D]``, the weight of the teacher's head.
        num_sub: S.
        temperature: positive; the paper tunes it.
        null_space: use only the part of the embeddings that the head does not see; in the paper it
            often helps. The head must leave at least S dimensions.
        generator: of the rotations, on the device of ``hidden``.

    Returns:
        ``[N, C, S]``, sums over S are 1; float32 (float64 if ``hidden`` is). No gradient.

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value, shape or type.

    Source: LELP (arXiv 2409.20449), confirmed by several reviews; no code was found.

    >>> import torch, fastkd
    >>> hidden, head, labels = torch.randn(20, 8), torch.randn(3, 8), torch.arange(20) % 3
    >>> list(fastkd.recipes.lelp_subclasses(hidden, labels, head, 4).shape)
    [20, 3, 4]
    """
    name = "lelp_subclasses"
    check_floats(name, hidden=hidden, head=head)
    check_rank(name, "hidden", hidden, "N", "D")
    check_rank(name, "head", head, "C", "D")
    if head.size(1) != hidden.size(1):
        raise ValueError(
            f"{name}: head must have hidden's {hidden.size(1)} channels, got {head.size(1)}"
        )
    check_integers(name, "labels", labels, hidden.shape[:1], hidden.device)
    check_range(name, "labels", labels, 0, head.size(0))
    check_positive(name, "temperature", temperature)
    num_sub = to_integer(name, "num_sub", num_sub)
    null_space = to_flag(name, "null_space", null_space)
    embeddings, width = wide(hidden), hidden.size(1)
    if null_space:
        seen = _row_space(wide(head).to(embeddings.dtype))
        embeddings = embeddings - product(product(embeddings, seen.mT), seen)
        width -= seen.size(0)
    if not 1 <= num_sub <= width:
        raise ValueError(
            f"{name}: num_sub must be in [1, {width}], the dimensions "
            f"{'that head leaves' if null_space else 'of hidden'}, got {num_sub}"
        )
    found = embeddings.new_empty(len(embeddings), head.size(0), num_sub)
    for label in range(head.size(0)):
        own = embeddings[labels == label]
        centre = own.mean(0) if len(own) else embeddings.new_zeros(embeddings.size(1))
        # A class of few examples has fewer directions than subclasses.
        directions = _row_space(own - centre)[:num_sub]
        rotation = _rotation(num_sub, embeddings, generator)[: len(directions)]
        coordinates = product(embeddings - centre, product(directions.mT, rotation))
        found[:, label] = (coordinates / temperature).softmax(-1)
    return found


def _row_space(rows: Tensor) -> Tensor:
    """Orthonormal directions that the rows have, the largest first."""
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    smallest = sizes[:1] * max(rows.shape) * torch.finfo(sizes.dtype).eps
    return directions[sizes > smallest]


def _rotation(size: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """A random orthogonal matrix, uniformly distributed."""
    normal = torch.randn(size, size, generator=generator, dtype=torch.float64, device=like.device)
    q, r = torch.linalg.qr(normal)
    return (q * r.diagonal().sign()).to(like.dtype)


def lelp(
    student_logits: Tensor,
    teacher_logits: Tensor,
    subclasses: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""LELP: cross-entropy of the student's C S subclasses with the teacher's. A term.

    The target of subclass s of class c is :math:`p_c a_{cs}`, with p the teacher's softmax at the
    temperature and a from :func:`lelp_subclasses`. The paper uses no hard labels beside it. A
    class's probability is the sum over its subclasses:
    ``student_logits.unflatten(-1, (C, S)).logsumexp(-1)``.

    Args:
        student_logits: ``[N, C * S]``, the subclasses of a class side by side.
        teacher_logits: ``[N, C]``.
        subclasses: ``[N, C, S]``, of these examples; no gradient.
        temperature: of both models, positive.
        mask: bool ``[N]``.
        reduction: see :func:`fastkd.softmax_divergence`.
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: LELP (arXiv 2409.20449), confirmed by several reviews; no code was found.

    >>> import torch, fastkd
    >>> teacher, halves = torch.zeros(1, 2), torch.full((1, 2, 3), 1 / 3)
    >>> round(fastkd.recipes.lelp(torch.zeros(1, 6), teacher, halves).item(), 4)  # log 6
    1.7918
    """
    check_floats(
        "lelp",
        student_logits=student_logits,
        teacher_logits=teacher_logits,
        subclasses=subclasses,
    )
    shape = (*student_logits.shape[:-1], *teacher_logits.shape[-1:], *subclasses.shape[-1:])
    if teacher_logits.shape != shape[:-1] or subclasses.shape != shape:
        raise ValueError(
            "lelp: teacher_logits must be [N, C] and subclasses [N, C, S] with student_logits' N, "
            f"got {list(teacher_logits.shape)} and {list(subclasses.shape)} for "
            f"{list(student_logits.shape)}"
        )
    if student_logits.size(-1) != shape[-2] * shape[-1]:
        raise ValueError(
            f"lelp: student_logits must have {shape[-2]} x {shape[-1]} columns, got "
            f"{student_logits.size(-1)}"
        )
    check_mask("lelp", "mask", mask, shape[:-2], student_logits.device)
    check_positive("lelp", "temperature", temperature)
    check_no_gradient("lelp", subclasses=subclasses)
    check_reduction("lelp", reduction, normalizer)
    teacher = wide(only(teacher_logits, mask))
    target = (teacher / temperature).log_softmax(-1).unsqueeze(-1)
    target = target + wide(subclasses).log().to(target.dtype)
    return softmax_divergence(
        student_logits,
        target.flatten(-2),
        divergence="cross_entropy",
        temperature=temperature,
        teacher_temperature=1.0,
        mask=mask,
        reduction=reduction,
        normalizer=normalizer,
    )
