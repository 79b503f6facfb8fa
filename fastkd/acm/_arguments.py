"""Arguments of gated routing: checks and layout."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkd._ops.arguments import check_dense
from fastkd._ops.arguments import to_integer as check_integer
from fastkd._ops.gradient import differentiable_gradients
from fastkd._ops.library import transforms_active
from fastkd.acm._kernels import ACTIVATIONS
from fastkd.acm._products import wide

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_float(function: str, name: str, value: Any) -> None:
    check_dense(function, name, value)
    if value.dtype not in _DTYPES:
        raise TypeError(
            f"{function}: {name} must be float32, bfloat16, float16 or float64, got "
            f"{str(value.dtype).removeprefix('torch.')}"
        )


def check_shape(function: str, name: str, value: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if value.shape != shape:
        raise ValueError(
            f"{function}: {name} must have shape {list(shape)}, got {list(value.shape)}"
        )
    if value.device != x.device:
        raise ValueError(f"{function}: {name} must be on {x.device} as x is, got {value.device}")


def check_learners(
    function: str,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    activation: str,
    bias: Tensor | None = None,
) -> torch.dtype:
    """Check the arguments and return the dtype that all promote to."""
    if not isinstance(activation, str):
        raise TypeError(f"{function}: activation must be a string, got {type(activation).__name__}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{function}: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}"
        )
    named = {"x": x, "w1": w1, "b1": b1, "w2": w2}
    if bias is not None:
        named["bias"] = bias
    for name, value in named.items():
        check_float(function, name, value)
    for name, value, words in (("w1", w1, "[N, D, b]"), ("w2", w2, "[N, b, D_out]")):
        if value.dim() != 3:
            raise ValueError(f"{function}: {name} must have shape {words}, got {list(value.shape)}")
    learners, inputs, width = w1.shape
    if learners == 0:
        raise ValueError(f"{function}: w1 must hold at least one learner, got {list(w1.shape)}")
    if x.dim() == 0 or x.size(-1) != inputs:
        raise ValueError(f"{function}: x must have shape [..., D = {inputs}], got {list(x.shape)}")
    check_shape(function, "w1", w1, w1.shape, x)
    check_shape(function, "b1", b1, (learners, width), x)
    check_shape(function, "w2", w2, (learners, width, w2.size(2)), x)
    dtype = x.dtype
    for value in named.values():
        if value.dtype != dtype:
            dtype = torch.promote_types(dtype, value.dtype)
    return dtype


def check_target(
    function: str, x: Tensor, w2: Tensor, target: Tensor, dtype: torch.dtype
) -> torch.dtype:
    check_float(function, "target", target)
    check_shape(function, "target", target, (*x.shape[:-1], w2.size(2)), x)
    return torch.promote_types(dtype, target.dtype)


def check_choices(choices: Any, x: Tensor) -> None:
    check_dense("acm.hard", "choices", choices)
    dtype = choices.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise TypeError(
            f"acm.hard: choices must have an integer dtype, got {str(dtype).removeprefix('torch.')}"
        )
    check_shape("acm.hard", "choices", choices, x.shape[:-1], x)


def check_module(function: str, name: str, value: Any) -> None:
    """Raise unless the value is a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{function}: {name} must be an nn.Module, got {type(value).__name__}")


def check_count(function: str, name: str, value: Any) -> int:
    value = check_integer(function, name, value)
    if value < 1:
        raise ValueError(f"{function}: {name} must be at least 1, got {value}")
    return value


def flat_rows(x: Tensor) -> Tensor:
    """``[rows, D]``."""
    return x.reshape(math.prod(x.shape[:-1]), x.size(-1))  # numel() would make them a constant


def requires_grad(*tensors: Tensor) -> bool:
    """Whether autograd must record a function of these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def by_definition(grad: Tensor) -> bool:
    """Whether a backward pass must be plain PyTorch: for second derivatives, or batched gradients.

    Batched gradients come from ``is_grads_batched`` and ``jacobian(vectorize=True)``.
    """
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() or transforms_active():
        return True
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(grad) or functorch.is_batchedtensor(grad)


def gradients_by_definition(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    grad: Tensor,
) -> Iterator[Tensor | None]:
    """Gradients of a function in plain PyTorch; under create_graph as functions of the inputs.

    Otherwise in float32 at least, as torch has no product of 16-bit tensors with sums in float32.
    """
    if torch.is_grad_enabled():
        return differentiable_gradients(function(*inputs), inputs, needs, grad)
    leaves = [
        value.detach().to(wide(value.dtype)).requires_grad_(need)
        for value, need in zip(inputs, needs, strict=True)
    ]
    with torch.enable_grad():
        out = function(*leaves)
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    found = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype)))
    return (
        next(found).to(value.dtype) if need else None
        for value, need in zip(inputs, needs, strict=True)
    )


def needed(values: tuple[Tensor, ...], needs: list[bool]) -> tuple[Tensor | None, ...]:
    """The gradients for autograd: None for those that are not needed."""
    return tuple(value if need else None for value, need in zip(values, needs, strict=False))[
        : len(needs)
    ]
