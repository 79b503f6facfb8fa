"""Texts as batches of both tokenizers' ids with their chunks: what an ALM training loop reads."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastkd._ops.arguments import to_flag
from fastkd._ops.padding import padded, padded_length, positive_or_none
from fastkd.tokenizers._alignment import align_batch
from fastkd.tokenizers._byte_vocab import ByteVocab, integers

_NAME = "AlmCollator"


class AlmCollator:
    """A DataLoader's ``collate_fn``: texts to what :func:`fastkd.recipes.alm` takes of a batch.

    Each text is tokenized by both tokenizers, and :func:`fastkd.align_batch` finds the chunks::

        collate = fastkd.tokenizers.AlmCollator(student_tokenizer, teacher_tokenizer)
        vocabs = {"student_vocab": collate.student_vocab, "teacher_vocab": collate.teacher_vocab}
        for batch in DataLoader(texts, batch_size=8, collate_fn=collate, num_workers=2):
            s = student(batch["student_ids"], attention_mask=batch["student_mask"]).logits
            with torch.no_grad():
                t = teacher(batch["teacher_ids"], attention_mask=batch["teacher_mask"]).logits
            loss = fastkd.recipes.alm(student_logits=s, teacher_logits=t, **vocabs, **batch)

    :func:`fastkd.alm_loss` takes the ids and chunks of the rows that score them: those from column
    1 on, with the logits up to the last row.

    Args:
        student_tokenizer: of transformers, a ``tokenizers.Tokenizer``, ``tiktoken.Encoding`` or
            ``sentencepiece.SentencePieceProcessor``; or, where ``student_vocab`` is given, any
            function from a text to ids.
        teacher_tokenizer: the same.
        student_vocab: None: :meth:`fastkd.ByteVocab.from_tokenizer`.
        teacher_vocab: the same.
        column: where an item of the data set is a dictionary: the key of its text.
        max_length: the most tokens of a text, for both or (student, teacher); None: all. The rest
            of the longer side is then in no chunk.
        add_special_tokens: as for the tokenizers that have this. With a token before the text, the
            text's first chunk counts, too.
        padding_side: where shorter texts are padded.
        pad_to_multiple_of: of the lengths of a batch, for both.

    Calling it with a sequence of texts, or of dictionaries with one, returns a dictionary:

    ===================================  =========================================================
    ``student_ids``, ``teacher_ids``     int64 ``[B, T_S]`` and ``[B, T_T]``, padded with the
                                         tokenizer's pad token, or else its end token, or 0
    ``student_mask``, ``teacher_mask``   int64, 1 for tokens and 0 for padding, as models take it
    ``student_chunks``,                  int32, the chunk of each token, -1 for none
    ``teacher_chunks``
    ``num_chunks``                       the largest number of chunks of a text
    ===================================  =========================================================

    It is pickled with its tokenizers, for a DataLoader's workers.

    Raises:
        TypeError: a tokenizer of another kind; an item that is no text; ids that are no integers.
        ValueError, KeyError: an option has the wrong value; there is no text, or no such column.
        IndexError: an id is not in the vocabulary.

    >>> import fastkd
    >>> letters = fastkd.ByteVocab([b"c", b"a", b"t"])
    >>> pieces = fastkd.ByteVocab([b"ca", b"t", b"a"])
    >>> collate = fastkd.tokenizers.AlmCollator(
    ...     lambda text: ["cat".index(x) for x in text],
    ...     lambda text: {"cat": [0, 1], "a": [2]}[text],
    ...     student_vocab=letters,
    ...     teacher_vocab=pieces,
    ... )
    >>> batch = collate(["cat", "a"])
    >>> batch["student_ids"].tolist(), batch["student_mask"].tolist()
    ([[0, 1, 2], [1, 0, 0]], [[1, 1, 1], [1, 0, 0]])
    >>> batch["student_chunks"].tolist(), batch["teacher_chunks"].tolist(), batch["num_chunks"]
    ([[0, 0, 1], [0, -1, -1]], [[0, 1], [0, -1]], 2)
    """

    def __init__(
        self,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        *,
        student_vocab: ByteVocab | None = None,
        teacher_vocab: ByteVocab | None = None,
        column: str = "text",
        max_length: int | tuple[int, int] | None = None,
        add_special_tokens: bool = True,
        padding_side: Literal["right", "left"] = "right",
        pad_to_multiple_of: int | None = None,
    ) -> None:
        vocabs = []
        for side, tokenizer, vocab in (
            ("student", student_tokenizer, student_vocab),
            ("teacher", teacher_tokenizer, teacher_vocab),
        ):
            if vocab is None:
                try:
                    vocab = ByteVocab.from_tokenizer(tokenizer)
                except TypeError as error:
                    raise TypeError(f"{_NAME}: {side}_tokenizer: {error}") from None
            elif not isinstance(vocab, ByteVocab):
                kind = type(vocab).__name__
                raise TypeError(f"{_NAME}: {side}_vocab must be a fastkd.ByteVocab, got {kind}")
            elif _encoder(tokenizer) is None:
                kind = type(tokenizer).__name__
                raise TypeError(
                    f"{_NAME}: {side}_tokenizer must be a tokenizer or a function, got {kind}"
                )
            vocabs.append(vocab)
        if padding_side not in ("right", "left"):
            raise ValueError(f"{_NAME}: padding_side must be right or left, got {padding_side!r}")
        both = max_length if isinstance(max_length, (tuple, list)) else (max_length, max_length)
        if len(both) != 2:
            raise ValueError(
                f"{_NAME}: max_length must be an integer or two (student, teacher), got "
                f"{len(both)} entries"
            )
        self.student_tokenizer, self.teacher_tokenizer = student_tokenizer, teacher_tokenizer
        self.student_vocab, self.teacher_vocab = vocabs
        self._column = column
        self._longest = [positive_or_none(_NAME, "max_length", x) for x in both]
        self._special = to_flag(_NAME, "add_special_tokens", add_special_tokens)
        self._left = padding_side == "left"
        self._multiple = positive_or_none(_NAME, "pad_to_multiple_of", pad_to_multiple_of) or 1

    def __call__(self, items: Iterable[str | Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of these texts; see the class."""
        if isinstance(items, str | Mapping) or not isinstance(items, Iterable):
            kind = type(items).__name__
            raise TypeError(f"{_NAME}: items must be a sequence of texts, got {kind}")
        texts = [self._text(i, item) for i, item in enumerate(items)]
        if not texts:
            raise ValueError(f"{_NAME}: items must hold a text or more, got none")
        sides = ("student", "teacher")
        tokenizers = (self.student_tokenizer, self.teacher_tokenizer)
        rows = [
            self._rows(side, tokenizer, longest, texts)
            for side, tokenizer, longest in zip(sides, tokenizers, self._longest, strict=True)
        ]
        try:
            alignment = align_batch(rows[0], rows[1], self.student_vocab, self.teacher_vocab)
        except IndexError as error:
            message = str(error).removeprefix("align_batch: ")
            raise IndexError(f"{_NAME}: {message}") from None
        batch: dict[str, Any] = {}
        for place, side in enumerate(sides):
            ids, chunks = rows[place], alignment[place]
            length = padded_length(map(len, ids), self._multiple)
            pad = _pad_id(tokenizers[place])
            batch[f"{side}_ids"] = self._padded(ids, length, pad)
            batch[f"{side}_mask"] = self._padded([[1] * len(row) for row in ids], length, 0)
            cut = [row[: len(x)] for row, x in zip(chunks, ids, strict=True)]
            batch[f"{side}_chunks"] = self._padded(cut, length, -1).int()
        return {**batch, "num_chunks": alignment.num_chunks}

    def _text(self, number: int, item: Any) -> str:
        if isinstance(item, Mapping):
            if self._column not in item:
                raise KeyError(
                    f"{_NAME}: item {number} must have the column {self._column!r}, got "
                    f"{', '.join(map(repr, item))}"
                )
            item = item[self._column]
        if not isinstance(item, str):
            raise TypeError(f"{_NAME}: item {number} must be a text, got {type(item).__name__}")
        return item

    def _rows(
        self, side: str, tokenizer: Any, longest: int | None, texts: list[str]
    ) -> list[list[int]]:
        encode = _encoder(tokenizer)
        assert encode is not None
        found = [
            integers(f"{_NAME}: {side}_tokenizer's ids", row)
            for row in encode(texts, self._special)
        ]
        for row in found:
            if row.ndim != 1:
                raise ValueError(
                    f"{_NAME}: {side}_tokenizer's ids must be [length], got shape {list(row.shape)}"
                )
        return [row[:longest].tolist() for row in found]

    def _padded(self, rows: Sequence[Sequence[int]], length: int, value: int) -> Tensor:
        tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
        return padded(tensors, length, value, left=self._left)


def _encoder(tokenizer: Any) -> Callable[[list[str], bool], Iterable[Any]] | None:
    """From texts, and whether to add special tokens, to ids; None if it is no tokenizer."""
    if hasattr(tokenizer, "encode_ordinary_batch"):  # tiktoken
        return lambda texts, special: map(tokenizer.encode_ordinary, texts)
    if hasattr(tokenizer, "id_to_piece"):  # SentencePiece: as its add_bos and add_eos say
        return lambda texts, special: map(tokenizer.encode, texts)
    if hasattr(tokenizer, "convert_ids_to_tokens"):  # transformers
        return lambda texts, special: tokenizer(texts, add_special_tokens=special)["input_ids"]
    if hasattr(tokenizer, "encode_batch"):  # tokenizers
        return lambda texts, special: (
            x.ids for x in tokenizer.encode_batch(texts, add_special_tokens=special)
        )
    return (lambda texts, special: map(tokenizer, texts)) if callable(tokenizer) else None


def _pad_id(tokenizer: Any) -> int:
    """An id of the model's: what it is does not matter."""
    for name in ("pad_token_id", "eos_token_id"):
        found = getattr(tokenizer, name, None)
        if isinstance(found, int) and found >= 0:
            return found
    return 0
