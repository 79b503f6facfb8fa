"""Teachers that have read something else than the student, or say less about some tokens."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastkd._ops.arguments import check_no_gradient
from fastkd._ops.checks import check_tensors
from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.recipes._chunks import check_mask, reduced, wide
from fastkd.recipes._rows import (
    check_choice,
    check_row_values,
    check_rows,
    number_type,
    row_options,
)
from fastkd.recipes._rowwise import by_blocks, placed


def mend(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_mask: Tensor,
    teacher_mask: Tensor,
    *,
    temperature: float = 1.0,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""KL between rows at different places of the two models' inputs (MEND). A term.

    The teacher reads demonstrations, the student vectors that stand for them: the same tokens
    follow, at other places. The rows chosen by the two masks are paired in order, text by text,
    and a pair's loss is :math:`KL(p \| q)`. Teacher rows are gathered in blocks; of all rows only
    the student's gradient is stored.

    Args:
        student_logits: ``[B, T_S, vocab]``. Row t scores the token that follows it.
        teacher_logits: ``[B, T_T, vocab]``; gets no gradient.
        student_mask: bool ``[B, T_S]``, the rows that learn.
        teacher_mask: bool ``[B, T_T]``, as many in each text.
        temperature: of both sides.
        reduction: over the student's rows: ``"none"`` (``[B, T_S]``), ``"sum"``, ``"mean"``,
            ``"batchmean"`` or ``"sequence_mean"`` (over a text's rows, then over texts).
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value or type, or a text has another number
            of rows on the two sides.

    Not for torch.compile without graph breaks: the number of rows is read. Source: Li et al. 2024
    (arXiv 2403.06914), whose pre-training uses this term alone.

    >>> import torch, fastkd
    >>> student, teacher = torch.zeros(1, 2, 2), torch.tensor([[[5.0, 0.0], [0.0, 0.0]]])
    >>> masks = (torch.tensor([[True, False]]), torch.tensor([[False, True]]))
    >>> fastkd.recipes.mend(student, teacher, *masks).item()
    0.0
    """
    check_tensors("mend", {"student_logits": student_logits, "teacher_logits": teacher_logits})
    shapes = {"student_logits": student_logits.shape, "teacher_logits": teacher_logits.shape}
    for name, shape in shapes.items():
        if len(shape) != 3 or shape[0] != student_logits.size(0):
            raise ValueError(
                f"mend: {name} must be [{student_logits.size(0)}, length, vocab], got {list(shape)}"
            )
    if student_logits.size(-1) != teacher_logits.size(-1):
        raise ValueError(
            f"mend: teacher_logits must have student_logits' vocabulary, {student_logits.size(-1)} "
            f"columns, got {teacher_logits.size(-1)}"
        )
    for name, mask in (("student_mask", student_mask), ("teacher_mask", teacher_mask)):
        check_tensors("mend", {name: mask})
        check_mask("mend", name, mask, shapes[name.replace("mask", "logits")][:-1])
    check_no_gradient("mend", teacher_logits=teacher_logits)
    counts = [mask.sum(1).tolist() for mask in (student_mask, teacher_mask)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"mend: teacher_mask must have as many rows in each text as student_mask, {counts[0]}, "
            f"got {counts[1]}"
        )
    rows, teacher_rows = (x.flatten().nonzero()[:, 0] for x in (student_mask, teacher_mask))
    student, teacher = (x.flatten(0, 1) for x in (student_logits, teacher_logits))

    def loss(block: slice, logits: Tensor) -> Tensor:
        return softmax_divergence(
            logits, teacher[teacher_rows[block]], temperature=temperature, reduction="none"
        )

    values = by_blocks(loss, [student], [rows], student_mask, student.size(-1))
    return reduced("mend", placed(values, student_mask), student_mask, reduction, normalizer)


def swing(
    student_logits: Tensor,
    teacher_logits: Tensor,
    privacy: Tensor,
    *,
    temperature: Callable[[Tensor], Tensor] | None = None,
    noise: str | None = None,
    noise_scale: float | Tensor | None = None,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
    square_temperature: bool = True,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Temperature and noise by how private a token is (Swing). A term.

    :math:`\tau_t^2 KL(p \| q)` with both sides at the row's temperature :math:`\tau_t`, the
    teacher's logits being :math:`z_T + s_t \epsilon`. The maps from privacy to temperature and to
    noise are not published in a form that we found: those here are ours (recalled, not verified).

    Args:
        student_logits: ``[..., vocab]``. Row t scores the token that follows it.
        teacher_logits: the same shape; gets no gradient if there is noise.
        privacy: float, one a row, in [0, 1].
        temperature: a function from privacy to the rows' temperatures; None: 1 + privacy.
        noise: ``"gumbel"``, ``"gaussian"`` or ``"laplace"``; None: none. It takes the memory of one
            more teacher.
        noise_scale: s, a number or one a row; None: the privacy.
        generator: of the noise.
        mask: bool, one a row: rows with False are not read.
        square_temperature: whether the loss has the factor :math:`\tau_t^2`.
        reduction, normalizer: see :func:`kd`.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Source: arXiv 2212.08349, its abstract.

    >>> import torch, fastkd
    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> round(fastkd.recipes.swing(student, teacher, torch.tensor([0.0])).item(), 4)
    0.3278
    >>> round(fastkd.recipes.swing(student, teacher, torch.tensor([1.0])).item(), 4)
    0.4438
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_rows("swing", tensors, mask=mask)
    check_row_values("swing", "privacy", privacy, student_logits.shape[:-1])
    check_no_gradient("swing", privacy=privacy)
    privacy = wide(privacy)
    tau = 1 + privacy if temperature is None else temperature(privacy)
    if noise is not None:
        check_choice("swing", "noise", noise, ("gumbel", "gaussian", "laplace"))
        check_no_gradient("swing", teacher_logits=teacher_logits, noise_scale=noise_scale)
        scale = privacy if noise_scale is None else noise_scale
        if isinstance(scale, Tensor) and scale.dim():
            check_row_values("swing", "noise_scale", scale, privacy.shape)
            scale = scale.unsqueeze(-1)
        teacher_logits = teacher_logits + scale * _noise(noise, teacher_logits, generator)
    elif noise_scale is not None:
        raise ValueError("swing: noise_scale needs noise, got None")
    return softmax_divergence(
        student_logits,
        teacher_logits,
        temperature=tau,
        square_temperature=square_temperature,
        **row_options(
            "swing", student_logits, mask=mask, reduction=reduction, normalizer=normalizer
        ),
    )


def _noise(kind: str, like: Tensor, generator: torch.Generator | None) -> Tensor:
    drawn = torch.empty(like.shape, dtype=number_type(like), device=like.device)
    if kind == "gaussian":
        return drawn.normal_(generator=generator)
    drawn.exponential_(generator=generator)
    if kind == "gumbel":
        return -drawn.log()
    return drawn - torch.empty_like(drawn).exponential_(generator=generator)  # Laplace
