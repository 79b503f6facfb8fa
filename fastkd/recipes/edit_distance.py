"""The nearest token of another vocabulary, by edit distance in bytes."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastkd.recipes._chunks import check_vocabs
from fastkd.tokenizers._byte_vocab import ByteVocab

#: Pairs whose distance is computed at once: some megabytes of working memory.
_PAIRS = 1 << 17


def edit_distance_map(student_vocab: ByteVocab, teacher_vocab: ByteVocab) -> Tensor:
    r"""For each student token the teacher token with the smallest edit distance in bytes.

    Edits are insertions, deletions and replacements of one byte (Levenshtein). A token with the
    same bytes is the nearest one. Of several nearest tokens the one with the longest common prefix
    is used, of those the lowest id, which in a byte-pair vocabulary is the most frequent. An id
    without bytes is mapped to the first id of the teacher's class of the same name (``"eos"`` to
    ``"eos"``), or to none.

    Equal tokens are found in a dictionary. For the others, tokens within k = 1, 2, 3, ... edits are
    searched. Candidates have a length that differs by at most k and
    :math:`\max(|s|, |t|) - |s \cap t| \leq k` (an edit changes the multiset of bytes by one; the
    intersections are sums over columns of byte counts). Their distance is computed in a band of
    2k + 1 diagonals, for many pairs at once. SmolLM2 (49,152) to GPT-2 (50,256) takes seconds, Qwen
    (151,643) to SmolLM2 a minute: keep the result.

    Args:
        student_vocab: the tokens to be mapped.
        teacher_vocab: the tokens to choose from.

    Returns:
        int64 ``[len(student_vocab)]``, teacher ids, -1 for none.

    Raises:
        TypeError: a vocabulary is no :class:`fastkd.ByteVocab`. ValueError: the teacher has no
            token with bytes.

    Sources: the mapping of Fu et al. 2023 (arXiv 2301.12726) and FuseLLM (arXiv 2401.10491), from
    memory, not verified.

    >>> import fastkd
    >>> student = fastkd.ByteVocab([b"cat", b"cats", b"dog", None], special={"eos": [3]})
    >>> teacher = fastkd.ByteVocab([None, b"bats", b"cat", b"do"], special={"eos": [0]})
    >>> fastkd.recipes.edit_distance_map(student, teacher).tolist()
    [2, 2, 3, 0]
    """
    check_vocabs("edit_distance_map", student_vocab, teacher_vocab)
    ids: dict[bytes, int] = {}
    for number, token in enumerate(teacher_vocab.tokens):
        if token is not None:
            ids.setdefault(token, number)
    if not ids:
        raise ValueError("edit_distance_map: teacher_vocab must have a token with bytes, got none")
    found = dict(ids)
    rest = {t for t in student_vocab.tokens if t is not None and t not in ids}
    found.update(_nearest(sorted(rest), ids))
    nearest = [-1 if token is None else found[token] for token in student_vocab.tokens]
    classes = dict(_classes(teacher_vocab))
    for name, members in _classes(student_vocab):
        if name in classes and name != "other":
            for number in members:
                nearest[number] = classes[name][0]
    return torch.tensor(nearest, dtype=torch.int64)


def _classes(vocab: ByteVocab) -> Iterator[tuple[str, list[int]]]:
    """Each class of ids without bytes that is not empty."""
    places = vocab.segments(b"")[257:].tolist()
    for name, (begin, end) in zip(vocab.special_classes, places, strict=True):
        if begin < end:
            yield name, vocab.order[begin:end].tolist()


class _Tokens:
    """Byte strings sorted by length: concatenated bytes, where each begins, byte counts."""

    def __init__(self, tokens: list[bytes]) -> None:
        self.lengths = np.array([len(token) for token in tokens], dtype=np.int64)
        self.begins = np.concatenate([[0], self.lengths.cumsum()])
        self.buffer = np.frombuffer(b"".join(tokens), dtype=np.uint8)
        self.kind = np.min_scalar_type(int(self.lengths.max()))

    def counts(self) -> np.ndarray:
        """How often each token has each byte, ``[256, tokens]``."""
        token = np.repeat(np.arange(len(self.lengths)), self.lengths)
        size = len(self.lengths)
        places = self.buffer.astype(np.int64) * size + token
        return np.bincount(places, minlength=256 * size).astype(self.kind).reshape(256, size)

    def matrix(self, which: np.ndarray, length: int) -> np.ndarray:
        """The first ``length`` bytes of some tokens, ``[length, which]``; arbitrary after ends."""
        places = self.begins[which] + np.arange(length)[:, None]
        return self.buffer[np.minimum(places, len(self.buffer) - 1)]


def _nearest(rest: list[bytes], ids: dict[bytes, int]) -> Iterator[tuple[bytes, int]]:
    """Nearest teacher id of tokens that the teacher does not have."""
    if not rest:
        return
    by_length = sorted(ids, key=lambda token: (len(token), ids[token]))
    teachers = _Tokens(by_length)
    numbers = np.array([ids[token] for token in by_length])
    counts = teachers.counts()
    students = _Tokens(rest)
    student_counts = students.counts()
    for length in np.unique(students.lengths):
        open_ = np.flatnonzero(students.lengths == length)
        limit = 1
        while open_.size:
            low, high = np.searchsorted(teachers.lengths, [length - limit, length + limit + 1])
            longest = np.maximum(teachers.lengths[low:high], length)
            pairs: list[tuple[np.ndarray, np.ndarray]] = []
            size = 0
            best: dict[int, int] = {}
            for student in open_:
                (values,) = student_counts[:, student].nonzero()
                common = np.zeros(high - low, dtype=teachers.kind)
                for value in values:
                    common += np.minimum(counts[value, low:high], student_counts[value, student])
                near = np.flatnonzero(longest - common <= limit) + low
                pairs.append((np.full(near.shape, student), near))
                size += near.size
                if size > _PAIRS:
                    best |= _best(students, teachers, numbers, pairs, limit)
                    pairs, size = [], 0
            best |= _best(students, teachers, numbers, pairs, limit)
            for place, number in best.items():
                yield rest[place], number
            open_ = np.array([student for student in open_ if student not in best])
            limit += 1 + limit // 4


def _best(
    students: _Tokens,
    teachers: _Tokens,
    numbers: np.ndarray,
    pairs: list[tuple[np.ndarray, np.ndarray]],
    limit: int,
) -> dict[int, int]:
    """Teacher id of each student token that has one within the limit."""
    if not pairs:
        return {}
    student, teacher = (np.concatenate(side) for side in zip(*pairs, strict=True))
    if not student.size:
        return {}
    length = int(students.lengths[student[0]])
    ends = teachers.lengths[teacher]
    texts = teachers.matrix(teacher, int(ends.max()))
    patterns = students.matrix(student, length)
    distance = _banded_distance(patterns, texts, ends, limit)
    near = np.flatnonzero(distance <= limit)
    shared = min(len(texts), length)
    equal = patterns[:shared, near] == texts[:shared, near]
    equal &= np.arange(shared)[:, None] < ends[near]
    prefix = np.logical_and.accumulate(equal).sum(0)
    order = np.lexsort((numbers[teacher[near]], -prefix, distance[near], student[near]))
    chosen, first = np.unique(student[near][order], return_index=True)
    return dict(zip(chosen.tolist(), numbers[teacher[near][order[first]]].tolist(), strict=True))


def _banded_distance(
    patterns: np.ndarray, texts: np.ndarray, ends: np.ndarray, limit: int
) -> np.ndarray:
    """Edit distance of columns, where it is at most the limit; more than that elsewhere.

    patterns ``[length, pairs]``, texts ``[longest, pairs]`` of which the first ``ends`` count. The
    distance of i bytes of the text to j of the pattern, |i - j| <= limit, is ``row[j - i + limit]``
    after step i.
    """
    length, pairs = patterns.shape
    far = limit + 1
    row = np.full((2 * limit + 2, pairs), far, dtype=np.int16)
    row[limit : limit + min(length, limit) + 1] = np.arange(min(length, limit) + 1)[:, None]
    found = np.full(pairs, far, dtype=np.int16)
    for i in range(1, len(texts) + 1):
        for j in range(max(0, i - limit), min(length, i + limit) + 1):
            place = j - i + limit
            best = row[place + 1] + 1
            if j:
                best = np.minimum(best, row[place] + (patterns[j - 1] != texts[i - 1]))
                if place:
                    best = np.minimum(best, row[place - 1] + 1)
            row[place] = best
        if abs(length - i) <= limit:
            found = np.where(ends == i, row[length - i + limit], found)
    return found
