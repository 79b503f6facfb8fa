"""The loop over chunks of rows: products to logits, the op's kernels, products of the gradients.

One loop serves all ops. A chunk's logits are written to memory that all chunks share; a loss writes
their gradient over them. The gradients of weights and biases are sums over the chunks.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.linear import products
from fastkd._ops.linear.call import Call, Side, Slot
from fastkd._ops.linear.logits import softcapped, without_autocast
from fastkd._ops.linear.rows import ChunkedRows, RowResult, RowTensor
from fastkd._ops.linear.stats import RowStats

#: Rows in a chunk at the least where the head is trained: below, the gradient of the weight is read
#: and written too often.
_LEAST = {"cuda": 2048, 16: 1024, 32: 512}
_FROZEN = 2048


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


def chunk_rows(call: Call, trained: bool) -> int:
    """Rows in a chunk: the logits take as much memory as the sum of the weight's gradient."""
    if call.chunk_size is not None:
        return call.chunk_size
    if not trained:
        return _FROZEN
    sides = [side for side in call.sides]
    weight = max((side.linear.weight for side in sides), key=lambda x: x.size(1))
    least = _LEAST["cuda" if weight.is_cuda else 16 if weight.dtype.itemsize == 2 else 32]
    bytes_of_column = sum(side.dtype.itemsize for side in sides)
    sum_bytes = products.sum_dtype(weight.dtype).itemsize
    return max(sum_bytes * weight.size(1) // bytes_of_column, least)


class Chunks:
    """The chunks of a call, and the logits of each."""

    def __init__(self, call: Call, wanted: Sequence[bool]) -> None:
        self.call = call
        op, rows = call.op, call.rows
        self.unit = getattr(op, "unit", 0)
        leading = rows.shape[: rows.dim() - 1 - self.unit]
        self.texts = tuple(rows.shape[len(leading) : -1])
        self.length = math.prod(self.texts)
        places = frozenset((side.place, side.item) for side in call.sides)
        fields = op.arguments.fields
        compact = rows.device.type == "cpu" if call.compact is None else call.compact
        drops = "mask" in fields
        self.rows = ChunkedRows(fields, call.packed, leading, drops, drops and compact, places)
        vocab = call.value("vocab_size")
        self.vocab = rows.size(-1) if vocab is None or vocab < 0 else vocab
        trained = any(w and s.part == "weight" for w, s in zip(wanted, call.slots, strict=True))
        size = max(1, chunk_rows(call, trained) // max(1, self.length))
        count = self.rows.count
        self.chunks = math.ceil(count / size)
        self.size = math.ceil(count / self.chunks) if self.chunks else 0
        self.hidden = [RowTensor(side.linear.hidden, len(leading)) for side in call.sides]
        self.weights = [side.linear.weight[: self.vocab] for side in call.sides]
        self.biases = [
            None if side.linear.bias is None else side.linear.bias[: self.vocab]
            for side in call.sides
        ]
        self.tied = self._are_tied()
        self._taken: dict[str, Tensor] = {}

    def _are_tied(self) -> bool:
        """Whether the logits of two sides are one product."""
        if len(self.call.sides) != 2:
            return False
        (a, b), (x, y) = self.weights, self.call.sides
        same = a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
        p, q = x.linear.bias, y.linear.bias
        biases = p is q or (p is not None and q is not None and p.data_ptr() == q.data_ptr())
        return (
            same and a.dtype == b.dtype and x.dtype == y.dtype and biases
            and x.linear.scale == y.linear.scale and a.numel() > 0
        )  # fmt: skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for first in range(0, self.rows.count, max(1, self.size)):
            yield first, min(first + self.size, self.rows.count)

    def memory(self, role: str, numel: int, dtype: torch.dtype) -> Tensor:
        """Memory of the chunks, kept until :meth:`release`."""
        key = f"{role} {dtype}"
        if key not in self._taken:
            most = numel * self.size * self.length
            self._taken[key] = products.workspace.take(key, most, dtype, self.call.rows.device)
        return self._taken[key]

    def release(self) -> None:
        """Give the memory back."""
        for key, flat in self._taken.items():
            products.workspace.give_back(key, flat)
        self._taken.clear()

    def hidden_of(self, i: int, first: int, last: int) -> Tensor:
        """Hidden states of a chunk of side i, ``[rows, features]``; 0 in rows that are not read."""
        found = self.rows.take(self.hidden[i], first, last)
        unread = self.rows.unread(first, last)
        if unread is not None:
            found = found.masked_fill(unread, 0)
        return found.reshape(-1, found.size(-1))

    def logits_of(self, first: int, last: int) -> tuple[list[Any], list[Tensor]]:
        """The op's arguments of a chunk, and the hidden states of its sides."""
        call, count = self.call, (last - first) * self.length
        hidden = [self.hidden_of(i, first, last) for i in range(len(call.sides))]
        flats = []
        same = len({side.dtype for side in call.sides}) == 1
        for i, side in enumerate(call.sides):
            if same:
                flat = self.memory("logits", self.vocab * len(call.sides), side.dtype)
                flat = flat[i * count * self.vocab :]
            else:
                flat = self.memory(f"logits {i}", self.vocab, side.dtype)
            flats.append(flat[: count * self.vocab].view(count, self.vocab))
        if self.tied:
            both = self.memory("logits", self.vocab * 2, call.sides[0].dtype)
            out = both[: 2 * count * self.vocab].view(2 * count, self.vocab)
            scale = call.sides[0].linear.scale
            products.project(out, torch.cat(hidden), self.weights[0], self.biases[0], scale)
        else:
            for i, side in enumerate(call.sides):
                products.project(
                    flats[i], hidden[i], self.weights[i], self.biases[i], side.linear.scale
                )
        values = self.rows.chunk(first, last)
        for flat, side in zip(flats, call.sides, strict=True):
            if side.cap is not None:
                flat.copy_(softcapped(flat, side.cap))
            shaped = flat.view(last - first, *self.texts, self.vocab)
            if side.item is None:
                values[side.place] = shaped
            else:
                values[side.place][side.item] = shaped
        return values, hidden

    def raw(self, op: Callable[..., Any], first: int, last: int, *given: Any) -> Any:
        """The result of a raw op; an error names the row of the call, not that of the chunk."""
        try:
            return op(*given)
        except RuntimeError as error:
            found = re.search(r"in row (\d+)", str(error))
            if found is None:
                raise
            row = int(found[1])
            unit = first + row // max(1, self.length)
            if self.rows.index is not None:
                unit = int(self.rows.index[unit])
            row = unit * self.length + row % max(1, self.length)
            message = str(error).split("\nException raised from")[0]
            raise RuntimeError(message.replace(found[0], f"in row {row}")) from None


class Gradients:
    """The gradients of the slots, from those of a chunk's logits."""

    def __init__(self, chunks: Chunks, wanted: Sequence[bool]) -> None:
        self.chunks, self.wanted = chunks, tuple(wanted)
        self.found: list[Tensor | None] = []
        self.rows: list[RowResult | None] = []
        call = chunks.call
        for slot, tensor, want in zip(call.slots, call.inputs(), wanted, strict=True):
            out = None
            if want and tensor is not None:
                out = self._memory(slot, tensor)
            self.found.append(out)
            by_row = out is not None and slot.part in ("hidden", "rows")
            leading = len(chunks.rows.leading)
            self.rows.append(
                RowResult(out, 0, leading, chunks.rows.index)
                if by_row and out is not None
                else None
            )

    def _memory(self, slot: Slot, tensor: Tensor) -> Tensor:
        some = self.chunks.rows.count > 0
        if slot.part in ("hidden", "rows"):
            whole = some and self.chunks.rows.index is None
            make = torch.empty if whole else torch.zeros
            return make(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        dtype = products.sum_dtype(tensor.dtype)
        if slot.part == "bias":
            return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)
        total = products.gradient_of_weight(tensor)
        total[self.chunks.vocab if some else 0 :].zero_()
        return total

    def of_bit(self, bit: int) -> bool:
        """Whether one of the gradients comes from the op's gradient of that number."""
        pairs = zip(self.chunks.call.slots, self.wanted, strict=True)
        return any(want and slot.bit == bit for slot, want in pairs)

    def add(self, bit: int, gradient: Tensor, hidden: list[Tensor], first: int, last: int) -> None:
        """Take the gradient of a chunk's tensor number ``bit`` of the op."""
        call, chunks = self.chunks.call, self.chunks
        narrow: Tensor | None = None
        for i, slot in enumerate(call.slots):
            if slot.bit != bit or self.found[i] is None:
                continue
            out, rows = self.found[i], self.rows[i]
            assert out is not None
            if slot.side is None:
                assert rows is not None
                rows.put(first, last, gradient)
                continue
            which = call.sides.index(slot.side)
            linear, weight = slot.side.linear, chunks.weights[which]
            if narrow is None:
                narrow = self._narrow(gradient.reshape(-1, chunks.vocab), hidden[which])
            if slot.part == "hidden":
                assert rows is not None
                part = rows.part(first, last)
                if part is None:
                    part = torch.empty_like(hidden[which])
                    products.to_hidden(part, narrow, weight, linear.scale)
                    rows.put(first, last, part)
                else:
                    part = part.view(-1, part.size(-1))
                    products.to_hidden(part, narrow, weight, linear.scale)
            elif slot.part == "weight":
                total = out[: chunks.vocab]
                products.add_to_weight(total, narrow, hidden[which], linear.scale, first > 0)
            else:
                out[: chunks.vocab] += narrow.sum(0, dtype=out.dtype)

    def _narrow(self, gradient: Tensor, hidden: Tensor) -> Tensor:
        """The gradient in the dtype of its products."""
        dtype = products.gradient_dtype(gradient.dtype, hidden)
        if dtype == gradient.dtype:
            return gradient
        flat = self.chunks.memory("gradient", self.chunks.vocab, dtype)
        return flat[: gradient.numel()].view(gradient.shape).copy_(gradient)

    def keep(self) -> None:
        """Keep the memory of the weight's gradient for the next call."""
        for slot, out in zip(self.chunks.call.slots, self.found, strict=True):
            if slot.part == "weight" and out is not None:
                products.weight_memory.keep(out)


def check(call: Call) -> None:
    """Do the raw op's checks of the whole call, without reading a row."""
    op, packed = call.op, list(call.packed)
    fields = op.arguments.fields

    def replace(name: str, value: Any) -> None:
        packed[fields.index(name)] = value

    device = call.rows.device
    if "denominator" in fields:
        replace("reduction", op.arguments.names["reduction"]["sum"])
        replace("denominator", 0.0)
        replace("normalizer", None)
    if "mask" in fields and (call.kind != "loss" or device.type != "cpu"):
        mask = call.value("mask")
        if mask is None or mask.dtype == torch.bool:
            none = torch.zeros((), dtype=torch.bool, device=device)
            replace("mask", none.expand(call.rows.shape[:-1] if mask is None else mask.shape))
    if "mask" in fields:
        raw = op.arguments.eager(packed)
        op.raw()(*raw, 0) if call.kind == "loss" else op.raw()(*raw)
        return
    leading = call.rows.shape[:-1]
    for name, value in zip(fields, packed, strict=False):
        if not isinstance(value, Tensor) or name == "boundary":
            continue
        if value.shape[: len(leading)] != leading or value.device != device:
            name = op.arguments.called.get(name, name)
            raise ValueError(
                f"{op.name}: {name} must have one entry a row, shape {list(leading)}, on "
                f"{device}; got shape {list(value.shape)} on {value.device}"
            )


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
        divisor = rows.divisor(names, chunks.vocab, call.rows.size(0))
    wait = not none and any(wanted) and half(call, wanted)
    if not none:
        rows.set("reduction", names.index("sum"))
        rows.set("normalizer", divisor if isinstance(divisor, Tensor) and not wait else None)
        rows.set("denominator", divisor if isinstance(divisor, float) and not wait else 1.0)
    gradients = Gradients(chunks, wanted)
    needs = [gradients.of_bit(bit) for bit in range(len(op.places))]
    bits = op.wanted(needs)
    stats = RowStats(call, rows) if call.stats else None
    over = needs[0] and any(side.place == op.places[0] for side in call.sides)
    try:
        for first, last in chunks:
            values, hidden = chunks.logits_of(first, last)
            if stats is not None:
                stats.add(values, first, last)
            raw = (*op.arguments.eager(values), bits)
            if over:
                gradient = values[op.places[0]]
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
    gradients.keep()
    pending = None
    if wait:
        factor = torch.as_tensor(divisor, dtype=torch.float64, device=device)
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
            numbers = chunks.raw(op.raw(), first, last, *raw)[-1]
            parts = [
                g if r is None else r.take(first, last, chunks.rows.index).contiguous()
                for g, r in zip(given, rows, strict=True)
            ]
            logits = values[side.place]
            gradient = logits if side.cap is None else torch.empty_like(logits)
            op.raw("_backward_into")(gradient, numbers, *parts, *raw)
            if side.cap is not None:  # of c tanh(z / c), from its value
                gradient *= 1 - (logits / side.cap).square()
            gradients.add(0, gradient, hidden, first, last)
    finally:
        chunks.release()
    gradients.keep()
    return gradients.found
