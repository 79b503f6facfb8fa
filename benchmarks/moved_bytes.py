"""Bytes that operators read and write, counted while they run."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Counter(TorchDispatchMode):
    """Sums each operator's operands, read once, and results, written once; views cost nothing.

    A lower bound for operators that read their operands more than once, as softmax and sort do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and count it."""
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function.is_view or function in _FREE or _product_with_one(function, args):
            return result
        operands = _tensors((args, kwargs))
        written = _tensors(result)
        if any(argument.is_write for argument in _aliases(function)):
            written = {**written, **_written_operands(function, args, kwargs)}
        self.bytes += sum(map(_bytes, operands.values())) + sum(map(_bytes, written.values()))
        return result


_FREE = {
    torch.ops.aten.detach.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.is_same_size.default,
}


def _product_with_one(function: Any, args: Any) -> bool:
    """The factor of backward: fastkd looks at it first, and touches no gradient where it is 1.

    Beneath a dispatch mode fastkd takes torch's product, as it does while tracing.
    """
    if function is not torch.ops.aten.mul.Tensor:
        return False
    factor = args[1]
    return isinstance(factor, Tensor) and factor.dim() == 0 and factor.item() == 1


def _tensors(values: Any) -> dict[int, Tensor]:
    return {id(value): value for value in tree_leaves(values) if isinstance(value, Tensor)}


def _aliases(function: Any) -> list[Any]:
    arguments = function._schema.arguments
    return [a.alias_info for a in arguments if a.alias_info is not None]


def _written_operands(function: Any, args: Any, kwargs: Any) -> dict[int, Tensor]:
    names = function._schema.arguments
    found = dict(zip((a.name for a in names), args, strict=False)) | kwargs
    written = [a.name for a in names if a.alias_info is not None and a.alias_info.is_write]
    return _tensors([found.get(name) for name in written])


def _bytes(tensor: Tensor) -> int:
    """An expanded dimension is in memory once."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else min(length, 1)
    return size
