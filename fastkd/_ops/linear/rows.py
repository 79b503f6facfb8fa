"""Which rows a call reads, and an op's arguments of a chunk of them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: Arguments that belong to the row `shift` places earlier.
_SHIFTED = ("labels", "label_weights", "mask", "weight", "entropy_mask", "token_ids")
#: Tensors that are not one entry, or one vector, a row.
_SHARED = ("normalizer", "boundary")


class RowTensor:
    """A tensor ``[*leading, ...]`` read by units of its leading dimensions."""

    def __init__(self, value: Tensor, leading: int) -> None:
        self.value, self.shape = value, value.shape[:leading]
        self.flat: Tensor | None
        try:
            self.flat = value.view(math.prod(self.shape), *value.shape[leading:])
        except RuntimeError:  # strides that no flat view has: copied a chunk at a time
            self.flat = None

    def take(self, first: int, last: int, index: Tensor | None) -> Tensor:
        """The units from first to last; with an index those that its entries there name."""
        if index is None and self.flat is not None:
            return self.flat[first:last]
        where = torch.arange(first, last, device=self.value.device) if index is None else index
        where = where if index is None else where[first:last]
        if self.flat is not None:
            return self.flat.index_select(0, where)
        return self.value[torch.unravel_index(where, self.shape)]


class RowResult:
    """A tensor with the leading dimensions, from dimension ``axis`` on, written by their units."""

    def __init__(self, out: Tensor, axis: int, leading: int, index: Tensor | None) -> None:
        shape = out.shape
        units = math.prod(shape[axis : axis + leading])
        self.out, self.axis, self.index = out, axis, index
        self.flat = out.view(*shape[:axis], units, *shape[axis + leading :])

    def part(self, first: int, last: int) -> Tensor | None:
        """The memory of these units, where they are one piece."""
        return None if self.index is not None else self.flat.narrow(self.axis, first, last - first)

    def put(self, first: int, last: int, part: Tensor) -> None:
        """Write the results of these units."""
        if self.index is None:
            self.flat.narrow(self.axis, first, last - first).copy_(part)
        else:
            self.flat.index_copy_(self.axis, self.index[first:last], part.to(self.flat.dtype))


def ahead(value: Tensor, shift: int) -> Tensor:
    """Each sequence moved by `shift` towards its front; the last entries are not used."""
    return torch.cat([value[..., shift:], value[..., : min(shift, value.size(-1))]], -1)


class ChunkedRows:
    """The arguments of a call, by chunks of the rows that it reads.

    Args:
        fields: the names of the raw op's arguments.
        packed: their values; the logits that a head computes have stand-ins of the same shape.
        leading: the leading dimensions of the logits, without those of a text where the op reads
            whole texts.
        drops: whether the op skips rows by mask, weight and labels.
        compact: whether such rows are left out.
        linear: the places of stand-ins, each with its place in a list.
    """

    def __init__(
        self,
        fields: Sequence[str],
        packed: Sequence[Any],
        leading: Sequence[int],
        drops: bool,
        compact: bool,
        linear: frozenset[tuple[int, int | None]],
    ) -> None:
        self.fields, self.values = fields, list(packed)
        self.leading = tuple(leading)
        self.device = self._first_tensor(packed).device
        self._at = {field: place for place, field in enumerate(fields)}
        self.shifted_rows = math.prod(self.leading)
        self._shift()
        self.kept = self._kept() if drops else None
        read, weight = self.kept, self.get("weight") if drops else None
        if weight is not None:
            read = weight != 0 if read is None else read & (weight != 0)
        self.read = None if read is None else read.reshape(-1)
        self.index: Tensor | None = None
        self.count = math.prod(self.leading)
        if compact and self.read is not None:
            index = self.read.nonzero().squeeze(1)
            if index.numel() < self.count:
                self.index, self.count = index, index.numel()
        self._rows: dict[int, list[RowTensor | None]] = {}
        for place, (field, value) in enumerate(zip(fields, self.values, strict=False)):
            if field in _SHARED or (place, None) in linear:
                continue
            if field == "teacher_logits" and self.get("teacher_rows") is not None:
                continue  # whole: each row says which of them it needs
            if field == "teacher_weights" and isinstance(value, Tensor) and value.dim() == 1:
                continue
            if isinstance(value, Tensor):
                self._rows[place] = [RowTensor(value, len(self.leading))]
            elif isinstance(value, (list, tuple)):
                self._rows[place] = [
                    None if (place, item) in linear else RowTensor(x, len(self.leading))
                    for item, x in enumerate(value)
                ]

    @staticmethod
    def _first_tensor(packed: Sequence[Any]) -> Tensor:
        first = packed[0]
        return first[0] if isinstance(first, (list, tuple)) else first

    def get(self, field: str) -> Any:
        """An argument's value, None where the op has none of that name."""
        return self.values[self._at[field]] if field in self._at else None

    def set(self, field: str, value: Any) -> None:
        """Replace an argument, before any chunk is taken."""
        place = self._at[field]
        self.values[place] = value
        if isinstance(value, Tensor) and field not in _SHARED:
            self._rows[place] = [RowTensor(value, len(self.leading))]

    def _shift(self) -> None:
        shift = self.get("shift")
        if not shift:
            return
        length = self.leading[-1]
        shift = min(shift, length)
        self.shifted_rows = math.prod(self.leading[:-1]) * (length - shift)
        for field in _SHIFTED:
            value = self.get(field)
            if isinstance(value, Tensor):
                self.values[self._at[field]] = ahead(value, shift)
        inside = torch.arange(length, device=self.device) < length - shift
        inside = inside.expand(self.leading)
        mask = self.get("mask")
        self.values[self._at["mask"]] = inside if mask is None else mask & inside
        self.values[self._at["shift"]] = 0

    def _kept(self) -> Tensor | None:
        """The rows that count for a mean; None for all."""
        kept, taught = self.get("mask"), self.get("teacher_rows")
        if taught is not None:
            kept = taught >= 0 if kept is None else kept & (taught >= 0)
        labels = self.get("labels" if "labels" in self._at else "token_ids")
        if labels is not None:
            ignored = self.get("ignore_index")
            chosen = labels != (-100 if ignored is None else ignored)
            kept = chosen if kept is None else kept & chosen
        return kept

    def take(self, value: RowTensor, first: int, last: int) -> Tensor:
        """Rows of a tensor that is no argument of the op."""
        return value.take(first, last, self.index)

    def chunk(self, first: int, last: int) -> list[Any]:
        """The arguments of these rows, in the raw op's order."""
        found = list(self.values)
        for place, rows in self._rows.items():
            parts = [None if x is None else x.take(first, last, self.index) for x in rows]
            listed = isinstance(self.values[place], (list, tuple))
            found[place] = parts if listed else parts[0]
        return found

    def unread(self, first: int, last: int) -> Tensor | None:
        """Which of these rows are not read, as a column; None if all are."""
        if self.read is None or self.index is not None:
            return None
        return ~self.read[first:last].unsqueeze(-1)

    def divisor(self, names: Sequence[str], vocab: int, batch: int) -> float | Tensor:
        """What the sum of the rows' losses is divided by, in the dtype of a normalizer."""
        normalizer, reduction = self.get("normalizer"), names[self.get("reduction")]
        if normalizer is not None:
            return normalizer.to(torch.float64)
        if reduction == "mean":
            if self.kept is None:
                return float(self.shifted_rows)
            return self.kept.sum().to(torch.float64)
        if reduction == "batchmean":
            return float(batch)
        if reduction == "elementmean":
            return float(self.shifted_rows * vocab)
        return self.get("denominator")
