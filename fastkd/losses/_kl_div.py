"""torch.nn.functional.kl_div: fused for the common cases, torch's own function for the others.

A call takes one of three paths:
  - torch's (``_torch_kl_div``): everything that the kernels do not support.
  - eager: ``_KlDiv``, an autograd Function around the op ``_kl_div``, which computes the loss and,
    in the same read, the gradients; backward scales them.
  - traced (torch.compile, torch.export): the op ``_kl_div_loss``, which computes only the loss. Its
    autograd formula uses torch's operations, so that an exported graph can be trained, and a
    compiled graph fuses it with the operations around it.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.nn import _reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastkd._ops.gradient import memory, scaled
from fastkd._ops.library import CUDA_ARCHITECTURES, transforms_active

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)
_TRACED = (*_PLAIN, FakeTensor)
#: The reductions as numbers, as the ops take them.
_NONE, _MEAN, _SUM, _BATCHMEAN = range(4)
_REDUCTIONS = {"none": _NONE, "mean": _MEAN, "sum": _SUM, "batchmean": _BATCHMEAN}

# torch's own functions, saved at import: users may replace torch.kl_div and F.kl_div by
# fastkd.kl_div.
_torch_terms = torch._C._VariableFunctions.kl_div
_functional_kl_div = F.kl_div


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
    read once, and each required gradient is written once. In all other cases (broadcasting, mixed
    dtypes, legacy arguments, tensor subclasses, torch.func transforms) torch's function is called.
    ``torch.nn.functional.kl_div`` may be replaced by this function.

    Kept for backward (G: the required gradients, which are computed with the loss):

    ========================  ====================  ==============  ==============================
    kept for the gradient of  ``input`` only        both            ``target`` only
    ========================  ====================  ==============  ==============================
    ``log_target=False``      G                     G, both inputs  G, both inputs
    the same, not reduced     ``target``            both inputs     both inputs
    ``log_target=True``       G                     G               G, ``target``
    ========================  ====================  ==============  ==============================

    The second row also holds for float16 (with ``log_target=True`` copies are kept). Only kept
    tensors must not be changed in place before backward; torch keeps at least the same ones. In the
    last row ``target`` is used only for second derivatives.

    Under torch.compile and torch.export the op ``fastkd::_kl_div_loss`` computes its gradients in
    backward and keeps ``target``, and ``input`` for the gradient of ``target``.

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
        The errors of torch.nn.functional.kl_div.

    >>> import torch, fastkd
    >>> x = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    >>> t = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    >>> round(fastkd.kl_div(x, t, reduction="batchmean").item(), 4)
    0.2554
    """
    code = _REDUCTIONS.get(reduction) if type(reduction) is str else None
    if (
        code is None
        or size_average is not None
        or reduce is not None
        or type(log_target) is not bool
    ):
        return _torch_kl_div(input, target, size_average, reduce, reduction, log_target)
    if torch.compiler.is_compiling():
        if not _traceable(input, target):
            return _torch_kl_div(input, target, size_average, reduce, reduction, log_target)
        if code == _MEAN:
            _warn_of_mean(3)
        return torch.ops.fastkd._kl_div_loss(input, target, log_target, code)
    if not _fusable(input, target):
        return _torch_kl_div(input, target, size_average, reduce, reduction, log_target)
    if code == _MEAN:
        _warn_of_mean(3)
    if (
        (input.requires_grad or target.requires_grad)
        and torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled()
    ):
        return _KlDiv.apply(input, target, log_target, code)
    return torch.ops.fastkd._kl_div(input, target, log_target, code, False, False)[0]


# Dynamo cannot trace warnings; a function with a constant result is run when the graph is traced.
@torch.compiler.assume_constant_result
def _warn_of_mean(stacklevel: int) -> None:
    warnings.warn(
        "reduction: 'mean' divides the total loss by both the batch size and the support size."
        "'batchmean' divides only by the batch size, and aligns with the KL div math "
        "definition.'mean' will be changed to behave the same as 'batchmean' in the next "
        "major release.",
        stacklevel=stacklevel,
    )


@torch.compiler.assume_constant_result
def _traced_transforms_active() -> bool:
    return transforms_active()


@torch.compiler.assume_constant_result
def _reduction_enum(size_average: bool | None, reduce: bool | None, reduction: str) -> int:
    if size_average is not None or reduce is not None:
        return _reduction.legacy_get_enum(size_average, reduce)
    return _reduction.get_enum("sum" if reduction == "batchmean" else reduction)


def _torch_kl_div(
    input: Any, target: Any, size_average: Any, reduce: Any, reduction: Any, log_target: Any
) -> Tensor:
    """torch.nn.functional.kl_div, statement for statement, on torch's own functions."""
    if has_torch_function_variadic(input, target):
        return handle_torch_function(
            _functional_kl_div,
            (input, target),
            input,
            target,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            log_target=log_target,
        )
    if size_average is None and reduce is None and reduction == "mean":
        _warn_of_mean(4)
    enum = _reduction_enum(size_average, reduce, reduction)
    loss = _torch_terms(input, target, enum, log_target=log_target)
    if reduction == "batchmean" and input.dim() != 0:
        loss = loss / input.size()[0]
    return loss


def _fusable(input: Any, target: Any) -> bool:
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
        and not transforms_active()
        and not torch.is_autocast_enabled(input.device.type)
    )


def _traceable(input: Any, target: Any) -> bool:
    """As _fusable, without guards on sizes: the op itself handles strides and empty tensors."""
    return (
        type(input) in _TRACED
        and type(target) in _TRACED
        and input.dtype == target.dtype
        and input.dtype in _FLOATS
        and input.device == target.device
        and _has_kernels(input)
        and input.dim() == target.dim()
        and all(guard_or_false(m == n) for m, n in zip(input.shape, target.shape, strict=True))
        and not _traced_transforms_active()
        and not torch.is_autocast_enabled(input.device.type)
    )


def _has_kernels(tensor: Tensor) -> bool:
    if tensor.device.type == "cuda":
        recent = torch.cuda.get_device_capability(tensor.device) >= (7, 5)
        return bool(CUDA_ARCHITECTURES) and recent and tensor.dtype != torch.float64
    return tensor.device.type == "cpu"


def _gradients(
    grad_output: Tensor,
    input: Tensor | None,
    target: Tensor,
    log_target: bool,
    reduction: int,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients by torch's formulas, differentiable in all three tensors.

    ``input`` is needed for the gradient of ``target`` only.
    """
    if reduction == _MEAN:
        grad_output = grad_output / target.numel()
    elif reduction == _BATCHMEAN and target.dim() > 0:
        grad_output = grad_output / target.size(0)
    mass = target.exp() if log_target else target
    by_input = -(grad_output * mass) if needs[0] else None
    if not needs[1]:
        return by_input, None
    assert input is not None
    if log_target:
        return by_input, grad_output * (mass * (target - input) + mass)
    log = torch.xlogy(grad_output, target).masked_fill(target == 0, 0.0)
    return by_input, log + grad_output * target / target - grad_output * input


class _KlDiv(torch.autograd.Function):
    """The eager path. :func:`kl_div` lists the tensors kept for backward.

    ``early``: the gradients are computed with the loss, and backward multiplies them by the
    gradient of the loss. It is False in float16, where a gradient divided by the number of elements
    would underflow before the loss scale is applied, and for unreduced losses of probabilities,
    where backward needs only ``target``.
    """

    @staticmethod
    def forward(ctx, input, target, log_target, reduction):
        need_input, need_target = ctx.needs_input_grad[:2]
        ctx.log_target, ctx.reduction = log_target, reduction
        ctx.early = input.dtype != torch.float16 and (log_target or reduction != _NONE)
        ops = torch.ops.fastkd
        if not ctx.early:
            loss = ops._kl_div(input, target, log_target, reduction, False, False)[0]
            input = input if need_target else None
            if log_target:  # copied: torch keeps e^target and target - input, so both may change
                with torch.enable_grad():
                    input = None if input is None else input.clone()
                    target = target.clone()
            ctx.save_for_backward(None, None, input, target)
            return loss
        gradient = memory.take(input) if need_input else None
        if gradient is not None:
            loss, target_gradient = ops._kl_div_into(
                gradient, input, target, log_target, reduction, need_target
            )
        else:
            loss, gradient, target_gradient = ops._kl_div(
                input, target, log_target, reduction, need_input, need_target
            )
        memory.keep(gradient)
        if not need_target:
            ctx.save_for_backward(gradient, None, None, None)
            return loss
        gradients = (gradient if need_input else None, target_gradient)
        if log_target:
            with torch.enable_grad():
                gradients = _LogTargetGradients.apply(input, target, gradients, reduction)
            input = target = None
        ctx.save_for_backward(*gradients, input, target)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        *gradients, input, target = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() or not _is_one_plain_tensor(grad_output):
            if target is None:
                found = [None if g is None else g * grad_output for g in gradients]
            else:
                found = _gradients(grad_output, input, target, ctx.log_target, ctx.reduction, needs)
        elif not ctx.early:
            found = torch.ops.fastkd._kl_div_backward(
                grad_output.contiguous(), input, target, ctx.log_target, ctx.reduction, *needs
            )
            found = [g if need else None for g, need in zip(found, needs, strict=True)]
        else:
            found = [None if g is None else _times(g, grad_output) for g in gradients]
        return *found, None, None


def _is_one_plain_tensor(grad_output: Tensor) -> bool:
    """Neither a batch of gradients (of a transform or ``is_grads_batched=True``) nor a subclass."""
    return not (
        torch.compiler.is_compiling()
        or type(grad_output) not in _PLAIN
        or transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(grad_output)
    )


def _times(gradient: Tensor, grad_output: Tensor) -> Tensor:
    """The product, in place unless the graph is retained."""
    if gradient.requires_grad:
        gradient = gradient.detach()
    if grad_output.dim() == 0:
        return scaled(gradient, grad_output)
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * grad_output
    return gradient.mul_(grad_output)


class _LogTargetGradients(torch.autograd.Function):
    """Makes the two gradients of a loss with log_target differentiable in its arguments.

    With m = scale e^target, the gradient of input is -m and that of target m (target - input) + m:
    their derivatives are sums of the two. The gradient of input is None where input is a constant;
    m is then computed from target if a second derivative is required.
    """

    @staticmethod
    def forward(ctx, input, target, gradients, reduction):
        ctx.set_materialize_grads(False)
        ctx.reduction = reduction
        ctx.save_for_backward(*gradients, target if gradients[0] is None else None)
        return gradients

    @staticmethod
    def backward(ctx, by_input, by_target):
        input_gradient, target_gradient, target = ctx.saved_tensors
        found_input = found_target = None
        if by_target is not None:
            if target is None:
                mass = -input_gradient
            else:
                scale = {_MEAN: target.numel(), _BATCHMEAN: target.size(0)}.get(ctx.reduction, 1)
                mass = target.exp() / scale
            found_target = by_target * (target_gradient + mass)
            found_input = -(by_target * mass) if ctx.needs_input_grad[0] else None
        if by_input is not None:
            more = by_input * input_gradient
            found_target = more if found_target is None else found_target + more
        return found_input, found_target, None, None


def _same_device(input: Tensor, target: Tensor) -> None:
    if input.device != target.device:
        raise ValueError(
            f"kl_div: target must be on the device of input, {input.device}, got {target.device}"
        )


@torch.library.register_fake("fastkd::_kl_div")
def _(input, target, log_target, reduction, input_gradient, target_gradient):
    _same_device(input, target)
    return (
        torch.empty_like(input) if reduction == _NONE else input.new_empty(()),
        torch.empty_like(input) if input_gradient else input.new_empty(0),
        torch.empty_like(target) if target_gradient else target.new_empty(0),
    )


@torch.library.register_fake("fastkd::_kl_div_into")
def _(gradient, input, target, log_target, reduction, target_gradient):
    _same_device(input, target)
    return (
        torch.empty_like(input) if reduction == _NONE else input.new_empty(()),
        torch.empty_like(target) if target_gradient else target.new_empty(0),
    )


@torch.library.register_fake("fastkd::_kl_div_backward")
def _(grad_output, input, target, log_target, reduction, input_gradient, target_gradient):
    _same_device(grad_output, target)
    return (
        torch.empty_like(target) if input_gradient else target.new_empty(0),
        torch.empty_like(target) if target_gradient else target.new_empty(0),
    )


@torch.library.register_fake("fastkd::_kl_div_loss")
def _(input, target, log_target, reduction):
    _same_device(input, target)
    return input.new_empty(input.shape if reduction == _NONE else ())


def _keep_for_loss(ctx, inputs, output):
    input, target, ctx.log_target, ctx.reduction = inputs
    ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, target)


def _gradients_of_loss(ctx, grad_output):
    needs = ctx.needs_input_grad[:2]
    found = _gradients(grad_output, *ctx.saved_tensors, ctx.log_target, ctx.reduction, needs)
    return *found, None, None


torch.library.register_autograd(
    "fastkd::_kl_div_loss", _gradients_of_loss, setup_context=_keep_for_loss
)
