"""The chunks of a call, and the logits of each."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.linear import products
from fastkd._ops.linear.call import Call
from fastkd._ops.linear.logits import softcapped
from fastkd._ops.linear.rows import ChunkedRows, RowTensor

#: Rows in a chunk at the least where the head is trained: below, the gradient of the weight is read
#: and written too often.
_LEAST = {"cuda": 2048, 16: 1024, 32: 512}
_FROZEN = 2048


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
    if call.kind == "loss" and not call.op.overwrites:
        bytes_of_column += sides[0].dtype.itemsize
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
        self.vocab = call.columns
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

    def like(self, role: str, logits: Tensor) -> Tensor:
        """Memory of a chunk's logits again, for another use."""
        flat = self.memory(role, self.vocab, logits.dtype)
        return flat[: logits.numel()].view(logits.shape)

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
        # Products of other strides are not fastkd's own.
        return found.reshape((last - first) * self.length, found.size(-1)).contiguous()

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
        except (RuntimeError, ValueError, IndexError) as error:
            found = re.search(r"in row (\d+)", str(error))
            if found is None:
                raise
            row = int(found[1])
            unit = first + row // max(1, self.length)
            if self.rows.index is not None:
                unit = int(self.rows.index[unit])
            row = unit * self.length + row % max(1, self.length)
            message = str(error).split("\nException raised from")[0]
            raise type(error)(message.replace(found[0], f"in row {row}")) from None
