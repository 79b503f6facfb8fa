"""Kernels of gated routing, on the backends that have them."""

import math
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.library import CUDA_ARCHITECTURES, raise_as_python

#: The dtypes of the kernels; other dtypes use torch's products.
DTYPES: dict[str, tuple[torch.dtype, ...]] = {"cpu": (torch.float32,)}
if CUDA_ARCHITECTURES:
    DTYPES["cuda"] = (torch.float32, torch.bfloat16, torch.float16)


#: Activations, at the numbers that the raw ops take; see csrc/math/activation.h.
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "identity")
_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


def _multiplied_by_cpu(dtype: str) -> bool:
    asks = f"_is_mkldnn_{dtype}_supported"  # missing where torch was built without oneDNN
    return hasattr(torch.ops.mkldnn, asks) and bool(getattr(torch.ops.mkldnn, asks)())


#: Whether torch's 16-bit products are vectorised on this processor; otherwise they are scalar.
CPU_PRODUCTS = {
    torch.bfloat16: _multiplied_by_cpu("bf16"),
    torch.float16: _multiplied_by_cpu("fp16"),
}


def product_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of products, on x's device, of operands that promote to a dtype."""
    one_by_one = x.device.type == "cpu" and not CPU_PRODUCTS.get(dtype, True)
    return torch.float32 if one_by_one and not has_kernels(x, dtype) else dtype


_PLAIN = (Tensor, torch.nn.Parameter)


def traced(x: Tensor) -> bool:
    """Whether values cannot be read: while compiling, and for fake and meta tensors."""
    return torch.compiler.is_compiling() or type(x) not in _PLAIN or x.is_meta


def has_kernels(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether fastkd has kernels for this dtype on x's device."""
    return dtype in DTYPES.get(x.device.type, ())


#: Multiply-adds of all rows and learners from which torch's products over prefixes are faster on a
#: GPU. cuBLAS does about twice as many a second as the kernels' tiles (780 and 350 TFLOP/s in 16
#: bits on an H200, an estimate), but needs the lengths of the prefixes on the host: a
#: synchronisation, after which the GPU waits for some 50 us until work arrives again. Ten times
#: that is saved from here on.
_MANY_PRODUCTS = 1.5e11


def products_win(x: Tensor, w1: Tensor, w2: Tensor) -> bool:
    """Whether torch's own products are the faster way to run learners, and are allowed.

    They synchronise, which a graph under capture and a compiled one cannot. In float32 both do the
    same arithmetic.
    """
    if not x.is_cuda or x.element_size() != 2 or traced(x):
        return False
    sizes = (math.prod(x.shape[:-1]), x.size(-1), w1.size(0), w1.size(2), w2.size(2))
    return worth_waiting(*sizes) and not torch.cuda.is_current_stream_capturing()


def worth_waiting(rows: int, inputs: int, learners: int, width: int, outputs: int) -> bool:
    """Whether so many products repay a synchronisation."""
    return rows * learners * width * (inputs + outputs) >= _MANY_PRODUCTS


def value(
    operands: tuple[Tensor, ...], bias: Tensor | None, choices: Tensor, activation: str
) -> Tensor | None:
    """acm's result in one call, or None where the arguments need checks or conversions first."""
    x = operands[0]
    if not isinstance(activation, str) or activation not in _NUMBERS:
        return None
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or not has_kernels(x, x.dtype):
        return None
    for other in (*operands, choices) if bias is None else (*operands, bias, choices):
        if type(other) not in _PLAIN or other.device != x.device or other.layout != torch.strided:
            return None
    if (
        x.is_cuda
        and operands[1].dim() == operands[3].dim() == 3
        and products_win(x, *operands[1::2])
    ):
        return None
    try:
        return torch.ops.fastkd._acm_value(*operands, bias, choices, _NUMBERS[activation])
    except RuntimeError as error:
        raise_as_python(error)


def route(choices: Tensor, learners: int) -> tuple[Tensor, Tensor]:
    """Rows by descending choice, and how many run each learner; see gated_routing_entry.h."""
    flat = choices.reshape(-1)
    if flat.dtype not in (torch.int64, torch.int32):
        flat = flat.long()
    try:
        return torch.ops.fastkd._acm_route(flat.contiguous(), learners)
    except RuntimeError as error:
        raise_as_python(error)


def forward(
    operands: tuple[Tensor, ...],
    bias: Tensor | None,
    order: Tensor,
    counts: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs ``[rows, D_out]`` and, if kept, pre-activations in sorted order.

    These are ``[N, rows, b]``, or packed where the host may know how many there are.
    """
    bias = None if bias is None else bias.contiguous()
    operands = tuple(value.contiguous() for value in operands)
    packed, number = not traced(order), _NUMBERS[activation]
    return torch.ops.fastkd._acm_rows(*operands, bias, order, counts, number, keep, packed)


def backward(
    grad: Tensor,
    operands: tuple[Tensor, ...],
    order: Tensor,
    counts: Tensor,
    pre_activations: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, w1, b1 and w2; empty where not needed."""
    operands = tuple(value.contiguous() for value in operands)
    return torch.ops.fastkd._acm_rows_backward(
        grad.contiguous(), *operands, order, counts, pre_activations, _NUMBERS[activation], *needs
    )


def _check_device(x: Tensor, *others: Tensor | None) -> None:
    """Raise for tensors on different devices: one meta tensor suffices to call the fake kernel."""
    for other in others:
        if other is not None and other.device != x.device:
            raise RuntimeError(
                f"ValueError: acm.hard: all tensors must be on {x.device} as x is, got "
                f"{other.device}"
            )


@torch.library.register_fake("fastkd::_acm_route")
def _(choices: Tensor, learners: int) -> tuple[Tensor, Tensor]:
    return (
        choices.new_empty(choices.shape, dtype=torch.int32),
        choices.new_empty(learners + 1, dtype=torch.int32),
    )


@torch.library.register_fake("fastkd::_acm_value")
def _(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    bias: Tensor | None,
    choices: Tensor,
    activation: int,
) -> Tensor | None:
    _check_device(x, w1, b1, w2, bias, choices)
    return x.new_empty((*x.shape[:-1], w2.size(2)))


@torch.library.register_fake("fastkd::_acm_rows")
def _(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    bias: Tensor | None,
    order: Tensor,
    counts: Tensor,
    activation: int,
    keep: bool,
    packed: bool = False,
) -> tuple[Tensor, Tensor]:
    _check_device(x, w1, b1, w2, bias, order, counts)
    rows: Any = math.prod(x.shape[:-1])
    learners = w1.size(0) if keep else 0
    if keep and packed and x.device.type == "cpu":
        learners, rows = 1, torch.library.get_ctx().new_dynamic_size()
    return x.new_empty((*x.shape[:-1], w2.size(2))), x.new_empty((learners, rows, w1.size(2)))


@torch.library.register_fake("fastkd::_acm_rows_backward")
def _(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    order: Tensor,
    counts: Tensor,
    pre_activations: Tensor,
    activation: int,
    *needs: bool,
) -> tuple[Tensor, ...]:
    _check_device(x, grad, w1, b1, w2, order, counts, pre_activations)
    return tuple(
        value.new_empty(value.shape if need else 0)
        for value, need in zip((x, w1, b1, w2), needs, strict=True)
    )
