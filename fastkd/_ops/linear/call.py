"""A call of an op with logits of linear heads: its arguments, sides and differentiable tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.linear.logits import LinearLogits, logits_dtype_of, softcapped
from fastkd._ops.shard_definition import copied
from fastkd._ops.shards import LOGITS, Shards, check_widths

#: Every op by its name.
OPS: dict[str, Any] = {}


@dataclass(frozen=True)
class Side:
    """Logits that a head computes: their place in the arguments, in a list with ``item``."""

    place: int
    item: int | None
    linear: LinearLogits
    #: A soft cap that the op itself does not apply.
    cap: Any

    @property
    def dtype(self) -> torch.dtype:
        """That of the logits."""
        return logits_dtype_of(self.linear.hidden, self.linear.options[0])

    def dense(self, shards: Shards | None) -> Tensor:
        """The logits as the op takes them, stored whole; with ``shards`` this process's columns."""
        linear = self.linear
        if shards is not None and linear.reduce_hidden_grad:
            hidden = copied(shards, linear.hidden)
            linear = linear.replaced(hidden, linear.weight, linear.bias)
        found = linear.uncapped_logits()
        return found if self.cap is None else softcapped(found, self.cap)


@dataclass(frozen=True)
class Slot:
    """A differentiable tensor. ``bit``: which of the op's gradients it belongs to."""

    bit: int
    place: int
    side: Side | None
    part: str  # "hidden", "weight", "bias", or "rows" for an argument of the op itself


class Call:
    """The op, its packed arguments with stand-ins for the logits of heads, and those heads."""

    def __init__(
        self,
        op: Any,
        packed: list[Any],
        sides: Sequence[Side],
        options: tuple[int | None, bool | None],
        stats: bool,
        shards: Shards | None,
    ) -> None:
        self.op, self.packed, self.sides = op, packed, tuple(sides)
        self.chunk_size, self.compact = options
        self.stats, self.shards = stats, shards
        self.slots = self._slots()

    def _slots(self) -> list[Slot]:
        found = []
        for bit, place in enumerate(getattr(self.op, "places", ())):
            sides = [side for side in self.sides if side.place == place]
            value = self.packed[place]
            if isinstance(value, (list, tuple)) and len(value) != 1:
                continue
            if sides:
                for part in ("hidden", "weight", "bias"):
                    found.append(Slot(bit, place, sides[0], part))
            else:
                found.append(Slot(bit, place, None, "rows"))
        return found

    @property
    def kind(self) -> str:
        """How the op computes gradients: "loss", "differentiable" or "plain"."""
        return self.op.kind

    @property
    def again(self) -> bool:
        """Whether the backward pass computes the logits again."""
        if self.kind != "loss":
            return True
        return self.value("reduction") == self.op.arguments.names["reduction"]["none"]

    @property
    def rows(self) -> Tensor:
        """The student's logits, or their stand-in."""
        return self.packed[0][0] if isinstance(self.packed[0], (list, tuple)) else self.packed[0]

    def inputs(self) -> list[Tensor | None]:
        """The tensor of each slot."""
        found: list[Tensor | None] = []
        for slot in self.slots:
            if slot.side is not None:
                found.append(getattr(slot.side.linear, slot.part))
            else:
                value = self.packed[slot.place]
                found.append(value[0] if isinstance(value, (list, tuple)) else value)
        return found

    def with_inputs(self, inputs: Sequence[Tensor | None]) -> "Call":
        """The same call of other tensors."""
        packed, sides = list(self.packed), []
        given = {(s.place, s.part): x for s, x in zip(self.slots, inputs, strict=True)}
        for side in self.sides:
            if (side.place, "hidden") in given:
                parts: list[Any] = [
                    given[side.place, part] for part in ("hidden", "weight", "bias")
                ]
                linear = side.linear.replaced(*parts)
                side = Side(side.place, side.item, linear, side.cap)
            sides.append(side)
        for slot, x in zip(self.slots, inputs, strict=True):
            if slot.side is None:
                listed = isinstance(packed[slot.place], (list, tuple))
                packed[slot.place] = [x] if listed else x
        options = (self.chunk_size, self.compact)
        return Call(self.op, packed, sides, options, self.stats, self.shards)

    def dense(self) -> list[Any]:
        """The op's arguments with all logits stored whole."""
        packed = list(self.packed)
        for side in self.sides:
            if side.item is None:
                packed[side.place] = side.dense(self.shards)
            else:
                packed[side.place] = list(packed[side.place])
                packed[side.place][side.item] = side.dense(self.shards)
        return packed

    def define(self) -> Any:
        """The result by the op's definition, in plain PyTorch.

        With a group that is the op's of the local logits, whose gradient can be differentiated.
        """
        if self.shards is not None:
            values = dict(zip(self.op.arguments.fields, self.dense(), strict=True))
            return self.op.sharded(self.op, values, self.shards, False)
        return self.op.reference(**self.op.arguments.unpack(self.dense()))

    def check_not_split(self) -> None:
        """Raise where collectives cannot be transformed."""
        if self.shards is not None:
            raise NotImplementedError(
                f"{self.shards.function}: group has no batches of gradients or torch.func "
                "transforms"
            )

    def value(self, field: str) -> Any:
        """An argument by name, None where the op has none of that name."""
        fields = self.op.arguments.fields
        return self.packed[fields.index(field)] if field in fields else None

    @property
    def columns(self) -> int:
        """How many columns of the logits count: of this process, where they are split."""
        if self.shards is not None:
            return self.shards.columns
        vocab = self.value("vocab_size")
        return self.rows.size(-1) if vocab is None or vocab < 0 else vocab

    @property
    def vocab(self) -> int:
        """The same of all processes."""
        return self.columns if self.shards is None else self.shards.vocab


def find(given: dict[str, Any]) -> bool:
    """Whether logits among the arguments are those of a head."""
    for field in LOGITS:
        value = given.get(field)
        if isinstance(value, LinearLogits):
            return True
        if isinstance(value, (list, tuple)):
            for each in value:
                if isinstance(each, LinearLogits):
                    return True
    return False


def make(op: Any, given: dict[str, Any], stats: bool = False, shards: Shards | None = None) -> Call:
    """The call, from the public arguments by name, of which some logits are those of heads."""
    arguments = op.arguments
    found: list[tuple[str, int | None, LinearLogits]] = []
    for field in arguments.fields:
        value = given.get(field)
        if isinstance(value, LinearLogits):
            found.append((field, None, value.prepared()))
        elif isinstance(value, (list, tuple)) and field in LOGITS:
            found += [
                (field, i, x.prepared()) for i, x in enumerate(value) if isinstance(x, LinearLogits)
            ]
    caps = _caps(op, given, found)
    for field, _, linear in found:
        if linear.placed:
            raise TypeError(
                f"{op.name}: {field} is of DTensors, {arguments.fields[0]} must be, too"
            )
    for field, item, linear in found:
        if item is None:
            given[field] = stand_in(linear)
        else:
            given[field] = list(given[field])
            given[field][item] = stand_in(linear)
    if shards is not None:
        given["vocab_size"] = max(shards.columns, 1)
    first = given[arguments.fields[0]]
    packed = arguments.pack(first, given)
    if shards is not None:
        check_widths(shards, arguments.fields, packed)
    sides = [
        Side(arguments.fields.index(field), item, linear, cap)
        for (field, item, linear), cap in zip(found, caps, strict=True)
    ]
    return Call(op, packed, sides, _options(op.name, found), stats, shards)


def stand_in(linear: LinearLogits) -> Tensor:
    """A tensor of the logits' shape and dtype, of one element."""
    dtype = logits_dtype_of(linear.hidden, linear.options[0])
    one = torch.zeros((), dtype=dtype, device=linear.hidden.device)
    return one.expand(linear.shape)


def _caps(op: Any, given: dict[str, Any], found: list[Any]) -> list[Any]:
    """Pass the soft caps of heads to the op where it takes them; return those it does not."""
    caps = [linear.softcap for _, _, linear in found]
    if all(cap is None for cap in caps):
        return caps
    if given.get("logit_softcap") is not None:
        raise ValueError(
            f"{op.name}: logit_softcap is given, but LinearLogits has a softcap already; give one "
            "of them"
        )
    limited = bool(op.arguments._limits)
    if not limited and "logit_softcap" not in op.arguments.fields:
        return caps
    pair: list[Any] = [None, None]
    for i, (field, item, linear) in enumerate(found):
        # The op caps all teachers of a list alike.
        if item is None or len(given[field]) == 1:
            pair[int(field == "teacher_logits")] = linear.softcap
            caps[i] = None
    given["logit_softcap"] = tuple(pair) if limited else pair[0]
    return caps


def _options(function: str, found: list[Any]) -> tuple[int | None, bool | None]:
    """The chunk size and compaction that the heads agree on."""
    agreed: list[Any] = []
    for i, name in ((1, "chunk_size"), (2, "compact")):
        values = {linear.options[i] for _, _, linear in found} - {None}
        if len(values) > 1:
            raise ValueError(
                f"{function}: {name} must be the same in all LinearLogits, got "
                f"{', '.join(map(str, sorted(values)))}"
            )
        agreed.append(values.pop() if values else None)
    return agreed[0], agreed[1]
