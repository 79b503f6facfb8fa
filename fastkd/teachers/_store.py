"""A teacher's top-k log-probabilities on disk, by sequence and token, for offline distillation."""

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fastkd._ops import hints
from fastkd._ops.arguments import to_flag
from fastkd._ops.names import StoredLogProbs
from fastkd.teachers._fingerprint import fingerprint
from fastkd.teachers._shards import (
    ID_BYTES,
    Settings,
    Shard,
    damaged,
    directory,
    integer,
    read_index,
)
from fastkd.teachers._teacher_topk import TopK
from fastkd.teachers._writer import TeacherStoreWriter, as_key, check_new, without_writer

__all__ = ["TeacherStore", "TeacherStoreWriter", "fingerprint"]

_OPEN_SHARDS = 64  # file descriptors kept


class TeacherStore:
    """A teacher's top-k log-probabilities, read from disk by sequence and token position.

    :meth:`create` and :meth:`append_to` return a writer; ``TeacherStore(path)`` opens a store for
    reading. An entry takes one byte (log_probs="8bit") or two ("float16"), its index
    :math:`2 + \\log_2(V/k)` bits: 183 bytes a token for k = 64 and 262,144 tokens. The mass of
    each row, and so of its tail, is exact to float32. With 8 bits a row, tail included, differs
    from the original by less than 1e-4 nats of KL up to k = 128 and 2e-4 up to k = 1024.

    Reading a part of a shard checks the checksums (CRC-32, one for 64 tokens) of that part, and
    reads otherwise only the header and sequence offsets. A store is a ``torch`` map-style dataset;
    pickled, or in a DataLoader's worker, it opens its files again. Sequences that are written after
    it was opened are not seen.

    Keys are texts; an integer that was given as a key is stored as its decimal text. All keys are
    read when the first is needed. With ``store`` of a directory that has keys:

    ==================  ========================================================================
    ``store["7"]``      the sequence with the key ``"7"``
    ``store[7]``        sequence number 7, whatever its key
    ``store.find(7)``   the number of the sequence with the key ``"7"``, as ``find("7")``
    ``"7" in store``    whether a sequence has the key ``"7"``; ``7 in store`` asks the same, and
                        not whether there is a sequence number 7: that is ``7 < len(store)``
    ==================  ========================================================================

    Without keys, ``in`` raises ValueError.

    Args:
        path: the directory.
        vocab_size: of the caller's student; None: not checked.
        fingerprint: of the caller's tokenizer or teacher (:func:`fingerprint`); None: not checked.

    Raises:
        ValueError: vocab_size or fingerprint are not the store's; store.json or (when read from) a
            shard is damaged: the message names the file. Other shards stay readable.
        FileNotFoundError: there is no store.
        TypeError, IndexError: from reading, for a sequence or position that does not exist.

    >>> import tempfile, torch
    >>> from fastkd import TeacherStore
    >>> path = tempfile.mkdtemp()
    >>> log_probs = torch.tensor([[0.5, 0.25], [0.9, 0.1]]).log()
    >>> with TeacherStore.create(path, vocab_size=50, k=2) as writer:
    ...     writer.append(log_probs, torch.tensor([[7, 3], [3, 9]]))
    0
    >>> store = TeacherStore(path, vocab_size=50)
    >>> len(store), store.num_tokens
    (1, 2)
    >>> store[0].indices.tolist()
    [[7, 3], [3, 9]]
    >>> [round(p, 2) for p in store.read(-1, 1, 2).log_probs.exp()[0].tolist()]
    [0.9, 0.1]
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        vocab_size: int | None = None,
        fingerprint: str | None = None,
    ) -> None:
        self.path = directory("TeacherStore", "path", path)
        self._settings, self._counts, self._beyond = read_index(self.path, "TeacherStore")
        self._settings.check_match(
            "TeacherStore", self.path, vocab_size=vocab_size, fingerprint=fingerprint
        )
        if self._beyond:
            hints.warn(f"{self._beyond}; the store ends before it")
        self._packing = self._settings.packing()
        self._first = np.cumsum([0, *(sequences for sequences, _ in self._counts)])
        self._shards: dict[int, Shard] = {}
        self._numbers: dict[str, int] | None = None  # of the keys, read when they are needed

    def __getstate__(self) -> dict[str, Any]:
        """The state without open files."""
        return {**self.__dict__, "_shards": {}, "_numbers": None}

    def __len__(self) -> int:
        """Number of sequences."""
        return int(self._first[-1])

    def __repr__(self) -> str:
        """The path, sizes and settings."""
        return (
            f"TeacherStore({str(self.path)!r}, {len(self)} sequences, {self.num_tokens} tokens, "
            f"vocab_size={self.vocab_size}, k={self.k}, log_probs={self._settings.log_probs!r})"
        )

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all sequences."""
        return sum(tokens for _, tokens in self._counts)

    @property
    def vocab_size(self) -> int:
        """The teacher's number of tokens."""
        return self._settings.vocab_size

    @property
    def k(self) -> int:
        """Entries of a row."""
        return self._settings.k

    @property
    def temperature(self) -> float:
        """The temperature of the stored log-probabilities."""
        return self._settings.temperature

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the tokenizer or teacher, as passed to :meth:`create`."""
        return self._settings.fingerprint

    @property
    def has_keys(self) -> bool:
        """Whether each sequence has a key."""
        return self._settings.keys

    @property
    def has_input_ids(self) -> bool:
        """Whether each row has the token that the teacher read."""
        return self._settings.input_ids

    def length(self, i: int | str) -> int:
        """Number of tokens of sequence i."""
        _, start, stop = self._locate("TeacherStore.length", i)
        return stop - start

    def keys(self) -> list[str]:
        """The key of each sequence; ValueError without keys."""
        return list(self._by_key("TeacherStore.keys"))

    def find(self, key: str | int) -> int:
        """The number of the sequence with this key; KeyError where there is none.

        Where a sequence is asked for, a text is a key, and an integer a number: pass the integers
        that are keys to this function.
        """
        text = as_key(key)
        if not isinstance(text, str):
            kind = type(key).__name__
            raise TypeError(f"TeacherStore.find: key must be a text or an integer, got {kind}")
        number = self._by_key("TeacherStore.find").get(text)
        if number is None:
            raise KeyError(f"TeacherStore.find: no sequence has the key {key!r} in {self.path}")
        return number

    def __contains__(self, key: object) -> bool:
        """Whether a sequence has this key: a text, or an integer, which is its decimal text."""
        text = as_key(key)
        return isinstance(text, str) and text in self._by_key("TeacherStore")

    def _by_key(self, where: str) -> dict[str, int]:
        if not self.has_keys:
            raise ValueError(f"{where}: {self.path} was created without keys")
        if self._numbers is None:
            keys = [
                key
                for number in range(len(self._counts))
                for key in self._shard(number).keys()  # noqa: SIM118
            ]
            self._numbers = {key: number for number, key in enumerate(keys)}
        return self._numbers

    def __getitem__(self, i: int | str) -> TopK:
        """Sequence i, or that with the key i: float32 log_probs and int32 indices."""
        shard, start, stop = self._locate("TeacherStore", i)
        return self._top_k(shard, start, stop)

    def input_ids(self, i: int | str) -> torch.Tensor:
        """The tokens that the teacher read, int64 ``[tokens]``; ValueError if not stored."""
        where = "TeacherStore.input_ids"
        if not self.has_input_ids:
            raise ValueError(f"{where}: {self.path} was created without input_ids")
        shard, start, stop = self._locate(where, i)
        ids = np.ascontiguousarray(shard.read(start, stop)[:, :ID_BYTES]).view("<i4")
        return torch.from_numpy(ids.reshape(-1).astype(np.int64))

    def read(self, i: int | str, start: int = 0, stop: int | None = None) -> TopK:
        """The positions [start, stop) of sequence i.

        Args:
            i: the sequence; -1 is the last. Or its key.
            start: the first position.
            stop: the position after the last one; None: the sequence's end.

        Returns:
            float32 log_probs and int32 indices, ``[stop - start, k]``: descending, ties by lower
            index; padding (-inf, -1) last. Entries of probability 0 have -inf and their index.

        Raises:
            ValueError: the shard is damaged. IndexError: there is no such sequence or position.
        """
        shard, first, end = self._locate("TeacherStore.read", i)
        length = end - first
        stop = length if stop is None else stop
        stop = integer("TeacherStore.read", "stop", stop, 0, length, IndexError)
        start = integer("TeacherStore.read", "start", start, 0, stop, IndexError)
        return self._top_k(shard, first + start, first + stop)

    def verify(self, progress: bool = False) -> None:
        """Read every shard and check all its checksums.

        Args:
            progress: show a progress bar, where rich is installed.

        Raises:
            ValueError: a line for each shard that is damaged or missing.
        """
        shards: Iterable[int] = range(len(self._counts))
        if to_flag("TeacherStore.verify", "progress", progress):
            try:
                from rich.progress import track
            except ImportError:
                pass
            else:
                shards = track(shards, description="TeacherStore.verify")
        problems = []
        for number in shards:
            try:
                Shard(self.path, number, self._settings, self._counts[number]).verify()
            except ValueError as error:
                problems.append(str(error))
        if self._beyond:
            problems.append(self._beyond)
        if problems:
            raise ValueError("\n".join(problems))

    def _locate(self, where: str, i: int | str) -> tuple[Shard, int, int]:
        """The shard with sequence i, and the range of its tokens there."""
        if isinstance(i, str):
            i = self.find(i)
        i = integer(
            where, f"the sequence, of {len(self)},", i, -len(self), len(self) - 1, IndexError
        )
        i %= len(self)
        number = int(np.searchsorted(self._first, i, side="right")) - 1
        shard = self._shard(number)
        start, stop = shard.offsets[i - self._first[number] :][:2].tolist()
        return shard, start, stop

    def _shard(self, number: int) -> Shard:
        shard = self._shards.pop(number, None)
        if shard is None:
            shard = Shard(self.path, number, self._settings, self._counts[number])
        self._shards[number] = shard
        # A shard is closed when no thread reads from it any more.
        for oldest in list(self._shards)[:-_OPEN_SHARDS]:
            self._shards.pop(oldest, None)
        return shard

    def _top_k(self, shard: Shard, start: int, stop: int) -> TopK:
        records = shard.read(start, stop)
        if self.has_input_ids:
            records = records[:, ID_BYTES:]
        try:
            log_probs, indices = self._packing.unpack(records)
        except ValueError as error:  # with a correct checksum: the record was written like this
            raise damaged(shard.path, f"tokens {start}..{stop - 1}: {error}") from None
        return TopK(torch.from_numpy(log_probs), torch.from_numpy(indices))

    @staticmethod
    def create(
        path: str | os.PathLike[str],
        *,
        vocab_size: int,
        k: int,
        temperature: float = 1.0,
        fingerprint: str | None = None,
        log_probs: StoredLogProbs = "8bit",
        shard_tokens: int = 1 << 18,
        keys: bool = False,
        input_ids: bool = False,
        exist_ok: bool = False,
    ) -> TeacherStoreWriter:
        """Begin a store in a new or empty directory.

        Args:
            path: the directory.
            vocab_size: 1 to 2^31 - 1; all indices are below it.
            k: entries of a row, 1 to min(vocab_size, 1024).
            temperature: of the log-probabilities; stored for the reader.
            fingerprint: of the tokenizer or teacher (:func:`fingerprint`); stored for the reader.
            log_probs: ``"8bit"`` or ``"float16"``.
            shard_tokens: a shard is written when it has this number of tokens. The unfinished one
                is in memory, and is lost if the writer is killed.
            keys: each sequence gets a key, by which it is found (:meth:`find`, ``store[key]``).
            input_ids: each row gets the token that the teacher read there (:meth:`input_ids`), for
                4 bytes more.
            exist_ok: continue a store that exists and has the same settings.

        Raises:
            FileExistsError: the directory is not empty. ValueError, TypeError: a setting is out of
                range, or differs from the store to continue. RuntimeError: the store has another
                writer. ImportError: the safetensors package is missing.
        """
        where = "TeacherStore.create"
        settings = Settings.checked(
            where,
            *(vocab_size, k, temperature, fingerprint, log_probs, shard_tokens, keys, input_ids),
        )
        exist_ok = to_flag(where, "exist_ok", exist_ok)
        path = directory(where, "path", path)
        path.mkdir(parents=True, exist_ok=True)
        check_new(path, where, exist_ok)
        return TeacherStoreWriter(path, where, settings, exist_ok)

    @staticmethod
    def append_to(
        path: str | os.PathLike[str],
        *,
        vocab_size: int | None = None,
        fingerprint: str | None = None,
    ) -> TeacherStoreWriter:
        """Continue a store with its settings; ``len(writer)`` sequences are in it.

        Args:
            path: the directory.
            vocab_size: expected of the store; None: not checked.
            fingerprint: expected of the store; None: not checked.

        Raises:
            FileNotFoundError: there is no store. ValueError: vocab_size or fingerprint are not the
                store's, or its last shard, which is checked here, is missing or damaged.
                RuntimeError: the store has another writer. ImportError: the safetensors package is
                missing.
        """
        where = "TeacherStore.append_to"
        path = directory(where, "path", path)
        settings = read_index(path, where)[0]
        settings.check_match(where, path, vocab_size=vocab_size, fingerprint=fingerprint)
        return TeacherStoreWriter(path, where, settings, True)

    @staticmethod
    def merge(
        path: str | os.PathLike[str],
        sources: Sequence[str | os.PathLike[str]],
        *,
        interleave: bool = False,
        duplicates: Literal["error", "first"] = "error",
        shard_tokens: int | None = None,
    ) -> "TeacherStore":
        """Join stores, such as those of several ranks, into a new one; records are copied as is.

        No source may have a writer, also in this process: it is closed first.

        Args:
            path: a new or empty directory.
            sources: directories of stores with the same settings but for ``shard_tokens``.
            interleave: take a sequence of each source in turn, as ``DistributedSampler`` without
                shuffling has dealt them out; False: all of the first, then all of the second, ...
            duplicates: what to do with a key that two sequences have, of two sources:
                ``"error"``: raise ValueError; ``"first"``: copy the sequence that comes first in
                the order of ``interleave``, and leave the others out, whatever they hold. A sampler
                that fills up its last batch makes such keys. Sequences without keys are all copied.
            shard_tokens: see :meth:`create`; None: that of the first source.

        Returns:
            the new store.

        Raises:
            FileExistsError: the directory is not empty. FileNotFoundError: a source is no store.
                ValueError: there is no source, their settings differ, a key is there twice, or a
                source is damaged; ``path`` then holds a part, which may be deleted.
                RuntimeError: a source has a writer.

        >>> import tempfile, torch, fastkd
        >>> best = fastkd.teacher_topk(torch.zeros(1, 5, 9), 2)
        >>> ranks = []
        >>> for rank in range(2):
        ...     settings = {"vocab_size": 9, "k": 2, "keys": True}
        ...     with fastkd.TeacherStore.create(tempfile.mkdtemp(), **settings) as writer:
        ...         _ = writer.append_batch(*best, keys=[f"text {rank}"])
        ...     ranks.append(writer.path)
        >>> fastkd.TeacherStore.merge(tempfile.mkdtemp(), ranks).keys()
        ['text 0', 'text 1']
        """
        where = "TeacherStore.merge"
        if isinstance(sources, (str, os.PathLike)) or not isinstance(sources, Iterable):
            kind = type(sources).__name__
            raise TypeError(f"{where}: sources must be a sequence of paths, got {kind}")
        if duplicates not in ("error", "first"):
            raise ValueError(f"{where}: duplicates must be error or first, got {duplicates!r}")
        interleave = to_flag(where, "interleave", interleave)
        folders = [directory(where, "sources", source) for source in sources]
        if not folders:
            raise ValueError(f"{where}: sources must be one store or more, got none")
        path = directory(where, "path", path)
        with ExitStack() as held:
            for folder in folders:
                held.enter_context(without_writer(folder, where))
            stores = [TeacherStore(folder) for folder in folders]
            return _merged(where, path, stores, interleave, duplicates, shard_tokens)


def _merged(
    where: str,
    path: Path,
    stores: list[TeacherStore],
    interleave: bool,
    duplicates: str,
    shard_tokens: int | None,
) -> TeacherStore:
    """Write the stores' sequences to a new store; see :meth:`TeacherStore.merge`."""
    for store in stores:
        if store._beyond:
            raise ValueError(f"{where}: {store._beyond}")
        wanted = {**stores[0]._settings._asdict(), "shard_tokens": None}
        # check_match skips None: without this, a store without a fingerprint would match any.
        if store.fingerprint != stores[0].fingerprint:
            wanted["fingerprint"] = str(stores[0].fingerprint)
        store._settings.check_match(where, store.path, **wanted)
    settings = stores[0]._settings
    if shard_tokens is not None:
        number = integer(where, "shard_tokens", shard_tokens, 1, 1 << 40)
        settings = settings._replace(shard_tokens=number)
    path.mkdir(parents=True, exist_ok=True)
    check_new(path, where, False, "merge into a folder of its own")
    order = [(i, store) for store in stores for i in range(len(store))]
    if interleave:
        order.sort(key=lambda x: x[0])  # stable: of equal numbers the earlier store's first
    names = [store.keys() if settings.keys else [] for store in stores]
    keys = {id(store): found for store, found in zip(stores, names, strict=True)}
    with TeacherStoreWriter(path, where, settings, False) as writer:
        for i, store in order:
            key = keys[id(store)][i] if settings.keys else ""
            if settings.keys and key in writer:
                if duplicates == "first":
                    continue
                raise ValueError(f"{where}: key {key!r} of {store.path} is in another, too")
            shard, start, stop = store._locate(where, i)
            writer._add(shard.read(start, stop), key)
    return TeacherStore(path)
