"""Forward KL over the part of the vocabulary where the teacher's probability lies in a range."""

from typing import Any

import torch
from torch import Tensor

from fastkd import reference
from fastkd._arguments import (
    check_no_gradient,
    check_no_group,
    check_tensors,
    loss_like,
    pending_like,
    per_row,
    row_options,
)
from fastkd._gradient import differentiable_gradients, gradient_for, memory, scaled
from fastkd._library import raise_as_python, transforms_active


def clipped_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    lower: float | Tensor,
    upper: float | Tensor,
    *,
    labels: Tensor | None = None,
    keep_label: bool = True,
    renormalize: str = "none",
    tail: str = "drop",
    softness: float | None = None,
    quantile: bool = False,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    label_weight: float = 0.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    square_temperature: bool = False,
    group: Any = None,
) -> Tensor:
    r"""KL(p || q) over the tokens whose teacher probability lies between two bounds.

    With :math:`p = \mathrm{softmax}(z_T / \tau_T)`, :math:`q = \mathrm{softmax}(z_S / \tau)` over
    the whole vocabulary, the support :math:`S = \{v : lower \le p_v \le upper\}`, with the label
    where ``keep_label``, and its masses :math:`P = \sum_S p`, :math:`Q = \sum_S q`, a row gives

    =============  =========  ======================================================================
    renormalize    tail
    =============  =========  ======================================================================
    ``"none"``     ``drop``   :math:`A = \sum_S p \log(p / q)`, the bare sum: can be negative
    ``"none"``     ``lump``   :math:`A + (1 - P) \log((1 - P) / (1 - Q))`: all else as one outcome
    ``"teacher"``  either     :math:`A / P - \log P`: the teacher renormalised inside S
    ``"both"``     either     :math:`A / P - \log P + \log Q`: both renormalised inside S
    =============  =========  ======================================================================

    All but the first are never negative. Where both sides are renormalised or only the teacher is,
    nothing is left for a tail. An empty support gives 0.

    With ``softness`` the edges are soft: a token belongs to the support by :math:`s_v =
    \sigma((p_v - lower) / softness)\, \sigma((upper - p_v) / softness)`, every sum over S
    is a sum weighted by s, and gradients flow to ``lower`` and ``upper``, so that a network can
    learn them.

    Args:
        student_logits: ``[..., vocab]`` float32, bfloat16, float16 or float64, any strides.
        teacher_logits: the same shape, its own dtype. Gradients flow to it where it requires them
            (a hard support, and the place of a quantile, count as constant).
        lower: the smallest probability of the support: a number, or a float tensor with one a row.
        upper: the largest.
        labels: int64 or int32, one a row. Rows with ``ignore_index`` drop out entirely.
        keep_label: the label belongs to the support whatever its probability.
        renormalize: see the table.
        tail: see the table.
        softness: width of the soft edges in units of probability, positive; None: hard edges.
        quantile: ``lower`` and ``upper`` are quantile levels in [0, 1] of the row's p over the
            vocabulary, interpolated linearly as `torch.quantile` does. A hard edge between two
            probabilities keeps those inside.
        temperature: of the student: a positive number, or a tensor with one entry a row.
        teacher_temperature: of the teacher; None: the same as ``temperature``.
        weight: see :func:`fastkd.softmax_divergence`, as for all arguments below.
        mask: rows with False are not read.
        label_weight: adds this times the student's cross-entropy at temperature 1 with the labels.
        ignore_index: see ``labels``.
        vocab_size: only the first columns count on both sides.
        reduction: ``"none"``, ``"sum"``, ``"mean"``, ``"batchmean"`` or ``"elementmean"``.
        normalizer: replaces the reduction's denominator.
        square_temperature: multiplies the divergence by temperature squared.
        group: reserved for vocabularies split across a process group.

    Returns:
        float32 (float64 where an input is): a scalar, or with ``reduction="none"`` the leading
        dimensions' shape.

    Raises:
        ValueError: lower > upper, a quantile level outside [0, 1], or bounds that require grad
            without ``softness`` (hard edges have none). On CUDA, where looking at values would wait
            for the device, a row with such bounds is NaN instead.
        ValueError, TypeError, IndexError: another argument has the wrong value or type, or a label
            lies outside.
        NotImplementedError: ``group`` is given.

    Source: DAC-KL of Multi-Granularity Semantic Revision (arXiv 2407.10068), whose bounds a small
    network learns; whether it renormalises is not said there.

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
    check_no_group("clipped_divergence", group)
    bounds, arguments = op_arguments(
        student_logits,
        teacher_logits,
        lower,
        upper,
        labels=labels,
        keep_label=keep_label,
        renormalize=renormalize,
        tail=tail,
        softness=softness,
        quantile=quantile,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        weight=weight,
        mask=mask,
        label_weight=label_weight,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        reduction=reduction,
        normalizer=normalizer,
        square_temperature=square_temperature,
    )
    inputs = (student_logits, teacher_logits, *bounds)
    try:
        if not torch.compiler.is_compiling() and transforms_active():
            return reference.clipped_divergence_op(*inputs, *arguments)
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            return _ClippedDivergence.apply(*inputs, arguments)
        return torch.ops.fastkd._clipped_divergence(None, *inputs, *arguments, False, False)[0]
    except RuntimeError as error:
        raise_as_python(error)


def op_arguments(
    student_logits: Tensor,
    teacher_logits: Tensor,
    lower: float | Tensor,
    upper: float | Tensor,
    *,
    keep_label: bool = True,
    renormalize: str = "none",
    tail: str = "drop",
    softness: float | None = None,
    quantile: bool = False,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    label_weight: float = 0.0,
    **rows: Any,
) -> tuple[tuple[Tensor, Tensor], tuple[Any, ...]]:
    """The bounds, and the other arguments as the raw op, and its reference, take them."""
    function = "clipped_divergence"
    check_tensors(function, {"student_logits": student_logits, "teacher_logits": teacher_logits})
    check_no_gradient(function, teacher_temperature=teacher_temperature)
    if softness is not None and not softness > 0:
        raise ValueError(f"{function}: softness must be positive, got {softness}")
    if softness is None and torch.is_grad_enabled():
        for name, bound in (("lower", lower), ("upper", upper)):
            if isinstance(bound, Tensor) and bound.requires_grad:
                raise ValueError(
                    f"{function}: {name} requires a gradient, and a hard edge has none; pass "
                    "softness, or detach it"
                )
    if teacher_temperature is None:
        teacher_temperature = temperature
    teacher_scalar, teacher_rows = per_row(teacher_temperature, student_logits)
    options = row_options(
        function,
        student_logits,
        temperature=temperature,
        label_weight=label_weight,
        **rows,
    )
    return (_bound(lower, student_logits), _bound(upper, student_logits)), (
        keep_label,
        renormalize,
        tail,
        0.0 if softness is None else float(softness),
        quantile,
        teacher_scalar,
        teacher_rows,
        *options,
    )


def _bound(bound: float | Tensor, student: Tensor) -> Tensor:
    if isinstance(bound, Tensor):
        return bound.expand(student.shape[:-1]) if bound.dim() == 0 else bound
    return student.new_full((), bound, dtype=torch.float64).expand(student.shape[:-1])


class _ClippedDivergence(torch.autograd.Function):
    """Gradients come with the loss; backward applies what is left to multiply."""

    @staticmethod
    def forward(ctx, student, teacher, lower, upper, arguments):
        needs = ctx.needs_input_grad
        gradient = gradient_for(student) if needs[0] else None
        loss, *others, pending = torch.ops.fastkd._clipped_divergence(
            gradient, student, teacher, lower, upper, *arguments, needs[1], needs[2] or needs[3]
        )
        memory.keep(gradient)
        ctx.arguments = arguments
        ctx.save_for_backward(gradient, *others, pending, student, teacher, lower, upper)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        needs = ctx.needs_input_grad[:4]
        saved = ctx.saved_tensors  # once: a checkpoint gives them once
        gradients, pending, inputs = saved[:4], saved[4], saved[5:]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            loss = reference.clipped_divergence_op(*inputs, *ctx.arguments)
            return *differentiable_gradients(loss, inputs, needs, grad_output), None
        if pending.numel():
            grad_output = grad_output * pending
        return (
            *(scaled(gradients[i], grad_output) if needs[i] else None for i in range(2)),
            *(
                (gradients[i] * grad_output).to(gradients[i].dtype) if needs[i] else None
                for i in (2, 3)
            ),
            None,
        )


@torch.library.register_fake("fastkd::_clipped_divergence")
def _(gradient, student_logits, teacher_logits, lower, upper, *arguments):
    *_, mode, _denominator, _normalizer, teacher_gradient, bound_gradients = arguments
    wanted = [] if gradient is None else [student_logits]
    wanted += [teacher_logits] * teacher_gradient + [lower, upper] * bound_gradients
    return (
        loss_like(student_logits, (student_logits, teacher_logits), mode),
        torch.empty_like(teacher_logits) if teacher_gradient else teacher_logits.new_empty(0),
        torch.empty_like(lower) if bound_gradients else lower.new_empty(0),
        torch.empty_like(upper) if bound_gradients else upper.new_empty(0),
        pending_like(student_logits, wanted, mode),
    )
