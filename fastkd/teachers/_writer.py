"""Writing a :class:`fastkd.TeacherStore`, sequence by sequence."""

import errno
import fcntl
import operator
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from fastkd.teachers._packing import array_of
from fastkd.teachers._shards import (
    ID_BYTES,
    Settings,
    Shard,
    index_is,
    read_index,
    write_index,
)

_LOCK = "writer.lock"
_LEFTOVER = re.compile(r"(shard-\d+\.safetensors|store\.json)\.tmp")

_CONTINUE = "exist_ok=True or TeacherStore.append_to continue it"


def check_new(path: Path, where: str, exist_ok: bool, advice: str = _CONTINUE) -> None:
    """Raise unless a directory is empty, or holds a store that may be continued."""
    names = {file.name for file in path.iterdir()}
    if "store.json" in names:
        if not exist_ok:
            raise FileExistsError(f"{where}: {path} is a store already; {advice}")
        return
    others = [name for name in names if name != _LOCK and not _LEFTOVER.fullmatch(name)]
    if others:
        raise FileExistsError(f"{where}: {path} must be empty, got {min(others)} in it")


def _lock(lock: IO[str], kind: int, error: str) -> None:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(error) from None


@contextmanager
def without_writer(path: Path, where: str) -> Iterator[None]:
    """Lock a store against writers while it is read whole; RuntimeError where there is one."""
    try:
        lock = open(path / _LOCK)  # noqa: SIM115 (closed below)
    except (FileNotFoundError, NotADirectoryError):  # a copy of a store, or none
        yield
        return
    with lock:
        error = f"{where}: {path} has a writer, whose last sequences are not stored: close it first"
        _lock(lock, fcntl.LOCK_SH, error)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # explicitly: forked processes hold it too


class TeacherStoreWriter:
    """Appends sequences to a store; from :meth:`TeacherStore.create` or :meth:`~.append_to`.

    Sequences are held in memory until they fill a shard, which is then written atomically;
    :meth:`flush` writes them at once. Leaving the ``with`` block flushes, also on an exception. If
    the writer is killed, only the sequences in memory are lost. Where writing fails (OSError: no
    space, for example), the store and the sequences in memory are unchanged, and the call may be
    repeated. A store can have one writer and any number of readers at a time: where several
    processes compute a teacher, each writes a store, and :meth:`TeacherStore.merge` joins them.

    ``len(writer)`` sequences are stored, so an interrupted run continues behind them, in a data set
    whose order is the same::

        with TeacherStore.create(path, exist_ok=True, **settings) as writer:
            rest = torch.utils.data.Subset(data, range(len(writer), len(data)))
            for batch in DataLoader(rest, batch_size=8):
                writer.append_batch(*teacher_topk(teacher(**batch).logits, k), mask=...)

    In any other order, keys tell what is stored: ``key in writer``.

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
        self._pending_keys: list[str] = []
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
        error = (
            f"{where}: another writer, or TeacherStore.merge, is at work in {self.path}; one at a "
            "time"
        )
        _lock(self._lock, fcntl.LOCK_EX, error)
        check_new(self.path, where, exist_ok)
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
        self._keys: set[str] = set()
        for number in range(len(self._counts) if self._settings.keys else 0):
            shard = Shard(self.path, number, self._settings, self._counts[number])
            self._keys.update(shard.keys())
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

    def __contains__(self, key: object) -> bool:
        """Whether a sequence with this key is stored, in memory included."""
        found = as_key(key)
        return isinstance(found, str) and found in self._keys

    def append(
        self,
        log_probs: Any,
        indices: Any,
        *,
        key: str | int | None = None,
        input_ids: Any = None,
    ) -> int:
        """Append one sequence.

        Args:
            log_probs: float32 tensor or array ``[tokens, k]``, any device, nats, sorted
                descending, normalised over the whole vocabulary: a row's exp sums to at most 1.
                -inf is probability 0.
            indices: int32 or int64, the same shape: the tokens, distinct in a row. -1, with any
                log_prob, pads a short row at its end; a row of -1 alone has no tokens.
            key: of the sequence, in a store with keys: a text, or an integer (its decimal text),
                that no other sequence has.
            input_ids: int32 or int64 ``[tokens]``, not negative, in a store with input ids: the
                token that the teacher read at each row.

        Returns:
            the sequence's number.

        Raises:
            ValueError, TypeError, IndexError: an argument is not as above; nothing is stored. The
                message names the argument, the expected and the actual value.
            OSError: the shard that this fills cannot be written; the sequence is not stored.
        """
        self._check_usable("TeacherStore.append")
        records = self._packing.pack(*self._packing.checked(log_probs, indices))
        found = self._checked_key(key)
        ids = self._checked_ids(input_ids, len(records))
        if ids is not None:
            records = np.concatenate([ids, records], axis=1)
        return self._add(records, found)

    def append_batch(
        self,
        log_probs: Any,
        indices: Any,
        *,
        mask: Any = None,
        keys: Sequence[str | int] | None = None,
        input_ids: Any = None,
    ) -> range:
        """Append the sequences of a padded batch.

        Args:
            log_probs: ``[B, T, k]``; see :meth:`append`.
            indices: ``[B, T, k]``.
            mask: ``[B, T]``, bool or integers: which rows are stored, as a model's
                ``attention_mask``. None: all.
            keys: of each sequence.
            input_ids: ``[B, T]``.

        Returns:
            the sequences' numbers.

        Raises:
            the same as :meth:`append`, for the first sequence that is wrong, whose place in the
            batch the message has: those before it are stored.

        >>> import tempfile, torch, fastkd
        >>> settings = {"vocab_size": 9, "k": 2, "keys": True, "input_ids": True}
        >>> ids, mask = torch.tensor([[3, 4], [5, 0]]), torch.tensor([[1, 1], [1, 0]])
        >>> best = fastkd.teacher_topk(torch.zeros(2, 2, 9), 2)
        >>> with fastkd.TeacherStore.create(tempfile.mkdtemp(), **settings) as writer:
        ...     writer.append_batch(*best, mask=mask, keys=["a", "b"], input_ids=ids)
        range(0, 2)
        >>> fastkd.TeacherStore(writer.path)["b"].indices.tolist()
        [[0, 1]]
        """
        where = "TeacherStore.append_batch"
        self._check_usable(where)
        for name, value, ndim in (
            ("log_probs", log_probs, 3),
            ("indices", indices, 3),
            ("mask", mask, 2),
            ("input_ids", input_ids, 2),
        ):
            if value is None and ndim == 2:
                continue
            if not isinstance(value, (torch.Tensor, np.ndarray)):
                kind = type(value).__name__
                raise TypeError(f"{where}: {name} must be a tensor or a numpy array, got {kind}")
            shape, wanted = list(value.shape), list(log_probs.shape[:2])
            if value.ndim != ndim or shape[:2] != wanted:
                expected = "[B, T, k]" if ndim == 3 else str(wanted)
                raise ValueError(f"{where}: {name} must be {expected}, got {shape}")
        if mask is not None and not re.match(r"(torch\.)?(bool|u?int)", str(mask.dtype)):
            raise TypeError(f"{where}: mask must be bool or integers, got {mask.dtype}")
        some = isinstance(keys, (Sequence, np.ndarray, torch.Tensor, type(None)))
        if not some or isinstance(keys, (str, bytes)) or getattr(keys, "ndim", 1) != 1:
            raise TypeError(f"{where}: keys must be a sequence of keys, got {type(keys).__name__}")
        if keys is not None and len(keys) != len(log_probs):
            raise ValueError(f"{where}: keys must be {len(log_probs)} of them, got {len(keys)}")
        begin = len(self)
        for i in range(len(log_probs)):
            rows = [x if x is None else as_array(x[i]) for x in (log_probs, indices, input_ids)]
            if mask is not None:
                kept = as_array(mask[i]) != 0
                rows = [x if x is None else x[kept] for x in rows]
            key = None if keys is None else keys[i]
            try:
                self.append(rows[0], rows[1], key=key, input_ids=rows[2])
            except (IndexError, TypeError, ValueError) as error:
                message = str(error).removeprefix("TeacherStore.append: ")
                raise type(error)(f"{where}: sequence {i}: {message}") from None
        return range(begin, len(self))

    def _checked_key(self, key: Any) -> str:
        where = "TeacherStore.append"
        if not self._settings.keys:
            if key is not None:
                raise ValueError(f"{where}: key must be None: the store was created without keys")
            return ""
        kind, key = type(key).__name__, as_key(key)
        if not isinstance(key, str):
            raise TypeError(
                f"{where}: key must be a text or an integer, as the store has keys, got {kind}"
            )
        if key in self._keys:
            raise ValueError(f"{where}: key must be new, got {key!r}, which is stored already")
        try:
            key.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: key must be valid Unicode, got {key!r}") from None
        return key

    def _checked_ids(self, ids: Any, tokens: int) -> np.ndarray | None:
        where = "TeacherStore.append"
        if not self._settings.input_ids:
            if ids is not None:
                raise ValueError(
                    f"{where}: input_ids must be None: the store was created without input_ids"
                )
            return None
        found = array_of(where, "input_ids", ids, ("int32", "int64"))
        if found.shape != (tokens,):
            raise ValueError(
                f"{where}: input_ids must be one a row, [{tokens}], got {list(found.shape)}"
            )
        if found.size and not 0 <= found.min() <= found.max() < 2**31:
            bad = found.min() if found.min() < 0 else found.max()
            raise IndexError(f"{where}: input_ids must lie in [0, 2^31), got {bad}")
        return found.astype("<i4").view(np.uint8).reshape(tokens, ID_BYTES)

    def _add(self, records: np.ndarray, key: str) -> int:
        """Append the records of one sequence, which are checked."""
        number = len(self)
        if self._pending_tokens + len(records) >= self._settings.shard_tokens:
            self._write([*self._pending, records], [*self._pending_keys, key])
        else:
            self._pending.append(records)
            self._pending_keys.append(key)
            self._pending_tokens += len(records)
        if self._settings.keys:
            self._keys.add(key)
        return number

    def flush(self) -> None:
        """Write the sequences in memory as a shard."""
        self._check_usable("TeacherStore.flush")
        if self._pending:
            self._write(self._pending, self._pending_keys)
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

    def _write(self, pending: list[np.ndarray], keys: list[str]) -> None:
        """Write the sequences as a shard: all of them, or none after an error."""
        self._undo()
        number = len(self._counts)
        self._unfinished = True
        try:
            counts = Shard.write(self.path, number, self._settings, pending, self._save_file, keys)
            write_index(self.path, self._settings, [*self._counts, counts])
        except BaseException:
            with suppress(OSError):  # repeated before the next write
                self._undo()
            raise
        self._unfinished = False
        self._counts.append(counts)
        self._written += len(pending)
        self._pending, self._pending_keys, self._pending_tokens = [], [], 0

    def _undo(self) -> None:
        """Undo a failed write; the order of the steps keeps the store valid at any time."""
        if self._unfinished:
            if not index_is(self.path, self._settings, self._counts):
                write_index(self.path, self._settings, self._counts)
            Shard.remove(self.path, len(self._counts))
            self._unfinished = False


def as_array(value: Any) -> np.ndarray:
    """A tensor or an array as an array."""
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value


def as_key(key: Any) -> Any:
    """The text of a key that is an integer; anything else as it is."""
    if isinstance(key, str | bool):
        return key
    try:
        return str(operator.index(key))
    except TypeError:
        return key


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
