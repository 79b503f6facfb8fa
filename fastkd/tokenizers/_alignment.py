"""Which tokens of two tokenizations of a text cover the same bytes."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from fastkd.tokenizers._byte_vocab import ByteVocab, _host, integers

__all__ = ["Alignment", "align", "align_batch"]

_MOST_TOKENS = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Alignment:
    """``student_chunks, teacher_chunks, num_chunks = alignment``; other fields by name.

    All six fields are part of copies, pickles, ``torch.utils._pytree``, ``default_collate`` (which
    stacks the fields, as if the texts had been aligned in one batch), :meth:`to`,
    :meth:`pin_memory` and :func:`dataclasses.replace`.

    >>> import dataclasses, fastkd
    >>> alignment = fastkd.align([b"a", b"b"], [b"ab"])
    >>> alignment.num_chunks, dataclasses.replace(alignment, num_chunks=2).num_chunks
    (1, 2)
    """

    #: int32, the number of each token's chunk, ascending from 0; -1 for none.
    student_chunks: Any
    teacher_chunks: Any
    #: Number of chunks of the pair of texts; of a batch: the largest of a row.
    num_chunks: int
    #: Number of chunks; of a batch: of each row, int64 ``[batch]``.
    chunks: Any = None
    #: Number of tokens that have bytes and are in no chunk; of a batch: int64 ``[batch]``.
    dropped_student: Any = None
    dropped_teacher: Any = None

    def __iter__(self) -> Iterator[Any]:
        """Iterate over student_chunks, teacher_chunks and num_chunks."""
        return iter((self.student_chunks, self.teacher_chunks, self.num_chunks))

    def __len__(self) -> int:
        """3, the number of items of :meth:`__iter__`."""
        return 3

    def __getitem__(self, index: Any) -> Any:
        """Index into the items of :meth:`__iter__`."""
        return (self.student_chunks, self.teacher_chunks, self.num_chunks)[index]

    def _replace(self, **changes: Any) -> "Alignment":
        """Return a copy with other fields, as a named tuple's method does."""
        return replace(self, **changes)

    def _asdict(self) -> dict[str, Any]:
        """All fields by name."""
        return {name: getattr(self, name) for name in _FIELDS}

    def to(self, *args: Any, **kwargs: Any) -> "Alignment":
        """Return a copy whose tensors are on another device; for arguments see ``Tensor.to``."""
        return self._mapped(lambda x: x.to(*args, **kwargs))

    def pin_memory(self, *args: Any) -> "Alignment":
        """Return a copy whose tensors are in pinned memory."""
        return self._mapped(lambda x: x.pin_memory(*args))

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> "Alignment":
        values = self._asdict().items()
        changed: dict[str, Any] = {
            name: function(x) if isinstance(x, Tensor) else x for name, x in values
        }
        return Alignment(**changed)


_FIELDS = tuple(field.name for field in fields(Alignment))


def _collate(batch: Sequence[Alignment], *, collate_fn_map: Any = None) -> Alignment:
    """Stack the fields as :func:`align_batch` returns them, with the largest number of chunks."""
    found: dict[str, Any] = {name: [getattr(x, name) for x in batch] for name in _FIELDS}
    most = max(found.pop("num_chunks"))
    for name, values in found.items():
        if any(x is None for x in values):
            found[name] = None
        else:
            found[name] = collate(values, collate_fn_map=collate_fn_map)
    return Alignment(**found, num_chunks=most)


default_collate_fn_map[Alignment] = _collate
pytree.register_pytree_node(
    Alignment,
    lambda x: ([getattr(x, name) for name in _FIELDS], None),
    lambda values, _: Alignment(*values),
    serialized_type_name="fastkd.Alignment",
    flatten_with_keys_fn=lambda x: (
        [(pytree.GetAttrKey(name), getattr(x, name)) for name in _FIELDS],
        None,
    ),
)


def align(
    student_tokens: Sequence[bytes | None], teacher_tokens: Sequence[bytes | None]
) -> Alignment:
    r"""Split two tokenizations of one text into the smallest chunks that both have.

    With :math:`E_S` and :math:`E_T` the byte offsets at which the tokens end, chunks end at
    :math:`E_S \cap E_T`, and token t belongs to the chunk in which it ends. A chunk has the same
    bytes on both sides, and no finer chunking exists. Offsets are in bytes, so a character may be
    split over tokens.

    * A token without bytes (None or ``b""``) is in no chunk. Between two tokens of a chunk, on
      either side, it breaks the chain of the chunk's likelihood: all its tokens get -1.
    * Where the texts differ, the tokens of the difference, and of chunks that overlap it, are in no
      chunk; all others are. The difference is the smallest one (Myers, O((n + m) d)) up to 256
      insertions and deletions of a byte. Larger ones are split at the runs of 32, 16 or 8 bytes
      that occur once on each side; where there are none, the search continues while at most a
      quarter of the bytes are edits. The rest counts as different, and so does a run of equal
      bytes between two differences that has less than 4 bytes, or less than 32 and less than a
      quarter of the smaller difference's.
    * If one text starts with one space more than the other (SentencePiece adds one before the
      text), this space is not a difference, but part of the first chunk.
    * Where one text ends before the other, the remaining tokens of the longer one, and a chunk that
      only one side completes, get -1.

    Args:
        student_tokens: each token's bytes; None for tokens that stand for no text.
        teacher_tokens: the same.

    Returns:
        :class:`Alignment`: int32 arrays with each token's chunk or -1, and the number of chunks.

    Raises:
        TypeError: not sequences of bytes and None.

    The chunks of Approximate Likelihood Matching (arXiv 2503.20083).

    >>> import fastkd
    >>> alignment = fastkd.align([b"Hel", b"lo", b" wor", b"ld"], [b"Hello", b" w", b"or", b"ld"])
    >>> student_chunks, teacher_chunks, num_chunks = alignment
    >>> student_chunks.tolist(), teacher_chunks.tolist(), num_chunks
    ([0, 0, 1, 2], [0, 1, 1, 2], 3)
    >>> alignment = fastkd.align([b"a", b" cat", b"."], [b"a", b" dog", b"."])
    >>> alignment.student_chunks.tolist(), alignment.dropped_student
    ([0, -1, 1], 1)
    """
    for name, tokens in (("student_tokens", student_tokens), ("teacher_tokens", teacher_tokens)):
        if not isinstance(tokens, Sequence) or isinstance(tokens, (str, bytes)):
            raise TypeError(
                f"align: {name} must be a sequence of bytes and None, got {type(tokens).__name__}"
            )
    student_chunks, teacher_chunks, num_chunks, *others = _host.align(
        student_tokens, teacher_tokens
    )
    return Alignment(student_chunks, teacher_chunks, num_chunks, num_chunks, *others)


def align_batch(
    student_ids: Any,
    teacher_ids: Any,
    student_vocab: ByteVocab,
    teacher_vocab: ByteVocab,
    *,
    pad_id: int | tuple[int, int] | None = None,
) -> Alignment:
    r"""Align every row of a batch of token ids as :func:`align` does, in threads.

    Args:
        student_ids: integers ``[batch, length]``: an array, a tensor on any device, or a list of
            lists whose lengths may differ.
        teacher_ids: the same number of rows, any length.
        student_vocab: each id's bytes.
        teacher_vocab: the same.
        pad_id: the id of padding, one for both or (student, teacher); may be negative. Padding gets
            -1 and breaks no chunk.

    Returns:
        :class:`Alignment`: int32 ``student_chunks`` and ``teacher_chunks`` in the ids' shapes (of
        lists: padded with -1), the largest number of chunks of a row; int64 ``[batch]`` counts. The
        chunks of a tensor of ids are a tensor on its device, otherwise a numpy array; ``chunks`` is
        of the same kind as the student's.

    Raises:
        IndexError: an id lies outside its vocabulary. TypeError: ids are not integers, a vocabulary
            is no :class:`ByteVocab`. ValueError: ids are not ``[batch, length]``, or the batches
            differ in size.

    >>> import fastkd
    >>> student = fastkd.ByteVocab([None, b"a", b"b", b"ab"], special={"pad": [0]})
    >>> teacher = fastkd.ByteVocab([b"a", b"b"])
    >>> chunks = fastkd.align_batch([[3, 1], [1, 2, 0]], [[0, 1, 0], [0, 1]], student, teacher)
    >>> chunks.student_chunks.tolist(), chunks.teacher_chunks.tolist(), chunks.chunks.tolist()
    ([[0, 1, -1], [0, 1, -1]], [[0, 0, 1], [0, 1, -1]], [2, 2])
    """
    arguments: list[Any] = []
    pads = pad_id if isinstance(pad_id, (tuple, list)) else (pad_id, pad_id)
    if len(pads) != 2:
        raise ValueError(
            "align_batch: pad_id must be one integer or two (student, teacher), got "
            f"{len(pads)} entries"
        )
    sides = (("student", student_ids, student_vocab), ("teacher", teacher_ids, teacher_vocab))
    for (side, ids, vocab), pad in zip(sides, pads, strict=True):
        if not isinstance(vocab, ByteVocab):
            raise TypeError(
                f"align_batch: {side}_vocab must be a fastkd.ByteVocab, got {type(vocab).__name__}"
            )
        if pad is not None and not isinstance(pad, (int, np.integer)):
            raise TypeError(
                f"align_batch: pad_id must be an integer or a pair, got {type(pad).__name__}"
            )
        arguments += [*_rows(f"align_batch: {side}_ids", ids), vocab._core, pad]
    rows, teacher_rows = len(arguments[0]), len(arguments[4])
    if rows != teacher_rows:
        raise ValueError(
            f"align_batch: teacher_ids has {teacher_rows} rows, student_ids has {rows}"
        )
    found = _host.align_batch(*arguments, _usable_cores())
    student_chunks, teacher_chunks, chunks, dropped_student, dropped_teacher = found
    return Alignment(
        _like(student_ids, student_chunks),
        _like(teacher_ids, teacher_chunks),
        int(chunks.max(initial=0)),
        _like(student_ids, chunks),
        _like(student_ids, dropped_student),
        _like(teacher_ids, dropped_teacher),
    )


def _rows(where: str, ids: Any) -> tuple[np.ndarray, np.ndarray]:
    """int64 ``[batch, length]``, padded with 0, and the length of each row."""
    if isinstance(ids, (list, tuple)):
        rows = [integers(f"{where}[{i}]", row) for i, row in enumerate(ids)]
        for i, row in enumerate(rows):
            if row.ndim != 1:
                raise ValueError(f"{where}[{i}] must have one dimension, got shape {row.shape}")
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        array = np.zeros((len(rows), lengths.max(initial=0)), dtype=np.int64)
        for number, row in enumerate(rows):
            array[number, : len(row)] = row
    else:
        array = integers(where, ids)
        if array.ndim != 2:
            raise ValueError(f"{where} must be [batch, length], got shape {array.shape}")
        lengths = np.full(len(array), array.shape[1], dtype=np.int64)
    if array.shape[1] > _MOST_TOKENS:
        raise ValueError(f"{where} must have rows of at most 2^31 - 1 ids, got {array.shape[1]}")
    return array, lengths


def _like(ids: Any, found: np.ndarray) -> Any:
    return torch.from_numpy(found).to(ids.device) if isinstance(ids, Tensor) else found


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
