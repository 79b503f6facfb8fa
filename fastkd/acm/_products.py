"""Passes of gated routing in torch's own matrix products.

They are used where there are no kernels (see _kernels): for soft gates, prefix losses, and choices
in other dtypes.

Rows are sorted by descending choice, so that the rows that run learner n are the first counts[n]:
one gather, N pairs of products with fewer and fewer rows into memory allocated once, one scatter.
Prefix losses go over blocks of rows and store the residuals of one block only.

A pass is called directly in eager mode. While tracing it is an op of the graph, as a graph must not
depend on the lengths of the prefixes, which are numbers on the host.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.acm import _kernels
from fastkd.acm._kernels import ACTIVATIONS, traced

_aten = torch.ops.aten

#: From pre-activations to activations; `out` may be the same memory.
_ACTIVATE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": lambda pre, out: _aten.gelu.out(pre, out=out),
    "gelu_tanh": lambda pre, out: _aten.gelu.out(pre, approximate="tanh", out=out),
    "relu": lambda pre, out: torch.clamp_min(pre, 0, out=out),
    "silu": lambda pre, out: _aten.silu.out(pre, out=out),
    "identity": lambda pre, out: pre,
}
#: From gradients of activations to those of pre-activations, in place.
_DIFFERENTIATE_: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": lambda grad, pre: _aten.gelu_backward.grad_input(grad, pre, grad_input=grad),
    "gelu_tanh": lambda grad, pre: _aten.gelu_backward.grad_input(
        grad, pre, approximate="tanh", grad_input=grad
    ),
    "relu": lambda grad, pre: _aten.threshold_backward.grad_input(grad, pre, 0, grad_input=grad),
    "silu": lambda grad, pre: _aten.silu_backward.grad_input(grad, pre, grad_input=grad),
    "identity": lambda grad, pre: grad,
}
assert tuple(_ACTIVATE) == ACTIVATIONS

#: Up to so many rows with the same choice are computed in two products in all.
_FEW_ROWS = 4
#: Rows of a block of the prefix losses: enough for fast products, few enough for the memory.
_SMALLEST_BLOCK, _LARGEST_BLOCK = 64, 1024


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over learners."""
    return dtype if dtype == torch.float64 else torch.float32


class _Pass:
    """A function of tensors, which is an op while tracing. It runs without autocast."""

    def __init__(self, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
        @functools.wraps(run)
        def kernel(x: Tensor, *others: Any) -> Any:
            if not torch.is_autocast_enabled(x.device.type):
                return run(x, *others)
            with torch.autocast(x.device.type, enabled=False):
                return run(x, *others)

        self.kernel = kernel
        name = f"fastkd::{run.__name__}"
        torch.library.custom_op(name, kernel, mutates_args=()).register_fake(fake)
        self.op = getattr(torch.ops.fastkd, run.__name__).default

    def __call__(self, x: Tensor, *others: Any) -> Any:
        return (self.op if traced(x) else self.kernel)(x, *others)


def _pass(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], _Pass]:
    return lambda run: _Pass(run, fake)


def _add_product(total: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """Add a @ b to total, or set it if `fresh`; a wider total gets the rounded product."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if fresh else 1, out=total)
    elif fresh:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


def _sorted(choices: Tensor | None, rows: int, learners: int) -> tuple[Tensor | None, list[int]]:
    """The rows that run a learner, those of the highest choice first, and how many run each one.

    None instead of an order means all rows in place. A choice out of range is an error on the CPU;
    elsewhere its row runs no learner, and `_out_of_range` finds it.
    """
    if choices is None:
        return None, [rows] * learners
    order, device_counts = _kernels.route(choices, learners)
    counts = device_counts[:learners].tolist()
    if all(count in (0, rows) for count in counts):
        return None, counts
    return order[: counts[0]].long(), counts


def _out_of_range(choices: Tensor, learners: int) -> Tensor:
    return (choices < 0) | (choices > learners)


def _gathered(x: Tensor, order: Tensor | None) -> Tensor:
    return x.contiguous() if order is None else x.index_select(0, order)


def _scattered(values: Tensor, order: Tensor | None, rows: int, dtype: torch.dtype) -> Tensor:
    """Sorted rows at their original positions, 0 at the others."""
    values = values.to(dtype)
    if values.size(0) == rows and order is None:
        return values
    new = values.new_empty if values.size(0) == rows else values.new_zeros
    out = new((rows, values.size(1)))
    return out if order is None else out.index_copy_(0, order, values)


def _fake_forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    *_, keep, _ = others
    rows = x.size(0)
    pre_activations = (rows * w1.size(0) if keep else 0, w1.size(2))
    return x.new_empty((rows, w2.size(2))), x.new_empty(pre_activations)


@_pass(_fake_forward)
def _acm(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    choices: Tensor | None,
    scale: Tensor | None,
    activation: str,
    keep: bool,
    padded: bool,
) -> tuple[Tensor, Tensor]:
    """Sum over learners of scale[n] act(x w1[n] + b1[n]) w2[n], and the pre-activations, packed.

    Row r runs learners 1..choices[r] (None: all). The pre-activations of learner n are counts[n]
    rows after those of n - 1; with `padded` the tensor has a size that does not depend on them.
    """
    (learners, _, width), rows = w1.shape, x.size(0)
    order, counts = _sorted(choices, rows, learners)
    chosen = counts[0]
    inputs = _gathered(x, order)[:chosen]
    pre_activations = x.new_empty(
        (rows * learners if padded else sum(counts), width) if keep else (0, width)
    )
    running = sum(count > 0 for count in counts)
    few = 0 < chosen <= _FEW_ROWS and counts[running - 1] == chosen and w2.is_contiguous()
    if few:
        pre = (
            pre_activations[: running * chosen] if keep else x.new_empty((running * chosen, width))
        )
        some = (w1[:running], b1[:running], w2[:running])
        total = _all_at_once(inputs, *some, scale, activation, pre.view(running, chosen, width))
        counts = []
    else:
        total = x.new_empty((chosen, w2.size(2)), dtype=wide(x.dtype))
    hidden = x.new_empty((0 if few else chosen, width))
    activate, start = _ACTIVATE[activation], 0
    for n, count in enumerate(counts):
        if count == 0:
            break
        pre = pre_activations[start : start + count] if keep else hidden[:count]
        torch.addmm(b1[n], inputs[:count], w1[n], out=pre)
        active = activate(pre, hidden[:count])
        if scale is not None:
            active = torch.mul(active, scale[n].unsqueeze(-1), out=hidden[:count])
        _add_product(total[:count], active, w2[n], n == 0)
        start += count
    out = _scattered(total, order, rows, x.dtype)
    if choices is not None and choices.device.type != "cpu":
        out.masked_fill_(_out_of_range(choices, learners).unsqueeze(-1), torch.nan)
    return out, pre_activations


def _all_at_once(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    scale: Tensor | None,
    activation: str,
    pre: Tensor,
) -> Tensor:
    """Every learner on every row: for few rows the cost is that of calls and of reading weights."""
    learners, rows, width = pre.shape
    torch.baddbmm(b1.unsqueeze(1), x.expand(learners, -1, -1), w1, out=pre)
    active = _ACTIVATE[activation](pre, torch.empty_like(pre))
    if scale is not None:
        active = active * scale.to(active.dtype).unsqueeze(-1)
    hidden = active.transpose(0, 1).reshape(rows, learners * width)
    return hidden @ w2.view(learners * width, -1)


class _Gradients:
    """Gradients of learners, added up over calls. Those that are not needed are empty."""

    def __init__(
        self,
        w1: Tensor,
        w2: Tensor,
        activation: str,
        needs: Sequence[bool],
        dtype: torch.dtype,
        most_rows: int,
    ) -> None:
        self.weights = w1, w2
        self.activation, self.needs = activation, needs
        shapes = (w1.shape, (w1.size(0), w1.size(2)), w2.shape)
        self.w1, self.b1, self.w2 = (
            w1.new_empty(shape if need else 0, dtype=dtype)
            for shape, need in zip(shapes, needs[1:4], strict=True)
        )
        self.hidden, self.inner = (w1.new_empty((most_rows, w1.size(2))) for _ in range(2))

    def clear(self, n: int) -> None:
        """Set the gradients of learner n, which runs on no row, to 0."""
        for total, need in zip((self.w1, self.b1, self.w2), self.needs[1:4], strict=True):
            if need:
                total[n].zero_()

    def add(
        self,
        n: int,
        x: Tensor,
        pre: Tensor,
        grad: Tensor,
        of_x: Tensor,
        fresh: bool,
        fresh_x: bool,
        scale: Tensor | None = None,
        of_scale: Tensor | None = None,
    ) -> None:
        """Add those of learner n's output on rows x; `fresh`: they are the first of learner n."""
        w1, w2 = self.weights
        need_x, need_w1, need_b1, need_w2, need_scale = self.needs
        hidden, inner = self.hidden[: x.size(0)], self.inner[: x.size(0)]
        active = _ACTIVATE[self.activation](pre, hidden) if need_w2 or need_scale else hidden
        if need_x or need_w1 or need_b1 or need_scale:
            torch.mm(grad, w2[n].T, out=inner)
        if need_scale and of_scale is not None:
            torch.sum(inner * active, -1, dtype=of_scale.dtype, out=of_scale)
        if need_w2:
            if scale is not None:
                active = torch.mul(active, scale.unsqueeze(-1), out=hidden)
            _add_product(self.w2[n], active.T, grad, fresh)
        if not (need_x or need_w1 or need_b1):
            return
        if scale is not None:
            inner.mul_(scale.unsqueeze(-1))
        _DIFFERENTIATE_[self.activation](inner, pre)
        if need_w1:
            _add_product(self.w1[n], x.T, inner, fresh)
        if need_b1:
            total = inner.sum(0, dtype=self.b1.dtype)
            self.b1[n].copy_(total) if fresh else self.b1[n].add_(total)
        if need_x:
            _add_product(of_x, inner, w1[n].T, fresh_x)


def _fake_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    scale, needs = others[1], others[-1]
    return tuple(
        value.new_empty(value.shape) if need else x.new_empty(0)
        for value, need in zip((x, w1, b1, w2, scale), needs, strict=True)
    )


@_pass(_fake_backward)
def _acm_backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    choices: Tensor | None,
    scale: Tensor | None,
    pre_activations: Tensor | None,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, b1, w2 and scale; pre-activations that were not kept are recomputed."""
    learners, rows = w1.size(0), x.size(0)
    order, counts = _sorted(choices, rows, learners)
    chosen = counts[0]
    inputs, grads = _gathered(x, order)[:chosen], _gathered(grad, order)[:chosen]
    gradients = _Gradients(w1, w2, activation, needs, w1.dtype, chosen)
    of_x = x.new_empty((chosen, x.size(1)) if needs[0] else (0, 0), dtype=wide(x.dtype))
    of_scale = x.new_empty(0) if scale is None or not needs[4] else torch.zeros_like(scale)
    again = x.new_empty((chosen if pre_activations is None else 0, w1.size(2)))
    start = 0
    for n, count in enumerate(counts):
        if count == 0:
            gradients.clear(n)
            continue
        if pre_activations is not None:
            pre = pre_activations[start : start + count]
        else:
            pre = torch.addmm(b1[n], inputs[:count], w1[n], out=again[:count])
        gradients.add(
            n,
            inputs[:count],
            pre,
            grads[:count],
            of_x[:count],
            fresh=True,
            fresh_x=n == 0,
            scale=None if scale is None else scale[n],
            of_scale=of_scale[n] if needs[4] else None,
        )
        start += count
    placed = _scattered(of_x, order, rows, x.dtype) if needs[0] else of_x.to(x.dtype)
    return placed, gradients.w1, gradients.b1, gradients.w2, of_scale


def _rows_of_block(x: Tensor, w1: Tensor, w2: Tensor) -> int:
    """The number of rows for which a block's memory is below twice that of x or of the target."""
    learners, inputs, width = w1.shape
    outputs = w2.size(2)
    a_row = (learners + 1) * outputs + (learners + 3) * width
    return min(
        max(x.size(0), 1),
        _LARGEST_BLOCK,
        max(_SMALLEST_BLOCK, 2 * x.size(0) * max(inputs, outputs) // max(a_row, 1)),
    )


def _fake_prefixes(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, target: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    needs, dtype = others[-1], wide(x.dtype)
    return (
        x.new_empty((w1.size(0) + 1, x.size(0)), dtype=dtype),
        *(
            value.new_empty(value.shape if need else 0, dtype=dtype)
            for value, need in zip((x, w1, b1, w2, target), needs, strict=True)
        ),
    )


@_pass(_fake_prefixes)
def _acm_prefixes(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    target: Tensor,
    factors: Tensor | None,
    activation: str,
    detach: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Distances [N + 1, rows] of every prefix's sum from the target, and gradients.

    The gradients are those of sum_k factors[k] / 2 |prefix k - target|^2 (None: all 1) for x, w1,
    b1, w2 and target: learner n gets the sum of factors[k] (prefix k - target) over k >= n, or
    k = n's term alone where the prefix before it is detached.
    """
    (learners, _, width), rows, dtype = w1.shape, x.size(0), wide(x.dtype)
    block = _rows_of_block(x, w1, w2)
    distances = x.new_empty((learners + 1, rows), dtype=dtype)
    residuals = x.new_empty((learners + 1, block, w2.size(2)), dtype=dtype)
    pre_activations = x.new_empty((learners, block, width))
    gradients = _Gradients(w1, w2, activation, [*needs[:4], False], dtype, block)
    of_x, of_target = (
        value.new_empty(value.shape if need else (0, 0), dtype=dtype)
        for value, need in ((x, needs[0]), (target, needs[4]))
    )
    for n in range(learners if rows == 0 else 0):
        gradients.clear(n)
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        inputs, residual = x[start:stop], residuals[:, : stop - start]
        pres = pre_activations[:, : stop - start]
        residual[0].copy_(target[start:stop]).neg_()
        for n in range(learners):
            torch.addmm(b1[n], inputs, w1[n], out=pres[n])
            active = _ACTIVATE[activation](pres[n], gradients.hidden[: stop - start])
            if dtype == x.dtype:
                torch.addmm(residual[n], active, w2[n], out=residual[n + 1])
            else:
                torch.add(residual[n], active @ w2[n], out=residual[n + 1])
        distances[:, start:stop] = torch.linalg.vector_norm(residual, dim=-1)
        if not any(needs):
            continue
        if factors is not None:
            residual.mul_(factors.view(-1, 1, 1))
        for n in reversed(range(learners)):
            if n + 1 < learners and not detach:
                residual[n + 1].add_(residual[n + 2])
            gradients.add(
                n,
                inputs,
                pres[n],
                residual[n + 1].to(x.dtype),
                of_x[start:stop],
                fresh=start == 0,
                fresh_x=n == learners - 1,
            )
        if needs[4]:
            suffix = residual.sum(0) if detach else residual[0] + residual[1]
            of_target[start:stop] = suffix.neg_()
    return (
        distances,
        of_x if needs[0] else x.new_empty(0, dtype=dtype),
        gradients.w1,
        gradients.b1,
        gradients.w2,
        of_target if needs[4] else x.new_empty(0, dtype=dtype),
    )


def prefix_unit(target: Tensor, learners: int) -> Tensor | None:
    """Factors of the prefixes' terms that keep float16 products in range; None: all 1.

    Residuals are about as large as the target, and up to N of them are added up.
    """
    if target.dtype != torch.float16 or target.numel() == 0:
        return None
    largest = target.detach().abs().amax().float().clamp_min(1)
    return (1 / (learners * largest)).expand(learners + 1)


def _fake_prefixes_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, target: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    return tuple(
        value.new_empty(value.shape if need else 0)
        for value, need in zip((x, w1, b1, w2, target), others[-2], strict=True)
    )


@_pass(_fake_prefixes_backward)
def _acm_prefixes_backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    target: Tensor,
    found: list[Tensor],
    activation: str,
    detach: bool,
    needs: list[bool],
    last_use: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients `found`, for equal factors, times the factor; others take another pass.

    `last_use`: `found` may be overwritten.
    """
    factors = grad.to(wide(x.dtype)) * (2 / max(target.numel(), 1))
    # Prefix 0 depends on the target only: no learner's gradient depends on its factor.
    counted = factors[0 if needs[4] else 1 :].tolist()
    unit = prefix_unit(target, w1.size(0))
    if any(factor != counted[0] for factor in counted):
        # float16 products need numbers of about 1; the small factor is multiplied at the end.
        top = factors[-len(counted) :].abs().amax()
        shares = factors / top if unit is None else factors / top * unit
        _, *found = _acm_prefixes.kernel(x, w1, b1, w2, target, shares, activation, detach, needs)
        last_use = True
    else:
        top = factors[-1]
    if unit is not None:
        top = top / unit[0]
    inputs = (x, w1, b1, w2, target)
    of_x, of_w1, of_b1, of_w2, of_target = (
        (gradient.mul_(top) if last_use else gradient * top).to(value.dtype)
        for gradient, value in zip(found, inputs, strict=True)
    )
    return of_x, of_w1, of_b1, of_w2, of_target


forward, backward = _acm, _acm_backward
prefixes, prefixes_backward = _acm_prefixes, _acm_prefixes_backward
