"""Real text for the examples: CPython's manual topics (prose) and standard library (code)."""

import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, TypeVar

import torch
from torch import Tensor

IGNORE = -100
MAX_WINDOWS_PER_DOCUMENT = 24

#: Token ids, or a text.
Piece = TypeVar("Piece", list[int], str)


@dataclass(frozen=True)
class Windows:
    """Pieces of documents, [windows, length]; a label is the next token, IGNORE where padded."""

    ids: Tensor
    labels: Tensor

    @property
    def mask(self) -> Tensor:
        """True where there is a next token to predict."""
        return self.labels != IGNORE

    @property
    def tokens(self) -> int:
        """How many tokens are predicted."""
        return int(self.mask.sum())

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.ids)

    def __getitem__(self, rows: slice) -> "Windows":
        """Return some of the windows, as views."""
        return Windows(self.ids[rows], self.labels[rows])


def build_windows(
    tokenizer: Any, *, train: int, held_out: int, length: int, seed: int
) -> tuple[Windows, Windows]:
    """Cut `train` and `held_out` windows, half prose and half code, from different documents.

    Manual topics repeat one another's paragraphs, so what a held-out document says is removed from
    the training documents. Windows come shuffled; fewer than asked for where the text runs out.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    chosen = _choose(encode, train=train, held_out=held_out, length=length, seed=seed)
    return _pack(chosen[0], length), _pack(chosen[1], length)


def build_texts(
    *, train: int, held_out: int, characters: int, seed: int
) -> tuple[list[str], list[str]]:
    """Cut texts of up to `characters` + 1 in the same manner, for whatever tokenizer."""
    return _choose(str, train=train, held_out=held_out, length=characters, seed=seed)


def _choose(
    encode: Callable[[str], Piece], *, train: int, held_out: int, length: int, seed: int
) -> tuple[list[Piece], list[Piece]]:
    rng = random.Random(seed)
    chosen: tuple[list[Piece], list[Piece]] = ([], [])
    for documents in (list(topics.values()), _standard_library()):
        rng.shuffle(documents)
        remaining = iter(documents)
        held_paragraphs: set[str] = set()

        def held_documents(
            remaining: Iterator[str] = remaining, seen: set[str] = held_paragraphs
        ) -> Iterator[str]:
            for text in remaining:
                seen.update(map(_key, text.split("\n\n")))
                yield text

        held = list(islice(_cut(encode, held_documents(), length), held_out // 2))
        fresh = (_without(text, held_paragraphs) for text in remaining)
        chosen[0].extend(islice(_cut(encode, fresh, length), train // 2))
        chosen[1].extend(held)
    for windows in chosen:
        rng.shuffle(windows)
    return chosen


def token_bytes(tokenizer: Any, vocab: int) -> Tensor:
    """Return how many bytes each token stands for: byte-level BPE spells a byte as a character."""
    special = set(tokenizer.all_special_ids)
    pieces = tokenizer.convert_ids_to_tokens(list(range(vocab)))
    return torch.tensor([0 if i in special else len(piece) for i, piece in enumerate(pieces)])


def _standard_library() -> list[str]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def _key(paragraph: str) -> str:
    """Return the paragraph without its line breaks and indentation: topics differ in both."""
    return " ".join(paragraph.split())


def _without(text: str, seen: set[str]) -> str:
    return "\n\n".join(p for p in text.split("\n\n") if _key(p) not in seen)


def _cut(encode: Callable[[str], Piece], documents: Iterable[str], length: int) -> Iterator[Piece]:
    """Yield runs of up to length + 1; ends of documents shorter than half are left out."""
    for text in documents:
        ids = encode(text)
        for first in range(0, min(len(ids), MAX_WINDOWS_PER_DOCUMENT * length), length):
            piece = ids[first : first + length + 1]
            if len(piece) > length // 2:
                yield piece


def _pack(pieces: list[list[int]], length: int) -> Windows:
    ids = torch.zeros(len(pieces), length, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE)
    for row, piece in enumerate(pieces):
        inputs = piece[:length]
        ids[row, : len(inputs)] = torch.tensor(inputs)
        labels[row, : len(piece) - 1] = torch.tensor(piece[1:])
    return Windows(ids, labels)
