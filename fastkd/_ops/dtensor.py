"""Calls with logits that are DTensors: what each process computes, and the result's placements.

At most one dimension of the mesh shards the vocabulary; the others shard leading dimensions or
replicate. Each process calls the same function with its local tensors, and with the group of the
dimension that shards the vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.arguments import to_integer
from fastkd._ops.linear.logits import LinearLogits


def is_dtensor(x: Any) -> bool:
    """Whether it is a DTensor or logits of such, without importing them for plain tensors."""
    if isinstance(x, LinearLogits):
        return x.placed
    if type(x) in (Tensor, torch.nn.Parameter) or not isinstance(x, Tensor):
        return False
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def _whole(x: Any) -> Any:
    return x.full_tensor() if is_dtensor(x) else x


class _Layout:
    """How logits are placed, and tensors with one entry a row with them."""

    def __init__(self, function: str, name: str, logits: Any) -> None:
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        self.function, self.name, self.logits = function, name, logits
        self.mesh, self.placements = logits.device_mesh, tuple(logits.placements)
        if logits.dim() < 1:
            raise ValueError(f"{function}: {name} must have at least one dimension, got a scalar")
        last = logits.dim() - 1
        self.vocab_dimension: int | None = None
        rows: list[Any] = []
        for dimension, placement in enumerate(self.placements):
            if type(placement) is Shard and placement.dim % logits.dim() == last:
                if self.vocab_dimension is not None:
                    raise ValueError(
                        f"{function}: at most one dimension of the mesh may shard the last "
                        f"dimension of {name}, got placements {self.placements}"
                    )
                self.vocab_dimension = dimension
                rows.append(Replicate())
            elif type(placement) is Shard or type(placement) is Replicate:
                rows.append(placement)
            else:
                raise ValueError(
                    f"{function}: {name} must have the placements Shard or Replicate, got "
                    f"{self.placements}; redistribute it first"
                )
        self.rows = tuple(rows)
        self.sharded = [i for i, x in enumerate(rows) if type(x) is Shard]
        self.vocab = logits.size(last)
        _, offset = compute_local_shape_and_global_offset(logits.shape, self.mesh, self.placements)
        self.start = offset[last]

    def local(self, name: str, x: Any, placements: Sequence[Any]) -> Any:
        """This process's part of a tensor: a DTensor, or the whole as a plain tensor."""
        from torch.distributed.tensor import DTensor, Replicate

        if not isinstance(x, DTensor):
            whole = [Replicate()] * self.mesh.ndim
            x = DTensor.from_local(x, self.mesh, whole, run_check=False)
        elif x.device_mesh != self.mesh:
            raise ValueError(
                f"{self.function}: {name} must be on the mesh of {self.name}, {self.mesh}, got "
                f"{x.device_mesh}"
            )
        if tuple(x.placements) != tuple(placements):
            x = x.redistribute(self.mesh, placements)
        return x.to_local()

    def of_rows(self, name: str, x: Any) -> Any:
        """The same of a tensor whose leading dimensions are the rows'."""
        leading = self.logits.shape[:-1]
        if not isinstance(x, Tensor) or x.dim() == 0:
            return _whole(x)
        if name == "teacher_weights" and x.dim() == 1:
            return _whole(x)  # the same for all rows
        if x.shape[: len(leading)] != leading:
            raise ValueError(
                f"{self.function}: {name} must have one entry a row, shape {list(leading)}, got "
                f"shape {list(x.shape)}"
            )
        return self.local(name, x, self.rows)

    def of_columns(self, name: str, x: Any, chosen: bool = False) -> Any:
        """The same of other logits. ``chosen``: of all rows, among which others are chosen."""
        if isinstance(x, (list, tuple)):
            return [self.of_columns(name, one, chosen) for one in x]
        if not isinstance(x, (Tensor, LinearLogits)):
            return x
        if chosen and isinstance(x, Tensor) and x.dim() and x.size(-1) == self.vocab:
            from torch.distributed.tensor import Replicate, Shard

            placements: list[Any] = [Replicate()] * self.mesh.ndim
            if self.vocab_dimension is not None:
                placements[self.vocab_dimension] = Shard(x.dim() - 1)
            return self.local(name, x, placements)
        if chosen and x.size(-1) != self.vocab:
            raise ValueError(
                f"{self.function}: {name} must have the columns of {self.name}, {self.vocab}, got "
                f"shape {list(x.shape)}"
            )
        if not chosen and x.shape != self.logits.shape:
            raise ValueError(
                f"{self.function}: {name} must have the shape of {self.name}, "
                f"{list(self.logits.shape)}, got {list(x.shape)}"
            )
        if isinstance(x, LinearLogits):
            if chosen and self.sharded:
                raise NotImplementedError(
                    f"{self.function}: teacher_rows chooses among all rows of {name}, but the mesh "
                    f"shards them, placements {self.placements}"
                )
            here = x.placed and x.device_mesh == self.mesh and x.placements == self.placements
            if not here:
                where = x.placements if x.placed else "plain tensors"
                raise ValueError(
                    f"{self.function}: {name} must be placed as {self.name}, on the same mesh, "
                    f"{self.placements}, got {where}"
                )
            return x.to_local()
        return self.local(name, x, self.placements)

    def options(self, vocab_size: Any) -> dict[str, Any]:
        """The arguments that say which columns the local logits have."""
        if self.vocab_dimension is None:
            return {"vocab_size": vocab_size}
        size = self.vocab
        if vocab_size is not None:
            size = to_integer(self.function, "vocab_size", vocab_size)
            if size > self.vocab:
                raise ValueError(
                    f"{self.function}: vocab_size is {size}, {self.name} has only {self.vocab} "
                    "columns"
                )
        group = self.mesh.get_group(self.vocab_dimension)
        start = 0 if self.mesh.size(self.vocab_dimension) == 1 else self.start
        return {"vocab_size": size, "group": group, "vocab_start": start}

    def result(self, x: Tensor, dimensions: int) -> Any:
        """A local result as a DTensor, whose first `dimensions` dimensions are the logits'."""
        from torch.distributed.tensor import DTensor

        shape = (*self.logits.shape[:dimensions], *x.shape[dimensions:])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            x, self.mesh, self.rows, run_check=False, shape=torch.Size(shape), stride=stride
        )

    def results(self, found: Any, dimensions: int) -> Any:
        """The same of a tensor, None or a tuple of them."""
        if isinstance(found, tuple):
            each = [self.results(x, dimensions) for x in found]
            return type(found)(*each) if hasattr(found, "_fields") else tuple(each)
        return None if found is None else self.result(found, dimensions)

    def reduced(self, x: Tensor) -> Any:
        """A local part of a sum over rows as a DTensor."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        placements = [
            Partial("sum") if i in self.sharded else Replicate() for i in range(self.mesh.ndim)
        ]
        return DTensor.from_local(x, self.mesh, placements, run_check=False)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the processes that have other rows."""
        from torch.distributed import _functional_collectives as collectives

        for dimension in self.sharded:
            x = collectives.all_reduce(x, "sum", self.mesh.get_group(dimension))
            if isinstance(x, collectives.AsyncCollectiveTensor):
                x = x.wait()
        return x


#: Arguments besides the first that are logits.
_OTHER_LOGITS = ("teacher_logits",)


def _local_arguments(
    function: Callable[..., Any], logits: Any, others: dict[str, Any], options: dict[str, Any]
) -> tuple[_Layout, list[Any], dict[str, Any]]:
    name = function.__code__.co_varnames[0]  # type: ignore[attr-defined]
    if options.get("group") is not None or options.get("vocab_start") is not None:
        raise ValueError(
            f"{function.__name__}: {name} is a DTensor, which says where its columns are: group "
            "and vocab_start must be None"
        )
    layout = _Layout(function.__name__, name, logits)
    shift = options.get("shift", 0)
    sequence = logits.dim() - 2
    if not (isinstance(shift, int) and shift == 0) and any(
        layout.rows[i].dim % logits.dim() == sequence for i in layout.sharded
    ):
        raise ValueError(
            f"{function.__name__}: shift needs whole sequences, but the mesh shards them, "
            f"placements {layout.placements}; shift the labels before they are sharded"
        )

    def local(key: str, x: Any) -> Any:
        chosen = options.get("teacher_rows") is not None
        if key in _OTHER_LOGITS:
            return layout.of_columns(key, x, chosen)
        return layout.of_rows(key, x)

    found = {
        key: local(key, x) for key, x in options.items() if key not in ("group", "vocab_start")
    }
    found.update(layout.options(options.get("vocab_size")))
    return layout, [logits.to_local(), *(local(key, x) for key, x in others.items())], found


def rows_of_dtensors(
    function: Callable[..., Any],
    logits: Any,
    others: dict[str, Any],
    options: dict[str, Any],
    whole: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """A function whose results have one entry a row, or several: a tensor or a tuple of them.

    ``whole``: arguments that are passed as they are.
    """
    layout, tensors, options = _local_arguments(function, logits, others, options)
    leading = logits.dim() - 1
    if function.__name__ == "chunk_log_likelihood":
        leading -= 1
        if any(layout.rows[i].dim % logits.dim() >= leading for i in layout.sharded):
            raise ValueError(
                f"chunk_log_likelihood: the mesh must not shard the tokens of a text, got "
                f"placements {layout.placements}"
            )
    return layout.results(function(*tensors, **options, **whole), leading)


def loss_of_dtensors(
    function: Callable[..., Any], logits: Any, others: dict[str, Any], options: dict[str, Any]
) -> Any:
    """A loss over rows. Its denominator is that of all rows, also of those of other processes."""
    layout, tensors, options = _local_arguments(function, logits, others, options)
    if options["reduction"] == "none":
        return layout.results(function(*tensors, **options), logits.dim() - 1)
    if layout.sharded and options["normalizer"] is None and options["reduction"] != "sum":
        options["normalizer"] = _denominator(layout, tensors, options)
        options["reduction"] = "sum"
    found = function(*tensors, **options)
    if isinstance(found, Tensor):
        return layout.reduced(found)
    return layout.reduced(found[0]), layout.results(found[1], logits.dim() - 1)


def _denominator(layout: _Layout, tensors: list[Any], options: dict[str, Any]) -> Any:
    logits, reduction = layout.logits, options["reduction"]
    if reduction == "batchmean":
        return logits.size(0)
    shift, rows = options.get("shift", 0), 1
    for size in logits.shape[:-1]:
        rows *= size
    length = logits.size(-2) if logits.dim() > 1 else 1
    if not (isinstance(shift, int) and shift == 0):
        rows = rows // max(length, 1) * max(length - shift, 0)
    labels = options.get("labels")
    if layout.function == "cross_entropy":
        labels = tensors[1]
    if reduction == "elementmean":
        vocab_size = options.get("vocab_size")
        return rows * (layout.vocab if vocab_size is None else vocab_size)
    if reduction != "mean":
        return None  # the function names the values that it takes
    mask, taught = options.get("mask"), options.get("teacher_rows")
    if labels is None and mask is None and taught is None:
        return rows
    kept = torch.ones(tensors[0].shape[:-1], dtype=torch.bool, device=tensors[0].device)
    if mask is not None:
        kept = kept & mask
    if labels is not None:
        kept = kept & (labels != options["ignore_index"])
    if not (isinstance(shift, int) and shift == 0):
        kept = kept[..., shift:]
    if taught is not None:
        kept = kept & (taught >= 0)[..., : kept.size(-1)]
    return layout.sum(kept.sum().to(torch.float64))
