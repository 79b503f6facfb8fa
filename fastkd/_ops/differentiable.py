"""Ops over logits with a backward pass of their own, which reads the logits again."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.gradient import gradient_for, memory
from fastkd._ops.library import is_batched, is_tracing
from fastkd._ops.op import Op, fake_values, keep, restored


class Differentiable(Op):
    """An op over logits with a backward pass of its own, which reads the logits again.

    The raw op returns its results and, last, a tensor of numbers for the backward pass. The raw
    backward op takes it, the gradient of each differentiable result, and the fields.

    Args:
        name: of the raw op.
        logits: the tensor that a gradient flows to.
        reference: the definition; takes the fields by name and returns the results.
        constant: the results without a gradient.
        fake: the results for fake tensors, from the fields by name.
        absent: see :class:`fastkd._ops.arguments.Arguments`.
        count: how many results there are.
        unit: dimensions of the logits, before the vocabulary, that the op reads as one text.
    """

    kind = "differentiable"

    def __init__(
        self,
        name: str,
        logits: str,
        reference: Callable[..., Any],
        *,
        fake: Callable[..., tuple[Tensor, ...]],
        constant: Sequence[int] = (),
        absent: Mapping[str, Any] | None = None,
        count: int = 2,
        unit: int = 0,
    ) -> None:
        super().__init__(name, (logits,), reference, absent)
        self.results, self.unit, self.axes = count, unit, (0,) * count
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
        """The gradients of the differentiable results, for the raw backward op."""
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
        keep(ctx, op, packed, ctx.needs_input_grad[2:])
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
        packed = restored(ctx.packed, op.places, [logits])
        op.raw("_backward_into")(
            gradient, numbers, *op.gradients_of_results(grads), *op.arguments.eager(packed)
        )
        memory.keep(gradient)
        return None, None, gradient


def _by_reference(op: Differentiable, kept: list[Any], logits: Tensor, grads: Sequence) -> Tensor:
    """The gradient by the definition: for second derivatives and batches of gradients."""
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        if not higher:
            logits = logits.detach().requires_grad_()
        results = op.reference(**op.arguments.unpack(restored(kept, op.places, [logits])))
        pairs = [
            (result, grad)
            for i, (result, grad) in enumerate(zip(results, grads, strict=True))
            if i not in op.constant and result is not None
        ]
        outputs, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, logits, cotangents, create_graph=higher)[0]
