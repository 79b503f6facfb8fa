"""How much a teacher's k stored tokens tell about each row, for choosing k, tails and tokens."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd._ops.arguments import check_tensor
from fastkd._ops.linear import function as linear
from fastkd._ops.linear.call import OPS
from fastkd._ops.linear.logits import LinearLogits, softcapped
from fastkd._ops.names import Tail, TopKDivergence
from fastkd.losses import _topk_divergence
from fastkd.losses._topk_divergence import topk_divergence
from fastkd.teachers._teacher_topk import stored_entries, teacher_topk


class TopKStats(NamedTuple):
    """One float32 number a row in each field. S: the teacher's stored tokens, n of them."""

    #: The student's probability of S.
    student_mass: Tensor
    #: The teacher's probability of S, as stored.
    teacher_mass: Tensor
    #: The share of S that is among the student's own n likeliest tokens.
    overlap: Tensor
    #: The divergence on S, with the tail that was chosen.
    divergence: Tensor


def topk_stats(
    student_logits: Tensor | LinearLogits,
    teacher_log_probs: Tensor,
    teacher_indices: Tensor,
    *,
    divergence: TopKDivergence = "forward_kl",
    beta: float | Tensor = 0.5,
    tail: Tail = "lump",
    temperature: float | Tensor = 1.0,
    stored_temperature: float = 1.0,
    teacher_temperature: float | Tensor | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
) -> TopKStats:
    r"""Masses, overlap and divergence of each row on a teacher's k stored tokens. No gradient.

    With S the stored tokens of a row, n of them, :math:`q = \mathrm{softmax}(z_S / \tau)` and B the
    n tokens with the largest logits of the student (ties count):

    .. math:: \text{student mass} = \sum_{v \in S} q_v, \quad
              \text{teacher mass} = \sum_{v \in S} p_v, \quad
              \text{overlap} = |S \cap B| / n

    The student's logits are read twice, and no tensor of probabilities is stored. A row with a NaN,
    ``+inf`` or no finite logit gives NaN; one without stored tokens has masses 0 and overlap NaN.

    Args:
        student_logits: ``[..., vocab]`` float32, bfloat16, float16 or float64, any strides. Or a
            :class:`fastkd.LinearLogits`.
        teacher_log_probs: ``[..., k]``, see :func:`fastkd.topk_divergence`.
        teacher_indices: ``[..., k]`` int32 or int64; -1 pads a short row. An entry with a
            log-probability of -1e4 or less does not count.
        divergence, beta, tail, temperature, stored_temperature, teacher_temperature: see
            :func:`fastkd.topk_divergence`.
        mask: rows with False are 0 in every field, whatever they hold.
        vocab_size: only the first ``vocab_size`` columns of the logits are used.

    Returns:
        :class:`TopKStats` of tensors in the leading dimensions' shape; the divergence is float64
        where an input is.

    Raises:
        IndexError, ValueError, TypeError: as :func:`fastkd.topk_divergence`; on CUDA a row with an
            index outside the vocabulary is NaN.

    >>> import torch, fastkd
    >>> student = torch.tensor([[0.0, 1.0, 2.0, 0.0]])
    >>> stats = fastkd.topk_stats(student, torch.tensor([[0.6, 0.3]]).log(), torch.tensor([[2, 0]]))
    >>> [round(x.item(), 4) for x in stats[:3]]
    [0.6929, 0.9, 0.5]
    >>> round(stats.divergence.item(), 4)
    0.2645
    """
    options: dict[str, Any] = {
        "divergence": divergence,
        "beta": beta,
        "tail": tail,
        "temperature": temperature,
        "stored_temperature": stored_temperature,
        "teacher_temperature": teacher_temperature,
        "mask": mask,
        "vocab_size": vocab_size,
        "reduction": "none",
    }
    try:
        check_tensor("topk_stats", "teacher_log_probs", teacher_log_probs)
        if isinstance(student_logits, LinearLogits):
            return _of_chunks(student_logits, teacher_log_probs, teacher_indices, options)
        check_tensor("topk_stats", "student_logits", student_logits)
        return _of_rows(student_logits, teacher_log_probs, teacher_indices, options)
    except (IndexError, TypeError, ValueError) as error:  # of topk_divergence, which is called
        message = str(error).replace("topk_divergence: ", "topk_stats: ", 1)
        raise type(error)(message) from None


def _of_rows(
    student_logits: Tensor,
    teacher_log_probs: Tensor,
    teacher_indices: Tensor,
    options: dict[str, Any],
) -> TopKStats:
    temperature, mask, vocab_size = (options[x] for x in ("temperature", "mask", "vocab_size"))
    with torch.no_grad():
        # It checks all other arguments.
        values = topk_divergence(student_logits, teacher_log_probs, teacher_indices, **options)
        logits, log_probs = student_logits.detach(), teacher_log_probs.detach()
        columns = logits.size(-1) if vocab_size is None else vocab_size
        stored = stored_entries(log_probs, teacher_indices)
        if mask is not None:
            stored = stored & mask.unsqueeze(-1)
        inside = stored & (teacher_indices < columns)
        outside = (stored & ~inside).any(-1)
        k = max(1, min(teacher_indices.size(-1), columns))
        best = teacher_topk(logits, k, temperature=temperature, vocab_size=vocab_size)
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        own = logits.gather(-1, best.indices.long()).to(wide)
        at = logits.gather(-1, torch.where(inside, teacher_indices, 0).long()).to(wide)
        if isinstance(temperature, Tensor) and temperature.dim():
            temperature = temperature.to(wide).unsqueeze(-1)
        log_q = (at - own[..., :1]) / temperature + best.log_probs[..., :1]
        count = stored.sum(-1)
        least = own.gather(-1, (count - 1).clamp(0, k - 1).unsqueeze(-1))
        lost = outside | best.log_probs[..., 0].isnan()

        def total(x: Tensor, of: Tensor | int = 1) -> Tensor:
            x = torch.where(stored, x, 0).sum(-1) / of
            x = torch.where(lost, torch.nan, x).float()
            return x if mask is None else torch.where(mask, x, 0)

        return TopKStats(
            total(log_q.exp()).clamp(max=1),
            total(log_probs.to(wide).exp()),
            total((at >= least).to(wide), count),
            values,
        )


def _of_chunks(
    student_logits: LinearLogits,
    teacher_log_probs: Tensor,
    teacher_indices: Tensor,
    options: dict[str, Any],
) -> TopKStats:
    """The same of logits that are computed a chunk of rows at a time."""
    row_options = {
        "label_weight": 1.0,
        "ignore_index": -100,
        "shift": 0,
        "square_temperature": False,
        **options,
    }
    given = _topk_divergence.given(
        student_logits.detach(), teacher_log_probs.detach(), teacher_indices, row_options
    )
    return TopKStats(*linear.run(_CHUNKED, given))


class _Chunked:
    """The statistics as an op with topk_divergence's arguments, for chunks of rows."""

    name, kind, results, axes = "topk_stats", "plain", None, (0, 0, 0, 0)
    checker, arguments = _topk_divergence.OP, _topk_divergence.OP.arguments

    def raw(self) -> Any:
        """The statistics of a chunk by the fields of topk_divergence."""

        def stats(*fields: Any) -> TopKStats:
            given = self.arguments.unpack(fields)
            logits, cap = given["student_logits"], given["student_logit_softcap"]
            if not (isinstance(cap, float) and cap == math.inf):
                logits = softcapped(logits, cap)

            def each(name: str) -> Any:
                return given[name] if given[f"{name}s"] is None else given[f"{name}s"]

            return topk_stats(
                logits,
                given["teacher_log_probs"],
                given["teacher_indices"],
                divergence=given["divergence"],
                beta=each("beta"),
                tail=given["tail"],
                temperature=each("temperature"),
                stored_temperature=given["stored_temperature"],
                teacher_temperature=each("teacher_temperature"),
                mask=given["mask"],
                vocab_size=None if given["vocab_size"] < 0 else given["vocab_size"],
            )

        return stats

    def fake(
        self, student_logits: Tensor, teacher_log_probs: Tensor, **_: Any
    ) -> tuple[Tensor, ...]:
        """Uninitialised results."""
        wide = torch.float64 in (student_logits.dtype, teacher_log_probs.dtype)
        shape = student_logits.shape[:-1]
        dtypes = [torch.float32] * 3 + [torch.float64 if wide else torch.float32]
        return tuple(student_logits.new_empty(shape, dtype=dtype) for dtype in dtypes)


_CHUNKED = _Chunked()
OPS[_CHUNKED.name] = _CHUNKED
