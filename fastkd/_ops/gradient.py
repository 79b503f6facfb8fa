"""What every op's backward shares: gradients computed in the forward call, still to be scaled."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.library import is_batched

_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)
_release_memory_of_kernels = torch.ops.fastkd._release_memory


def _plain_cpu(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"


def _holders(tensor: Tensor) -> tuple[int, int]:
    """How many tensors share this one's storage, and how many Python objects its storage object.

    A storage object that somebody keeps adds to the second number only. Both also count what this
    function itself holds: compare them with `_UNSHARED`.
    """
    storage = tensor.untyped_storage()
    return _use_count(storage._cdata), sys.getrefcount(storage)


_UNSHARED = _holders(torch.empty(1)) if _use_count is not None else None


class GradientMemory:
    """Keeps the memory of the last large CPU gradient for the next step.

    A training loop frees a gradient and asks for the same again. The system takes back memory of
    that size and hands it out page by page, zeroed, which costs more than computing the gradient.
    Memory is given out again only when no tensor, array, graph or storage object refers to it any
    more and no other process can have mapped it, and only for a gradient of the same shape and
    dtype; another shape replaces it. At most one gradient is kept; :func:`fastkd.release_memory`
    lets go of it.
    """

    SMALLEST = 128 << 10  # bytes; below it the allocator keeps freed memory itself

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def take(self, like: Tensor) -> Tensor | None:
        """A tensor of like's shape, strides and dtype in memory that nothing refers to, or None."""
        if torch.compiler.is_compiling() or _use_count is None or not _plain_cpu(like):
            return None
        try:
            kept = self._kept.pop()  # one step at a time gets it
        except IndexError:
            return None
        fits = kept.shape == like.shape and kept.dtype == like.dtype and kept.device == like.device
        if not fits or kept.stride() != torch.empty_like(like, device="meta").stride():
            return None
        # Shared memory: sent through a queue, another process may still read it.
        if _holders(kept) != _UNSHARED or kept.is_shared():
            return None
        enough = kept.untyped_storage().nbytes() >= kept.numel() * kept.itemsize
        return kept if enough else None

    def keep(self, gradient: Tensor | None) -> None:
        """Remember where this gradient lies."""
        if (
            gradient is None
            or torch.compiler.is_compiling()
            or _use_count is None
            or not _plain_cpu(gradient)
        ):
            return
        if gradient.numel() * gradient.itemsize >= self.SMALLEST:
            self._kept[:] = [gradient.detach()]

    def release(self) -> None:
        """Give the kept memory back to the system."""
        self._kept.clear()
        _release_memory_of_kernels()


memory = GradientMemory()


def gradient_for(tensor: Tensor) -> Tensor:
    """Memory for a gradient of this tensor, used again where possible."""
    kept = memory.take(tensor)
    return torch.ops.fastkd._gradient_like(tensor) if kept is None else kept


def release_memory() -> None:
    """Give back the memory of the last large CPU gradient, which is kept for the next step.

    Call it after training, or before a phase that needs all memory. At most one gradient's memory
    is kept, and none below 128 KiB; and what the backward pass of :func:`fastkd.acm.hard` works
    in, the largest so far: about the weights' size and a few hundred hidden rows of each learner.

    >>> import fastkd
    >>> fastkd.release_memory()
    """
    memory.release()


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Gradient x factor (a scalar, or one a row), as a backward pass returns it.

    In place, since the gradient was computed for this; a copy where the graph lives on and may ask
    for it again. A factor of 1 costs nothing. While compiling and under vmap (batched gradients)
    it is a product.
    """
    if torch.compiler.is_compiling() or is_batched(factor):
        return product(gradient, factor)
    if torch._C._autograd._get_current_graph_task_keep_graph():
        gradient = gradient.clone()
    torch.ops.fastkd._scale_rows_(gradient, factor)
    return gradient


def product(gradient: Tensor, factor: Tensor) -> Tensor:
    """Gradient x factor, a scalar or one a row, in the gradient's dtype."""
    if factor.dim() and factor.dim() < gradient.dim():
        factor = factor.unsqueeze(-1)
    return (gradient * factor).to(gradient.dtype)


def differentiable_gradients(
    loss: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    grad_output: Tensor | Sequence[Tensor],
) -> Iterator[Tensor | None]:
    """Gradients of what plain PyTorch computed, as functions of inputs, for create_graph=True."""
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(loss, wanted, grad_output, create_graph=True))
    return (next(found) if need else None for need in needs)


@torch.library.register_fake("fastkd::_scale_rows_")
def _(gradient, factor):
    return None


@torch.library.register_fake("fastkd::_gradient_like")
def _(like):
    return torch.empty_like(like)
