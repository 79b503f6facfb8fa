"""Divergences between the softmaxes of two linear heads, without their logits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.arguments import to_flag
from fastkd._ops.dtensor import is_dtensor, loss_of_dtensors
from fastkd._ops.linear import function as linear
from fastkd._ops.linear.logits import LinearLogits, checked_options, linear_side
from fastkd._ops.names import Divergence, Reduction, TeacherMix
from fastkd._ops.shards import shards_of
from fastkd.losses._softmax_divergence import OP, given
from fastkd.losses._token_stats import TokenStats, token_stats_of

_NAME = "linear_softmax_divergence"


def linear_softmax_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    logit_scale: float | tuple[float, float] = 1.0,
    logit_softcap: float | tuple[float | None, float | None] | None = None,
    chunk_size: int | None = None,
    compact: bool | None = None,
    logits_dtype: torch.dtype | None = None,
    return_stats: bool = False,
    reduce_hidden_grad: bool = True,
    divergence: Divergence = "forward_kl",
    beta: float | Tensor = 0.5,
    alpha: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    teacher_weights: Sequence[float] | Tensor | None = None,
    teacher_mix: TeacherMix = "logits",
    teacher_rows: Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: float | Tensor = 1.0,
    ignore_index: int = -100,
    shift: int = 0,
    vocab_size: int | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    square_temperature: bool = False,
    group: Any = None,
    vocab_start: int | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    r"""Divergence between the distributions of two linear heads, whose logits are never stored.

    .. math:: z_S = s_S \, h_S W_S^\top + b_S, \qquad z_T = s_T \, h_T W_T^\top + b_T

    and then :func:`fastkd.softmax_divergence` of both. The same as that function with a
    :class:`fastkd.LinearLogits` on each side, which says how the rows are computed in chunks, how
    much memory that takes and how many matrix products. Gradients flow to the hidden states,
    weights and biases that require them.

    Args:
        student_hidden: ``[..., features]`` float32, bfloat16, float16 or float64. The leading
            dimensions are rows (tokens).
        student_weight: ``[vocab, features]``, of the dtype of ``student_hidden``.
        teacher_hidden: ``[..., other features]``, its own dtype. With the same leading dimensions,
            or with ``teacher_rows`` any.
        teacher_weight: ``[vocab, other features]``. Where it is the tensor ``student_weight``, the
            logits of both sides are one product.
        student_bias: ``[vocab]``, or None.
        teacher_bias: ``[vocab]``, or None.
        logit_scale: s, a number for both sides or a pair (student, teacher).
        logit_softcap: see :func:`fastkd.softmax_divergence`.
        chunk_size: see :class:`fastkd.LinearLogits`, as for the next two.
        compact: whether rows that are not read are left out of the products.
        logits_dtype: of a chunk's logits.
        return_stats: whether to return statistics of the rows, too, from the same logits.
        reduce_hidden_grad: whether gradients of hidden states are summed over ``group``.
        divergence, beta, alpha, temperature, teacher_temperature, weight, mask, teacher_weights,
            teacher_mix, teacher_rows, labels, label_weight, ignore_index, shift, vocab_size,
            reduction, normalizer, square_temperature: see :func:`fastkd.softmax_divergence`.
        group: the vocabulary is split across this process group: the weights and biases are rows of
            the heads, the hidden states the same on all processes. See
            :class:`fastkd.LinearLogits`.
        vocab_start: with ``group``, the vocabulary's number of this process's first row.

    Returns:
        float32 (float64 where an input is): a scalar, or with ``reduction="none"`` the leading
        dimensions' shape. With ``return_stats=True`` a pair of that and the
        :class:`fastkd.TokenStats` at ``temperature`` of both sides' logits, capped where they are.
        Rows that are not read are 0 there, with argmax -1. The statistics have no gradient.

    Raises:
        IndexError: a label out of range (on CUDA its row is NaN instead).
        ValueError, TypeError: another argument has the wrong value or type.
        NotImplementedError: ``torch.func`` transforms with ``group`` or ``return_stats``; batches
            of gradients with ``group``.

    Source: products by chunks of tokens with the gradient in the forward pass as Liger's chunked
    losses (Hsu et al. 2024, arXiv 2410.10989).

    >>> import torch, fastkd
    >>> head = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    >>> student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    >>> loss = fastkd.linear_softmax_divergence(student, head, teacher, head.detach())
    >>> round(loss.item(), 4)
    0.4621
    >>> loss.backward()
    >>> [[round(x, 4) for x in row] for row in head.grad.tolist()]
    [[-0.0, -0.4621], [0.0, 0.4621]]
    """
    return_stats = to_flag(_NAME, "return_stats", return_stats)
    reduced = to_flag(_NAME, "reduce_hidden_grad", reduce_hidden_grad)
    options = checked_options(_NAME, logits_dtype, chunk_size, compact)
    scales = logit_scale if isinstance(logit_scale, (tuple, list)) else (logit_scale, logit_scale)
    if len(scales) != 2:
        raise ValueError(
            f"{_NAME}: logit_scale must be a number or a pair (student, teacher), got {logit_scale}"
        )
    student = linear_side(
        _NAME, "student_", student_hidden, student_weight, student_bias, scales[0], options, reduced
    )
    teacher = linear_side(
        _NAME, "teacher_", teacher_hidden, teacher_weight, teacher_bias, scales[1], options, reduced
    )
    row_options: dict[str, Any] = {
        "divergence": divergence,
        "beta": beta,
        "alpha": alpha,
        "temperature": temperature,
        "teacher_temperature": teacher_temperature,
        "weight": weight,
        "mask": mask,
        "teacher_weights": teacher_weights,
        "teacher_mix": teacher_mix,
        "teacher_rows": teacher_rows,
        "labels": labels,
        "label_weight": label_weight,
        "ignore_index": ignore_index,
        "shift": shift,
        "vocab_size": vocab_size,
        "logit_softcap": logit_softcap,
        "square_temperature": square_temperature,
        "reduction": reduction,
        "normalizer": normalizer,
    }
    row_options.update(group=group, vocab_start=vocab_start, return_stats=return_stats)
    if is_dtensor(student):
        others = {"teacher_logits": teacher}
        return loss_of_dtensors(_of_heads, student, others, row_options)
    return _of_heads(student, teacher, **row_options)


def _of_heads(
    student: LinearLogits,
    teacher: LinearLogits,
    *,
    group: Any = None,
    vocab_start: int | None = None,
    return_stats: bool,
    **options: Any,
) -> Tensor | tuple[Tensor, TokenStats]:
    shards = shards_of(_NAME, student, group, vocab_start, options["vocab_size"])
    labels = options["labels"] is not None
    try:
        arguments = given(student, teacher, options)
        found = linear.run(OP, arguments, stats=return_stats, shards=shards)
    except (ValueError, TypeError, IndexError) as error:
        message = str(error)
        if message.startswith("softmax_divergence:"):
            message = f"linear_{message}"
        raise type(error)(message) from None
    if not return_stats:
        return found
    loss, numbers, argmax = found
    return loss, token_stats_of(numbers, argmax, True, labels)


_of_heads.__name__ = _NAME
