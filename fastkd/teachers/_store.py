"""A teacher's top-k log-probabilities on disk, by sequence and token, for offline distillation."""

import errno
import fcntl
import os
import re
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastkd._ops.names import StoredLogProbs
from fastkd.teachers._fingerprint import fingerprint
from fastkd.teachers._shards import (
    Settings,
    Shard,
    damaged,
    index_is,
    integer,
    read_index,
    write_index,
)
from fastkd.teachers._teacher_topk import TopK

__all__ = ["TeacherStore", "TeacherStoreWriter", "fingerprint"]

_OPEN_SHARDS = 64  # file descriptors kept
_LOCK = "writer.lock"
_LEFTOVER = re.compile(r"(shard-\d+\.safetensors|store\.json)\.tmp")


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
        self.path = Path(path).absolute()
        self._settings, self._counts, self._beyond = read_index(self.path, "TeacherStore")
        self._settings.check_match(
            "TeacherStore", self.path, vocab_size=vocab_size, fingerprint=fingerprint
        )
        if self._beyond:
            warnings.warn(f"{self._beyond}; the store ends before it", stacklevel=2)
        self._packing = self._settings.packing()
        self._first = np.cumsum([0, *(sequences for sequences, _ in self._counts)])
        self._shards: dict[int, Shard] = {}

    def __getstate__(self) -> dict[str, Any]:
        """The state without open files."""
        return {**self.__dict__, "_shards": {}}

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

    def length(self, i: int) -> int:
        """Number of tokens of sequence i."""
        _, start, stop = self._locate("TeacherStore.length", i)
        return stop - start

    def __getitem__(self, i: int) -> TopK:
        """Sequence i: float32 log_probs and int32 indices, ``[tokens, k]``."""
        shard, start, stop = self._locate("TeacherStore", i)
        return self._top_k(shard, start, stop)

    def read(self, i: int, start: int = 0, stop: int | None = None) -> TopK:
        """The positions [start, stop) of sequence i.

        Args:
            i: the sequence; -1 is the last.
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
        if progress:
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

    def _locate(self, where: str, i: int) -> tuple[Shard, int, int]:
        """The shard with sequence i, and the range of its tokens there."""
        i = integer(
            where, f"the sequence, of {len(self)},", i, -len(self), len(self) - 1, IndexError
        )
        i %= len(self)
        number = int(np.searchsorted(self._first, i, side="right")) - 1
        shard = self._shards.pop(number, None)
        if shard is None:
            shard = Shard(self.path, number, self._settings, self._counts[number])
        self._shards[number] = shard
        # A shard is closed when no thread reads from it any more.
        for oldest in list(self._shards)[:-_OPEN_SHARDS]:
            self._shards.pop(oldest, None)
        start, stop = shard.offsets[i - self._first[number] :][:2].tolist()
        return shard, start, stop

    def _top_k(self, shard: Shard, start: int, stop: int) -> TopK:
        records = shard.read(start, stop)
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
        exist_ok: bool = False,
    ) -> "TeacherStoreWriter":
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
            exist_ok: continue a store that exists and has the same settings.

        Raises:
            FileExistsError: the directory is not empty. ValueError, TypeError: a setting is out of
                range, or differs from the store to continue. RuntimeError: the store has another
                writer. ImportError: the safetensors package is missing.
        """
        where = "TeacherStore.create"
        settings = Settings.checked(
            where, vocab_size, k, temperature, fingerprint, log_probs, shard_tokens
        )
        path = Path(path).absolute()
        path.mkdir(parents=True, exist_ok=True)
        _check_new(path, where, exist_ok)
        return TeacherStoreWriter(path, where, settings, exist_ok)

    @staticmethod
    def append_to(
        path: str | os.PathLike[str],
        *,
        vocab_size: int | None = None,
        fingerprint: str | None = None,
    ) -> "TeacherStoreWriter":
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
        where, path = "TeacherStore.append_to", Path(path).absolute()
        settings = read_index(path, where)[0]
        settings.check_match(where, path, vocab_size=vocab_size, fingerprint=fingerprint)
        return TeacherStoreWriter(path, where, settings, True)


def _check_new(path: Path, where: str, exist_ok: bool) -> None:
    names = {file.name for file in path.iterdir()}
    if "store.json" in names:
        if not exist_ok:
            raise FileExistsError(
                f"{where}: {path} is a store already; exist_ok=True or TeacherStore.append_to "
                "continue it"
            )
        return
    others = [name for name in names if name != _LOCK and not _LEFTOVER.fullmatch(name)]
    if others:
        raise FileExistsError(f"{where}: {path} must be empty, got {min(others)} in it")


class TeacherStoreWriter:
    """Appends sequences to a store; from :meth:`TeacherStore.create` or :meth:`~.append_to`.

    Sequences are held in memory until they fill a shard, which is then written atomically;
    :meth:`flush` writes them at once. Leaving the ``with`` block flushes, also on an exception. If
    the writer is killed, only the sequences in memory are lost. Where writing fails (OSError: no
    space, for example), the store and the sequences in memory are unchanged, and the call may be
    repeated. A store can have one writer and any number of readers at a time.

    >>> import tempfile, torch
    >>> from fastkd import TeacherStore
    >>> path = tempfile.mkdtemp()
    >>> for _ in range(2):
    ...     with TeacherStore.create(path, vocab_size=50, k=1, exist_ok=True) as writer:
    ...         writer.append(torch.tensor([[-0.5]]), torch.tensor([[7]]))
    0
    1
    """

    def __init__(self, path: Path, where: str, settings: Settings, exist_ok: bool) -> None:
        self.path, self._settings, self._save_file = path, settings, _save_file(where)
        self._packing = settings.packing()
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        self._unfinished = False  # a failed write may have left something on disk
        self._process = os.getpid()
        self._lock = open(path / _LOCK, "a")  # noqa: SIM115 (held until close)
        try:
            self._begin(where, exist_ok)
        except BaseException:
            self._lock.close()
            raise

    def _begin(self, where: str, exist_ok: bool) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"{where}: another writer is at work in {self.path}; one at a time"
            ) from None
        _check_new(self.path, where, exist_ok)
        for file in self.path.iterdir():
            if _LEFTOVER.fullmatch(file.name):
                file.unlink()
        self._counts: list[tuple[int, int]] = []
        if (self.path / "store.json").exists():
            stored, self._counts, beyond = read_index(self.path, where)
            stored.check_match(where, self.path, **self._settings._asdict())
            if beyond:
                raise ValueError(f"{where}: cannot continue: {beyond}")
            if self._counts:
                last = len(self._counts) - 1
                try:
                    Shard(self.path, last, stored, self._counts[last]).verify()
                except ValueError as error:
                    raise ValueError(f"{where}: cannot continue: {error}") from None
            self._settings = stored
        self._written = sum(sequences for sequences, _ in self._counts)
        write_index(self.path, self._settings, self._counts)

    def __enter__(self) -> "TeacherStoreWriter":
        """Return the writer."""
        return self

    def __exit__(self, *_: object) -> None:
        """:meth:`close`, also on an exception; the lock is released even if writing fails."""
        try:
            self.close()
        finally:
            self._unlock()

    def __len__(self) -> int:
        """Number of sequences, those in memory included."""
        return self._written + len(self._pending)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, those in memory included."""
        return sum(tokens for _, tokens in self._counts) + self._pending_tokens

    def append(self, log_probs: Any, indices: Any) -> int:
        """Append one sequence.

        Args:
            log_probs: float32 tensor or array ``[tokens, k]``, any device, nats, sorted
                descending, normalised over the whole vocabulary: a row's exp sums to at most 1.
                -inf is probability 0.
            indices: int32 or int64, the same shape: the tokens, distinct in a row. -1, with any
                log_prob, pads a short row at its end.

        Returns:
            the sequence's number.

        Raises:
            ValueError, TypeError, IndexError: an argument is not as above; nothing is stored. The
                message names the argument, the expected and the actual value.
            OSError: the shard that this fills cannot be written; the sequence is not stored.
        """
        self._check_usable("TeacherStore.append")
        records = self._packing.pack(*self._packing.checked(log_probs, indices))
        number = len(self)
        if self._pending_tokens + len(records) >= self._settings.shard_tokens:
            self._write([*self._pending, records])
        else:
            self._pending.append(records)
            self._pending_tokens += len(records)
        return number

    def flush(self) -> None:
        """Write the sequences in memory as a shard."""
        self._check_usable("TeacherStore.flush")
        if self._pending:
            self._write(self._pending)
        else:
            self._undo()

    def close(self) -> None:
        """Flush, and release the lock for other writers. Closing again does nothing.

        If flushing fails, the writer stays open with the sequences in memory: close it again.
        """
        if self._lock.closed:
            return
        self._check_usable("TeacherStore.close")
        self.flush()
        self._unlock()

    def _unlock(self) -> None:
        if not self._lock.closed and os.getpid() == self._process:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # explicitly: forked processes hold it too
            self._lock.close()

    def _check_usable(self, where: str) -> None:
        if self._lock.closed:
            raise ValueError(f"{where}: the writer is closed")
        if os.getpid() != self._process:
            raise RuntimeError(f"{where}: the writer belongs to process {self._process}")

    def _write(self, pending: list[np.ndarray]) -> None:
        """Write the sequences as a shard: all of them, or none after an error."""
        self._undo()
        number = len(self._counts)
        self._unfinished = True
        try:
            counts = Shard.write(self.path, number, self._settings, pending, self._save_file)
            write_index(self.path, self._settings, [*self._counts, counts])
        except BaseException:
            with suppress(OSError):  # repeated before the next write
                self._undo()
            raise
        self._unfinished = False
        self._counts.append(counts)
        self._written += len(pending)
        self._pending, self._pending_tokens = [], 0

    def _undo(self) -> None:
        """Undo a failed write; the order of the steps keeps the store valid at any time."""
        if self._unfinished:
            if not index_is(self.path, self._settings, self._counts):
                write_index(self.path, self._settings, self._counts)
            Shard.remove(self.path, len(self._counts))
            self._unfinished = False


def _save_file(where: str) -> Callable[..., None]:
    """``safetensors.numpy.save_file``, which raises errors of writing as OSError."""
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file
    except ImportError:
        raise ImportError(
            f'{where}: needs the safetensors package: pip install "fastkd[store]"'
        ) from None

    def save(tensors: dict[str, np.ndarray], file: Path, metadata: dict[str, str]) -> None:
        try:
            save_file(tensors, file, metadata)
        except SafetensorError as error:
            code = re.search(r"\(os error (\d+)\)", str(error))
            number = int(code[1]) if code else errno.EIO
            raise OSError(number, str(error), str(file)) from error

    return save
