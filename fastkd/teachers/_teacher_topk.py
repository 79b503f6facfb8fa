"""A teacher's k likeliest tokens, as they are stored."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd._ops import shards as ops
from fastkd._ops.dtensor import is_dtensor, rows_of_dtensors
from fastkd._ops.linear.logits import LinearLogits, check_logits
from fastkd._ops.op import Plain
from fastkd._ops.shards import Merged, Shards, shards_of
from fastkd.reference._topk_divergence import PADDING_LOG_PROB


class TopK(NamedTuple):
    """The k likeliest tokens of each row, likeliest first."""

    #: ``[..., k]`` float32, natural logarithms, normalised over the whole vocabulary.
    log_probs: Tensor
    #: ``[..., k]`` int32.
    indices: Tensor


def stored_entries(log_probs: Tensor, indices: Tensor) -> Tensor:
    """Which entries are a teacher's tokens, and not padding. A row without one has no teacher."""
    return (indices >= 0) & (log_probs > PADDING_LOG_PROB)


def teacher_topk(
    teacher_logits: Tensor | LinearLogits,
    k: int,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    group: Any = None,
    vocab_start: int | None = None,
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
        group: the vocabulary is split across this process group, see
            :func:`fastkd.softmax_divergence`, as for DTensors. One all-gather of 8 (k + 1)
            bytes a row.
        vocab_start: with ``group``, the first of this process's columns.

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
    if is_dtensor(teacher_logits):
        options = {
            "temperature": temperature,
            "vocab_size": vocab_size,
            "group": group,
            "vocab_start": vocab_start,
        }
        return rows_of_dtensors(teacher_topk, teacher_logits, {}, options, {"k": k})
    check_logits("teacher_topk", "teacher_logits", teacher_logits)
    teacher_logits = teacher_logits.detach()
    given = {
        "teacher_logits": teacher_logits,
        "k": k,
        "temperature": temperature,
        "vocab_size": vocab_size,
    }
    shards = shards_of("teacher_topk", teacher_logits, group, vocab_start, vocab_size)
    return TopK(*OP(teacher_logits, given, shards=shards))


def _sharded(
    op: Plain, values: dict[str, Any], shards: Shards, inplace: bool
) -> tuple[Tensor, Tensor]:
    """The k likeliest of columns split across processes: those of each process, merged."""
    teacher, k = values["teacher_logits"], values["k"]
    if not 1 <= k <= shards.vocab:
        raise ValueError(f"teacher_topk: k must lie in [1, {shards.vocab}], got {k}")
    own = min(k, max(shards.columns, 1))
    rows = math.prod(teacher.shape[:-1])
    each = values["temperatures"]
    tau = values["temperature"] if each is None else each.reshape(-1).to(torch.float64)
    tau = torch.ones(rows, dtype=torch.float64, device=teacher.device) * tau
    one = torch.ones_like(tau)
    no_token = torch.full((rows,), -1, dtype=torch.int64, device=teacher.device)
    base = torch.stack([one, tau, one, one * math.inf])
    numbers = ops.statistics(shards, teacher, base, no_token)[: ops.SUM + 1]
    logits = torch.full((k, rows), -math.inf, dtype=torch.float64, device=teacher.device)
    columns = torch.full_like(logits, shards.vocab)
    if shards.columns:
        # Of a row that is NaN here the raw op returns the first columns.
        given = {**values, "k": own, "vocab_size": shards.columns}
        if each is not None:
            given["temperature"] = each
        local = op(teacher, given)[1].long()
        logits[:own] = teacher.gather(-1, local).reshape(rows, own).T
        columns[:own] = local.reshape(rows, own).T + shards.start
    dtype = ops.sent_dtype(shards, teacher)
    every = shards.gather_first(torch.cat([numbers, logits, columns]), dtype)
    merged = Merged(every[:, ops.ORIGIN])
    log_sum = merged.log_sum(every[:, ops.SUM], tau)
    logits, columns = (x.flatten(0, 1) for x in (every[:, 2 : 2 + k], every[:, 2 + k :]))
    # Of columns without probability the lowest come first, as they do in one process.
    columns, order = columns.sort(dim=0, stable=True)
    logits, order = logits.gather(0, order).sort(dim=0, descending=True, stable=True)
    columns = columns.gather(0, order)
    log_probs = ((logits[:k] - merged.origin) / tau - log_sum).T
    indices = columns[:k].T
    lost = log_sum.isnan().unsqueeze(1)
    log_probs = torch.where(lost, math.nan, log_probs)
    indices = torch.where(lost, torch.arange(k, device=teacher.device), indices)
    shape = (*teacher.shape[:-1], k)
    found = log_probs.float().reshape(shape), indices.int().reshape(shape)
    return found[0].contiguous(), found[1].contiguous()


def _fake(teacher_logits: Tensor, k: int, **_: Any) -> tuple[Tensor, ...]:
    shape = (*teacher_logits.shape[:-1], k)
    return (
        teacher_logits.new_empty(shape, dtype=torch.float32),
        teacher_logits.new_empty(shape, dtype=torch.int32),
    )


OP = Plain("teacher_topk", _fake)
OP.sharded = _sharded
