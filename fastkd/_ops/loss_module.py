"""Base class of the modules of losses: options that are checked when a module is made."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

#: Options that may be a tensor with one entry a row, and what such a tensor has besides.
_ONE_A_ROW = {
    "beta": 0,
    "alpha": 0,
    "temperature": 0,
    "teacher_temperature": 0,
    "label_weight": 0,
    "entropy_mask": 0,
    "teacher_weights": 1,
}


class LossModule(torch.nn.Module):
    """A loss function with options from the constructor; a call may add or replace some.

    ``given``: the constructor's local variables.
    """

    function: Callable[..., Any]

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__()
        self.options = {x: given[x] for x in self.function.__kwdefaults__ or () if x in given}
        if not torch.compiler.is_compiling():
            self._check()

    def _check(self) -> None:
        """Call the function with its options on no rows, for the errors that it has of them."""
        options = dict(self.options)
        if options.get("group") is not None and "vocab_start" in options:
            options["group"] = options["vocab_start"] = None  # processes need not be here yet
        rows: tuple[int, ...] = (0,)
        device = "cpu"
        for name, more in _ONE_A_ROW.items():
            value = options.get(name)
            if isinstance(value, Tensor) and value.dim() > more:
                rows, device = tuple(value.shape[: value.dim() - more]), str(value.device)
        with torch.no_grad():
            self._call(torch.zeros((*rows, 1), device=device), options)

    def _call(self, one: Tensor, options: dict[str, Any]) -> None:
        """Call the function with these options. ``one``: zeros, ``[..., 1]``."""
        raise NotImplementedError

    def forward(self, *inputs: Any, **batch: Any) -> Tensor:
        """Call the function; ``batch`` adds or replaces options."""
        return self.function(*inputs, **{**self.options, **batch})

    def extra_repr(self) -> str:
        """The options that are not the function's defaults."""
        defaults = inspect.signature(type(self)).parameters
        return ", ".join(
            f"{name}={_shown(value)}"
            for name, value in self.options.items()
            if not _same(value, defaults[name].default)
        )


def _same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and bool(value == default))


def _shown(value: Any) -> str:
    if isinstance(value, Tensor) and value.dim():
        return f"<tensor {list(value.shape)}>"
    return repr(value)


def columns(one: Tensor, options: Mapping[str, Any], *, least: int = 1) -> Tensor:
    """Logits of as many columns as the options need, without memory."""
    size = options.get("vocab_size")
    wide = size if isinstance(size, int) and 0 < size < 2**62 else 1
    return one.expand(*one.shape[:-1], max(least, wide))
