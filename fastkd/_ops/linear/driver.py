"""The loop over chunks of rows: products to logits, the op's kernels, products of the gradients.

One loop serves all ops. A chunk's logits are written to memory that all chunks share; a loss writes
their gradient over them. The gradients of weights and biases are sums over the chunks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.arguments import can_be_read
from fastkd._ops.checks import check_devices
from fastkd._ops.linear.call import Call, Side
from fastkd._ops.linear.chunks import Chunks
from fastkd._ops.linear.gradients import Gradients
from fastkd._ops.linear.logits import without_autocast
from fastkd._ops.linear.rows import RowResult, RowTensor
from fastkd._ops.linear.split import loss_of_split, results_of_split, split_gradient
from fastkd._ops.linear.stats import RowStats
from fastkd._ops.shards import one_column, with_columns


@dataclass
class Results:
    """What a loss returns: gradients of the slots, None where not wanted."""

    loss: Tensor
    gradients: list[Tensor | None] = field(default_factory=list)
    #: A factor left for the backward pass, None for 1.
    pending: Tensor | None = None
    stats: tuple[Tensor, ...] = ()


@contextmanager
def _plain(device: torch.device) -> Iterator[None]:
    """Without autograd and autocast: the products have the dtypes that they are given."""
    with torch.no_grad(), without_autocast(device):
        yield


def check(call: Call) -> None:
    """Do the raw op's checks of the whole call, without reading a row."""
    fields, device = call.op.arguments.fields, call.rows.device
    if call.shards is None:
        return _check(call, list(call.packed), call.kind == "loss" and device.type == "cpu")
    _check(call, with_columns(fields, call.packed), False)
    if call.kind == "loss" and can_be_read(call.rows):
        # Values, all but labels, which count all columns.
        _check(call, one_column(fields, call.packed), True)


def _check(call: Call, packed: list[Any], with_values: bool) -> None:
    op, fields, device = call.op, call.op.arguments.fields, call.rows.device

    def replace(name: str, value: Any) -> None:
        packed[fields.index(name)] = value

    if "denominator" in fields:
        replace("reduction", op.arguments.names["reduction"]["sum"])
        replace("denominator", 0.0)
        replace("normalizer", None)
    if "mask" in fields and not with_values:
        mask = call.value("mask")
        if mask is None or mask.dtype == torch.bool:
            none = torch.zeros((), dtype=torch.bool, device=device)
            replace("mask", none.expand(call.rows.shape[:-1] if mask is None else mask.shape))
    if "mask" in fields:
        raw, checker = op.arguments.eager(packed), getattr(op, "checker", op)
        checker.raw()(*raw, 0) if checker.kind == "loss" else checker.raw()(*raw)
        return
    values = dict(zip(fields, packed, strict=False))
    check_devices(op.name, values, op.arguments.tensors, op.arguments.called)
    leading = call.rows.shape[:-1]
    for name, value in zip(fields, packed, strict=False):
        if not isinstance(value, Tensor) or name == "boundary":
            continue
        if value.shape[: len(leading)] != leading:
            name = op.arguments.called.get(name, name)
            raise ValueError(
                f"{op.name}: {name} must have one entry a row, shape {list(leading)}, got shape "
                f"{list(value.shape)}"
            )


def check_empty(call: Call) -> None:
    """Do the raw op's checks where tensors have no values, of a transform or on the meta device."""
    op = getattr(call.op, "checker", call.op)
    raw = op.arguments.eager(op.arguments.emptied(call.packed))
    op.raw()(*raw, 0) if op.kind == "loss" else op.raw()(*raw)


def run_loss(call: Call, wanted: Sequence[bool]) -> Results:
    """The loss, and the gradients of the slots that are wanted."""
    with _plain(call.rows.device):
        check(call)
        return _loss(call, wanted)


def _loss(call: Call, wanted: Sequence[bool], row_factor: Tensor | None = None) -> Results:
    """row_factor: sum the rows' losses times this, whatever the reduction."""
    op, chunks = call.op, Chunks(call, wanted)
    rows, names = chunks.rows, tuple(op.arguments.names["reduction"])
    dtype = loss_dtype(call)
    device = call.rows.device
    none = names[rows.get("reduction")] == "none" and row_factor is None
    total = torch.zeros((), dtype=torch.float64, device=device)
    out = torch.zeros(call.rows.shape[:-1], dtype=dtype, device=device) if none else None
    losses = None if out is None else RowResult(out, 0, len(rows.leading), rows.index)
    divisor: float | Tensor = 1.0
    if row_factor is not None:
        weight = rows.get("weight")
        rows.set("weight", row_factor if weight is None else weight * row_factor)
    elif not none:
        divisor = rows.divisor(names, call.vocab, call.rows.size(0))
    wait = not none and any(wanted) and half(call, wanted)
    if not none:
        rows.set("reduction", names.index("sum"))
        rows.set("normalizer", divisor if isinstance(divisor, Tensor) and not wait else None)
        rows.set("denominator", divisor if isinstance(divisor, float) and not wait else 1.0)
    gradients = Gradients(chunks, wanted)
    needs = [gradients.of_bit(bit) for bit in range(len(op.places))]
    bits = op.wanted(needs)
    stats = RowStats(call, rows) if call.stats else None
    first_side = [side for side in call.sides if side.place == op.places[0]]
    try:
        for first, last in chunks:
            values, hidden = chunks.logits_of(first, last)
            if stats is not None:
                stats.add(values, first, last)
            raw = (*op.arguments.eager(values), bits)
            if call.shards is not None:
                loss, *found = chunks.raw(loss_of_split, first, last, call, values, needs)
            elif needs[0] and first_side:
                gradient = values[op.places[0]]
                if not op.overwrites:
                    gradient = chunks.like("gradient of logits", gradient)
                loss, *found = chunks.raw(op.raw("_into"), first, last, gradient, *raw)
                found.insert(0, gradient)
            else:
                loss, *found = chunks.raw(op.raw(), first, last, *raw)
            if losses is not None:
                losses.put(first, last, loss)
            else:
                total += loss
            for bit, need in enumerate(needs):
                if need:
                    gradients.add(bit, found[bit], hidden, first, last)
    finally:
        chunks.release()
    gradients.finish()
    pending = None
    if wait:
        factor = divisor if isinstance(divisor, Tensor) else total.new_full((), divisor)
        factor = torch.where(factor == 0, 0, 1 / torch.where(factor == 0, 1, factor))
        total = torch.where(factor == 0, 0, total * factor)
        pending = factor.float()
    result = total.to(dtype) if out is None else out
    return Results(result, gradients.found, pending, stats.tensors() if stats else ())


def loss_dtype(call: Call) -> torch.dtype:
    """float64 where an input of the op is."""
    for name in call.op.precision:
        value = call.value(name)
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if tensor is not None and tensor.dtype == torch.float64:
                return torch.float64
    return torch.float32


def half(call: Call, wanted: Sequence[bool]) -> bool:
    """Whether a gradient is float16: divided by thousands of rows it would be 0."""
    for slot, tensor, want in zip(call.slots, call.inputs(), wanted, strict=True):
        if want and tensor is not None:
            side = slot.side
            if tensor.dtype == torch.float16 or (side and side.dtype == torch.float16):
                return True
    return False


def run_rows(call: Call) -> tuple[Tensor, ...]:
    """The results of an op that has no reduction, without gradients."""
    op = call.op
    with _plain(call.rows.device):
        check(call)
        chunks = Chunks(call, [False] * len(call.slots))
        fake = dict(zip(op.arguments.fields, call.packed, strict=False))
        outs = op.fake(**fake)[: op.results]
        make = torch.zeros_like if chunks.rows.index is not None else torch.empty_like
        outs = tuple(make(out) for out in outs)
        leading, index = len(chunks.rows.leading), chunks.rows.index
        results = [
            RowResult(out, axis, leading, index) if out.dim() > axis or leading == 0 else None
            for out, axis in zip(outs, op.axes, strict=False)
        ]
        absent = [out.shape == (0,) for out in outs]
        try:
            for first, last in chunks:
                values, _ = chunks.logits_of(first, last)
                if call.shards is not None:
                    found = chunks.raw(results_of_split, first, last, call, values)
                else:
                    found = chunks.raw(op.raw(), first, last, *op.arguments.eager(values))
                for result, part, empty in zip(results, found, absent, strict=False):
                    if result is not None and not empty:
                        result.put(first, last, part)
        finally:
            chunks.release()
        return outs


def run_backward(
    call: Call, grads: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of the slots, from those of the results; the logits are computed again."""
    with _plain(call.rows.device):
        if call.kind == "loss":
            return _loss_backward(call, grads[0], wanted)
        return _rows_backward(call, grads, wanted)


def _loss_backward(call: Call, grad: Tensor | None, wanted: Sequence[bool]) -> list[Tensor | None]:
    if grad is None:
        grad = torch.zeros((), device=call.rows.device).expand(call.rows.shape[:-1])
    if call.again:
        return _loss(call, wanted, grad).gradients
    found = _loss(call, wanted)
    if found.pending is not None:
        grad = grad * found.pending
    return [None if x is None else x.mul_(grad) for x in found.gradients]


def _rows_backward(
    call: Call, grads: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    op, chunks = call.op, Chunks(call, wanted)
    gradients = Gradients(chunks, wanted)
    leading = len(chunks.rows.leading)
    given = op.gradients_of_results(grads)
    rows = [None if g is None or g.shape == (0,) else RowTensor(g, leading) for g in given]
    side: Side = call.sides[0]
    try:
        for first, last in chunks:
            values, hidden = chunks.logits_of(first, last)
            raw = op.arguments.eager(values)
            parts = [
                g if r is None else r.take(first, last, chunks.rows.index).contiguous()
                for g, r in zip(given, rows, strict=True)
            ]
            logits = values[side.place]
            if call.shards is not None:
                gradient = chunks.raw(split_gradient, first, last, call, values, parts)
            else:
                numbers = chunks.raw(op.raw(), first, last, *raw)[-1]
                gradient = logits if side.cap is None else torch.empty_like(logits)
                op.raw("_backward_into")(gradient, numbers, *parts, *raw)
            if side.cap is not None:  # of c tanh(z / c), from its value
                gradient *= 1 - (logits / side.cap).square()
            gradients.add(0, gradient, hidden, first, last)
    finally:
        chunks.release()
    gradients.finish()
    return gradients.found
