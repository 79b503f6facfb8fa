"""What the recipes share: chunks as places, checks of arguments, reductions."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._arguments import check_tensors, reduction_of
from fastkd.byte_vocab import ByteVocab


def wide(values: Tensor) -> Tensor:
    """float32, or float64 as it is."""
    return values if values.dtype == torch.float64 else values.float()


def check_integers(function: str, name: str, values: Tensor, shape: Sequence[int]) -> None:
    """int64 or int32 of this shape."""
    check_tensors(function, {name: values})
    if values.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{function}: {name} must be int64 or int32, got {values.dtype}")
    if values.shape != torch.Size(shape):
        raise ValueError(
            f"{function}: {name} must have shape {list(shape)}, got {list(values.shape)}"
        )


def check_range(function: str, name: str, values: Tensor, lowest: int, end: int) -> None:
    """All in [lowest, end). Elsewhere than on the CPU that would wait for the device."""
    if values.device.type != "cpu" or not values.numel():
        return
    for found in (int(values.min()), int(values.max())):
        if not lowest <= found < end:
            raise IndexError(f"{function}: {name} must lie in [{lowest}, {end}), got {found}")


def check_mask(function: str, name: str, mask: Tensor | None, shape: Sequence[int]) -> None:
    """Bool of this shape, or None."""
    if mask is None:
        return
    check_tensors(function, {name: mask})
    if mask.dtype != torch.bool or mask.shape != torch.Size(shape):
        raise ValueError(
            f"{function}: {name} must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}"
        )


def check_batch(function: str, name: str, values: Tensor, like: Tensor) -> None:
    """``[B, T, width]`` with the same B as the student's."""
    if values.dim() != 3 or values.size(0) != like.size(0):
        raise ValueError(
            f"{function}: {name} must be [{like.size(0)}, length, width], got {list(values.shape)}"
        )


def check_number(function: str, num_chunks: int) -> None:
    """A count."""
    if not isinstance(num_chunks, int):
        raise TypeError(
            f"{function}: num_chunks must be an integer, got {type(num_chunks).__name__}"
        )
    if num_chunks < 0:
        raise ValueError(f"{function}: num_chunks must not be negative, got {num_chunks}")


def chunk_slots(chunks: Tensor, num_chunks: int) -> Tensor:
    """Each token's chunk as an index into ``[B, num_chunks + 1]``, the last one for no chunk."""
    return torch.where((chunks < 0) | (chunks >= num_chunks), num_chunks, chunks).long()


def chunk_ends(
    function: str, name: str, rows: Tensor, chunks: Tensor, num_chunks: int
) -> tuple[Tensor, Tensor]:
    """Last token of each chunk, -1 for a chunk without, and number of its tokens, ``[B, chunks]``.

    ``rows`` is the ``[B, T, width]`` that the chunks ``[B, T]`` belong to.
    """
    check_integers(function, name, chunks, rows.shape[:-1])
    check_number(function, num_chunks)
    check_range(function, name, chunks, -1, num_chunks)
    places = chunk_slots(chunks, num_chunks)
    position = torch.arange(chunks.size(1), device=chunks.device).expand_as(chunks)
    last = position.new_full((chunks.size(0), num_chunks + 1), -1)
    count = torch.zeros_like(last).scatter_add(1, places, torch.ones_like(position))
    return last.scatter_reduce(1, places, position, "amax")[:, :-1], count[:, :-1]


def first_token_chunks(mask: Tensor | None, places: Tensor, num_chunks: int) -> Tensor:
    """Chunks with a token that no row scores, bool ``[B, num_chunks + 1]``.

    Such are the tokens at the beginning of a row, and where there is a mask those after padding.
    """
    first = torch.arange(places.size(1), device=places.device).expand_as(places) == 0
    if mask is not None:
        first = first | mask & ~F.pad(mask, (1, 0))[:, :-1]
    hits = places.new_zeros((places.size(0), num_chunks + 1)).scatter_add(1, places, first.long())
    return F.pad(hits[:, :-1] > 0, (0, 1))


def shifted(values: Tensor, fill: int) -> Tensor:
    """At t what was at t + 1."""
    return F.pad(values[:, 1:], (0, min(1, values.size(1))), value=fill)


@torch.compiler.assume_constant_result
def boundaries(
    student: ByteVocab, student_width: int, teacher: ByteVocab, teacher_width: int, device: str
) -> tuple[Tensor, Tensor]:
    """Boundary sets of vocabularies over so many logits: columns behind them begin no word.

    Both in one call: torch.compile takes two single tensors of such a function for the same.
    """
    return _boundary(student, student_width, device), _boundary(teacher, teacher_width, device)


@lru_cache(maxsize=16)
def _boundary(vocab: ByteVocab, width: int, device: str) -> Tensor:
    found = torch.zeros(width, dtype=torch.bool)
    known = torch.from_numpy(vocab.boundary())[:width]
    found[: known.numel()] = known
    return found.to(device)


def placed(values: Tensor, kept: Tensor) -> Tensor:
    """Values of the rows that are kept, 0 elsewhere."""
    (rows,) = kept.flatten().nonzero(as_tuple=True)
    return values.new_zeros(kept.numel()).index_copy(0, rows, values).view(kept.shape)


def reduced(
    function: str,
    loss: Tensor,
    kept: Tensor,
    reduction: str,
    normalizer: float | Tensor | None,
) -> Tensor:
    """The losses, their sum, or it over a denominator; nothing to divide by gives 0."""
    mode, denominator, divisor = reduction_of(function, reduction, normalizer, loss, None)
    if mode == "none":
        return loss
    if mode == "mean":
        divisor = kept.sum()
    if divisor is None:
        divisor = loss.new_full((), denominator)
    mean = loss.sum() / torch.where(divisor == 0, 1, divisor)
    return torch.where(divisor == 0, 0, mean).to(loss.dtype)
