"""Losses of rows, a block of rows at a time: of all rows only the gradient is stored."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.gradient import differentiable_gradients, scaled
from fastkd._ops.library import is_tracing, transforms_active

#: Entries of the widest tensor of a block: 16 MB of float32.
_ENTRIES = 1 << 22

#: Takes a slice of the chosen rows, and these rows of the inputs; returns a value for each.
RowLoss = Callable[..., Tensor]


def chosen(values: Tensor, kept: Tensor) -> Tensor:
    """Values of the rows that are kept, ``[M]``.

    Where no shape can depend on data, in a compiled graph and on the meta device, M is the number
    of all rows, and those that are not kept have the value 0.
    """
    if is_tracing(kept):
        return values.masked_fill(~kept, 0).flatten()
    return values[kept]


def placed(values: Tensor, kept: Tensor) -> Tensor:
    """Values ``[M]`` of the chosen rows at their positions, 0 elsewhere."""
    if is_tracing(kept):
        return torch.where(kept, values.view(kept.shape), 0)
    (rows,) = kept.flatten().nonzero(as_tuple=True)
    return values.new_zeros(kept.numel()).index_copy(0, rows, values).view(kept.shape)


def at_rows(values: Tensor, rows: Tensor, kept: Tensor) -> Tensor:
    """Some of a tensor's rows; in a compiled graph 0 for those not kept, which may hold NaN."""
    found = values[rows]
    if is_tracing(kept):
        return torch.where(kept.reshape(-1, *[1] * (found.dim() - 1)), found, 0)
    return found


def by_blocks(
    loss: RowLoss,
    inputs: Sequence[Tensor],
    rows: Sequence[Tensor],
    kept: Tensor,
    width: int,
    ends: Sequence[int] | None = None,
) -> Tensor:
    """Loss of each of the M chosen rows, as a differentiable function of the inputs.

    ``inputs[i]`` is ``[N_i, ...]`` and may require a gradient. ``rows[i]``, int64 ``[M]``, are the
    distinct indices of its rows, from :func:`chosen` by ``kept``. The gradient is computed with the
    value, block by block, and backward only scales it. ``width`` is that of the widest tensor in
    `loss`. In a compiled graph there is one block of all rows, and the compiler differentiates it;
    torch.func transforms and forward-mode derivatives do the same.

    With ``ends``, ascending from 0 to M, blocks begin and end there: a row's loss may then depend
    on the other rows between the same two ends, if only the sum of their losses is used.
    """
    if is_tracing(kept):
        parts = [at_rows(x, places, kept) for x, places in zip(inputs, rows, strict=True)]
        return loss(slice(None), *parts)
    if transforms_active():  # torch.func differentiates the loss itself, of all rows at once
        every = slice(0, rows[0].numel())
        return loss(every, *_at(inputs, rows, every))
    size = max(1, _ENTRIES // max(1, width))
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _ByBlocks.apply(loss, rows, (size, ends), *inputs)
    blocks = _blocks(rows[0].numel(), size, ends)
    values = [loss(block, *_at(inputs, rows, block)) for block in blocks]
    return torch.cat(values) if values else _no_values(inputs)


def _blocks(count: int, size: int, ends: Sequence[int] | None) -> list[slice]:
    if ends is None:
        return [slice(first, min(first + size, count)) for first in range(0, count, size)]
    found, first = [], 0
    while first < count:
        last = ends[max(bisect_right(ends, first), bisect_right(ends, first + size) - 1)]
        found.append(slice(first, last))
        first = last
    return found


def _at(inputs: Sequence[Tensor], rows: Sequence[Tensor], block: slice) -> list[Tensor]:
    return [x[places[block]] for x, places in zip(inputs, rows, strict=True)]


def _no_values(inputs: Sequence[Tensor]) -> Tensor:
    double = any(x.dtype == torch.float64 for x in inputs)
    return inputs[0].new_empty(0, dtype=torch.float64 if double else torch.float32)


class _ByBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        loss: RowLoss,
        rows: Sequence[Tensor],
        cut: tuple[int, Sequence[int] | None],
        *inputs: Tensor,
    ) -> Tensor:
        needs = ctx.needs_input_grad[3:]
        gradients = [torch.zeros_like(x) for x, need in zip(inputs, needs, strict=True) if need]
        values = []
        for block in _blocks(rows[0].numel(), *cut):
            parts = [
                part.detach().requires_grad_(need)
                for part, need in zip(_at(inputs, rows, block), needs, strict=True)
            ]
            with torch.enable_grad():
                value = loss(block, *parts)
                found = torch.autograd.grad(value.sum(), [p for p in parts if p.requires_grad])
            places = [x[block] for x, need in zip(rows, needs, strict=True) if need]
            for gradient, at, part in zip(gradients, places, found, strict=True):
                gradient.index_copy_(0, at, part)
            values.append(value.detach())
        ctx.loss, ctx.rows, ctx.needs = loss, rows, needs
        ctx.save_for_backward(*inputs, *gradients)
        return torch.cat(values) if values else _no_values(inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        count = len(ctx.needs)
        saved = ctx.saved_tensors  # read once: under a checkpoint it can be read only once
        inputs, gradients = saved[:count], iter(saved[count:])
        if torch.is_grad_enabled():  # create_graph=True
            every = slice(0, ctx.rows[0].numel())
            value = ctx.loss(every, *_at(inputs, ctx.rows, every))
            found = differentiable_gradients(value, inputs, ctx.needs, grad_output)
            return None, None, None, *found
        result: list[Tensor | None] = [None, None, None]
        for x, rows, need in zip(inputs, ctx.rows, ctx.needs, strict=True):
            if not need:
                result.append(None)
                continue
            factor = grad_output.new_zeros(x.size(0)).index_copy_(0, rows, grad_output)
            result.append(scaled(next(gradients), factor))
        return tuple(result)
