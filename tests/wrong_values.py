"""Wrong values for each argument of a function: which errors there must be, and what they say."""

import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

import fastkd

ERRORS = (ValueError, TypeError, IndexError, NotImplementedError)
#: Arguments of which PyTorch's own errors say enough.
LEFT_TO_TORCH = {"device", "dtype", "generator"}


def wrong(value: Any) -> Iterator[tuple[str, Any]]:
    """Values of another kind, and what they are. Some of them may be accepted."""
    yield "text", "x"
    if isinstance(value, torch.Tensor):
        yield from (("None", None), ("number", 0.5), ("list", [1.0]))
        zeros = torch.zeros(value.shape, dtype=value.dtype)
        for dtype in (torch.int64, torch.bool, torch.float32, torch.complex64):
            if dtype != value.dtype:
                yield str(dtype), zeros.to(dtype)
        yield from (("meta", value.to("meta")), ("scalar", zeros.sum().to(value.dtype)))
        if value.dim():
            yield from (("sparse", zeros.to_sparse()), ("extra", value.unsqueeze(0)))
            yield from (("fewer", value[:-1]), ("narrow", value[..., :-1]))
    elif isinstance(value, (bool, int, float)) or value is None:
        yield from (("tensor", torch.ones(2)), ("list", ["x"]), ("object", object()))
        if value is not None:
            yield from (("None", None), ("nan", math.nan), ("inf", math.inf), ("negative", -1))
            yield "gradient", torch.ones((), requires_grad=True)
    else:
        yield from (("None", None), ("number", 3.0), ("tensor", torch.ones(2)))
        if isinstance(value, (list, tuple)):
            yield from (("longer", [*value, *value]), ("texts", ["x"] * len(value)))


#: What no argument takes.
_NEVER = ("text", "object", "sparse", "torch.complex64", "texts")
#: Where another argument may be the one that does not fit.
_OF_SHAPES = ("scalar", "extra", "fewer", "narrow", "longer")


def unclear(function: Callable[..., Any], given: dict[str, Any]) -> list[str]:
    """The errors that name no function of fastkd, or not the argument, or are of another type.

    And arguments without a default for which None is accepted. ``given``: arguments that are right.
    """
    found = []
    parameters = inspect.signature(function).parameters.items()
    defaults = {name: x.default for name, x in parameters if x.default is not x.empty}
    for name, right in {**defaults, **given}.items():
        for kind, value in wrong(right) if name not in LEFT_TO_TORCH else ():
            try:
                function(**{**given, name: value})
            except Exception as error:
                text = str(error)
                named = kind in _OF_SHAPES or kind == "meta" or re.search(rf"\b{name}\b", text)
                if not (isinstance(error, ERRORS) and _function(text) and named):
                    found.append(f"{name}={kind}: {type(error).__name__}: {text[:120]}")
            else:
                needed = value is None and right is not None and name not in defaults
                if needed or kind in _NEVER:
                    found.append(f"{name}={kind}: no error")
    return found


def _function(text: str) -> bool:
    """Whether a message begins with the name of a public function."""
    *rooms, name = text.partition(": ")[0].split(".")
    homes = [fastkd, fastkd.recipes, fastkd.nn, fastkd.nn.ACM]
    if rooms == ["acm"]:
        homes = [fastkd.acm]
    return any(hasattr(home, name) for home in homes)
