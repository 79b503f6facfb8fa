"""Statistics of each row of logits, for methods that select tokens."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd._ops.dtensor import is_dtensor, rows_of_dtensors
from fastkd._ops.linear.logits import LinearLogits, check_logits
from fastkd._ops.op import Plain
from fastkd._ops.shards import shards_of
from fastkd.losses import _sharded_softmax


class TokenStats(NamedTuple):
    """One number a row in each field; None where an input was not given. Logarithms are natural."""

    #: log-sum-exp of logits / temperature.
    student_lse: Tensor
    #: Shannon entropy in nats.
    student_entropy: Tensor
    #: int64, the likeliest token, of equal ones the lowest; -1 where the row is no distribution.
    student_argmax: Tensor
    #: Probability of that token.
    student_top_prob: Tensor
    #: log-probability of the label; NaN where the label is -100.
    student_label_log_prob: Tensor | None
    teacher_lse: Tensor | None
    teacher_entropy: Tensor | None
    teacher_argmax: Tensor | None
    teacher_top_prob: Tensor | None
    teacher_label_log_prob: Tensor | None
    #: KL(p || q), teacher first.
    forward_kl: Tensor | None
    #: KL(q || p).
    reverse_kl: Tensor | None
    #: 1/2 sum |p - q|; a speculative decoder accepts with probability 1 - tvd.
    tvd: Tensor | None
    #: KL(p || softmax(reference)), teacher first.
    reference_kl: Tensor | None = None


def token_stats(
    student_logits: Tensor | LinearLogits,
    teacher_logits: Tensor | LinearLogits | None = None,
    *,
    labels: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    reference_logits: Tensor | None = None,
    group: Any = None,
    vocab_start: int | None = None,
) -> TokenStats:
    r"""Entropy, likeliest token, label likelihood and divergences of each row, from one read.

    Computes every field of :class:`TokenStats` with :math:`q = \mathrm{softmax}(z_S / \tau)` and
    :math:`p = \mathrm{softmax}(z_T / \tau)`. Each logits tensor is read from memory once, and no
    tensor of probabilities is stored. The results have no gradient.

    ``-inf`` logits are probability 0; a row with a NaN, ``+inf`` or no finite logit gives NaN (and
    argmax -1), and other rows are not affected. The divergences are as accurate near 0 as those of
    :func:`fastkd.softmax_divergence`.

    Args:
        student_logits: ``[..., vocab]`` float32, bfloat16, float16 or float64, any strides. Or a
            :class:`fastkd.LinearLogits`.
        teacher_logits: the same shape, its own dtype, in either form, or None.
        labels: int64 or int32, one a row; -100 for none.
        temperature: of both sides, positive: a number, or a tensor with one entry a row.
        vocab_size: only the first ``vocab_size`` columns are used, on all sides.
        reference_logits: of a third model, for ``reference_kl`` = KL(teacher || reference): the
            same shape, its own dtype. It needs ``teacher_logits``, which are then read twice.
        group: the vocabulary is split across this process group, see
            :func:`fastkd.softmax_divergence`, as for DTensors. Labels are those of the whole
            vocabulary. Two all-gathers; both sides are read four times.
        vocab_start: with ``group``, the first of this process's columns.

    Returns:
        :class:`TokenStats` of float32 tensors (float64 where an input is) in the leading
        dimensions' shape.

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type, or a label is
            out of range (on CUDA its log-probability is NaN instead).

    Used by AdaSPEC (arXiv 2510.19779), R2R (2505.21600), dParallel (2509.26488), DistillSpec
    (2310.08461), AlignDistil (2503.02832) and DDK (2407.16154).

    >>> import torch, fastkd
    >>> stats = fastkd.token_stats(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    >>> stats.student_argmax.item(), stats.teacher_argmax.item()
    (1, 0)
    >>> round(stats.student_entropy.item(), 4), round(stats.tvd.item(), 4)
    (0.5822, 0.4621)
    >>> stats.student_label_log_prob is None
    True
    """
    if reference_logits is not None:
        _check_reference(student_logits, teacher_logits, reference_logits, vocab_size)
        options: dict[str, Any] = {
            "temperature": temperature,
            "vocab_size": vocab_size,
            "group": group,
            "vocab_start": vocab_start,
        }
        reference = token_stats(reference_logits, teacher_logits, **options)
        stats = token_stats(student_logits, teacher_logits, labels=labels, **options)
        return stats._replace(reference_kl=reference.forward_kl)
    if is_dtensor(student_logits):
        options = {
            "labels": labels,
            "temperature": temperature,
            "vocab_size": vocab_size,
            "group": group,
            "vocab_start": vocab_start,
        }
        others = {"teacher_logits": teacher_logits}
        return rows_of_dtensors(token_stats, student_logits, others, options)
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if logits is not None or name == "student_logits":
            check_logits("token_stats", name, logits)
    student_logits = student_logits.detach()
    teacher_logits = None if teacher_logits is None else teacher_logits.detach()
    given = {
        "student_logits": student_logits,
        "teacher_logits": teacher_logits,
        "labels": labels,
        "temperature": temperature,
        "vocab_size": vocab_size,
    }
    shards = shards_of("token_stats", student_logits, group, vocab_start, vocab_size)
    numbers, argmax = OP(student_logits, given, shards=shards)
    return token_stats_of(numbers, argmax, teacher_logits is not None, labels is not None)


def token_stats_of(numbers: Tensor, argmax: Tensor, teacher: bool, labels: bool) -> TokenStats:
    """The op's results by name. ``teacher``, ``labels``: whether they were given."""
    fields: list[Any] = []
    for side in range(2):
        if side == 1 and not teacher:
            fields += [None] * 5
            continue
        lse, entropy, top_prob, label = numbers[4 * side : 4 * side + 4].unbind(0)
        label_log_prob = label if labels else None
        fields += [lse, entropy, argmax[side], top_prob, label_log_prob]
    return TokenStats(*fields, *(numbers[8:].unbind(0) if teacher else [None] * 3))


def _check_reference(student: Any, teacher: Any, reference: Any, vocab_size: int | None) -> None:
    check_logits("token_stats", "reference_logits", reference)
    if teacher is None:
        raise ValueError(
            "token_stats: teacher_logits must be given with reference_logits, got None"
        )
    if reference.shape != student.shape and (
        vocab_size is None or reference.shape[:-1] != student.shape[:-1]
    ):
        raise ValueError(
            "token_stats: reference_logits must have student_logits' shape, "
            f"{list(student.shape)}, got {list(reference.shape)}"
        )


def _fake(student_logits: Tensor, teacher_logits: Tensor | None, **_: Any) -> tuple[Tensor, ...]:
    given = [student_logits] if teacher_logits is None else [student_logits, teacher_logits]
    float64 = any(x.dtype == torch.float64 for x in given)
    leading = student_logits.shape[:-1]
    return (
        student_logits.new_empty(
            (4 if teacher_logits is None else 11, *leading),
            dtype=torch.float64 if float64 else torch.float32,
        ),
        student_logits.new_empty((len(given), *leading), dtype=torch.int64),
    )


OP = Plain("token_stats", _fake, axes=(1, 1))
OP.sharded = _sharded_softmax.token_stats
