"""Losses over rows of logits: their gradients are computed together with their values."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.gradient import differentiable_gradients, memory, product, scaled
from fastkd._ops.hints import check_loss
from fastkd._ops.library import is_tracing
from fastkd._ops.op import Op, fake_values, keep, restored


class Loss(Op):
    """A loss over rows of logits whose gradients are computed together with its value.

    Args:
        name: of the raw op.
        differentiable: its tensors that gradients flow to, the student's logits first.
        reference: the definition; takes the raw op's fields by name, choices as names.
        precision: tensors of which one in float64 makes the loss float64.
        together: fields with one number a row whose gradients the kernel always computes together.
        overwrites: whether the kernel may write the gradient over the student's logits.
    """

    kind = "loss"

    def __init__(
        self,
        name: str,
        differentiable: Sequence[str],
        reference: Callable[..., Any],
        *,
        precision: Sequence[str],
        together: Sequence[str] = (),
        absent: Mapping[str, Any] | None = None,
        overwrites: bool = False,
    ) -> None:
        super().__init__(name, differentiable, reference, absent)
        self.overwrites = overwrites
        self.hints = check_loss
        self.precision = tuple(precision)
        self.one_a_row = frozenset(differentiable.index(field) for field in together)
        self._together = sum(1 << differentiable.index(field) for field in together)
        self.register("fastkd")

    def register(self, library: str) -> None:
        """Register the fake kernels and the autograd formula of graphs for a library's raw ops."""
        for name in (self.name, self._name):
            torch.library.register_fake(f"{library}::{name}", self._fake)
        torch.library.register_fake(f"{library}::{self._name}_into", self._fake_into)
        torch.library.register_autograd(
            f"{library}::{self.name}", self._graph_backward, setup_context=self._graph_context
        )

    def wanted(self, needs: Sequence[bool]) -> int:
        """The bit mask ``gradients`` of the raw op."""
        bits = 0
        for i, need in enumerate(needs):
            if need:
                bits |= 1 << i
        return bits | self._together if bits & self._together else bits

    def compute(self, packed: list[Any]) -> Tensor:
        return self.raw()(*self.arguments.eager(packed), 0)[0]

    def record(self, packed: list[Any], inputs: list[Tensor | None], inplace: bool) -> Tensor:
        if inplace:
            self.check_overwritten(packed[self.places[0]])
        return _LossFunction.apply(self, packed, inplace, *inputs)

    def trace(self, packed: list[Any], inplace: bool) -> Tensor:
        needs, inputs = [], self.inputs(packed)
        if torch.is_grad_enabled():
            needs = [x is not None and x.requires_grad for x in inputs]
        # An exported graph needs the op's own autograd formula, so that it can be trained.
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
        # An exported graph is run with other tensors than it was traced with. They may require
        # other gradients, and second derivatives.
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
        """Gradients by the definition, which can be differentiated again."""
        packed = self.arguments.untraced(fields)
        higher, inputs = torch.is_grad_enabled(), self.inputs(packed)
        with torch.enable_grad():
            loss = self.reference(**self.arguments.unpack(packed))
        wanted = [x for x, need in zip(inputs, needs, strict=True) if need and x is not None]
        names = [
            self.arguments.fields[i] for i, need in zip(self.places, needs, strict=True) if need
        ]
        found = torch.autograd.grad(loss, wanted, grad_output, create_graph=higher)
        return dict(zip(names, found, strict=True))


class _LossFunction(torch.autograd.Function):
    """The gradients are computed with the loss; backward multiplies them by the factors left.

    Kept until backward: the gradients, and for second derivatives the op's arguments; with
    ``inplace`` only the gradients.
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
        ctx.inplace = inplace
        if inplace:
            ctx.op = op
            torch.autograd.graph.increment_version(student)
            ctx.save_for_backward(*computed)
        else:
            if needs[0]:
                memory.keep(computed[0])
            keep(ctx, op, packed, needs)
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
            loss = op.reference(**op.arguments.unpack(restored(ctx.packed, op.places, inputs)))
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
