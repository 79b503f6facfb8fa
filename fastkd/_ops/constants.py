"""Tensors of constant data, cached for calls in every mode of PyTorch.

A tensor made under ``torch.inference_mode``, FakeTensorMode, export, a torch.func transform or
``with torch.device(...)`` belongs to that mode. If it were cached, later calls would fail or return
tensors of that mode. A mode is local to a thread, so cached tensors are made in a new thread.
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
    """A cache of arrays, and of their tensors on each device.

    Several threads may use it at once: they may do the work twice, but get the same tensors.
    A copy or a pickle of it is empty: tensors are neither shared with it nor pickled.
    """

    def __init__(self) -> None:
        self._arrays: dict[Any, Arrays] = {}
        self._tensors: dict[tuple[Any, str], tuple[Tensor, ...]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Constants, ()

    def arrays(self, key: Any, make: Callable[[], Arrays]) -> Arrays:
        """The result of `make`, cached for each key."""
        found = self._arrays.get(key)
        return self._arrays.setdefault(key, make()) if found is None else found

    def tensors(
        self,
        key: Any,
        device: str,
        make: Callable[[], Arrays],
        mode: FakeTensorMode | None = None,
    ) -> tuple[Tensor, ...]:
        """The same as tensors on a device; with a mode new fake tensors."""
        if mode is not None:
            return tensors_of(self.arrays(key, make), device, mode)
        found = self._tensors.get((key, device))
        if found is None:
            with ThreadPoolExecutor(1) as thread:
                made = thread.submit(tensors_of, self.arrays(key, make), device, None)
            found = self._tensors.setdefault((key, device), made.result())
        return found


def fake_mode_of(like: Tensor) -> FakeTensorMode | None:
    """The active mode, if there is one, that does not accept ordinary tensors with fake ones.

    ``like`` is an argument of the call: fake tensors have a mode even where none is entered.
    """
    if torch.compiler.is_compiling():  # the compiler and export convert constants themselves
        return None
    modes = _get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else []
    if isinstance(like, FakeTensor):
        modes.append(like.fake_mode)
    for mode in modes:
        if isinstance(mode, FakeTensorMode) and not mode.allow_non_fake_inputs:
            return mode
    return None


def tensors_of(arrays: Arrays, device: str, mode: FakeTensorMode | None) -> tuple[Tensor, ...]:
    """New tensors, of the mode if there is one."""
    with mode or nullcontext():
        return tuple(torch.tensor(x, device=device) for x in arrays)
