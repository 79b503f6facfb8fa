"""Tensors made of data that never changes, cached for calls in every mode of PyTorch.

A tensor made under ``torch.inference_mode``, FakeTensorMode, export, a torch.func transform or
``with torch.device(...)`` belongs to that mode. Cached, it makes later calls fail or return tensors
of that mode. A mode is at work in one thread only, so cached tensors are made in a new thread.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Arrays = tuple[np.ndarray, ...]


class Constants:
    """Arrays that are made once, and once for each device as tensors.

    It may be used by several threads at once: they may do the work twice, but get the same tensors.
    A copy and a pickle of it are empty: no tensor is shared with, or sent to, another owner.
    """

    def __init__(self) -> None:
        self._arrays: dict[Any, Arrays] = {}
        self._tensors: dict[tuple[Any, str], tuple[Tensor, ...]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Constants, ()

    def arrays(self, key: Any, make: Callable[[], Arrays]) -> Arrays:
        """What `make` returns, for each key once."""
        found = self._arrays.get(key)
        return self._arrays.setdefault(key, make()) if found is None else found

    def tensors(
        self,
        key: Any,
        device: str,
        make: Callable[[], Arrays],
        mode: FakeTensorMode | None = None,
    ) -> tuple[Tensor, ...]:
        """The same on a device. Fake tensors, made anew, where a mode is given."""
        if mode is not None:
            return tensors_of(self.arrays(key, make), device, mode)
        found = self._tensors.get((key, device))
        if found is None:
            with ThreadPoolExecutor(1) as thread:
                made = thread.submit(tensors_of, self.arrays(key, make), device, None)
            found = self._tensors.setdefault((key, device), made.result())
        return found


def fake_mode_of(like: Tensor) -> FakeTensorMode | None:
    """The mode at work, if there is one, that takes no ordinary tensors beside its fake ones.

    ``like`` is an argument of the call: fake tensors have a mode even where none is entered.
    """
    if torch.compiler.is_compiling():  # the compiler and export turn constants into their own
        return None
    modes = _get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else []
    if isinstance(like, FakeTensor):
        modes.append(like.fake_mode)
    for mode in modes:
        if isinstance(mode, FakeTensorMode) and not mode.allow_non_fake_inputs:
            return mode
    return None


def tensors_of(arrays: Arrays, device: str, mode: FakeTensorMode | None) -> tuple[Tensor, ...]:
    """New tensors, of this mode if it is one."""
    with mode or nullcontext():
        return tuple(torch.tensor(x, device=device) for x in arrays)
