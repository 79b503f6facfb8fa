"""Code shared by recipes: checks, softmaxes of wide rows, chunks as indices, reductions."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastkd._ops import checks
from fastkd._ops.arguments import to_integer
from fastkd._ops.checks import check_device, check_normalizer, check_tensors
from fastkd._ops.constants import fake_mode_of
from fastkd._ops.gradient import savable
from fastkd._ops.library import transforms_active
from fastkd._ops.linear.logits import FLOATS
from fastkd._ops.names import TextReduction
from fastkd.tokenizers._byte_vocab import ByteVocab

_INTEGERS = (torch.int64, torch.int32, torch.uint8, torch.int8, torch.int16)


def wide(values: Tensor) -> Tensor:
    """The values in float32, or unchanged if they are float64; autograd can keep them."""
    return savable(values if values.dtype == torch.float64 else values.float())


def log_softmax(values: Tensor) -> Tensor:
    """Over the last dimension, in float32 at least.

    Torch's own on CPUs adds up wide rows one after the other: over the 49,152 logits of a language
    model its probabilities sum to 1 within 2e-5 only, these within 3e-7.
    """
    values = wide(values)
    values = values - values.detach().amax(-1, keepdim=True)
    return values - values.exp().sum(-1, keepdim=True).log()


def softmax(values: Tensor) -> Tensor:
    """See :func:`log_softmax`."""
    values = wide(values)
    masses = (values - values.detach().amax(-1, keepdim=True)).exp()
    return masses / masses.sum(-1, keepdim=True)


def added(values: Tensor, columns: Tensor, width: int) -> Tensor:
    """``[rows, width]``: to each column the sum of the values that belong there, in their dtype.

    In float64: probabilities of thousands of tokens are each below the last digit of a float32 sum.
    """
    total = values.new_zeros(values.size(0), width, dtype=torch.float64)
    return total.index_add(1, columns, values.double()).to(values.dtype)


def check_integers(
    function: str,
    name: str,
    values: Tensor,
    shape: Sequence[int],
    device: torch.device | None = None,
) -> None:
    """Raise unless the values are int64 or int32 of this shape, and on this device."""
    check_tensors(function, {name: values})
    if device is not None:
        check_device(function, name, values, device)
    if values.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{function}: {name} must be int64 or int32, got {values.dtype}")
    if values.shape != torch.Size(shape):
        raise ValueError(
            f"{function}: {name} must have shape {list(shape)}, got {list(values.shape)}"
        )


def readable(values: Tensor) -> bool:
    """Whether a check can read the values without a synchronisation."""
    return not (
        torch.compiler.is_compiling()
        or values.device.type != "cpu"
        or isinstance(values, FakeTensor)
        or torch._C._len_torch_dispatch_stack()
        or transforms_active()
    )


def check_range(function: str, name: str, values: Tensor, lowest: int, end: int) -> None:
    """Raise unless all values are in [lowest, end), if they can be read."""
    if not readable(values) or not values.numel():
        return
    for found in (int(values.min()), int(values.max())):
        if not lowest <= found < end:
            raise IndexError(f"{function}: {name} must lie in [{lowest}, {end}), got {found}")


def check_mask(
    function: str,
    name: str,
    mask: Tensor | None,
    shape: Sequence[int],
    device: torch.device | None = None,
) -> None:
    """Raise unless the mask is None or bool of this shape, and on this device."""
    if mask is None:
        return
    check_tensors(function, {name: mask})
    if device is not None:
        check_device(function, name, mask, device)
    if mask.dtype != torch.bool or mask.shape != torch.Size(shape):
        raise ValueError(
            f"{function}: {name} must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}"
        )


def attention_mask(function: str, name: str, mask: Any) -> Any:
    """A mask as bool where it is one of integers, as a model's ``attention_mask``."""
    if not isinstance(mask, Tensor) or mask.dtype not in _INTEGERS:
        return mask
    if readable(mask) and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"{function}: {name} must be bool, or 0 and 1, got {int(mask.max())} as its largest"
        )
    return mask != 0


def check_batch(function: str, name: str, values: Tensor, like: Tensor) -> None:
    """Raise unless the values are floats ``[B, T, width]`` with the same B as the student's."""
    check_dtype(function, name, values)
    if values.dim() != 3 or values.shape[:1] != like.shape[:1]:
        batch = like.size(0) if like.dim() else "B"
        raise ValueError(
            f"{function}: {name} must be [{batch}, length, width], got {list(values.shape)}"
        )


def check_dtype(function: str, name: str, values: Tensor) -> None:
    """Raise unless the values are floats of a dtype that the ops take."""
    if values.dtype not in FLOATS:
        raise TypeError(
            f"{function}: {name} must be float32, float64, bfloat16 or float16, got {values.dtype}"
        )


def check_callable(function: str, name: str, value: Any, *, needed: bool = False) -> None:
    """Raise unless the value is a function, such as a module; or None, where none is needed."""
    if not callable(value) and (needed or value is not None):
        raise TypeError(f"{function}: {name} must be a function, got {type(value).__name__}")


def check_tuple(function: str, name: str, value: Any, count: int) -> None:
    """Raise unless the value is a tuple or list of so many entries."""
    if not isinstance(value, (tuple, list)) or len(value) != count:
        found = len(value) if isinstance(value, (tuple, list)) else type(value).__name__
        raise TypeError(f"{function}: {name} must be a tuple of {count}, got {found}")


def check_vocabs(function: str, student_vocab: Any, teacher_vocab: Any) -> None:
    """Raise unless both are vocabularies."""
    for name, vocab in (("student_vocab", student_vocab), ("teacher_vocab", teacher_vocab)):
        if not isinstance(vocab, ByteVocab):
            raise TypeError(
                f"{function}: {name} must be a fastkd.ByteVocab, got {type(vocab).__name__}"
            )


def check_number(function: str, num_chunks: int) -> int:
    """The number of chunks as an integer; raise if it is negative."""
    num_chunks = to_integer(function, "num_chunks", num_chunks)
    if num_chunks < 0:
        raise ValueError(f"{function}: num_chunks must not be negative, got {num_chunks}")
    return num_chunks


def chunk_slots(chunks: Tensor, num_chunks: int) -> Tensor:
    """Each token's chunk as an index into ``[B, num_chunks + 1]``, the last one for no chunk."""
    return torch.where((chunks < 0) | (chunks >= num_chunks), num_chunks, chunks).long()


def chunk_ends(
    function: str, name: str, rows: Tensor, chunks: Tensor, num_chunks: int
) -> tuple[Tensor, Tensor]:
    """Last token of each chunk, -1 if it has none, and number of its tokens, ``[B, chunks]``.

    ``rows`` is the ``[B, T, width]`` that the chunks ``[B, T]`` belong to.
    """
    check_integers(function, name, chunks, rows.shape[:-1], rows.device)
    num_chunks = check_number(function, num_chunks)
    check_range(function, name, chunks, -1, num_chunks)
    places = chunk_slots(chunks, num_chunks)
    position = torch.arange(chunks.size(1), device=chunks.device).expand_as(chunks)
    last = position.new_full((chunks.size(0), num_chunks + 1), -1)
    count = torch.zeros_like(last).scatter_add(1, places, torch.ones_like(position))
    return last.scatter_reduce(1, places, position, "amax")[:, :-1], count[:, :-1]


def single_token_rows(
    function: str,
    student_logits: Tensor,
    student_chunks: Tensor,
    teacher_logits: Tensor,
    teacher_chunks: Tensor,
    num_chunks: int,
    match: str = "scored",
) -> tuple[Tensor, Tensor]:
    """Student tokens whose chunk is one token on both sides, and the teacher's row for each.

    Both ``[B, T_S]``, for the row that scores the token, t - 1. With ``match="scored"`` it is the
    teacher's row that scores its token; with ``"read"`` the row that has read the token before.
    """
    _, count = chunk_ends(function, "student_chunks", student_logits, student_chunks, num_chunks)
    other, others = chunk_ends(
        function, "teacher_chunks", teacher_logits, teacher_chunks, num_chunks
    )
    at = chunk_slots(student_chunks, num_chunks)
    if match == "scored":
        other = other - 1  # nothing scores the teacher's first token
    single = F.pad((count == 1) & (others == 1) & (other >= 0), (0, 1))
    matched, taught_by = single.gather(1, at), F.pad(other, (0, 1)).gather(1, at)
    if match == "read":  # the teacher row of token t is for row t, which is stored at token t + 1
        matched, taught_by = (F.pad(x, (1, 0))[:, :-1] for x in (matched, taught_by))
    return matched, taught_by


def unscored_chunks(mask: Tensor | None, places: Tensor, num_chunks: int) -> Tensor:
    """Chunks with a token that no row scores, bool ``[B, num_chunks + 1]``.

    These are the first tokens of a row; with a mask also tokens that it leaves out, and the first
    ones after these. ``places``: of :func:`chunk_slots`.
    """
    read = torch.ones_like(places, dtype=torch.bool) if mask is None else mask
    unscored = ~(read & F.pad(read, (1, 0))[:, :-1])
    hits = places.new_zeros((places.size(0), num_chunks + 1))
    hits = hits.scatter_add(1, places, unscored.long())
    return F.pad(hits[:, :-1] > 0, (0, 1))


def boundaries(
    student: ByteVocab, student_logits: Tensor, teacher: ByteVocab, teacher_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Boundary sets of vocabularies, False for additional columns of the logits."""
    device, mode = str(student_logits.device), fake_mode_of(student_logits)
    found = []
    for boundary, vocab, logits in zip(
        _known_boundaries(student, teacher, device, mode),
        (student, teacher),
        (student_logits, teacher_logits),
        strict=True,
    ):
        missing = logits.size(-1) - vocab._size
        found.append(F.pad(boundary, (0, missing)) if missing else boundary)
    return found[0], found[1]


def boundary_of(vocab: ByteVocab) -> np.ndarray:
    """The boundary set of a vocabulary, computed once."""
    return vocab._constants.arrays("boundary", functools.partial(_boundary_of, vocab))[0]


def _boundary_of(vocab: ByteVocab) -> tuple[np.ndarray, ...]:
    return (vocab.boundary(),)


@torch.compiler.assume_constant_result
def _known_boundaries(
    student: ByteVocab, teacher: ByteVocab, device: str, mode: Any
) -> tuple[Tensor, ...]:
    # Both in one call: the compiler treats two constant tensors of one function as the same.
    return tuple(
        v._constants.tensors("boundary", device, functools.partial(_boundary_of, v), mode)[0]
        for v in (student, teacher)
    )


def reduced(
    function: str,
    loss: Tensor,
    kept: Tensor,
    reduction: TextReduction,
    normalizer: float | Tensor | None,
) -> Tensor:
    """The losses, their sum, or the sum over a denominator; a denominator of 0 gives 0.

    ``"sequence_mean"``: the mean over a text's rows, then over the texts (dimension 0).
    """
    check_normalizer(function, normalizer)
    if reduction == "sequence_mean":
        if loss.dim() < 2:
            raise ValueError(
                f"{function}: reduction sequence_mean needs losses of texts and rows, got shape "
                f"{list(loss.shape)}"
            )
        rows = kept.reshape(loss.shape).flatten(1).sum(1)
        loss, kept = loss.flatten(1).sum(1) / rows.clamp(min=1), torch.ones_like(rows)
        reduction = "mean"
    return checks.reduced(function, loss, kept, reduction, normalizer)
