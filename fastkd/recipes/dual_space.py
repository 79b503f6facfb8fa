"""Dual-space distillation: each model's hidden states through the other's head."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._ops.arguments import check_no_gradient, to_flag
from fastkd._ops.checks import check_normalizer, check_tensors
from fastkd._ops.names import Divergence, Reduction
from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.recipes._chunks import (
    check_batch,
    check_callable,
    check_integers,
    check_mask,
    check_range,
    reduced,
    wide,
)
from fastkd.recipes._rowwise import at_rows, by_blocks, chosen, placed
from fastkd.tokenizers._chunk_log_likelihood import chunk_log_likelihood

Map = Callable[[Tensor], Tensor]


class DskdSide(NamedTuple):
    """The tensors of one model for :func:`dskd`, of whole texts, without any shift."""

    #: ``[B, T, vocab]``: row t scores token t + 1.
    logits: Tensor
    #: ``[B, T, D]``: the hidden states, the inputs of the head.
    hidden: Tensor
    #: ``[B, T, E]``: embeddings of the input tokens; the teacher's have E = D.
    embeddings: Tensor
    #: ``[vocab, D]``: the weight of the head. It gets no gradient.
    head: Tensor
    #: bool ``[B, T]``, False for tokens that are not to be learned: padding, a prompt, and after
    #: padding on the left the first token of the text.
    mask: Tensor | None = None


def dskd(
    student: DskdSide,
    teacher: DskdSide,
    student_ids: Tensor,
    *,
    query: Map | None,
    to_student: Map | None,
    to_teacher: Map | None,
    only_correct: bool | None = None,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    reduction: Reduction = "mean",
    normalizer: tuple[float | Tensor, float | Tensor] | None = None,
) -> Tensor:
    r"""Dual-space distillation with cross-model attention between the tokens of two tokenizers.

    Row t is the step from token t to token t + 1. With e the embeddings, h the hidden states, and
    :math:`\bar x = x / \mathrm{std}(x)` over all entries of rows that count:

    .. math:: A = \frac{\text{query}([e^S_t; e^S_{t+1}])\, \bar{[e^T_u; e^T_{u+1}]}^\top}
                       {\sqrt{2 E_T}}, \qquad
              h^{T \to S} = \mathrm{softmax}(A)\, \text{to\_student}(\bar h^T_u + \bar e^T_{u+1}),
              \qquad
              h^{S \to T} = \mathrm{softmax}(A^\top)\, \text{to\_teacher}(h^S_t)

    In the student's space, with :math:`z = h^{T \to S} \text{head}_S^\top`, a row's loss is the sum
    of the cross-entropy of z, which trains the maps, and the divergence of the student's logits
    from z (as a constant); with ``only_correct`` the divergence is added only where z's best token
    is the right one. In the teacher's space it is the forward KL divergence of
    :math:`h^{S \to T} \text{head}_T^\top` from the teacher's logits, both at ``temperature``. The
    result is the sum of both spaces' means. Logits of the other space are computed in blocks of
    rows and not stored.

    Args:
        student: :class:`DskdSide`; gradients flow to its logits, hidden states and embeddings.
        teacher: :class:`DskdSide`; its logits get no gradient.
        student_ids: ``[B, T_S]``, the tokens.
        query: maps ``[B, T_S - 1, 2 E_S]`` to ``2 E_T``, for example an ``nn.Linear``. None: both
            have the same tokenizer, and rows are paired by position (dual-space distillation
            without attention, :math:`h^{T \to S} = \text{to\_student}(h^T)`).
        to_student: maps ``D_T`` to ``D_S``; None leaves the student's space out.
        to_teacher: maps ``D_S`` to ``D_T``; None leaves the teacher's space out.
        only_correct: see above. None: True with a query, as in the paper's code.
        divergence, beta, temperature, teacher_temperature: see :func:`fastkd.softmax_divergence`,
            in the student's space; of these only the temperature is used in the teacher's.
        reduction: ``"mean"`` over each space's rows, or ``"sum"``.
        normalizer: replaces the two denominators, of the student's and the teacher's space.

    Returns:
        A scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type.

    Source: Zhang et al. 2024 (arXiv 2406.17328) and its code (songmzhang/DSKD), whose total is the
    mean of this and the cross-entropy of the student. Its scripts have temperature 2, without a
    factor of its square. Differences: in the code no gradient flows to the embeddings (pass them
    detached), both spaces are divided by the student's number of tokens n (``normalizer=(n, n)``),
    and the standard deviation includes padding.

    >>> import torch, fastkd
    >>> def side(vocab, width):
    ...     hidden = torch.randn(1, 3, width)
    ...     head = torch.randn(vocab, width)
    ...     return fastkd.recipes.DskdSide(hidden @ head.T, hidden, hidden, head)
    >>> maps = {
    ...     "query": torch.nn.Linear(8, 12),
    ...     "to_student": torch.nn.Linear(6, 4),
    ...     "to_teacher": torch.nn.Linear(4, 6),
    ... }
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> fastkd.recipes.dskd(side(9, 4), side(7, 6), ids, **maps).shape
    torch.Size([])
    """
    for name, side in (("student", student), ("teacher", teacher)):
        if not isinstance(side, DskdSide):
            raise TypeError(f"dskd: {name} must be a DskdSide, got {type(side).__name__}")
    _check_side("student", student, student.logits)
    _check_side("teacher", teacher, student.logits)
    for what, value in (("query", query), ("to_student", to_student), ("to_teacher", to_teacher)):
        check_callable("dskd", what, value)
    if only_correct is not None:
        only_correct = to_flag("dskd", "only_correct", only_correct)
    if to_student is None and to_teacher is None:
        raise ValueError("dskd: to_student or to_teacher must be given, got neither")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"dskd: reduction must be mean or sum, got {reduction!r}")
    if normalizer is not None and (not isinstance(normalizer, tuple) or len(normalizer) != 2):
        raise ValueError(f"dskd: normalizer must be two denominators, got {normalizer!r}")
    for divisor in normalizer or ():
        check_normalizer("dskd", divisor)
        check_no_gradient("dskd", normalizer=divisor)
    check_no_gradient("dskd", **{"teacher.logits": teacher.logits})
    check_integers(
        "dskd", "student_ids", student_ids, student.logits.shape[:-1], student.logits.device
    )
    check_range("dskd", "student_ids", student_ids, 0, student.logits.size(-1))
    kept, carried = _carried(student, teacher, query, to_student, to_teacher)
    heads = student.head.detach(), teacher.head.detach()
    labels = chosen(student_ids[:, 1:], kept[0])
    if only_correct is None:
        only_correct = query is not None
    rows = [_rows(x, side.logits.size(1)) for x, side in zip(kept, (student, teacher), strict=True)]
    taught = teacher.logits.flatten(0, 1)

    def in_student_space(block: slice, hidden: Tensor, logits: Tensor) -> Tensor:
        projected, label = F.linear(hidden, heads[0].to(hidden.dtype)), labels[block]
        if torch.compiler.is_compiling():
            nll = F.cross_entropy(wide(projected), label.long(), reduction="none")
        else:
            each = torch.arange(label.numel(), device=label.device).unsqueeze(0)
            nll = -chunk_log_likelihood(
                projected.unsqueeze(0), label.unsqueeze(0), each, label.numel()
            ).log_likelihood[0]
        target = projected.detach()
        loss = softmax_divergence(
            logits,
            target,
            divergence=divergence,
            beta=beta,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            reduction="none",
        )
        return nll + (torch.where(target.argmax(-1) == label, loss, 0) if only_correct else loss)

    def in_teacher_space(block: slice, hidden: Tensor) -> Tensor:
        projected = F.linear(hidden, heads[1].to(hidden.dtype))
        target = at_rows(taught, rows[1][0][block], kept[1])
        return softmax_divergence(projected, target, temperature=temperature, reduction="none")

    total = wide(student.logits).new_zeros(())
    divisors = normalizer or (None, None)
    if carried[0] is not None:
        inputs = [carried[0].flatten(0, 1), student.logits.flatten(0, 1)]
        width = student.logits.size(-1)
        losses = by_blocks(in_student_space, inputs, rows[0][::-1], kept[0], width)
        total = total + _total(losses, kept[0], reduction, divisors[0])
    if carried[1] is not None:
        inputs = [carried[1].flatten(0, 1)]
        width = teacher.logits.size(-1)
        losses = by_blocks(in_teacher_space, inputs, rows[1][1:], kept[1], width)
        total = total + _total(losses, kept[1], reduction, divisors[1])
    return total


def _check_side(name: str, side: DskdSide, like: Tensor) -> None:
    """Raise unless the shapes of a side match."""
    tensors = {f"{name}.{field}": getattr(side, field) for field in side._fields[:4]}
    check_tensors("dskd", tensors)
    for field in ("logits", "hidden", "embeddings"):
        values = getattr(side, field)
        check_batch("dskd", f"{name}.{field}", values, like)
        if values.size(1) != side.logits.size(1):
            raise ValueError(
                f"dskd: {name}.{field} must have logits' {side.logits.size(1)} rows a text, got "
                f"{values.size(1)}"
            )
    expected = [side.logits.size(-1), side.hidden.size(-1)]
    if list(side.head.shape) != expected:
        raise ValueError(f"dskd: {name}.head must be {expected}, got {list(side.head.shape)}")
    check_mask("dskd", f"{name}.mask", side.mask, side.logits.shape[:-1], side.logits.device)


def _carried(
    student: DskdSide,
    teacher: DskdSide,
    query: Map | None,
    to_student: Map | None,
    to_teacher: Map | None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The steps that count on each side, and the hidden states mapped to it from the other."""
    own, other = _steps(student), _steps(teacher)
    hidden = [_only(side.hidden[:, :-1], x) for side, x in ((student, own), (teacher, other))]
    if query is None:
        if own.shape != other.shape:
            raise ValueError(
                f"dskd: without a query teacher.logits must have the student's {own.size(1) + 1} "
                f"rows a text, got {other.size(1) + 1}"
            )
        kept, maps = [own & other] * 2, (to_student, to_teacher)
        return kept, [
            None if function is None else function(x)
            for function, x in zip(maps, reversed(hidden), strict=True)
        ]
    # A text without steps on the other side has nothing to attend to.
    kept = [own & other.any(1, keepdim=True), other & own.any(1, keepdim=True)]
    questions, keys = (
        torch.cat([_only(x[:, :-1], at), _only(x[:, 1:], at)], -1)
        for x, at in ((student.embeddings, own), (teacher.embeddings, other))
    )
    keys = _of_unit_size(keys, other)
    asked = query(questions)
    if asked.shape[-1] != keys.shape[-1]:
        raise ValueError(
            f"dskd: query must give {keys.size(-1)} channels, twice those of teacher.embeddings, "
            f"got {asked.size(-1)}"
        )
    scores = wide(asked) @ wide(keys).mT / math.sqrt(keys.size(-1))
    carried: list[Tensor | None] = [None, None]
    if to_student is not None:
        targets = _only(teacher.embeddings[:, 1:], other)
        if targets.size(-1) != hidden[1].size(-1):
            raise ValueError(
                f"dskd: teacher.embeddings must have its hidden states' {hidden[1].size(-1)} "
                f"channels, got {targets.size(-1)}"
            )
        values = to_student(_of_unit_size(hidden[1], other) + _of_unit_size(targets, other))
        carried[0] = _attended(scores, values, other)
    if to_teacher is not None:
        carried[1] = _attended(scores.mT, to_teacher(hidden[0]), own)
    return kept, carried


def _steps(side: DskdSide) -> Tensor:
    """Rows that lead to a token that counts, ``[B, T - 1]``."""
    if side.mask is None:
        shape = (side.logits.size(0), max(side.logits.size(1) - 1, 0))
        return torch.ones(shape, dtype=torch.bool, device=side.logits.device)
    return side.mask[:, 1:]


def _only(values: Tensor, kept: Tensor) -> Tensor:
    """The values with 0 for rows that do not count, also where these hold NaN."""
    return torch.where(kept.unsqueeze(-1), values, 0)


def _of_unit_size(values: Tensor, kept: Tensor) -> Tensor:
    """Values over the standard deviation of the rows that count; the other rows must be 0."""
    precise = wide(values)
    count = kept.sum() * values.size(-1)
    mean = precise.sum() / count.clamp(min=1)
    square = _only((precise - mean).square(), kept).sum() / (count - 1).clamp(min=1)
    return values / square.clamp(min=torch.finfo(torch.float32).tiny).sqrt().to(values.dtype)


def _attended(scores: Tensor, values: Tensor, kept: Tensor) -> Tensor:
    """Means of the values that count, weighted by the softmax of the scores."""
    lowest = torch.finfo(scores.dtype).min
    weights = scores.masked_fill(~kept.unsqueeze(1), lowest).softmax(-1)
    return weights.to(values.dtype) @ values


def _rows(kept: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Indices of the steps that count among all rows, and among the steps."""
    texts = torch.arange(kept.size(0), device=kept.device).unsqueeze(-1)
    steps = torch.arange(kept.size(1), device=kept.device)
    return chosen(texts * length + steps, kept), chosen(texts * kept.size(1) + steps, kept)


def _total(
    losses: Tensor, kept: Tensor, reduction: Reduction, normalizer: float | Tensor | None
) -> Tensor:
    """The sum, over the denominator if there is one; a denominator of 0 gives 0."""
    return reduced("dskd", placed(losses, kept), kept, reduction, normalizer)
