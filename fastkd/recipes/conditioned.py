"""Teachers that have read something else, say less about some tokens, or are corrected."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastkd._ops.arguments import check_no_gradient
from fastkd._ops.checks import check_tensors
from fastkd._ops.names import Reduction, TextReduction
from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.losses._token_stats import token_stats
from fastkd.recipes._chunks import (
    attention_mask,
    check_batch,
    check_callable,
    check_mask,
    readable,
    reduced,
    wide,
)
from fastkd.recipes._rows import (
    IGNORED,
    check_choice,
    check_row_values,
    check_rows,
    check_share,
    check_width,
    kept_rows,
    label_log_probs,
    number_type,
    row_divergence,
)


def mend(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_mask: Tensor,
    teacher_mask: Tensor,
    *,
    temperature: float = 1.0,
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""KL between rows at different places of the two models' inputs (MEND). A term.

    The teacher reads demonstrations, the student vectors that stand for them: the same tokens
    follow, at other places. The rows chosen by the two masks are paired in order, text by text,
    and a pair's loss is :math:`KL(p \| q)`. Nothing is copied: ``teacher_rows`` of
    :func:`fastkd.softmax_divergence`.

    Args:
        student_logits: ``[B, T_S, vocab]``. Row t scores the token that follows it.
        teacher_logits: ``[B, T_T, vocab]``; gets no gradient.
        student_mask: bool, or integers 0 and 1, ``[B, T_S]``: the rows that learn.
        teacher_mask: the same, ``[B, T_T]``: as many in each text.
        temperature: of both sides.
        reduction: over the student's rows: ``"none"`` (``[B, T_S]``), ``"sum"``, ``"mean"``,
            ``"batchmean"`` or ``"sequence_mean"`` (over a text's rows, then over texts).
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value or type, or a text has another number
            of rows on the two sides.

    Where these numbers differ, a compiled graph raises RuntimeError, and on CUDA, where no values
    are checked, the loss is NaN. Source: Li et al. 2024 (arXiv 2403.06914), whose pre-training uses
    this term alone.

    >>> import torch, fastkd
    >>> student, teacher = torch.zeros(1, 2, 2), torch.tensor([[[5.0, 0.0], [0.0, 0.0]]])
    >>> masks = (torch.tensor([[True, False]]), torch.tensor([[False, True]]))
    >>> fastkd.recipes.mend(student, teacher, *masks).item()
    0.0
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_tensors("mend", tensors)
    for name, logits in tensors.items():
        check_batch("mend", name, logits, student_logits)
    check_width("mend", "teacher_logits", teacher_logits, "student_logits", student_logits)
    student_mask = attention_mask("mend", "student_mask", student_mask)
    teacher_mask = attention_mask("mend", "teacher_mask", teacher_mask)
    for side, mask, logits in (
        ("student", student_mask, student_logits),
        ("teacher", teacher_mask, teacher_logits),
    ):
        check_tensors("mend", {f"{side}_mask": mask})
        check_mask("mend", f"{side}_mask", mask, logits.shape[:-1], student_logits.device)
    check_no_gradient("mend", teacher_logits=teacher_logits)
    counts = [mask.sum(1) for mask in (student_mask, teacher_mask)]
    if readable(counts[0]) and not torch.equal(*counts):
        raise ValueError(
            "mend: teacher_mask must have as many rows in each text as student_mask, "
            f"{counts[0].tolist()}, got {counts[1].tolist()}"
        )
    values = softmax_divergence(
        student_logits,
        teacher_logits,
        teacher_rows=_paired(student_mask, teacher_mask, counts[0] == counts[1]),
        temperature=temperature,
        reduction="none",
    )
    return reduced("mend", values, student_mask, reduction, normalizer)


def _paired(student_mask: Tensor, teacher_mask: Tensor, paired: Tensor) -> Tensor:
    """The teacher's row of each of the student's, in order in each text; -1 for rows left out.

    Out of range in the texts that are not `paired`, where a compiled graph cannot raise.
    """
    texts, length = teacher_mask.shape
    first_of_text = length * torch.arange(texts, device=teacher_mask.device).unsqueeze(-1)
    if length == 0:
        return student_mask.new_full(student_mask.shape, -1, dtype=torch.int64)
    chosen_first = teacher_mask.byte().argsort(dim=1, descending=True, stable=True)
    rank = (student_mask.cumsum(1) - 1).clamp(0, length - 1)
    rows = first_of_text + chosen_first.gather(1, rank)
    rows = torch.where(paired.unsqueeze(-1), rows, texts * length)
    return torch.where(student_mask, rows, -1)


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
    reduction: Reduction = "mean",
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
    check_row_values("swing", "privacy", privacy, student_logits.shape[:-1], student_logits.device)
    check_callable("swing", "temperature", temperature)
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
    return row_divergence(
        "swing",
        student_logits,
        teacher_logits,
        temperature=tau,
        square_temperature=square_temperature,
        mask=mask,
        reduction=reduction,
        normalizer=normalizer,
    )


def mft(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    threshold: float = 0.2,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""A teacher corrected towards the label, mostly the student's former self (minifinetuning).

    A term: :math:`\tau^2 KL(p' \| q)` with :math:`p' = (1 - m) p + m e_y`. Where the teacher's
    likeliest token is not the label y, :math:`m = (p_{max} - p_y + t) / (1 + p_{max} - p_y)`: the
    label is then ahead of it by the threshold t. Where it is, :math:`p'_y = \min(1, p_y + t)`.

    Args:
        student_logits: ``[..., T, vocab]``. Row t scores ``labels[t]``.
        teacher_logits: the same shape; gets no gradient.
        labels: int64 or int32 ``[..., T]``; rows with -100 do not count.
        threshold: t, in [0, 1].
        temperature: of both sides.
        mask: bool ``[..., T]``: rows with False are not read.
        reduction: ``"none"``, ``"sum"``, ``"mean"``, ``"batchmean"`` or ``"sequence_mean"`` (over a
            text's rows, then over texts).
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type.

    Source: arXiv 2506.15702 and NVIDIA's Model-Optimizer.

    >>> import torch, fastkd
    >>> student, teacher = torch.zeros(1, 2), torch.tensor([[0.7, 0.3]]).log()
    >>> round(fastkd.recipes.mft(student, teacher, torch.tensor([1])).item(), 4)  # p' = (0.4, 0.6)
    0.0201
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_tensors("mft", {**tensors, "labels": labels})
    check_rows("mft", tensors, mask=mask, labels=labels)
    check_no_gradient("mft", teacher_logits=teacher_logits, threshold=threshold)
    check_share("mft", "threshold", threshold)
    kept = kept_rows(student_logits, mask, labels)
    stats = token_stats(
        teacher_logits, labels=torch.where(kept, labels, IGNORED), temperature=temperature
    )
    assert stats.student_label_log_prob is not None
    best, p = stats.student_top_prob, stats.student_label_log_prob.exp()
    ahead = (best - p + threshold) / (1 + best - p)
    # Where p is 1, so is p' whatever m is.
    more = torch.where(p < 1, (p + threshold).clamp(max=1) - p, 1) / torch.where(p < 1, 1 - p, 1)
    share = torch.where(stats.student_argmax == labels, more, ahead).clamp(0, 1)
    share, p = (torch.where(kept, x, 0) for x in (share, p))
    rest, corrected = 1 - share, share + (1 - share) * p
    divergence = softmax_divergence(
        student_logits,
        teacher_logits,
        temperature=temperature,
        square_temperature=True,
        weight=rest,
        mask=kept,
        reduction="none",
    )
    log_q = label_log_probs(student_logits, labels, mask=mask, temperature=temperature)
    # What KL(p' || q) has besides (1 - m) KL(p || q) - m log q_y.
    constant = torch.xlogy(corrected, corrected) + (1 - p) * torch.xlogy(rest, rest)
    constant = constant - rest * torch.xlogy(p, p)
    losses = divergence + temperature**2 * (constant - share * log_q)
    return reduced("mft", torch.where(kept, losses, 0), kept, reduction, normalizer)


def _noise(kind: str, like: Tensor, generator: torch.Generator | None) -> Tensor:
    drawn = torch.empty(like.shape, dtype=number_type(like), device=like.device)
    if kind == "gaussian":
        return drawn.normal_(generator=generator)
    drawn.exponential_(generator=generator)
    if kind == "gumbel":
        return -drawn.log()
    return drawn - torch.empty_like(drawn).exponential_(generator=generator)  # Laplace
