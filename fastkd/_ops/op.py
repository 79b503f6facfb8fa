"""Ops with gradients: one autograd Function, fake kernel and formula for graphs for all of them.

csrc/tensor/op.h and loss_op.h declare the raw ops; their schemas say what each argument is. Here
an op is a name, the tensors that gradients flow to, and its definition in
:mod:`fastkd.reference`.

A call takes one of four ways:

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

from fastkd._gradient import differentiable_gradients, gradient_for, memory, product, scaled
from fastkd._library import (
    is_batched,
    is_tracing,
    raise_as_python,
    traced_transforms_active,
    transforms_active,
)
from fastkd._ops.arguments import Arguments
from fastkd._ops.hints import check_loss


class Op:
    """What both kinds of ops share."""

    #: Looks at the arguments of an eager call for what is seldom meant.
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

    def raw(self, suffix: str = "") -> Any:
        """The raw op. Looked up in each call: tests put the emulated kernels in their place."""
        return getattr(torch.ops.fastkd, self._name + suffix)

    def graph_op(self, suffix: str = "") -> Any:
        """The raw op of graphs, with an autograd formula."""
        return getattr(torch.ops.fastkd, self.name + suffix)

    def inputs(self, packed: Sequence[Any]) -> list[Tensor | None]:
        """The differentiable tensors; None for a list of several, which takes no gradient."""
        return [_only(packed[place]) for place in self.places]

    def define(self, rows: Tensor, given: dict[str, Any]) -> Any:
        """The result by the definition, in plain PyTorch."""
        return self.reference(**self.arguments.unpack(self.arguments.pack(rows, given)))

    def __call__(self, rows: Tensor, given: dict[str, Any], inplace: bool = False) -> Any:
        """The op's result. ``rows``: the logits; ``given``: the public arguments by name."""
        packed = self.arguments.pack(rows, given)
        try:
            # A graph's op has no rules for transforms of the function that is traced.
            if traced_transforms_active() if torch.compiler.is_compiling() else transforms_active():
                return self.reference(**self.arguments.unpack(packed))
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

    def compute(self, packed: list[Any]) -> Any:
        """The result alone."""
        raise NotImplementedError

    def record(self, packed: list[Any], inputs: list[Tensor | None], inplace: bool) -> Any:
        """The result, in autograd's graph."""
        raise NotImplementedError

    def trace(self, packed: list[Any], inplace: bool) -> Any:
        """The result as a node of a graph."""
        raise NotImplementedError


def check_devices(function: str, values: Mapping[str, Any], tensors: Sequence[str]) -> None:
    """A fake kernel answers for meta tensors: those of another device must not reach it."""
    device = values[tensors[0]].device
    for field in tensors:
        value = values[field]
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if tensor is not None and tensor.device != device:
                raise ValueError(
                    f"{function}: {field} must be on the device of {tensors[0]}, {device}, got "
                    f"{tensor.device}"
                )


def fake_values(arguments: Arguments, fields: Sequence[Any]) -> dict[str, Any]:
    """A fake kernel's arguments by name, their devices checked."""
    values = dict(zip(arguments.fields, fields, strict=False))
    check_devices(arguments.function, values, arguments.tensors)
    return values


def _only(value: Any) -> Any:
    """A tensor, or the one tensor of a list; lists of several take no gradient."""
    if isinstance(value, (list, tuple)):
        return value[0] if len(value) == 1 else None
    return value


class Loss(Op):
    """A loss over rows of logits whose gradients are computed together with its value.

    Args:
        name: of the raw op.
        differentiable: its tensors that gradients flow to, the student's logits first.
        reference: the definition; takes the raw op's fields by name, choices as names.
        precision: of these tensors' dtypes, float64 makes the loss float64.
        together: fields with one number a row, whose gradients the kernel computes only together.
    """

    def __init__(
        self,
        name: str,
        differentiable: Sequence[str],
        reference: Callable[..., Any],
        *,
        precision: Sequence[str],
        together: Sequence[str] = (),
        absent: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(name, differentiable, reference, absent)
        self.hints = check_loss
        self.precision = tuple(precision)
        self.one_a_row = frozenset(differentiable.index(field) for field in together)
        self._together = sum(1 << differentiable.index(field) for field in together)
        self.register("fastkd")

    def register(self, library: str) -> None:
        """The fake kernels and the formula for graphs, for the raw ops of a library."""
        for name in (self.name, self._name):
            torch.library.register_fake(f"{library}::{name}", self._fake)
        torch.library.register_fake(f"{library}::{self._name}_into", self._fake_into)
        torch.library.register_autograd(
            f"{library}::{self.name}", self._graph_backward, setup_context=self._graph_context
        )

    def wanted(self, needs: Sequence[bool]) -> int:
        """The raw op's ``gradients``."""
        bits = 0
        for i, need in enumerate(needs):
            if need:
                bits |= 1 << i
        return bits | self._together if bits & self._together else bits

    def compute(self, packed: list[Any]) -> Tensor:
        return self.raw()(*self.arguments.eager(packed), 0)[0]

    def record(self, packed: list[Any], inputs: list[Tensor | None], inplace: bool) -> Tensor:
        if inplace:
            student = inputs[0]
            if isinstance(student, torch.nn.Parameter) or student.is_neg():
                kind = "a parameter, which would be lost" if student.is_leaf else "a negated view"
                raise ValueError(f"{self.name}: inplace needs plain student_logits, got {kind}")
        return _LossFunction.apply(self, packed, inplace, *inputs)

    def trace(self, packed: list[Any], inplace: bool) -> Tensor:
        needs, inputs = [], self.inputs(packed)
        if torch.is_grad_enabled():
            needs = [x is not None and x.requires_grad for x in inputs]
        # An exported graph needs the op's own formula, which trains.
        if inplace and needs and needs[0] and not torch.compiler.is_exporting():
            return _LossFunction.apply(self, packed, True, *inputs)
        return self.graph_op()(*self.arguments.graph(packed), self.wanted(needs))[0]

    def _fake(self, *raw: Any) -> tuple[Tensor, ...]:
        *fields, gradients = raw
        values = fake_values(self.arguments, fields)
        tensors = [values[self.arguments.fields[place]] for place in self.places]
        tensors = [x[0] if isinstance(x, (list, tuple)) else x for x in tensors]
        wanted = [bool(gradients >> i & 1) for i in range(len(tensors))]
        of_precision: list[Tensor] = []
        for field in self.precision:
            value = values[field]
            of_precision += value if isinstance(value, (list, tuple)) else [value]
        double = any(x.dtype == torch.float64 for x in of_precision)
        student, reduced = tensors[0], values["reduction"] != 0
        pairs = list(zip(tensors, wanted, strict=True))
        wait = reduced and any(want and x.dtype == torch.float16 for x, want in pairs)
        return (
            student.new_empty(
                () if reduced else student.shape[:-1],
                dtype=torch.float64 if double else torch.float32,
            ),
            *(torch.empty_like(x) if want else x.new_empty(0) for x, want in pairs),
            student.new_empty(() if wait else (0,), dtype=torch.float32),
        )

    def _fake_into(self, gradient: Tensor, *raw: Any) -> tuple[Tensor, ...]:
        loss, _, *others = self._fake(*raw[:-1], raw[-1] | 1)
        return loss, *others

    # The autograd formula of ``fastkd::name``, the op of graphs.

    def _graph_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *fields, ctx.gradients = inputs
        _, *gradients, pending = output
        ctx.set_materialize_grads(False)
        # An exported graph is run with other tensors than it was traced with: they may require
        # gradients that those did not, and second derivatives.
        ctx.fields = None if is_tracing(gradients[0]) else fields
        ctx.lists = {
            field: len(value)
            for field, value in zip(self.arguments.fields, fields, strict=False)
            if isinstance(value, (list, tuple))
        }
        ctx.save_for_backward(*gradients, pending)

    def _graph_backward(self, ctx: Any, *grad_outputs: Tensor | None) -> tuple[Any, ...]:
        grad_output = grad_outputs[0]
        *gradients, pending = ctx.saved_tensors
        found: dict[str, Any] = {}
        needs = [ctx.needs_input_grad[place] for place in self.places]
        needs = [any(x) if isinstance(x, (list, tuple)) else x for x in needs]
        missing = self.wanted(needs) & ~ctx.gradients
        if grad_output is not None and (missing or torch.is_grad_enabled()) and ctx.fields:
            found = self._by_reference(ctx.fields, needs, grad_output)
        elif grad_output is not None:
            if pending.numel():
                grad_output = grad_output * pending
            for i, place in enumerate(self.places):
                if ctx.gradients >> i & 1:
                    found[self.arguments.fields[place]] = product(gradients[i], grad_output)
        results = []
        for field in self.arguments.fields:
            value = found.get(field)
            if field in ctx.lists:
                value = [value] + [None] * (ctx.lists[field] - 1)
            results.append(value)
        return (*results, *([None] if self.arguments.traced else []), None)

    def _by_reference(
        self, fields: list[Any], needs: Sequence[bool], grad_output: Tensor
    ) -> dict[str, Tensor]:
        """Gradients by the definition, which are functions of the inputs in turn."""
        packed = self.arguments.untraced(fields)
        higher, inputs = torch.is_grad_enabled(), self.inputs(packed)
        with torch.enable_grad():
            loss = self.reference(**self.arguments.unpack(packed))
        wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
        names = [
            self.arguments.fields[i] for i, need in zip(self.places, needs, strict=True) if need
        ]
        found = torch.autograd.grad(loss, wanted, grad_output, create_graph=higher)
        return dict(zip(names, found, strict=True))


class _LossFunction(torch.autograd.Function):
    """Gradients come with the loss; backward applies what is left to multiply.

    Kept until backward: the gradients, and for second derivatives the op's arguments; with
    ``inplace`` the gradients alone.
    """

    @staticmethod
    def forward(ctx, op, packed, inplace, *inputs):
        needs = ctx.needs_input_grad[3:]
        pack = op.arguments.graph if torch.compiler.is_compiling() else op.arguments.eager
        student, raw = inputs[0], (*pack(packed), op.wanted(needs))
        inplace = inplace and needs[0]
        gradient = None
        if inplace:
            gradient = student.detach()
        elif needs[0]:
            gradient = memory.take(student)
        if gradient is None:
            loss, *computed = op.raw()(*raw)
        else:
            loss, *computed = op.raw("_into")(gradient, *raw)
            computed.insert(0, gradient)
        ctx.op, ctx.inplace = op, inplace
        if inplace:
            torch.autograd.graph.increment_version(student)
            ctx.save_for_backward(*computed)
        else:
            if needs[0]:
                memory.keep(computed[0])
            _keep(ctx, op, packed, needs)
            saved = [x if need else None for x, need in zip(inputs, needs, strict=True)]
            ctx.save_for_backward(*computed, *saved)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        op, needs, saved = ctx.op, ctx.needs_input_grad[3:], ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if ctx.inplace:
                raise RuntimeError(
                    f"{op.name}: second derivatives need the logits that inplace=True overwrote"
                )
            inputs = saved[len(needs) + 1 :]
            loss = op.reference(**op.arguments.unpack(_with(ctx.packed, op.places, inputs)))
            return None, None, None, *differentiable_gradients(loss, inputs, needs, grad_output)
        pending = saved[len(needs)]
        if pending.numel():
            grad_output = grad_output * pending
        found: list[Tensor | None] = [None] * len(needs)
        for i, need in enumerate(needs):
            if need:
                scale = product if i in op.one_a_row else scaled
                found[i] = scale(saved[i], grad_output)
        return None, None, None, *found


def _keep(ctx: Any, op: Op, packed: Sequence[Any], needs: Sequence[bool]) -> None:
    """Keep the arguments but for the tensors that need a gradient, which autograd saves.

    It cannot save others, as those that a teacher gave under ``torch.inference_mode()``.
    """
    ctx.op, ctx.packed = op, list(packed)
    for place, need in zip(op.places, needs, strict=True):
        if need:
            ctx.packed[place] = None if isinstance(packed[place], Tensor) else [None]


def _with(kept: list[Any], places: Sequence[int], inputs: Sequence[Tensor | None]) -> list[Any]:
    """The arguments again."""
    packed = list(kept)
    for place, tensor in zip(places, inputs, strict=True):
        if tensor is not None:
            packed[place] = tensor if kept[place] is None else [tensor]
    return packed


class Differentiable(Op):
    """An op over logits with a backward pass of its own, which reads the logits again.

    The raw op returns its results and, last, numbers for the backward pass. The raw backward op
    takes those, the gradient of each differentiable result, and the fields.

    Args:
        name: of the raw op.
        logits: the tensor that a gradient flows to.
        reference: the definition; takes the fields by name and returns the results.
        constant: which results take no gradient.
        fake: the results for fake tensors, from the fields by name.
    """

    def __init__(
        self,
        name: str,
        logits: str,
        reference: Callable[..., Any],
        *,
        fake: Callable[..., tuple[Tensor, ...]],
        constant: Sequence[int] = (),
    ) -> None:
        super().__init__(name, (logits,), reference)
        self.constant, self.fake = tuple(constant), fake
        self.register("fastkd")

    def register(self, library: str) -> None:
        """See :meth:`Loss.register`."""
        for name in (self.name, self._name):
            torch.library.register_fake(f"{library}::{name}", self._fake)
        torch.library.register_fake(f"{library}::{self.name}_backward", self._fake_backward)
        torch.library.register_fake(f"{library}::{self._name}_backward_into", lambda *_: None)
        torch.library.register_autograd(
            f"{library}::{self.name}", self._graph_backward, setup_context=self._graph_context
        )

    def compute(self, packed: list[Any]) -> tuple[Tensor, ...]:
        return self.raw()(*self.arguments.eager(packed))[:-1]

    def record(
        self, packed: list[Any], inputs: list[Tensor | None], inplace: bool
    ) -> tuple[Tensor, ...]:
        return _DifferentiableFunction.apply(self, packed, *inputs)

    def trace(self, packed: list[Any], inplace: bool) -> tuple[Tensor, ...]:
        return self.graph_op()(*self.arguments.graph(packed))[:-1]

    def gradients_of_results(self, grads: Sequence[Any]) -> list[Any]:
        """Of the differentiable results, as the raw backward op takes them."""
        return [g.contiguous() for i, g in enumerate(grads) if i not in self.constant]

    def _fake(self, *fields: Any) -> tuple[Tensor, ...]:
        return self.fake(**fake_values(self.arguments, fields))

    def _fake_backward(self, *arguments: Any) -> Tensor:
        given = len(self.arguments.fields) + self.arguments.traced
        return torch.empty_like(arguments[len(arguments) - given + self.places[0]])

    def _graph_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *results, numbers = output
        ctx.mark_non_differentiable(*(results[i] for i in self.constant), numbers)
        tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.inputs = [None if i in tensors else value for i, value in enumerate(inputs)]
        ctx.tensors = tensors
        ctx.save_for_backward(numbers, *(inputs[i] for i in tensors))

    def _graph_backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        numbers, *tensors = ctx.saved_tensors
        inputs = list(ctx.inputs)
        for i, tensor in zip(ctx.tensors, tensors, strict=True):
            inputs[i] = tensor
        if torch.is_grad_enabled() and not is_tracing(numbers):
            packed, place = self.arguments.untraced(inputs), self.places[0]
            packed[place] = None
            gradient = _by_reference(self, packed, inputs[place], grads[:-1])
            return tuple(gradient if i == place else None for i in range(len(inputs)))
        backward = self.graph_op("_backward")
        gradient = backward(numbers, *self.gradients_of_results(grads[:-1]), *inputs)
        return tuple(gradient if i == self.places[0] else None for i in range(len(inputs)))


class _DifferentiableFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, packed, logits):
        *results, numbers = op.raw()(*op.arguments.eager(packed))
        _keep(ctx, op, packed, ctx.needs_input_grad[2:])
        ctx.mark_non_differentiable(*(results[i] for i in op.constant))
        ctx.save_for_backward(numbers, logits)
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        op = ctx.op
        numbers, logits = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(*grads):
            return None, None, _by_reference(op, ctx.packed, logits, grads)
        gradient = gradient_for(logits)
        packed = _with(ctx.packed, op.places, [logits])
        op.raw("_backward_into")(
            gradient, numbers, *op.gradients_of_results(grads), *op.arguments.eager(packed)
        )
        memory.keep(gradient)
        return None, None, gradient


def _by_reference(op: Differentiable, kept: list[Any], logits: Tensor, grads: Sequence) -> Tensor:
    """The gradient of the definition: for second derivatives, and of a batch of gradients."""
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        if not higher:
            logits = logits.detach().requires_grad_()
        results = op.reference(**op.arguments.unpack(_with(kept, op.places, [logits])))
        pairs = [
            (result, grad)
            for i, (result, grad) in enumerate(zip(results, grads, strict=True))
            if i not in op.constant and result is not None
        ]
        outputs, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, logits, cotangents, create_graph=higher)[0]


class Plain:
    """An op without gradients: arguments by the schema, and a fake kernel."""

    def __init__(self, name: str, fake: Callable[..., tuple[Tensor, ...]]) -> None:
        self._name, self.fake = f"_{name}", fake
        self.arguments = Arguments(name)
        self.register("fastkd")

    def register(self, library: str) -> None:
        """See :meth:`Loss.register`."""
        torch.library.register_fake(f"{library}::{self._name}", self._fake)

    def __call__(self, rows: Tensor, given: dict[str, Any]) -> tuple[Tensor, ...]:
        """See :meth:`Op.__call__`."""
        packed = self.arguments.pack(rows, given)
        pack = self.arguments.graph if is_tracing(rows) else self.arguments.eager
        try:
            return getattr(torch.ops.fastkd, self._name)(*pack(packed))
        except RuntimeError as error:
            raise_as_python(error)

    def _fake(self, *fields: Any) -> tuple[Tensor, ...]:
        return self.fake(**fake_values(self.arguments, fields))
