"""A teacher's k likeliest tokens, as they are stored."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd._ops.linear.logits import LinearLogits, check_logits
from fastkd._ops.op import Plain


class TopK(NamedTuple):
    """The k likeliest tokens of each row, likeliest first."""

    #: ``[..., k]`` float32, natural logarithms, normalised over the whole vocabulary.
    log_probs: Tensor
    #: ``[..., k]`` int32.
    indices: Tensor


def teacher_topk(
    teacher_logits: Tensor | LinearLogits,
    k: int,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
) -> TopK:
    r"""Log-probabilities and indices of a teacher's k likeliest tokens, in one read of its logits.

    :math:`\log p_v = z_v / \tau - \log \sum_u e^{z_u / \tau}` over the whole vocabulary, for the k
    largest, sorted descending; equal ones by lower index. It replaces `torch.log_softmax` and
    `torch.topk`, without a tensor of all log-probabilities. The results have no gradient.

    A ``-inf`` logit is probability 0 and comes last, with log-probability ``-inf``. A row with a
    NaN, ``+inf`` or no finite logit gives NaN for all k, with indices 0 to k - 1.

    Args:
        teacher_logits: ``[..., vocab]`` float32, bfloat16, float16 or float64, any strides. Or a
            :class:`fastkd.LinearLogits`.
        k: from 1 to the size of the vocabulary; on CUDA 1,024 at most.
        temperature: positive: a number, or a tensor with one entry a row.
        vocab_size: only the first ``vocab_size`` columns are used (padded vocabularies).

    Returns:
        ``TopK(log_probs, indices)``, float32 and int32 of shape ``[..., k]``.

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    >>> import torch, fastkd
    >>> best = fastkd.teacher_topk(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), 3)
    >>> best.indices.tolist()
    [[1, 3, 2]]
    >>> [round(x, 4) for x in best.log_probs[0].tolist()]
    [-0.9176, -0.9176, -1.9176]
    """
    check_logits("teacher_topk", "teacher_logits", teacher_logits)
    teacher_logits = teacher_logits.detach()
    found = OP(
        teacher_logits,
        {
            "teacher_logits": teacher_logits,
            "k": k,
            "temperature": temperature,
            "vocab_size": vocab_size,
        },
    )
    return TopK(*found)


def _fake(teacher_logits: Tensor, k: int, **_: Any) -> tuple[Tensor, ...]:
    shape = (*teacher_logits.shape[:-1], k)
    return (
        teacher_logits.new_empty(shape, dtype=torch.float32),
        teacher_logits.new_empty(shape, dtype=torch.int32),
    )


OP = Plain("teacher_topk", _fake)
