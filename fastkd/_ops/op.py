"""Base class of all ops: checks of a call, and the path that it takes.

csrc/arguments/op.h and loss_op.h declare the raw ops; their schemas have the type of each argument.
Here an op is a name, the tensors that gradients flow to, and its definition in
:mod:`fastkd.reference`. loss.py and differentiable.py have the autograd Functions, fake kernels and
autograd formulas of graphs for the two kinds of op.

A call takes one of four paths:

============================  ====================================================================
eager, with a gradient        an autograd Function around ``_name``
eager, without                ``_name`` alone
torch.compile, export, fakes  ``name``: the same op with an autograd formula of its own, so that
                              an exported graph can be trained
torch.func, forward-mode AD   the definition, in plain PyTorch
============================  ====================================================================
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.arguments import Arguments, can_be_read, to_flag, with_defaults
from fastkd._ops.checks import check_devices
from fastkd._ops.library import (
    is_tracing,
    raise_as_python,
    traced_transforms_active,
    transforms_active,
)
from fastkd._ops.linear import function as linear
from fastkd._ops.linear.call import OPS, find
from fastkd._ops.shards import Shards, check_widths, one_column, with_columns

#: Fields that index columns.
_INDICES = ("labels", "token_ids", "teacher_indices")


def declared(name: str) -> "Op":
    """The op of that name, for the public definitions, which take the same arguments."""
    return OPS[name]


class Op:
    """Base class of both kinds of ops."""

    #: The public function, and the conversion of its arguments to the op's; see :meth:`serves`.
    function: Callable[..., Any]
    given: Callable[..., dict[str, Any]]

    #: "loss", or "differentiable" with a backward pass of its own; see fastkd/_ops/linear.
    kind: str

    #: The results of this process's columns and those of the others (fastkd/losses/_sharded.py), as
    #: the raw op returns them: of the op, its packed arguments by name, the columns, inplace.
    sharded: Callable[["Any", dict[str, Any], Shards, bool], Any]

    #: Warns about arguments of an eager call that are probably wrong.
    hints: Callable[[str, Tensor, dict[str, Any]], None] | None = None

    def __init__(
        self,
        name: str,
        differentiable: Sequence[str],
        reference: Callable[..., Any],
        absent: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.arguments = Arguments(name, differentiable, absent)
        self.places = self.arguments.differentiable
        self.reference = reference
        self._name = f"_{name}"
        OPS[name] = self

    def serves(self, function: Callable[..., Any], given: Callable[..., dict[str, Any]]) -> None:
        """Set the public function of this op, and the conversion of its arguments to the op's."""
        self.function, self.given = function, given

    def by_definition(self, *tensors: Any, **options: Any) -> Any:
        """The result of the public function, by the definition."""
        options = with_defaults(self.function, options)
        return self.define(tensors[0], self.given(*tensors, options))

    def raw(self, suffix: str = "") -> Any:
        """The raw op, looked up in each call, as tests replace it by the emulated kernels."""
        return getattr(torch.ops.fastkd, self._name + suffix)

    def graph_op(self, suffix: str = "") -> Any:
        """The raw op for graphs, with an autograd formula."""
        return getattr(torch.ops.fastkd, self.name + suffix)

    def inputs(self, packed: Sequence[Any]) -> list[Tensor | None]:
        """The differentiable tensors; None for a list of several, which gets no gradient."""
        found = []
        for place in self.places:
            value = packed[place]
            if isinstance(value, (list, tuple)):
                value = value[0] if len(value) == 1 else None
            found.append(value)
        return found

    def define(self, rows: Any, given: dict[str, Any]) -> Any:
        """The result by the definition, in plain PyTorch."""
        if find(given):
            return linear.define(self, given)
        return self.reference(**self.arguments.unpack(self.arguments.pack(rows, given)))

    def __call__(
        self,
        rows: Any,
        given: dict[str, Any],
        inplace: bool = False,
        shards: Shards | None = None,
    ) -> Any:
        """The op's result.

        ``rows``: the logits; ``given``: the public arguments by name; ``shards``: this process's
        columns, of a vocabulary that is split.
        """
        if inplace is not False:
            inplace = to_flag(self.name, "inplace", inplace)
        if find(given):
            return linear.run(self, given, inplace, shards=shards)
        if shards is not None:
            given["vocab_size"] = max(shards.columns, 1)
        packed = self.arguments.pack(rows, given)
        if shards is not None:
            return self._split(packed, shards, inplace)
        try:
            # The op for graphs has no rules for transforms inside the traced function.
            if torch.compiler.is_compiling():
                if traced_transforms_active():
                    return self.reference(**self.arguments.unpack(packed))
            elif transforms_active():
                self.check(packed)
                return self._defined(packed)
            elif rows.is_meta and type(rows) is Tensor:
                self.check(packed)
            if is_tracing(rows):
                return self.trace(packed, inplace)
            if self.hints is not None:
                self.hints(self.name, rows, given)
            if torch.is_grad_enabled():
                inputs = self.inputs(packed)
                for x in inputs:
                    if x is not None and x.requires_grad:
                        return self.record(packed, inputs, inplace)
            return self.compute(packed)
        except RuntimeError as error:
            raise_as_python(error)

    def _split(self, packed: list[Any], shards: Shards, inplace: bool) -> Any:
        """The result of this process's columns and those of the others."""
        values = check_split(self.arguments, packed, shards)
        rows = packed[self.places[0]]
        if inplace:
            self.check_overwritten(rows)
        # An op that does not know the vocabulary's size has its own checks there.
        if "vocab_size" in self.arguments.fields and not torch.compiler.is_compiling():
            try:
                self.check(with_columns(self.arguments.fields, packed))
                if can_be_read(rows):  # values, of all but the vocabulary's columns
                    self.compute(one_column(self.arguments.fields, packed))
            except RuntimeError as error:
                raise_as_python(error)
        return self.sharded(self, values, shards, inplace)

    def check_overwritten(self, logits: Tensor) -> None:
        """Raise where a gradient may not be written over these logits."""
        if isinstance(logits, torch.nn.Parameter) or logits.is_neg():
            kind = "a parameter, which would be lost" if logits.is_leaf else "a negated view"
            name = self.arguments.fields[self.places[0]]
            raise ValueError(f"{self.name}: inplace needs plain {name}, got {kind}")

    def _defined(self, packed: list[Any]) -> Any:
        """The definition's result; with the errors of indices, whose values are not checked."""
        try:
            return self.reference(**self.arguments.unpack(packed))
        except (IndexError, RuntimeError) as error:
            if "out of bounds" not in str(error):
                raise
            fields = [x for x in _INDICES if x in self.arguments.fields]
            raise IndexError(
                f"{self.name}: {' and '.join(fields)} must lie in the vocabulary: {error}"
            ) from None

    def check(self, packed: list[Any]) -> None:
        """Do the raw op's checks where it is not called for its result."""
        self.compute(self.arguments.emptied(packed))

    def compute(self, packed: list[Any]) -> Any:
        """The result without autograd."""
        raise NotImplementedError

    def record(self, packed: list[Any], inputs: list[Tensor | None], inplace: bool) -> Any:
        """The result, in autograd's graph."""
        raise NotImplementedError

    def trace(self, packed: list[Any], inplace: bool) -> Any:
        """The result as a node of a graph."""
        raise NotImplementedError


def check_split(arguments: Arguments, packed: list[Any], shards: Shards) -> dict[str, Any]:
    """The arguments of a call with a group by name, after checks of devices and widths."""
    values = dict(zip(arguments.fields, packed, strict=True))
    check_devices(arguments.function, values, arguments.tensors, arguments.called)
    check_widths(shards, arguments.fields, packed)
    if torch.compiler.is_compiling():
        transformed = traced_transforms_active()
    else:
        transformed = transforms_active()
    if transformed:
        raise NotImplementedError(
            f"{shards.function}: group has no torch.func transforms or forward-mode derivatives"
        )
    return values


def fake_values(arguments: Arguments, fields: Sequence[Any]) -> dict[str, Any]:
    """A fake kernel's arguments by name, after a check of their devices."""
    values = dict(zip(arguments.fields, fields, strict=False))
    check_devices(arguments.function, values, arguments.tensors, arguments.called)
    return values


def keep(ctx: Any, op: Op, packed: Sequence[Any], needs: Sequence[bool]) -> None:
    """Keep the arguments in ctx, except the tensors that need a gradient, which autograd saves.

    Autograd cannot save some others, such as a teacher's from ``torch.inference_mode()``.
    """
    kept = list(packed)
    for i, place in enumerate(op.places):
        if needs[i]:
            kept[place] = None if isinstance(packed[place], Tensor) else [None]
    ctx.op, ctx.packed = op, kept


def restored(kept: list[Any], places: Sequence[int], inputs: Sequence[Tensor | None]) -> list[Any]:
    """The arguments of :func:`keep`, with the saved tensors put back."""
    packed = list(kept)
    for place, tensor in zip(places, inputs, strict=True):
        if tensor is not None:
            packed[place] = tensor if kept[place] is None else [tensor]
    return packed


class Plain:
    """An op without gradients: arguments by the schema, and a fake kernel.

    ``axes``: of each result, the first dimension that counts rows.
    """

    kind, results = "plain", None
    #: As :attr:`Op.sharded`.
    sharded: Callable[["Any", dict[str, Any], Shards, bool], Any]

    def __init__(
        self, name: str, fake: Callable[..., tuple[Tensor, ...]], axes: Sequence[int] = (0, 0)
    ) -> None:
        self.name, self._name, self.fake, self.axes = name, f"_{name}", fake, tuple(axes)
        self.arguments = Arguments(name)
        OPS[name] = self
        self.register("fastkd")

    def register(self, library: str) -> None:
        """See :meth:`Loss.register`."""
        torch.library.register_fake(f"{library}::{self._name}", self._fake)

    def __call__(
        self, rows: Any, given: dict[str, Any], shards: Shards | None = None
    ) -> tuple[Tensor, ...]:
        """See :meth:`Op.__call__`."""
        if find(given):
            return linear.run(self, given, shards=shards)
        if shards is not None:
            given["vocab_size"] = max(shards.columns, 1)
        packed = self.arguments.pack(rows, given)
        if shards is not None:
            values = check_split(self.arguments, packed, shards)
            if can_be_read(packed[0]):
                try:
                    self.raw()(*self.arguments.eager(one_column(self.arguments.fields, packed)))
                except RuntimeError as error:
                    raise_as_python(error)
            return self.sharded(self, values, shards, False)
        pack = self.arguments.graph if is_tracing(rows) else self.arguments.eager
        try:
            if rows.is_meta and type(rows) is Tensor:
                self.raw()(*self.arguments.eager(self.arguments.emptied(packed)))
            return self.raw()(*pack(packed))
        except RuntimeError as error:
            raise_as_python(error)

    def raw(self) -> Any:
        """See :meth:`Op.raw`."""
        return getattr(torch.ops.fastkd, self._name)

    def _fake(self, *fields: Any) -> tuple[Tensor, ...]:
        return self.fake(**fake_values(self.arguments, fields))
