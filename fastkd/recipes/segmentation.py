"""Methods of semantic segmentation, where the rows are maps."""

import torch
from torch import Tensor

from fastkd._ops.arguments import check_no_gradient, to_integer
from fastkd._ops.checks import check_positive, check_tensors
from fastkd._ops.names import Reduction
from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.recipes._chunks import check_integers, wide
from fastkd.recipes._features import check_factors, check_floats, check_like, check_reduction


def _maps(function: str, **maps: Tensor) -> tuple[Tensor, Tensor]:
    """Maps ``[B, C, ...]`` of one shape as rows of pixels."""
    (name, student), (other, teacher) = maps.items()
    check_like(function, other, teacher, name, student)
    if student.dim() < 3:
        raise ValueError(f"{function}: {name} must be [B, C, H, W], got {list(student.shape)}")
    return student.flatten(2), teacher.flatten(2)


def cwd(
    student_maps: Tensor,
    teacher_maps: Tensor,
    *,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Channel-wise distillation of maps: each channel is a distribution over pixels. A term.

    :math:`T^2 KL(p \| q)`, with p and q the softmaxes over the pixels of a channel at temperature
    T, averaged over examples and channels. LAD's student adds 3 times this to its cross-entropy and
    0.02 times that of an auxiliary head.

    Args:
        student_maps: ``[B, C, H, W]``, any strides.
        teacher_maps: the same shape.
        temperature: 4 in the code of CWD and LAD.
        reduction: over the channels of all examples, as :func:`fastkd.softmax_divergence` has it.
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: Shu et al. (arXiv 2011.13256); LAD (2407.13254; code
    skyshoumeng/Label_Assisted_Distillation).

    >>> import torch, fastkd
    >>> maps = torch.randn(2, 3, 4, 4)
    >>> fastkd.recipes.cwd(maps, maps + 1).item() < 1e-6
    True
    """
    check_positive("cwd", "temperature", temperature)
    check_reduction("cwd", reduction, normalizer)
    student, teacher = _maps("cwd", student_maps=student_maps, teacher_maps=teacher_maps)
    return softmax_divergence(
        student,
        teacher,
        temperature=temperature,
        square_temperature=True,
        reduction=reduction,
        normalizer=normalizer,
    )


def lad_consistency(
    first_maps: Tensor, second_maps: Tensor, *, weight: float = 5.0, temperature: float = 4.0
) -> Tensor:
    r"""LAD's teacher: two paths with differently noised label maps must agree. A term.

    ``weight`` times (:func:`cwd` of the first path from the second, held constant, plus that of the
    second from the first). The teacher adds the cross-entropy of both paths.

    Args:
        first_maps: ``[B, C, H, W]`` logits of a path.
        second_maps: those of the other.
        weight: 5 in the authors' code.
        temperature: see :func:`cwd`.

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: LAD (arXiv 2407.13254; code skyshoumeng/Label_Assisted_Distillation).

    >>> import torch, fastkd
    >>> maps = torch.randn(2, 3, 4, 4)
    >>> fastkd.recipes.lad_consistency(maps, maps).item()
    0.0
    """
    check_positive("lad_consistency", "weight", weight)
    check_no_gradient("lad_consistency", weight=weight)
    check_positive("lad_consistency", "temperature", temperature)
    first, second = _maps("lad_consistency", first_maps=first_maps, second_maps=second_maps)
    rows = first.size(0) * first.size(1)
    total = first.new_zeros((), dtype=wide(first).dtype)
    for student, teacher in ((first, second), (second, first)):
        total = total + softmax_divergence(
            student,
            teacher.detach(),
            temperature=temperature,
            square_temperature=True,
            normalizer=rows / weight,
        )
    return total


def lad_label_map(
    labels: Tensor,
    num_classes: int,
    *,
    noise: float = 0.03,
    scale: float = 100.0,
    values: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""LAD's label map, the fourth channel of its teacher's input.

    ``scale`` times (the class's value + ``noise`` times a normal number for each pixel). The values
    are random normal numbers, new ones in each call while the teacher is trained; the student's
    phase has fixed ``values`` and noise 0.02.

    Args:
        labels: int64 or int32, any shape. Labels outside of [0, num_classes), such as 255 for
            unlabelled pixels, have the value 0; this choice is ours.
        num_classes: number of classes.
        noise: 0.03 in the authors' code, 0.02 in the student's phase.
        scale: 100 in the authors' code.
        values: float ``[num_classes]``, the classes' values; None: random.
        generator: of the random numbers.

    Returns:
        float32, the labels' shape.

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: LAD (arXiv 2407.13254; code skyshoumeng/Label_Assisted_Distillation).

    >>> import torch, fastkd
    >>> labels, values = torch.tensor([[0, 1], [1, 255]]), torch.tensor([0.5, -1.0])
    >>> fastkd.recipes.lad_label_map(labels, 2, noise=0.0, values=values).tolist()
    [[50.0, -100.0], [-100.0, 0.0]]
    """
    check_tensors("lad_label_map", {"labels": labels})
    check_integers("lad_label_map", "labels", labels, labels.shape)
    num_classes = to_integer("lad_label_map", "num_classes", num_classes)
    check_factors("lad_label_map", "noise", (noise,), 1)
    check_positive("lad_label_map", "scale", scale)
    if num_classes < 1:
        raise ValueError(f"lad_label_map: num_classes must be positive, got {num_classes}")
    if values is None:
        values = torch.randn(num_classes, generator=generator, device=labels.device)
    check_floats("lad_label_map", values=values)
    if values.shape != (num_classes,):
        raise ValueError(f"lad_label_map: values must be [{num_classes}], got {list(values.shape)}")
    known = (labels >= 0) & (labels < num_classes)
    found = torch.where(known, values.float()[torch.where(known, labels, 0)], 0)
    jitter = torch.randn(found.shape, generator=generator, device=found.device)
    return scale * (found + noise * jitter)
