"""The matrix products of linear heads, and the memory of a chunk.

The logits are float32 by default where hidden states and weight are 16-bit.

========================== ===================== ================================================
16-bit heads on            logits                products of the gradient
========================== ===================== ================================================
CUDA                       one call from sm_80   rounded first, 16-bit
CPU, bfloat16, with AMX    own kernels           own kernels: as a sum of two bfloat16 numbers
CPU, bfloat16, with        own kernels           own kernels: rounded, and the remainders that are
AVX512_BF16                                      large
CPU that multiplies        converted weight      rounded first, 16-bit
float16
other CPUs                 converted weight      converted weight
========================== ===================== ================================================

A weight is converted to float32 8,192 rows at a time. PyTorch has no product of bfloat16 matrices
with float32 results on the CPU.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.gradient import GradientMemory, kept_memories
from fastkd._ops.library import is_batched

#: Products run on the CPU where the ops' kernels are emulated.
_OPS = torch.ops.fastkd
#: Rows of the weight that are converted at a time.
SLICE = 8192


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor, of huge pages where the system has them."""
    one = torch.empty((), dtype=dtype, device=device)
    return _OPS._gradient_like(one.expand(shape))


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; itself where it has it."""
    if x.dtype == dtype or not x.is_cpu or is_batched(x):
        return x.to(dtype)
    return fresh(x.shape, dtype, x.device).copy_(x)


class Workspace:
    """Memory of a chunk, by role. On the CPU it is kept for the next call of this process.

    It never leaves the call that took it, so that a call in another thread finds nothing and
    allocates its own.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, role: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat tensor, uninitialised."""
        if device.type == "cpu":
            kept = self._kept.pop(role, None)
            if kept is not None and kept.numel() >= numel * dtype.itemsize:
                return kept[: numel * dtype.itemsize].view(dtype)
        return fresh((numel,), dtype, device)

    def give_back(self, role: str, flat: Tensor) -> None:
        """Keep the memory of a tensor that :meth:`take` returned, of all of its storage."""
        if flat.device.type == "cpu" and not flat.is_inference():
            storage = flat.untyped_storage()
            whole = torch.empty(0, dtype=torch.uint8, device="cpu").set_(
                storage, 0, (storage.nbytes(),), (1,)
            )
            self._kept[role] = whole

    def release(self) -> None:
        """Free the memory kept."""
        self._kept.clear()


workspace = Workspace()
#: Gradients of weights in the dtype in which they are summed.
weight_memory = GradientMemory()
kept_memories += [workspace, weight_memory]


@cache
def _processor(capability: str) -> bool:
    return bool(torch.cpu.get_capabilities().get(capability, False))


@cache
def _sums_in_float32(device: torch.device) -> bool:
    """Whether products of 16-bit matrices have float32 results there."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device multiplies matrices of a 16-bit dtype faster than float32."""
    if device.type != "cpu":
        return True
    if dtype == torch.bfloat16:
        return _processor("avx512_bf16") or _processor("amx_bf16")
    return dtype == torch.float16 and (_processor("avx512_fp16") or _processor("amx_fp16"))


def _own(wide: Tensor, *matrices: Tensor) -> bool:
    """Whether fastkd's own kernels multiply bfloat16 matrices; ``wide`` may be float32."""
    if wide.numel() == 0:
        return False
    if wide.dtype not in (torch.bfloat16, torch.float32) or wide.device.type != "cpu":
        return False
    if any(x.dtype != torch.bfloat16 for x in matrices):
        return False
    if any(x.stride(-1) != 1 for x in (wide, *matrices)):
        return False
    return _OPS._bfloat16_capability(None) != "none"


def gradient_dtype(logits: torch.dtype, hidden: Tensor) -> torch.dtype:
    """The dtype in which the logits' gradient is handed to its products."""
    if logits == torch.float32 and _own(hidden, hidden):
        return logits
    if logits == hidden.dtype or not multiplies(hidden.dtype, hidden.device):
        return logits
    return hidden.dtype if hidden.dtype.itemsize < logits.itemsize else logits


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the gradients of the weight are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _slices(weight: Tensor, dtype: torch.dtype) -> Any:
    """(first row, last, rows in a dtype), for all rows of the weight; all at once where it can."""
    rows, width = weight.shape
    if weight.dtype == dtype:
        yield 0, rows, weight
        return
    flat = workspace.take("slice", min(rows, SLICE) * width, dtype, weight.device)
    for first in range(0, rows, SLICE):
        last = min(first + SLICE, rows)
        part = flat[: (last - first) * width].view(last - first, width)
        yield first, last, part.copy_(weight[first:last])
    workspace.give_back("slice", flat)


def project(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> None:
    """Out = scale x hidden @ weight.T + bias, in the dtype of out."""
    if _own(out, hidden, weight):
        bias = None if bias is None else bias.float()
        _OPS._bfloat16_logits(out, hidden, weight, bias, scale)
        return
    if hidden.dtype.itemsize < out.dtype.itemsize == 4 and _sums_in_float32(out.device):
        torch.ops.aten.mm.dtype_out(hidden, weight.mT, out.dtype, out=out)
        if scale != 1:
            out.mul_(scale)
        if bias is not None:
            out.add_(bias)
        return
    wide = hidden.to(out.dtype)
    bias = None if bias is None else bias.to(out.dtype)
    for first, last, part in _slices(weight, out.dtype):
        into = out[:, first:last]
        if bias is None:
            into.addmm_(wide, part.mT, beta=0, alpha=scale)
        else:
            torch.addmm(bias[first:last], wide, part.mT, alpha=scale, out=into)


def add_to_weight(total: Tensor, gradient: Tensor, hidden: Tensor, scale: float, add: bool) -> None:
    """Total = scale x gradient.T @ hidden, added to what it has where ``add``."""
    if total.dtype == torch.float32 and _own(gradient, hidden):
        _OPS._bfloat16_weight_gradient(total, gradient, hidden, scale, add)
        return
    beta = int(add)
    low = hidden.dtype == gradient.dtype != total.dtype
    if low and total.dtype.itemsize == 4 and _sums_in_float32(total.device):
        torch.ops.aten.addmm.dtype_out(
            total, gradient.mT, hidden, total.dtype, beta=beta, alpha=scale, out=total
        )
    elif gradient.dtype == total.dtype:
        total.addmm_(gradient.mT, hidden.to(total.dtype), beta=beta, alpha=scale)
    else:
        rows, width = total.shape
        hidden = hidden.to(gradient.dtype)
        flat = workspace.take("part", min(rows, SLICE) * width, gradient.dtype, total.device)
        for first in range(0, rows, SLICE):
            last = min(first + SLICE, rows)
            part = flat[: (last - first) * width].view(last - first, width)
            torch.mm(gradient[:, first:last].mT, hidden, out=part)
            into = total[first:last]
            if not add:
                into.zero_()
            into.add_(part, alpha=scale)
        workspace.give_back("part", flat)


def to_hidden(out: Tensor, gradient: Tensor, weight: Tensor, scale: float) -> None:
    """Out = scale x gradient @ weight."""
    if weight.size(0) == 0:  # a process without a part of the vocabulary
        out.zero_()
        return
    if _own(gradient, out, weight):
        _OPS._bfloat16_hidden_gradient(out, gradient, weight, scale)
        return
    if gradient.dtype == weight.dtype == out.dtype:
        out.addmm_(gradient, weight, beta=0, alpha=scale)
        return
    low = gradient.dtype == weight.dtype != out.dtype
    if low and out.dtype.itemsize == 4 and _sums_in_float32(out.device):
        torch.ops.aten.mm.dtype_out(gradient, weight, out.dtype, out=out)
        out.mul_(scale)
        return
    if out.dtype == torch.float32 and _own(gradient, weight):
        narrow = torch.empty(out.shape, dtype=weight.dtype, device=out.device)
        to_hidden(narrow, gradient, weight, scale)
        out.copy_(narrow)
        return
    flat = workspace.take("hidden", out.numel(), gradient.dtype, out.device)
    total = flat.view(out.shape)
    for first, last, part in _slices(weight, gradient.dtype):
        total.addmm_(gradient[:, first:last], part, beta=int(first > 0), alpha=scale)
    out.copy_(total)
    workspace.give_back("hidden", flat)


def gradient_of_weight(weight: Tensor) -> Tensor:
    """Memory for the gradient of a weight, in the dtype in which it is summed."""
    dtype = sum_dtype(weight.dtype)
    like = torch.empty((), dtype=dtype, device=weight.device).expand(weight.shape)
    kept = weight_memory.take(like)
    return fresh(weight.shape, dtype, weight.device) if kept is None else kept
