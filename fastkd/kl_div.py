"""torch.nn.functional.kl_div, fused where that pays and torch's own everywhere else."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._gradient import memory, scaled
from fastkd._library import CUDA_ARCHITECTURES, transforms_active

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    r"""Drop-in for :func:`torch.nn.functional.kl_div`, argument for argument.

    The value of an element is :math:`t (\log t - x)` for a probability :math:`t`, or
    :math:`e^t (t - x)` with ``log_target=True``, where :math:`x` is ``input``, a log-probability.
    Values, NaNs, shapes, dtypes, broadcasting, warnings, errors, gradients of both arguments and
    second derivatives are torch's.

    Two contiguous CPU or CUDA tensors of one shape and floating dtype (float64 on the CPU only) are
    read once, and each gradient asked for is written once. Anything else (broadcasting, mixed
    dtypes, legacy arguments, tensor subclasses, torch.func transforms) is handed to torch as it is.

    Args:
        input: log-probabilities, any shape.
        target: probabilities, or log-probabilities with ``log_target=True``; broadcastable.
        size_average: deprecated by torch, see ``reduction``.
        reduce: deprecated by torch, see ``reduction``.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` (over elements) or ``"batchmean"`` (over
            ``input.size(0)``: the mathematical definition).
        log_target: whether ``target`` is in log space.

    Returns:
        A scalar, or with ``reduction="none"`` a tensor of the inputs' shape, in their dtype.

    Raises:
        What torch raises.

    >>> import torch, fastkd
    >>> x = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    >>> t = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    >>> round(fastkd.kl_div(x, t, reduction="batchmean").item(), 4)
    0.2554
    """
    if (
        size_average is not None
        or reduce is not None
        or reduction not in ("none", "sum", "mean", "batchmean")
        or not _fusable(input, target)
    ):
        return F.kl_div(input, target, size_average, reduce, reduction, log_target)
    if reduction == "mean":
        warnings.warn(
            "reduction: 'mean' divides the total loss by both the batch size and the support size."
            "'batchmean' divides only by the batch size, and aligns with the KL div math "
            "definition.'mean' will be changed to behave the same as 'batchmean' in the next "
            "major release.",
            stacklevel=2,
        )
    scale = 1.0
    if reduction == "mean":
        scale = 1 / input.numel()
    elif reduction == "batchmean":
        scale = 1 / input.size(0)
    if torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
        return _KlDiv.apply(input, target, log_target, reduction, scale)
    return torch.ops.fastkd._kl_div(
        input, target, log_target, reduction != "none", scale, False, False
    )[0]


def _fusable(input: Tensor, target: Tensor) -> bool:
    return (
        type(input) in _PLAIN
        and type(target) in _PLAIN
        and input.dtype == target.dtype
        and input.dtype in _FLOATS
        and input.device == target.device
        and _has_kernels(input)
        and input.shape == target.shape
        and input.numel() > 0
        and input.dim() > 0
        and input.is_contiguous()
        and target.is_contiguous()
        and (torch.compiler.is_compiling() or not transforms_active())
        and not torch.is_autocast_enabled(input.device.type)
    )


def _has_kernels(tensor: Tensor) -> bool:
    if tensor.device.type == "cuda":
        recent = torch.cuda.get_device_capability(tensor.device) >= (7, 5)
        return bool(CUDA_ARCHITECTURES) and recent and tensor.dtype != torch.float64
    return tensor.device.type == "cpu"


class _KlDiv(torch.autograd.Function):
    """With a reduction, gradients come with the loss and backward scales them.

    Without one, and in float16 (where a gradient divided by the number of elements would vanish
    before a loss scaler lifts it), they are computed in backward.
    """

    @staticmethod
    def forward(ctx, input, target, log_target, reduction, scale):
        early = reduction != "none" and input.dtype != torch.float16
        need_input, need_target = ctx.needs_input_grad[:2]
        reduce, ops = reduction != "none", torch.ops.fastkd
        need_input, need_target = early and need_input, early and need_target
        gradient = memory.take(input) if need_input else None
        if gradient is not None:
            loss, target_gradient = ops._kl_div_into(
                gradient, input, target, log_target, scale, need_target
            )
        else:
            loss, gradient, target_gradient = ops._kl_div(
                input, target, log_target, reduce, scale, need_input, need_target
            )
        memory.keep(gradient)
        ctx.early, ctx.log_target, ctx.reduction, ctx.scale = early, log_target, reduction, scale
        ctx.save_for_backward(input, target, gradient, target_gradient)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        input, target, *gradients = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return *_differentiable_gradients(ctx, input, target, grad_output), None, None, None
        if not ctx.early:
            gradients = torch.ops.fastkd._kl_div_backward(
                grad_output.contiguous(), input, target, ctx.log_target, ctx.scale, *needed
            )
        else:
            gradients = [
                scaled(g, grad_output) if need else None
                for g, need in zip(gradients, needed, strict=True)
            ]
        found = [g if need else None for g, need in zip(gradients, needed, strict=True)]
        return *found, None, None, None


def _differentiable_gradients(ctx, input, target, grad_output):
    """The gradients as functions of both inputs, for create_graph=True: torch's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = F.kl_div(input, target, reduction=ctx.reduction, log_target=ctx.log_target)
    wanted = [x for x, need in zip((input, target), ctx.needs_input_grad, strict=False) if need]
    found = iter(torch.autograd.grad(loss, wanted, grad_output, create_graph=True))
    return tuple(next(found) if need else None for need in ctx.needs_input_grad[:2])


@torch.library.register_fake("fastkd::_kl_div")
def _(input, target, log_target, reduce, scale, input_gradient, target_gradient):
    return (
        input.new_empty(()) if reduce else torch.empty_like(input),
        torch.empty_like(input) if input_gradient else input.new_empty(0),
        torch.empty_like(target) if target_gradient else target.new_empty(0),
    )


@torch.library.register_fake("fastkd::_kl_div_into")
def _(gradient, input, target, log_target, scale, target_gradient):
    target_like = torch.empty_like(target) if target_gradient else target.new_empty(0)
    return input.new_empty(()), target_like


@torch.library.register_fake("fastkd::_kl_div_backward")
def _(grad_output, input, target, log_target, scale, input_gradient, target_gradient):
    return (
        torch.empty_like(input) if input_gradient else input.new_empty(0),
        torch.empty_like(target) if target_gradient else target.new_empty(0),
    )
