"""Base class of the modules of losses: options that are checked when a module is made."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastkd._ops import hints
from fastkd._ops.arguments import check_no_gradient

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

    Tensors among the options move with the module. They keep their dtype, as a number of rows may
    be too large for another one. ``given``: the constructor's local variables.
    """

    function: Callable[..., Any]
    #: Options that may require a gradient.
    learned: tuple[str, ...] = ()

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__()
        self.options = {x: given[x] for x in self.function.__kwdefaults__ or () if x in given}
        if not torch.compiler.is_compiling():
            self._check()
        for name in self.learned:
            if isinstance(self.options[name], torch.nn.Parameter):
                self.register_parameter(name, self.options.pop(name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LossModule":
        super()._apply(fn, recurse)
        for name, value in self.options.items():
            if isinstance(value, Tensor):
                moved = fn(value)
                self.options[name] = moved if value.is_meta else value.to(moved.device)
        return self

    def _check(self) -> None:
        """Call the function with its options on no rows, for the errors that it has of them."""
        options = dict(self.options)
        if options.get("group") is not None and "vocab_start" in options:
            options["group"] = options["vocab_start"] = None  # processes need not be here yet
            if any(options[name] is not None for name in self.learned):
                options["vocab_size"] = None  # of all processes, a bias of this one
        rows: tuple[int, ...] = (0,)
        device = "cpu"
        for name, value in options.items():
            if not isinstance(value, Tensor):
                continue
            if name not in self.learned:
                with torch.enable_grad():  # as later calls are
                    check_no_gradient(self.function.__name__, **{name: value})
            device = str(value.device) if value.dim() else device
            more = _ONE_A_ROW.get(name)
            if more is not None and value.dim() > more:
                rows = tuple(value.shape[: value.dim() - more])
        with torch.no_grad(), hints.silent():
            self._call(torch.zeros((*rows, 1), device=device), options)

    def _call(self, one: Tensor, options: dict[str, Any]) -> None:
        """Call the function with these options. ``one``: zeros, ``[..., 1]``."""
        raise NotImplementedError

    def forward(self, *inputs: Any, **batch: Any) -> Tensor:
        """Call the function; ``batch`` adds or replaces options."""
        return self.function(*inputs, **{**self._given(), **batch})

    def _given(self) -> dict[str, Any]:
        """The options, of which those that are parameters are attributes."""
        learned = {name: getattr(self, name) for name in self.learned if name not in self.options}
        return {**self.options, **learned}

    def extra_repr(self) -> str:
        """The options that are not the function's defaults."""
        defaults = inspect.signature(type(self)).parameters
        return ", ".join(
            f"{name}={_shown(value)}"
            for name, value in self._given().items()
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
