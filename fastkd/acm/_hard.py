"""Gated routing (adaptive computation modules): each row runs as many learners as it chooses."""

from typing import Any

import torch
from torch import Tensor

from fastkd import reference
from fastkd._ops.arguments import to_flag
from fastkd._ops.gradient import savable
from fastkd._ops.library import transforms_active
from fastkd.acm import _kernels, _products
from fastkd.acm._arguments import (
    by_definition,
    check_choices,
    check_float,
    check_learners,
    check_shape,
    flat_rows,
    gradients_by_definition,
    needed,
    requires_grad,
)
from fastkd.acm._export import call, exportable, exporting
from fastkd.acm._kernels import traced


def hard(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    choices: Tensor,
    *,
    activation: str = "gelu",
    bias: Tensor | None = None,
) -> Tensor:
    r"""Run as many learners on each row as its choice says, and no others.

    .. math:: y = \sum_{n \le k} \mathrm{act}(x W^1_n + b^1_n) W^2_n \;[+\, \text{bias}], \qquad
              k \in \{0, \dots, N\}

    Rows are sorted by choice (once, stable), so that the rows that run learner n are the first
    ones: there are N pairs of matrix products with fewer and fewer rows. The pre-activations of the
    learners that ran are kept for backward, which runs over the same rows only; on a GPU, and while
    compiling, memory is allocated for those of all learners.

    float32 on the CPU, and float32, bfloat16 and float16 on a GPU, run in fastkd's own kernels. The
    gather, bias, activation and scatter are fused into the matrix products. On the CPU a row's
    result is bitwise the same with any other rows and any number of threads; on a GPU there is no
    synchronisation. Other dtypes use torch's products over the same prefixes: last bits may depend
    on the other rows and on threads, and a GPU synchronises once a pass. So do 16-bit dtypes on a
    GPU where all learners on all rows take 1.5e11 multiply-adds or more (8,192 rows through
    learners of 2,048 x 8,192 in all), unless a CUDA graph is being captured: there torch's products
    save more time than the synchronisation takes, by an estimate that is not measured yet.

    Outside the CPU choices are not checked, but a row whose choice is out of range is NaN and gets
    no gradient. Second derivatives and torch.func transforms use
    :func:`fastkd.reference.acm.hard`, which runs every learner on every row.

    Args:
        x: ``[..., D]`` float32, bfloat16, float16 or float64, any strides.
        w1: ``[N, D, b]``, N from 1 to 1,023.
        b1: ``[N, b]``.
        w2: ``[N, b, D_out]``.
        choices: ``[...]``, any integer dtype.
        activation: ``"gelu"`` (erf), ``"gelu_tanh"``, ``"relu"``, ``"silu"``, ``"identity"``.
        bias: ``[D_out]``, for every row (also those that choose 0), or ``[N + 1, D_out]``, one for
            each choice.

    Returns:
        ``[..., D_out]`` in the dtype that x, the weights and the bias promote to, which is also the
        dtype of the products. 16-bit products are accumulated in float32, and computed in float32
        on processors without 16-bit instructions. Autocast has no effect.

    Raises:
        IndexError: a choice out of range (CPU).
        ValueError, TypeError: an argument has the wrong shape or type.

    Source: Wójcik et al. 2023 (arXiv 2312.10193). Their released code, unlike this, runs one
    learner less on tokens with the largest choice of the batch.

    >>> import torch, fastkd
    >>> w1, b1, w2 = torch.ones(2, 1, 1), torch.zeros(2, 1), torch.tensor([[[1.0]], [[10.0]]])
    >>> x = torch.full((3, 1), 2.0)
    >>> fastkd.acm.hard(x, w1, b1, w2, torch.tensor([0, 1, 2]), activation="identity").tolist()
    [[0.0], [2.0], [22.0]]
    """
    if not torch.is_grad_enabled() and not transforms_active():
        found = _kernels.value((x, w1, b1, w2), bias, choices, activation)
        if found is not None:
            return found
    dtype = check_learners("acm.hard", x, w1, b1, w2, activation, bias)
    check_choices(choices, x)
    choices = savable(choices)
    learners = w1.size(0)
    if bias is not None and bias.shape not in ((w2.size(2),), (learners + 1, w2.size(2))):
        raise ValueError(
            f"acm.hard: bias must have shape [{w2.size(2)}] or [{learners + 1}, {w2.size(2)}], got "
            f"{list(bias.shape)}"
        )
    if bias is not None:
        check_shape("acm.hard", "bias", bias, bias.shape, x)  # and device
    if transforms_active():
        return reference.acm.hard(x, w1, b1, w2, choices, activation=activation, bias=bias)
    if exporting(x, w1, b1, w2, bias):
        return call("acm.hard", x, w1, b1, w2, choices, bias, activation, False)
    inside = _kernels.product_dtype(x, dtype)
    operands = (flat_rows(x).to(inside), w1.to(inside), b1.to(inside), w2.to(inside))
    flat, bias = choices.reshape(-1), None if bias is None else bias.to(inside)
    if _kernels.has_kernels(x, inside) and not _kernels.products_win(operands[0], *operands[1::2]):
        if requires_grad(*operands) or (bias is not None and requires_grad(bias)):
            out = _AcmRouted.apply(*operands, bias, flat, activation)
        else:
            out = _routed_value(operands, bias, flat, activation)
        return out.view(*x.shape[:-1], w2.size(2)).to(dtype)
    flat = flat.long()
    if requires_grad(*operands):
        out = _Acm.apply(*operands, flat, activation)
    else:
        out, _ = _products.forward(*operands, flat, None, activation, False, False)
    out = out.view(*x.shape[:-1], w2.size(2))
    if bias is None:
        return out
    return out + (bias if bias.dim() == 1 else bias[choices.long().clamp(0, learners)])


def soft(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    gates: Tensor,
    *,
    activation: str = "gelu",
    straight_through: bool = False,
) -> Tensor:
    r"""Weight learners by the probability that a gate runs them, to train the gate.

    .. math:: y = \sum_{n=1}^N G_n\, \mathrm{act}(x W^1_n + b^1_n) W^2_n, \qquad
              G_n = \sum_{k \ge n} \text{gates}_k

    One-hot gates give :func:`acm.hard`'s value (where learners are finite, as 0 times NaN is NaN).
    Every learner runs on every row. The gradient of :math:`G_n` is the product of the learner's
    output and the incoming gradient. It is computed from the activations, without that output.

    ``straight_through``: the value is that of ``acm.hard(x, ..., gates.argmax(-1))``, and computed
    like it. The gradients of all arguments are those of the sum above; pre-activations are
    recomputed in backward instead of being kept. A row whose gates hold a NaN is NaN.

    Args:
        x: ``[..., D]`` float32, bfloat16, float16 or float64, any strides.
        w1: ``[N, D, b]``.
        b1: ``[N, b]``.
        w2: ``[N, b, D_out]``.
        gates: ``[..., N + 1]``, of :func:`acm.gate` or any other weights.
        activation: as for :func:`acm.hard`.
        straight_through: see above.

    Returns:
        ``[..., D_out]`` in the dtype that x and the weights promote to.

    Raises:
        ValueError, TypeError: an argument has the wrong shape or type.

    Source: Wójcik et al. 2023 (arXiv 2312.10193), whose gates get no gradient from the task.

    >>> import torch, fastkd
    >>> w1, b1, w2 = torch.ones(2, 1, 1), torch.zeros(2, 1), torch.tensor([[[1.0]], [[10.0]]])
    >>> gates = torch.tensor([[0.25, 0.25, 0.5]], requires_grad=True)
    >>> y = fastkd.acm.soft(torch.ones(1, 1), w1, b1, w2, gates, activation="identity")
    >>> y.backward()
    >>> y.item(), gates.grad.tolist()
    (5.75, [[0.0, 1.0, 11.0]])
    """
    dtype = check_learners("acm.soft", x, w1, b1, w2, activation)
    check_float("acm.soft", "gates", gates)
    straight_through = to_flag("acm.soft", "straight_through", straight_through)
    check_shape("acm.soft", "gates", gates, (*x.shape[:-1], w1.size(0) + 1), x)
    if transforms_active():
        return reference.acm.soft(
            x, w1, b1, w2, gates, activation=activation, straight_through=straight_through
        )
    if exporting(x, w1, b1, w2, gates):
        return call("acm.soft", x, w1, b1, w2, gates, None, activation, straight_through)
    inside = _kernels.product_dtype(x, dtype)
    operands = (flat_rows(x).to(inside), w1.to(inside), b1.to(inside), w2.to(inside))
    flat = flat_rows(gates).to(_products.wide(inside))
    choices = flat.detach().argmax(-1) if straight_through else None
    scale = flat.T[1:].flip(0).cumsum(0).flip(0)
    if requires_grad(*operands, scale):
        out = _AcmSoft.apply(*operands, scale, choices, activation)
    else:
        out = _soft_value(operands, scale, choices, activation)
    if straight_through:
        out = out.masked_fill(flat.detach().isnan().any(-1, keepdim=True), torch.nan)
    return out.view(*x.shape[:-1], w2.size(2)).to(dtype)


@exportable("acm.hard")
def _acm(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    choices: Tensor,
    bias: Tensor | None,
    activation: str,
    _: bool,
) -> Tensor:
    return hard(x, w1, b1, w2, choices, activation=activation, bias=bias)


@exportable("acm.soft")
def _acm_soft(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    gates: Tensor,
    _: Tensor | None,
    activation: str,
    flag: bool,
) -> Tensor:
    return soft(x, w1, b1, w2, gates, activation=activation, straight_through=flag)


class _AcmRouted(torch.autograd.Function):
    """By the kernels, with the same routing forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        bias: Tensor | None,
        choices: Tensor,
        activation: str,
    ) -> Tensor:
        operands = (x, w1, b1, w2)
        order, counts = _kernels.route(choices, w1.size(0))
        keep = any(ctx.needs_input_grad[:4])
        out, pre_activations = _kernels.forward(operands, bias, order, counts, activation, keep)
        ctx.save_for_backward(*operands, bias, choices, order, counts, pre_activations)
        ctx.activation = activation
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *operands, bias, choices, order, counts, pre_activations = ctx.saved_tensors
        needs, (grad,) = list(ctx.needs_input_grad[:4]), grads
        choices = choices.long().clamp(0, operands[1].size(0))
        if by_definition(grad):

            def function(x, w1, b1, w2, bias=None):
                return reference.acm.hard(
                    x, w1, b1, w2, choices, activation=ctx.activation, bias=bias
                )

            inputs = operands if bias is None else [*operands, bias]
            all_needs = [*needs, ctx.needs_input_grad[4]][: len(inputs)]
            again = tuple(gradients_by_definition(function, inputs, all_needs, grad))
            return *again, *[None] * (7 - len(again))
        of_bias = None
        if bias is not None and ctx.needs_input_grad[4]:
            of_bias = _bias_gradient(grad, bias, choices)
        if not any(needs):
            return None, None, None, None, of_bias, None, None
        routing = (order, counts, pre_activations, ctx.activation)
        found = _kernels.backward(grad, tuple(operands), *routing, needs)
        return *needed(found, needs), of_bias, None, None


def _bias_gradient(grad: Tensor, bias: Tensor, choices: Tensor) -> Tensor:
    # A sum to a single number would be split over threads, and its bits depend on their number.
    if bias.dim() == 1 and bias.numel() != 1:
        return grad.sum(0)
    index = choices if bias.dim() == 2 else torch.zeros_like(choices)
    sums = torch.zeros_like(bias, dtype=_products.wide(bias.dtype))
    rows = sums if bias.dim() == 2 else sums.unsqueeze(0)
    rows.index_add_(0, index, grad.to(sums.dtype))
    return sums.to(bias.dtype)


def _routed_value(
    operands: tuple[Tensor, ...], bias: Tensor | None, choices: Tensor, activation: str
) -> Tensor:
    order, counts = _kernels.route(choices, operands[1].size(0))
    return _kernels.forward(operands, bias, order, counts, activation, False)[0]


def _soft_value(
    operands: tuple[Tensor, ...], scale: Tensor, choices: Tensor | None, activation: str
) -> Tensor:
    """The value for choices if they are given, else for the weights of learners."""
    if choices is not None and _kernels.has_kernels(operands[0], operands[0].dtype):
        return _routed_value(operands, None, choices, activation)
    weights = scale if choices is None else None
    return _products.forward(*operands, choices, weights, activation, False, False)[0]


class _Acm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, choices: Tensor, activation: str
    ) -> Tensor:
        operands = (x, w1, b1, w2)
        out, pre_activations = _products.forward(
            *operands, choices, None, activation, True, traced(x)
        )
        ctx.save_for_backward(*operands, choices, pre_activations)
        ctx.activation = activation
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *operands, choices, pre_activations = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:4])
        if by_definition(grads[0]):

            def function(*operands):
                return reference.acm.hard(*operands, choices, activation=ctx.activation)

            return *gradients_by_definition(function, operands, needs, grads[0]), None, None
        found = _products.backward(
            grads[0], *operands, choices, None, pre_activations, ctx.activation, [*needs, False]
        )
        return *needed(found, needs), None, None


class _AcmSoft(torch.autograd.Function):
    """With choices: the value for them, and the gradient of the weighted sum."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        scale: Tensor,
        choices: Tensor | None,
        activation: str,
    ) -> Tensor:
        operands = (x, w1, b1, w2)
        pre_activations = None
        if choices is None:
            arguments = (*operands, None, scale, activation, True, traced(x))
            out, pre_activations = _products.forward(*arguments)
        else:
            out = _soft_value(operands, scale, choices, activation)
        ctx.save_for_backward(*operands, scale, pre_activations)
        ctx.activation = activation
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *operands, scale, pre_activations = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:5])
        if by_definition(grads[0]):

            def function(x, w1, b1, w2, scale):
                steps = torch.cat([scale, scale.new_zeros((1, scale.size(1)))])
                gates = torch.cat([scale.new_zeros((1, scale.size(1))), steps[:-1] - steps[1:]])
                return reference.acm.soft(x, w1, b1, w2, gates.T, activation=ctx.activation)

            inputs = (*operands, scale)
            return *gradients_by_definition(function, inputs, needs, grads[0]), None, None
        found = _products.backward(
            grads[0], *operands, None, scale, pre_activations, ctx.activation, needs
        )
        return *needed(found, needs), None, None
