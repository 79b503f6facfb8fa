"""Code shared by the ops' backward passes: scaling and memory of precomputed gradients."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.library import is_batched

_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)
_release_memory_of_kernels = torch.ops.fastkd._release_memory


def savable(values: Tensor) -> Tensor:
    """The tensor, or a copy of one that was made in inference mode, which autograd cannot keep."""
    if torch.compiler.is_compiling() or not values.is_inference():
        return values
    return values if torch.is_inference_mode_enabled() else values.clone()


def _plain_cpu(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"


def _holders(tensor: Tensor) -> tuple[int, int]:
    """Reference counts of a tensor's storage: by tensors, and by Python to its storage object.

    A storage object that the user keeps adds to the second number only. Both also count the
    references of this function: compare them with `_UNSHARED`.
    """
    storage = tensor.untyped_storage()
    return _use_count(storage._cdata), sys.getrefcount(storage)


_UNSHARED = _holders(torch.empty(1)) if _use_count is not None else None


class GradientMemory:
    """Keeps the memory of the last large CPU gradient for the next step.

    A training loop frees a gradient and allocates the same again. Memory of that size goes back to
    the system, which returns it page by page, zeroed; that takes longer than to compute the
    gradient. Memory is reused only when no tensor, array, graph or storage object refers to it any
    more and no other process can have mapped it, and only for a gradient of the same shape and
    dtype; another shape replaces it. At most one gradient is kept; :func:`fastkd.release_memory`
    frees it.
    """

    SMALLEST = 128 << 10  # bytes; below it the allocator keeps freed memory itself

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def take(self, like: Tensor) -> Tensor | None:
        """A tensor of like's shape, strides and dtype in the memory kept, or None."""
        if torch.compiler.is_compiling() or not self._kept or _use_count is None:
            return None
        if not _plain_cpu(like):
            return None
        try:
            kept = self._kept.pop()  # atomic: only one thread gets it
        except IndexError:
            return None
        fits = kept.shape == like.shape and kept.dtype == like.dtype and kept.device == like.device
        if not fits or kept.stride() != torch.empty_like(like, device="meta").stride():
            return None
        # Shared memory may have been sent through a queue, and another process may still read it.
        if _holders(kept) != _UNSHARED or kept.is_shared():
            return None
        enough = kept.untyped_storage().nbytes() >= kept.numel() * kept.itemsize
        return kept if enough else None

    def keep(self, gradient: Tensor | None) -> None:
        """Keep the memory of this gradient."""
        if gradient is None or torch.compiler.is_compiling() or _use_count is None:
            return
        if gradient.nbytes >= self.SMALLEST and _plain_cpu(gradient):
            self._kept[:] = [gradient.detach()]

    def release(self) -> None:
        """Free the memory kept."""
        self._kept.clear()


memory = GradientMemory()
#: What :func:`release_memory` frees: each has a method ``release``.
kept_memories: list[Any] = [memory]


def gradient_for(tensor: Tensor) -> Tensor:
    """Memory for a gradient of this tensor, reused where possible."""
    kept = memory.take(tensor)
    return torch.ops.fastkd._gradient_like(tensor) if kept is None else kept


def release_memory() -> None:
    """Free the memory of the last large CPU gradient, which is kept for the next step.

    Call it after training, or before a phase that needs all memory. At most one gradient's memory
    is kept, and none below 128 KiB. Also kept is the largest working memory so far of the backward
    pass of :func:`fastkd.acm.hard`: about the weights and a few hundred hidden rows of each
    learner. And the logits of the last chunk of :class:`fastkd.LinearLogits`, with the last
    gradient of its weight.

    >>> import fastkd
    >>> fastkd.release_memory()
    """
    for each in kept_memories:
        each.release()
    _release_memory_of_kernels()


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Gradient x factor (a scalar, or one a row), as a backward pass returns it.

    It is computed in place, in a copy if the graph is retained and may need the gradient again.
    With a factor of 1 nothing is done. While compiling and under vmap (batched gradients) it is a
    product.
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
    """Gradients of a loss in plain PyTorch as functions of the inputs, for create_graph=True."""
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(loss, wanted, grad_output, create_graph=True))
    return (next(found) if need else None for need in needs)


@torch.library.register_fake("fastkd::_scale_rows_")
def _(gradient, factor):
    return None


@torch.library.register_fake("fastkd::_gradient_like")
def _(like):
    return torch.empty_like(like)
