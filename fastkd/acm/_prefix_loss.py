"""The error of every prefix of learners, which trains learners and gives the gate's labels."""

from typing import Any

import torch
from torch import Tensor

from fastkd import reference
from fastkd._ops.arguments import to_flag
from fastkd._ops.checks import check_positive
from fastkd._ops.library import transforms_active
from fastkd.acm import _kernels, _products
from fastkd.acm._arguments import (
    by_definition,
    check_learners,
    check_target,
    flat_rows,
    gradients_by_definition,
    needed,
    requires_grad,
)
from fastkd.acm._export import call, exportable, exporting
from fastkd.acm._kernels import traced

_RULES = ("paper", "code")


def prefix_loss(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    target: Tensor,
    *,
    activation: str = "gelu",
    detach: bool = False,
) -> Tensor:
    r"""Mean squared error of every prefix of learners: the loss of phase I, for the learners.

    .. math:: L_k = \frac{1}{\text{rows} \cdot D_\text{out}} \sum_{\text{rows}}
              \Bigl\lVert \sum_{n \le k} \mathrm{act}(x W^1_n + b^1_n) W^2_n - o \Bigr\rVert^2,
              \qquad k = 0, \dots, N

    Prefix 0 is zero: :math:`L_0` is the mean square of the target. Rows are processed in blocks, so
    that no ``[rows, N + 1, D_out]`` tensor and no hidden layer of all rows is stored; the memory
    besides the gradients is about two ``[rows, D]``. The call computes the gradients of
    ``losses.sum()``, which also give those of its multiples (``losses.mean()``,
    ``losses[1:].sum()``). Backward from other combinations goes over the rows once more. On a GPU
    backward synchronises, to read the factors that decide this.

    Args:
        x: ``[..., D]`` float32, bfloat16, float16 or float64: the replaced module's input.
        w1: ``[N, D, b]``.
        b1: ``[N, b]``.
        w2: ``[N, b, D_out]``.
        target: ``[..., D_out]``: its output. Subtract an output bias from it first.
        activation: as for :func:`fastkd.acm.hard`.
        detach: learner k gets only the gradient of prefix k's term, in which the learners before
            it are constants. (The released code has this option, but never enables it.)

    Returns:
        ``[N + 1]``, float32 (float64 if an input is); 0 without rows.

    Raises:
        ValueError, TypeError: an argument has the wrong shape or type.

    Source: Wójcik et al. 2023 (arXiv 2312.10193).

    >>> import torch, fastkd
    >>> w1, b1, w2 = torch.ones(2, 1, 1), torch.zeros(2, 1), torch.tensor([[[1.0]], [[2.0]]])
    >>> target = torch.full((1, 1), 3.0)
    >>> fastkd.acm.prefix_loss(target / 3, w1, b1, w2, target, activation="identity").tolist()
    [9.0, 4.0, 0.0]
    """
    detach = to_flag("acm.prefix_loss", "detach", detach)
    dtype = check_learners("acm.prefix_loss", x, w1, b1, w2, activation)
    dtype = _kernels.product_dtype(x, check_target("acm.prefix_loss", x, w2, target, dtype))
    if transforms_active():
        return reference.acm.prefix_loss(
            x, w1, b1, w2, target, activation=activation, detach=detach
        )
    if exporting(x, w1, b1, w2, target):
        return call("acm.prefix_loss", x, w1, b1, w2, target, None, activation, detach)
    operands = (
        *(flat_rows(x).to(dtype), w1.to(dtype), b1.to(dtype), w2.to(dtype)),
        flat_rows(target).to(dtype),
    )
    if requires_grad(*operands):
        return _AcmPrefixLoss.apply(*operands, activation, detach)
    return _losses(_distances(operands, activation), target.numel())


def oracle(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    target: Tensor,
    *,
    activation: str = "gelu",
    threshold: float = 1 / 1.2,
    rule: str = "paper",
) -> Tensor:
    r"""How many learners each row needs: phase II's labels for the gate.

    With :math:`d_n` the distance of prefix n from the target, learner n does not help if it leaves
    at least :math:`\theta` of the distance: :math:`d_n \ge \theta d_{n-1}`.

    ============  =================================================================================
    ``"paper"``   the first such n of 2..N; N if there is none (every learner helps)
    ``"code"``    the first n of 1..N with :math:`d_{n-1} / d_n < 1 / \theta`; N if there is none,
                  and N also if that n is 1: a row that learner 1 does not help runs all learners,
                  as in the released code
    ============  =================================================================================

    The rules are computed without division: :math:`d_{n-1} = 0` stops the paper's rule at n, and so
    do infinite distances. A row with a NaN gets N.

    Args:
        x: ``[..., D]`` float32, bfloat16, float16 or float64.
        w1: ``[N, D, b]``.
        b1: ``[N, b]``.
        w2: ``[N, b, D_out]``.
        target: ``[..., D_out]``: the replaced module's output.
        activation: as for :func:`fastkd.acm.hard`.
        threshold: :math:`\theta`, positive; the released code's error factor is its inverse, 1.2.
        rule: ``"paper"`` or ``"code"``.

    Returns:
        int64 ``[...]``. No gradient.

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: Wójcik et al. 2023 (arXiv 2312.10193).

    >>> import torch, fastkd
    >>> w1, b1, w2 = torch.ones(3, 1, 1), torch.zeros(3, 1), torch.tensor([1, 1, 0.1]).view(3, 1, 1)
    >>> x, target = torch.ones(1, 1), torch.full((1, 1), 3.0)  # distances 3, 2, 1, 0.9
    >>> fastkd.acm.oracle(x, w1, b1, w2, target, activation="identity").tolist()
    [3]
    """
    dtype = check_learners("acm.oracle", x, w1, b1, w2, activation)
    dtype = _kernels.product_dtype(x, check_target("acm.oracle", x, w2, target, dtype))
    check_rule("acm.oracle", threshold, rule)
    if transforms_active():
        options = {"activation": activation, "threshold": threshold, "rule": rule}
        return reference.acm.oracle(x, w1, b1, w2, target, **options)
    learners = w1.size(0)
    with torch.no_grad():
        operands = [v.detach().to(dtype) for v in (flat_rows(x), w1, b1, w2, flat_rows(target))]
        distances = _distances(operands, activation)
        before, after = threshold * distances[:-1], distances[1:]
        stops = after >= before if rule == "paper" else after > before
        if rule == "paper":
            stops[0] = False
        first = (stops.long().cumsum(0) == 0).sum(0) + 1
        label = torch.where((first == 1) | (first > learners), learners, first)
    return label.view(x.shape[:-1])


def check_rule(function: str, threshold: Any, rule: Any) -> None:
    """Raise unless these are options of :func:`oracle`."""
    if rule not in _RULES:
        raise ValueError(f"{function}: rule must be one of {', '.join(_RULES)}; got {rule!r}")
    check_positive(function, "threshold", threshold)


@exportable("acm.prefix_loss")
def _acm_prefix_loss(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    target: Tensor,
    _: Tensor | None,
    activation: str,
    flag: bool,
) -> Tensor:
    return prefix_loss(x, w1, b1, w2, target, activation=activation, detach=flag)


class _AcmPrefixLoss(torch.autograd.Function):
    """Forward computes the gradients of the losses' sum; backward scales or recomputes them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        target: Tensor,
        activation: str,
        detach: bool,
    ) -> Tensor:
        operands = (x, w1, b1, w2, target)
        needs = list(ctx.needs_input_grad[:5])
        factors = _products.prefix_unit(target, w1.size(0))
        distances, *found = _products.prefixes(*operands, factors, activation, detach, needs)
        ctx.save_for_backward(*operands, *found)
        ctx.options = activation, detach
        return _losses(distances, target.numel())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        operands, found = saved[:5], list(saved[5:])
        needs = list(ctx.needs_input_grad[:5])
        activation, detach = ctx.options
        if by_definition(grads[0]):

            def function(*operands):
                return reference.acm.prefix_loss(*operands, activation=activation, detach=detach)

            return *gradients_by_definition(function, operands, needs, grads[0]), None, None
        last_use = not (
            traced(operands[0]) or torch._C._autograd._get_current_graph_task_keep_graph()
        )
        found = _products.prefixes_backward(
            grads[0], *operands, found, activation, detach, needs, last_use
        )
        return *needed(found, needs), None, None


def _distances(operands: Any, activation: str) -> Tensor:
    """[N + 1, rows]."""
    return _products.prefixes(*operands, None, activation, False, [False] * 5)[0]


def _losses(distances: Tensor, count: int) -> Tensor:
    return (distances.double().square().sum(-1) / max(count, 1)).to(distances.dtype)
