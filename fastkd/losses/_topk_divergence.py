"""Divergence from a teacher of which only the best k tokens are stored."""

import math
from typing import Any

from torch import Tensor

from fastkd import reference
from fastkd._ops.dtensor import is_dtensor, loss_of_dtensors
from fastkd._ops.linear.logits import LinearLogits, check_logits
from fastkd._ops.loss import Loss
from fastkd._ops.names import Reduction, Tail, TopKDivergence
from fastkd._ops.shards import shards_of
from fastkd.losses import _sharded_topk


def topk_divergence(
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
    min_log_prob: float | None = None,
    max_token_loss: float | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: float | Tensor = 1.0,
    ignore_index: int = -100,
    shift: int = 0,
    vocab_size: int | None = None,
    logit_softcap: float | tuple[float | None, float | None] | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    square_temperature: bool = False,
    group: Any = None,
    vocab_start: int | None = None,
) -> Tensor:
    r"""Divergence between a student's logits and a teacher's k stored log-probabilities.

    Let :math:`q = \mathrm{softmax}(z_S / \tau)` over the whole vocabulary, and :math:`\log p_v` the
    teacher's log-probabilities of the k tokens of a row, its *support* :math:`S`. ``tail``
    says how the tokens outside the support are treated:

    ===============  =======================================================================
    ``lump``         the rest as one more outcome on both sides: a divergence between k + 1
                     outcomes, never negative, and a lower bound of the true one
    ``uniform``      the teacher's rest spread evenly over the other vocab - k tokens
    ``renormalize``  both sides renormalised inside the support
    ``drop``         the plain sum over the support. **Not a divergence**: it can be negative,
                     and its minimum is not at q = p. Most code computes this; it is here for
                     comparison.
    ===============  =======================================================================

    Divergences are those of :func:`fastkd.softmax_divergence`. The student's logits are read once
    and their gradient written once; the k entries are gathered and corrected in the same passes.

    Log-probabilities stored at ``stored_temperature`` are converted to ``teacher_temperature`` by
    :math:`r \log p_v - \log Z`, where r is the ratio of the two. Where r is not 1, :math:`Z`
    depends on the tokens that were not stored: they are then assumed to be spread evenly,
    :math:`(V - k)^{1-r} (1 - \sum_S p)^r` (``renormalize`` does not need them and is exact).
    Storing at the temperature of training is exact for every tail.

    Special cases:

    - With ``renormalize``, a row where the teacher or the student (by -inf) has no mass on the
      support is NaN.
    - Where the stored mass is near 1, the rest (1 minus the mass) is mostly rounding error, and its
      last bit would decide whether KL(q‖p) is infinite. ``reverse_kl`` (and ``jsd`` with
      ``beta=1``) therefore uses a rest of at least u · max(Σ p |log p|, u), with u half a unit in
      the last place of 1 in the stored format, and never less than float32's 2^-24.

    Args:
        student_logits: ``[..., vocab]`` float32, bfloat16, float16 or float64, any strides. Or a
            :class:`fastkd.LinearLogits`.
        teacher_log_probs: ``[..., k]`` natural logarithms, any float dtype, in any order,
            normalised over the whole vocabulary (as :func:`fastkd.teacher_topk` gives them).
            Gradients flow to them where they require it. Masses that exceed 1 by rounding (2 %)
            are scaled to 1, except by ``drop``.
        teacher_indices: ``[..., k]`` int32 or int64, distinct in a row; -1 pads a short row. A
            repeated index is also padding where its log-probability is -1e4 or less (servers pad
            with id 0 and -inf or -1e9).
        divergence: ``"forward_kl"``, ``"reverse_kl"``, ``"jsd"`` or ``"cross_entropy"``.
        beta: share of the mixture of ``jsd``: a number, or a tensor with one entry a row.
        tail: one of the table.
        temperature: of the student: a positive number, or a tensor with one entry a row.
        stored_temperature: at which the log-probabilities were computed.
        teacher_temperature: to which they are converted; None: the same as ``temperature``.
        min_log_prob: a floor, negative, for the log-probabilities of both sides. Entries below it
            get no gradient. Both sides then no longer sum to 1, so that values may fall below 0 by
            about the mass that was added.
        max_token_loss: a cap for a row's divergence (not the label's term). A row above it gets no
            gradient.
        weight: see :func:`fastkd.softmax_divergence`, as for all arguments below.
        mask: rows with False are not read, nor are their indices.
        labels: adds ``label_weight`` x cross-entropy at temperature 1 from the same read.
        label_weight: see ``labels``: a number, or a tensor with one entry a row.
        ignore_index: see ``labels``.
        shift: see :func:`fastkd.softmax_divergence`. It does not shift the teacher's entries.
        vocab_size: only the first ``vocab_size`` columns of the logits are used.
        logit_softcap: of the student's logits, see :func:`fastkd.softmax_divergence`: a number, or
            (number, None). The stored log-probabilities are those of a teacher capped already: a
            cap for it is an error.
        reduction: ``"none"``, ``"sum"``, ``"mean"``, ``"batchmean"`` or ``"elementmean"``.
        normalizer: replaces the reduction's denominator.
        square_temperature: multiplies the divergence by temperature².
        group: the vocabulary is split across this process group, see
            :func:`fastkd.softmax_divergence`, as for DTensors. Indices are those of the whole
            vocabulary. One all-gather of 8 bytes a row (12 or 16 with labels) and one all-reduce of
            the entries' logits.
        vocab_start: with ``group``, the first of this process's columns.

    Returns:
        float32 (float64 where an input is): a scalar, or with ``reduction="none"`` the leading
        dimensions' shape.

    Raises:
        IndexError: an index (or label) outside the vocabulary.
        ValueError, TypeError: duplicate indices, positive log-probabilities, a mass over 1, or
            another argument of the wrong value or type. (On CUDA, where a check of values would
            synchronise, such a row is NaN instead.)
        NotImplementedError: with ``group``: ``torch.func`` transforms, batches of gradients;
            ``tail="uniform"`` with ``jsd`` or ``min_log_prob``.

    Sources: Hinton et al. 2015 (arXiv 1503.02531); the tails follow FKD's label variants (MEAL V2,
    2009.08453).

    >>> import torch, fastkd
    >>> student = torch.tensor([[0.0, 1.0, 2.0, 0.0]], requires_grad=True)
    >>> teacher = torch.tensor([[0.6, 0.3]]).log()
    >>> indices = torch.tensor([[2, 1]])
    >>> loss = fastkd.topk_divergence(student, teacher, indices)
    >>> round(loss.item(), 4)
    0.0266
    >>> loss.backward()
    >>> [round(x, 4) for x in student.grad[0].tolist()]
    [0.0326, -0.0755, 0.0103, 0.0326]
    """
    options = {
        "divergence": divergence,
        "beta": beta,
        "tail": tail,
        "stored_temperature": stored_temperature,
        "teacher_temperature": teacher_temperature,
        "min_log_prob": min_log_prob,
        "max_token_loss": max_token_loss,
        "temperature": temperature,
        "weight": weight,
        "mask": mask,
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
    if is_dtensor(student_logits):
        others = {"teacher_log_probs": teacher_log_probs, "teacher_indices": teacher_indices}
        place = {"group": group, "vocab_start": vocab_start}
        return loss_of_dtensors(topk_divergence, student_logits, others, {**options, **place})
    shards = shards_of("topk_divergence", student_logits, group, vocab_start, vocab_size)
    arguments = given(student_logits, teacher_log_probs, teacher_indices, options)
    return OP(student_logits, arguments, shards=shards)


def given(
    student_logits: Tensor | LinearLogits,
    teacher_log_probs: Tensor,
    teacher_indices: Tensor,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The arguments by name, as the op takes them."""
    check_logits("topk_divergence", "student_logits", student_logits)
    options["student_logits"] = student_logits
    options["teacher_log_probs"] = teacher_log_probs
    options["teacher_indices"] = teacher_indices
    return options


OP = Loss(
    "topk_divergence",
    ("student_logits", "teacher_log_probs"),
    reference.topk_divergence_op,
    precision=("student_logits", "teacher_log_probs"),
    absent={
        "teacher_temperature": "temperature",
        "min_log_prob": -math.inf,
        "max_token_loss": math.inf,
    },
)
OP.serves(topk_divergence, given)
OP.sharded = _sharded_topk.topk_divergence
