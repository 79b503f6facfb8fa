"""acm, acm.soft and acm.prefix_loss as one op with its own gradient in exported graphs.

torch.export keeps the ops that an autograd.Function calls, and drops its backward, so that a graph
of the kernels alone could not be trained.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkd.acm._products import wide

#: By name: from (x, w1, b1, w2, other, bias, activation, flag) to the public function's result.
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {}


def exporting(*tensors: Tensor | None) -> bool:
    """Whether torch.export traces a call that autograd must record."""
    return (
        torch.compiler.is_exporting()
        and torch.is_grad_enabled()
        and any(x is not None and x.requires_grad for x in tensors)
    )


def exportable(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function for :func:`call` under a name."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        _FUNCTIONS[name] = function
        return function

    return register


@torch.library.custom_op("fastkd::_acm_exported", mutates_args=())
def call(
    name: str,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    other: Tensor,
    bias: Tensor | None,
    activation: str,
    flag: bool,
) -> Tensor:
    """The function's value."""
    with torch.no_grad():
        return _FUNCTIONS[name](x, w1, b1, w2, other, bias, activation, flag)


@call.register_fake
def _(
    name: str,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    other: Tensor,
    bias: Tensor | None,
    activation: str,
    flag: bool,
) -> Tensor:
    dtype = x.dtype
    for value in (w1, b1, w2, bias, other if name == "acm.prefix_loss" else None):
        dtype = dtype if value is None else torch.promote_types(dtype, value.dtype)
    if name == "acm.prefix_loss":
        return x.new_empty(w1.size(0) + 1, dtype=wide(dtype))
    return x.new_empty((*x.shape[:-1], w2.size(2)), dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    name, *tensors, activation, flag = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = name, activation, flag


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by the function's own backward, after another forward pass."""
    name, *options = ctx.options
    needs = ctx.needs_input_grad[1:7]
    again = torch.is_grad_enabled()
    leaves = [
        value if again or value is None else value.detach().requires_grad_(need)
        for value, need in zip(ctx.saved_tensors, needs, strict=True)
    ]
    with torch.enable_grad():
        out = _FUNCTIONS[name](*leaves, *options)
    wanted = [value for value, need in zip(leaves, needs, strict=True) if need]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=again))
    return None, *(next(found) if need else None for need in needs), None, None


call.register_autograd(_backward, setup_context=_setup)
