"""The way that a call with logits of heads takes: as in fastkd/_ops/op.py."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.gradient import product, scaled
from fastkd._ops.library import (
    is_batched,
    is_tracing,
    raise_as_python,
    traced_transforms_active,
    transforms_active,
)
from fastkd._ops.linear import graph
from fastkd._ops.linear.call import Call, make
from fastkd._ops.linear.driver import check_empty, run_backward, run_loss, run_rows
from fastkd._ops.linear.products import converted
from fastkd._ops.shards import Shards


def run(
    op: Any,
    given: dict[str, Any],
    inplace: bool = False,
    stats: bool = False,
    shards: Shards | None = None,
) -> Any:
    """The op's result; for a loss with ``stats`` a tuple, with the results of token_stats."""
    try:
        call = make(op, given, stats, shards)
        if inplace:
            raise ValueError(
                f"{op.name}: inplace needs logits that are stored; those of LinearLogits are not"
            )
        return _run(call)
    except RuntimeError as error:
        raise_as_python(error)


def define(op: Any, given: dict[str, Any]) -> Any:
    """The op's result by its definition, of logits that are stored whole."""
    return make(op, given).define()


def _run(call: Call) -> Any:
    head = call.sides[0].linear.hidden
    if torch.compiler.is_compiling():
        if traced_transforms_active():
            return _whole(call)
    elif transforms_active():
        check_empty(call)
        return _whole(call)
    elif head.is_meta:
        check_empty(call)
    inputs = call.inputs()
    wanted = [x is not None and x.requires_grad for x in inputs]
    if not torch.is_grad_enabled():
        wanted = [False] * len(inputs)
    if is_tracing(head):
        return _results(call, graph.trace(call, wanted))
    hints = getattr(call.op, "hints", None)
    if hints is not None:
        hints(call.op.name, call.rows, _named(call))
    if any(wanted):
        found = _LinearFunction.apply(call, *inputs)
        return found if call.kind != "loss" or call.stats else found[0]
    if call.kind != "loss":
        return run_rows(call)
    results = run_loss(call, wanted)
    return (results.loss, *results.stats) if call.stats else results.loss


def _named(call: Call) -> dict[str, Any]:
    return dict(zip(call.op.arguments.fields, call.packed, strict=False))


def _results(call: Call, found: list[Tensor]) -> Any:
    if call.kind != "loss":
        return tuple(found)
    return (found[0], *found[2:4]) if call.stats else found[0]


def _whole(call: Call) -> Any:
    """The result under a transform, of logits that are stored whole."""
    call.check_not_split()
    if call.stats:
        raise NotImplementedError(
            "linear_softmax_divergence: return_stats is not available under torch.func transforms"
        )
    if call.kind == "plain":
        return call.op.raw()(*call.op.arguments.eager(call.dense()))
    return call.define()


class _LinearFunction(torch.autograd.Function):
    """A loss keeps its gradients until backward; other ops compute the logits again there.

    Kept besides: the inputs.
    """

    @staticmethod
    def forward(ctx, call, *inputs):
        needs = ctx.needs_input_grad[1:]
        ctx.again = call.again
        gradients: Sequence[Tensor | None] = ()
        pending = None
        if call.kind == "loss":
            found = run_loss(call, [False] * len(needs) if ctx.again else needs)
            gradients, pending = found.gradients, found.pending
            results = (found.loss, *found.stats)
            ctx.mark_non_differentiable(*found.stats)
        else:
            results = run_rows(call)
            ctx.mark_non_differentiable(*(results[i] for i in call.op.constant))
        # Autograd saves what needs a gradient. It cannot save some others, such as those made under
        # torch.inference_mode.
        pairs = list(zip(inputs, needs, strict=True))
        ctx.call = call.with_inputs([None if need else x for x, need in pairs])
        saved = [x if need else None for x, need in pairs]
        ctx.save_for_backward(pending, *saved, *([] if ctx.again else gradients))
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        needs = ctx.needs_input_grad[1:]
        pending, *saved = ctx.saved_tensors
        mine, gradients = saved[: len(needs)], saved[len(needs) :]
        others = zip(mine, ctx.call.inputs(), strict=True)
        inputs = [other if x is None else x for x, other in others]
        if all(grad is None for grad in grads):
            return None, *[None] * len(needs)
        call = ctx.call.with_inputs(inputs)
        if torch.is_grad_enabled():
            return None, *graph.by_definition(call, grads, needs)
        if ctx.again:
            if is_batched(*grads):
                call.check_not_split()
                leaves = [
                    x.detach().requires_grad_() if need else x
                    for x, need in zip(inputs, needs, strict=True)
                ]
                found = graph.by_definition(call.with_inputs(leaves), grads, needs)
            else:
                found = run_backward(call, _filled(call, grads), needs)
        else:
            grad = grads[0] if pending is None else grads[0] * pending
            each = getattr(call.op, "one_a_row", ())
            found = [
                None if x is None else (product if slot.bit in each else scaled)(x, grad)
                for slot, x in zip(call.slots, gradients, strict=True)
            ]
        return None, *[
            None if x is None or not need else converted(x, tensor.dtype)
            for x, tensor, need in zip(found, inputs, needs, strict=True)
        ]


def _filled(call: Call, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients of the results, zeros where there are none."""
    if call.kind == "loss":
        return [grad for grad in grads if grad is not None][:1]
    fields = dict(zip(call.op.arguments.fields, call.packed, strict=False))
    likes = call.op.fake(**fields)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, likes, strict=False)]
