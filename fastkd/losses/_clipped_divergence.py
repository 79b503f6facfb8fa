"""Forward KL over the part of the vocabulary where the teacher's probability lies in a range."""

from typing import Any

import torch
from torch import Tensor

from fastkd import reference
from fastkd._ops.arguments import to_number
from fastkd._ops.dtensor import is_dtensor, loss_of_dtensors
from fastkd._ops.linear.logits import LinearLogits, check_logits
from fastkd._ops.loss import Loss
from fastkd._ops.names import ClippedTail, Reduction, Renormalize
from fastkd._ops.shards import shards_of
from fastkd.losses import _sharded_clipped


def clipped_divergence(
    student_logits: Tensor | LinearLogits,
    teacher_logits: Tensor | LinearLogits,
    lower: float | Tensor,
    upper: float | Tensor,
    *,
    labels: Tensor | None = None,
    keep_label: bool = True,
    renormalize: Renormalize = "none",
    tail: ClippedTail = "drop",
    softness: float | None = None,
    quantile: bool = False,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
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
    r"""KL(p || q) over the tokens whose teacher probability lies between two bounds.

    With :math:`p = \mathrm{softmax}(z_T / \tau_T)`, :math:`q = \mathrm{softmax}(z_S / \tau)` over
    the whole vocabulary, the support :math:`S = \{v : lower \le p_v \le upper\}`, plus the label
    if ``keep_label``, and its masses :math:`P = \sum_S p`, :math:`Q = \sum_S q`, a row's loss is

    =============  =========  ======================================================================
    renormalize    tail
    =============  =========  ======================================================================
    ``"none"``     ``drop``   :math:`A = \sum_S p \log(p / q)`, the plain sum: can be negative
    ``"none"``     ``lump``   :math:`A + (1 - P) \log((1 - P) / (1 - Q))`: the rest as one outcome
    ``"teacher"``  either     :math:`A / P - \log P`: the teacher renormalised inside S
    ``"both"``     either     :math:`A / P - \log P + \log Q`: both renormalised inside S
    =============  =========  ======================================================================

    All but the first are never negative. After renormalisation of the teacher or of both sides
    there is no tail. An empty support gives 0.

    With ``softness`` the edges are soft: a token has the weight :math:`s_v =
    \sigma((p_v - lower) / softness)\, \sigma((upper - p_v) / softness)` in the support, every sum
    over S is weighted by s, and gradients flow to ``lower`` and ``upper``, so that a network can
    learn them.

    Args:
        student_logits: ``[..., vocab]`` float32, bfloat16, float16 or float64, any strides. Or a
            :class:`fastkd.LinearLogits`.
        teacher_logits: the same shape, its own dtype, in either form. Gradients flow to it where it
            requires them (a hard support and the position of a quantile are constants).
        lower: the smallest probability of the support: a number, or a float tensor with one a row.
        upper: the largest probability of the support, in the same form.
        labels: int64 or int32, one a row. Rows with ``ignore_index`` are ignored entirely.
        keep_label: the label is in the support whatever its probability.
        renormalize: see the table.
        tail: see the table.
        softness: width of the soft edges in units of probability, positive; None: hard edges.
        quantile: ``lower`` and ``upper`` are quantile levels in [0, 1] of the row's p over the
            vocabulary, interpolated linearly as in `torch.quantile`. A hard edge between two
            probabilities keeps the one inside.
        temperature: of the student: a positive number, or a tensor with one entry a row.
        teacher_temperature: of the teacher; None: the same as ``temperature``.
        weight: see :func:`fastkd.softmax_divergence`, as for all arguments below.
        mask: rows with False are not read.
        label_weight: adds this times the student's cross-entropy at temperature 1 with the labels:
            a number, or a tensor with one entry a row; 0: labels are used for ``keep_label`` only.
        shift: see :func:`fastkd.softmax_divergence`.
        ignore_index: see ``labels``.
        vocab_size: only the first ``vocab_size`` columns are used, on both sides.
        logit_softcap: see :func:`fastkd.softmax_divergence`. Bounds are of the capped teacher's p.
        reduction: ``"none"``, ``"sum"``, ``"mean"``, ``"batchmean"`` or ``"elementmean"``.
        normalizer: replaces the reduction's denominator.
        square_temperature: multiplies the divergence by temperature squared.
        group: the vocabulary is split across this process group, see
            :func:`fastkd.softmax_divergence`, as for DTensors. Two all-gathers, and one
            more in the backward pass where the teacher or a bound requires a gradient. Rows are
            worked on a few at a time in plain PyTorch; in a graph of torch.compile all at once.
        vocab_start: with ``group``, the first of this process's columns.

    Returns:
        float32 (float64 where an input is): a scalar, or with ``reduction="none"`` the leading
        dimensions' shape.

    Raises:
        ValueError: lower > upper, a quantile level outside [0, 1], or bounds that require grad
            without ``softness`` (hard edges have no gradient). On CUDA, where a check of values
            would synchronise, a row with such bounds is NaN instead.
        ValueError, TypeError, IndexError: another argument has the wrong value or type, or a label
            is out of range.
        NotImplementedError: with ``group``: ``torch.func`` transforms, batches of gradients,
            ``quantile``.

    Source: DAC-KL of Multi-Granularity Semantic Revision (arXiv 2407.10068), whose bounds a small
    network learns. The paper does not say whether it renormalises.

    >>> import torch, fastkd
    >>> student = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    >>> teacher = torch.tensor([[0.1, 0.3, 0.6]]).log()
    >>> loss = fastkd.clipped_divergence(student, teacher, 0.2, 1.0, tail="lump")
    >>> round(loss.item(), 4)
    0.0097
    >>> lower = torch.tensor([0.2], requires_grad=True)
    >>> fastkd.clipped_divergence(student, teacher, lower, 1.0, softness=0.05).backward()
    >>> round(lower.grad.item(), 3)
    -0.15
    """
    options = {
        "keep_label": keep_label,
        "renormalize": renormalize,
        "tail": tail,
        "softness": softness,
        "quantile": quantile,
        "teacher_temperature": teacher_temperature,
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
        others = {"teacher_logits": teacher_logits, "lower": lower, "upper": upper}
        place = {"group": group, "vocab_start": vocab_start}
        return loss_of_dtensors(clipped_divergence, student_logits, others, {**options, **place})
    shards = shards_of("clipped_divergence", student_logits, group, vocab_start, vocab_size)
    arguments = given(student_logits, teacher_logits, lower, upper, options)
    return OP(student_logits, arguments, shards=shards)


def given(
    student_logits: Tensor | LinearLogits,
    teacher_logits: Tensor | LinearLogits,
    lower: float | Tensor,
    upper: float | Tensor,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The arguments by name, as the op takes them."""
    check_logits("clipped_divergence", "student_logits", student_logits)
    _check_edges(lower, upper, options["softness"])
    options["student_logits"] = student_logits
    options["teacher_logits"] = teacher_logits
    options["lower"] = _bound("lower", lower, student_logits)
    options["upper"] = _bound("upper", upper, student_logits)
    return options


def _check_edges(lower: Any, upper: Any, softness: Any) -> None:
    if softness is not None:
        softness = to_number("clipped_divergence", "softness", softness)
        # The raw op takes 0 for hard edges. While compiling the value is not known.
        if not torch.compiler.is_compiling() and not softness > 0:
            raise ValueError(f"clipped_divergence: softness must be positive, got {softness}")
    elif torch.is_grad_enabled():
        for name, bound in (("lower", lower), ("upper", upper)):
            if isinstance(bound, Tensor) and bound.requires_grad:
                raise ValueError(
                    f"clipped_divergence: {name} requires a gradient, and a hard edge has none; "
                    "pass softness, or detach it"
                )


def _bound(name: str, bound: float | Tensor, student: Tensor | LinearLogits) -> Tensor:
    if not isinstance(bound, Tensor):
        number = to_number("clipped_divergence", name, bound)
        if torch.compiler.is_compiling():  # torch.full would make it a constant of the graph
            one = torch.ones((), dtype=torch.float64, device=student.device) * number
        else:
            one = torch.full((), number, dtype=torch.float64, device=student.device)
        return one.expand(student.shape[:-1])
    return bound.expand(student.shape[:-1]) if bound.dim() == 0 else bound


OP = Loss(
    "clipped_divergence",
    ("student_logits", "teacher_logits", "lower", "upper"),
    reference.clipped_divergence_op,
    precision=("student_logits", "teacher_logits"),
    together=("lower", "upper"),
    absent={"teacher_temperature": "temperature", "softness": 0.0},
)
OP.serves(clipped_divergence, given)
OP.sharded = _sharded_clipped.clipped_divergence
