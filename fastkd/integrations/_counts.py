"""The denominator of a mean over all tokens of a step."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd._ops.arguments import to_flag, to_integer


def normalizer(
    labels: Tensor | Sequence[Tensor],
    *,
    shift: bool = True,
    ignore_index: int = -100,
    group: Any = None,
    accumulate: int = 1,
) -> Tensor:
    """What to pass as ``normalizer=`` for the mean over all kept tokens of a step, of all ranks.

    The kept tokens of all ranks, divided by the number of ranks, as data parallelism averages
    gradients over them, and by ``accumulate``. Every rank gets the same number.

    Args:
        labels: ``[..., T]``; those of all micro-batches of the step, one tensor or several.
        shift: row t scores ``labels[t + 1]``: the first label of each text counts for nothing.
            False: labels are shifted already.
        ignore_index: of labels that do not count.
        group: the data-parallel process group; None: the default one if torch.distributed is
            initialised, else this process alone.
        accumulate: by what the loop divides the loss of a micro-batch, which cancels: the number
            of accumulation steps with ``accelerator.backward``, 1 where nothing is divided.

    Returns:
        0-d float32. At least 1 token is assumed, so that a step without any is 0 and not NaN.

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    >>> import torch
    >>> from fastkd.integrations import normalizer
    >>> normalizer(torch.tensor([[-100, 5, 6], [7, 8, -100]])).item()
    3.0
    """
    if not isinstance(labels, Iterable):
        kind = type(labels).__name__
        raise TypeError(f"normalizer: labels must be a tensor or a sequence of them, got {kind}")
    shift = to_flag("normalizer", "shift", shift)
    ignore_index = to_integer("normalizer", "ignore_index", ignore_index)
    tensors = [labels] if isinstance(labels, Tensor) else list(labels)
    if not tensors:
        raise ValueError("normalizer: labels must be one tensor or more, got none")
    accumulate = to_integer("normalizer", "accumulate", accumulate)
    if accumulate < 1:
        raise ValueError(f"normalizer: accumulate must be 1 or more, got {accumulate}")
    for some in tensors:
        integers = isinstance(some, Tensor) and some.dtype not in (torch.bool, torch.complex64)
        if not integers or some.is_floating_point() or not some.dim():
            tensor = isinstance(some, Tensor)
            found = f"{some.dtype} {list(some.shape)}" if tensor else type(some).__name__
            raise TypeError(f"normalizer: labels must be integers [..., T], got {found}")
    counts = [(x[..., 1:] if shift else x).ne(ignore_index).sum() for x in tensors]
    kept = torch.stack([count.to(counts[0].device) for count in counts]).sum()
    ranks = 1
    if group is not None or (dist.is_available() and dist.is_initialized()):
        ranks = dist.get_world_size(group)
        dist.all_reduce(kept, group=group)
    return kept.clamp(min=1).float() / (ranks * accumulate)
