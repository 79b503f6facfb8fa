"""The files of a :class:`fastkd.TeacherStore`: the index, and the shards with the records."""

import json
import math
import operator
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastkd.teachers._packing import Packing

FORMATS = ("8bit", "float16")
KIND = "fastkd.TeacherStore"
#: 2: with keys or input ids.
VERSIONS = (1, 2)
ID_BYTES = 4  # of an input id, before the packed record

BLOCK = 64  # tokens under one checksum
_MOST = 1 << 48  # sequences or tokens of a shard: more than fit on any disk

#: Exceptions from reading a damaged file.
_UNREADABLE = (
    *(AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError),
)


class Settings(NamedTuple):
    """The settings of a store, in store.json and in every shard."""

    vocab_size: int
    k: int
    temperature: float
    fingerprint: str | None
    log_probs: str
    shard_tokens: int
    keys: bool = False
    input_ids: bool = False

    @classmethod
    def checked(cls, where: str, *values: Any) -> "Settings":
        """Settings from values, or an error that names a wrong one."""
        vocab_size, k, temperature, fingerprint, log_probs, shard_tokens, *flags = values
        vocab_size = integer(where, "vocab_size", vocab_size, 1, 2**31 - 1)
        k = integer(where, "k", k, 1, min(vocab_size, 1024))
        shard_tokens = integer(where, "shard_tokens", shard_tokens, 1, 1 << 40)
        if isinstance(temperature, bool) or not isinstance(temperature, Real):
            raise TypeError(
                f"{where}: temperature must be a number, got {type(temperature).__name__}"
            )
        number: Any = temperature
        if not 0 < number <= sys.float_info.max:
            raise ValueError(f"{where}: temperature must be positive, got {temperature}")
        if not isinstance(fingerprint, (str, type(None))):
            raise TypeError(
                f"{where}: fingerprint must be a string, got {type(fingerprint).__name__}"
            )
        if log_probs not in FORMATS:
            raise ValueError(
                f"{where}: log_probs must be one of {', '.join(FORMATS)}, got {log_probs!r}"
            )
        for name, flag in zip(("keys", "input_ids"), flags, strict=True):
            if not isinstance(flag, bool):
                raise TypeError(f"{where}: {name} must be True or False, got {type(flag).__name__}")
        return cls(vocab_size, k, float(temperature), fingerprint, log_probs, shard_tokens, *flags)

    def stored(self) -> dict[str, Any]:
        """The settings as files have them: without what version 1 does not know, where absent."""
        return {x: value for x, value in self._asdict().items() if value is not False}

    @property
    def version(self) -> int:
        """Of the format."""
        return 2 if self.keys or self.input_ids else 1

    def check_match(self, where: str, path: Path, **wanted: Any) -> None:
        """Raise for the first of the wanted settings that is not None and differs from this."""
        for name, value in wanted.items():
            if name == "vocab_size" and value is not None:
                value = integer(where, name, value, 1, 2**31 - 1)
            if name == "fingerprint" and not isinstance(value, (str, type(None))):
                raise TypeError(f"{where}: {name} must be a string, got {type(value).__name__}")
            if value is not None and value != getattr(self, name):
                raise ValueError(
                    f"{where}: {name} is {value!r}, but {path} was written with "
                    f"{getattr(self, name)!r}"
                )

    def text(self) -> str:
        """The settings as text, as in the shards."""
        return json.dumps(self.stored())

    @property
    def record_bytes(self) -> int:
        """Of a token."""
        return self.packing().record_bytes + ID_BYTES * self.input_ids

    def packing(self) -> Packing:
        """The packing of the records."""
        return Packing(self.vocab_size, self.k, self.log_probs)


def directory(where: str, name: str, path: Any) -> Path:
    """An absolute path."""
    try:
        return Path(path).absolute()
    except TypeError:
        raise TypeError(f"{where}: {name} must be a path, got {type(path).__name__}") from None


def integer(
    where: str, name: str, value: Any, low: int, high: int, error: type = ValueError
) -> int:
    """The value as an int, if it lies in [low, high]."""
    try:
        if isinstance(value, bool):
            raise TypeError
        found = operator.index(value)
    except TypeError:
        raise TypeError(f"{where}: {name} must be an int, got {type(value).__name__}") from None
    if not low <= found <= high:
        raise error(f"{where}: {name} must lie in [{low}, {high}], got {found}")
    return found


def damaged(path: Path, what: str) -> ValueError:
    """The error for a damaged file."""
    return ValueError(f"teacher_store: {path} is damaged: {what}")


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file atomically, also if the process or the machine stops.

    After an error the file is the old one, or, if only its directory was not synced, the new one.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        _sync(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # the error may be a full disk
            temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _index(settings: Settings, shards: list[tuple[int, int]]) -> str:
    """The text of store.json: the settings, and each shard's number of sequences and of tokens."""
    content = {"format": KIND, "version": settings.version, **settings.stored()}
    content["shards"] = shards
    content["crc32"] = zlib.crc32(json.dumps(content).encode())
    return json.dumps(content) + "\n"


def write_index(path: Path, settings: Settings, shards: list[tuple[int, int]]) -> None:
    """Write store.json."""
    text = _index(settings, shards)
    write_whole(path / "store.json", lambda file: file.write_text(text))


def index_is(path: Path, settings: Settings, shards: list[tuple[int, int]]) -> bool:
    """Whether store.json is the file that :func:`write_index` writes for these arguments."""
    try:
        return (path / "store.json").read_bytes() == _index(settings, shards).encode()
    except OSError:
        return False


def read_index(path: Path, where: str) -> tuple[Settings, list[tuple[int, int]], str]:
    """Settings, shards as in :func:`write_index`, and a message if the next shard is damaged."""
    file = path / "store.json"
    try:
        content = json.loads(file.read_bytes())
        crc32 = content.pop("crc32")
        kind = content["format"], content["version"]
        known = kind[0] == KIND and kind[1] in VERSIONS
        if known:
            found = zlib.crc32(json.dumps(content).encode())
            if found != crc32:
                raise ValueError(f"checksum is {found:08x}, not {crc32:08x}")
            filled = {**Settings._field_defaults, **content}
            settings = Settings.checked("store.json", *(filled[x] for x in Settings._fields))
            shards = [
                (_count(sequences), _count(tokens)) for sequences, tokens in content["shards"]
            ]
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{where}: {path} is no teacher store: no store.json") from None
    except (*_UNREADABLE, IsADirectoryError) as error:
        raise damaged(file, f"{type(error).__name__}: {error}") from None
    if not known:
        raise ValueError(
            f"{where}: {file} must have format {KIND}, version 1 or 2, got {kind[0]}, version "
            f"{kind[1]}"
        )
    # A writer that was killed may not have listed its last shard.
    while Shard.file(path, len(shards)).exists():
        try:
            shard = Shard(path, len(shards), settings, None)
        except ValueError as error:
            return settings, shards, str(error)
        shards.append((shard.sequences, shard.tokens))
    return settings, shards, ""


def _count(value: Any) -> int:
    """A number of sequences, tokens or bytes that a file holds."""
    return integer("a file", "a count", value, 0, _MOST)


class Shard:
    """One open file; its header, size and sequence offsets are checked.

    It is read by position, not memory-mapped: truncation of a mapped file would kill the process.
    """

    def __init__(
        self, path: Path, number: int, settings: Settings, counts: tuple[int, int] | None
    ) -> None:
        self.path = self.file(path, number)
        self.record_bytes = settings.record_bytes
        try:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (closed with self)
        except FileNotFoundError:
            raise ValueError(f"teacher_store: {self.path} is missing") from None
        size = os.fstat(self._file.fileno()).st_size
        start = 8 + int.from_bytes(self._bytes(0, 8), "little")
        if start > size:
            raise damaged(self.path, f"{size} bytes, of which the header alone takes {start}")
        try:
            header = json.loads(self._bytes(8, start - 8))
            metadata = header.pop("__metadata__")
            self._crc32 = {name: metadata["crc32." + name] for name in header}
            self._spans = {}
            for name, tensor in header.items():
                first, end = map(_count, tensor["data_offsets"])
                self._spans[name] = start + first, _count(end - first)
            self.sequences = _count(header["offsets"]["shape"][0] - 1)
            self.tokens = _count(header["records"]["shape"][0])
            blocks = -(-self.tokens // BLOCK)
            facts: list[tuple[str, Any, Any]] = [
                ("shard", metadata["shard"], str(number)),
                ("store", metadata["store"], settings.text()),
            ]
            if counts:
                facts += [("counts", (self.sequences, self.tokens), counts)]
            tensors = [
                ("offsets", "I64", 8, [self.sequences + 1]),
                ("block_crc32", "U32", 4, [blocks]),
                ("records", "U8", 1, [self.tokens, self.record_bytes]),
            ]
            if settings.keys:
                text = _count(header["keys"]["shape"][0])
                tensors += [("keys", "U8", 1, [text])]
                tensors += [("key_offsets", "I64", 8, [self.sequences + 1])]
            facts += [("tensors", sorted(header), sorted(x[0] for x in tensors))]
            for name, dtype, itemsize, shape in tensors:
                found = header[name]["dtype"], header[name]["shape"], self._spans[name][1]
                facts += [(name, found, (dtype, shape, itemsize * math.prod(shape)))]
            end = start + sum(span[1] for span in self._spans.values())
        except _UNREADABLE as error:
            raise damaged(self.path, f"its header: {type(error).__name__}: {error}") from None
        for what, is_, was in [*facts, ("size in bytes", size, end)]:
            if is_ != was:
                raise damaged(self.path, f"{what}: found {is_}, expected {was}")
        self.offsets = self._offsets("offsets", self.tokens, "its sequence offsets")
        self._block_crc32 = np.frombuffer(self._checked("block_crc32"), "<u4")

    def _offsets(self, name: str, end: int, what: str) -> np.ndarray:
        offsets = np.frombuffer(self._checked(name), "<i8")
        if offsets[0] or offsets[-1] != end or (offsets[1:] < offsets[:-1]).any():
            raise damaged(self.path, f"{what} do not ascend to {end}")
        return offsets

    def keys(self) -> list[str]:
        """The key of each sequence, in a store that has them."""
        content = self._checked("keys")
        ends = self._offsets("key_offsets", len(content), "its keys' offsets").tolist()
        try:
            return [content[a:b].decode() for a, b in pairwise(ends)]
        except UnicodeDecodeError as error:
            raise damaged(self.path, f"its keys: {error}") from None

    @staticmethod
    def file(path: Path, number: int) -> Path:
        """The file of a store's shard."""
        return path / f"shard-{number:06d}.safetensors"

    @classmethod
    def write(
        cls,
        path: Path,
        number: int,
        settings: Settings,
        sequences: list[np.ndarray],
        save: Any,
        keys: Sequence[str] = (),
    ) -> tuple[int, int]:
        """Write sequences of records with ``safetensors.numpy.save_file``; returns counts.

        ``keys``: of each sequence, where the settings say that the store has them.
        """
        records = np.concatenate(sequences)
        tensors: dict[str, np.ndarray] = {
            "offsets": np.cumsum([0, *map(len, sequences)], dtype=np.int64),
            "block_crc32": np.array(_checksums(records), dtype=np.uint32),
            "records": records,
        }
        if settings.keys:
            texts = [key.encode() for key in keys]
            tensors["keys"] = np.frombuffer(b"".join(texts), np.uint8)
            tensors["key_offsets"] = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        metadata = {"store": settings.text(), "shard": str(number)}
        for name, tensor in tensors.items():
            metadata["crc32." + name] = f"{zlib.crc32(tensor.data):08x}"
        write_whole(cls.file(path, number), lambda file: save(tensors, file, metadata))
        return len(sequences), len(records)

    @classmethod
    def remove(cls, path: Path, number: int) -> None:
        """Delete the file that :meth:`write` has written, if it exists."""
        cls.file(path, number).unlink(missing_ok=True)

    def _bytes(self, start: int, size: int) -> bytes:
        pieces = []
        while size:
            piece = os.pread(self._file.fileno(), min(size, 1 << 30), start)
            if not piece:
                raise damaged(self.path, f"it ends at byte {start}, {size} bytes too early")
            pieces.append(piece)
            start += len(piece)
            size -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _checked(self, name: str) -> bytes:
        content = self._bytes(*self._spans[name])
        found = f"{zlib.crc32(content):08x}"
        if found != self._crc32[name]:
            raise damaged(self.path, f"checksum of {name} is {found}, not {self._crc32[name]}")
        return content

    def read(self, start: int, stop: int) -> np.ndarray:
        """The records of the tokens [start, stop), after a check of their blocks' checksums."""
        if start == stop:
            return np.empty((0, self.record_bytes), dtype=np.uint8)
        begin, end = start // BLOCK * BLOCK, min(-(-stop // BLOCK) * BLOCK, self.tokens)
        size = self.record_bytes
        data = self._bytes(self._spans["records"][0] + begin * size, (end - begin) * size)
        records = np.frombuffer(data, np.uint8).reshape(-1, size)
        for block, found in enumerate(_checksums(records), begin // BLOCK):
            if found != self._block_crc32[block]:
                raise damaged(
                    self.path,
                    f"checksum of tokens {block * BLOCK}..{min((block + 1) * BLOCK, end) - 1} is "
                    f"{found:08x}, not {self._block_crc32[block]:08x}",
                )
        return records[start - begin : stop - begin]

    def verify(self) -> None:
        """Check records and keys, which are not checked when the shard is opened."""
        found, step = 0, BLOCK << 10
        for start in range(0, self.tokens, step):
            part = self.read(start, min(start + step, self.tokens))
            found = zlib.crc32(part.data, found)
        if f"{found:08x}" != self._crc32["records"]:
            raise damaged(
                self.path, f"checksum of records is {found:08x}, not {self._crc32['records']}"
            )
        if "keys" in self._spans:
            self.keys()


def _checksums(records: np.ndarray) -> list[int]:
    step = BLOCK * records.shape[1]
    flat = records.reshape(-1)
    return [zlib.crc32(flat[i : i + step].data) for i in range(0, flat.size, step)]
