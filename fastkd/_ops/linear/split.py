"""A chunk's results where the vocabulary is split across processes: collectives in each chunk."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.linear.call import Call

_AUTOGRAD = ("AutogradFunctionality", "AutogradOther", "AutogradCPU", "AutogradCUDA")


@contextmanager
def _recording() -> Iterator[None]:
    """Record gradients, also inside a custom op of a graph, in which autograd is switched off."""
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in (*_AUTOGRAD, "ADInplaceOrView"):
        excluded = excluded.remove(getattr(keys, name))
    included = torch._C._dispatch_tls_local_include_set()
    # Tensors saved here are used at once: the caller's hooks (of a checkpoint, say) are for others.
    own = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, Tensor.detach)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad(), own:
        yield


def _named(call: Call, values: list[Any]) -> dict[str, Any]:
    return dict(zip(call.op.arguments.fields, values, strict=True))


def loss_of_split(call: Call, values: list[Any], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """The loss of a chunk and the op's gradients by number, empty where not needed.

    The gradient of logits that a head computes overwrites them, where the op can.
    """
    op, values, leaves = call.op, list(values), []
    for place, need in zip(op.places, needs, strict=True):
        value = values[place]
        if need:
            listed = isinstance(value, (list, tuple))
            leaf = (value[0] if listed else value).detach().requires_grad_()
            values[place] = [leaf] if listed else leaf
            leaves.append(leaf)
    if not leaves:
        return (op.sharded(op, _named(call, values), call.shards, False),)
    inplace = needs[0] and any(side.place == op.places[0] for side in call.sides)
    with _recording():
        loss = op.sharded(op, _named(call, values), call.shards, inplace)
        found = iter(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    return (loss.detach(), *(next(found) if need else loss.new_empty(0) for need in needs))


def results_of_split(call: Call, values: list[Any]) -> tuple[Tensor, ...]:
    """The results of a chunk, of an op that is no loss."""
    return call.op.sharded(call.op, _named(call, values), call.shards, False)


def split_gradient(call: Call, values: list[Any], grads: Sequence[Tensor | None]) -> Tensor:
    """The gradient of a chunk's logits, from those of the results that have one."""
    op, place, values = call.op, call.op.places[0], list(values)
    values[place] = leaf = values[place].detach().requires_grad_()
    with _recording():
        results = results_of_split(call, values)
        free = [x for i, x in enumerate(results) if i not in op.constant]
        pairs = [(x, g) for x, g in zip(free, grads, strict=True) if x is not None]
        return torch.autograd.grad([x for x, _ in pairs], leaf, [g for _, g in pairs])[0]
