"""A token's record in a :class:`fastkd.TeacherStore`: k log-probabilities and indices."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch

_ELEMENTS = 1 << 16  # of one array at a time, so that all arrays stay in cache
_LAST = 254  # largest 8-bit code of a finite log-probability
_LOG_SHARE = 1 / 8  # share of the 8-bit codes that are spread evenly over log p
_FAR = 80.0  # nats; the density is about 0 there, and exp stays finite in float32
_RANGES = np.exp2(np.linspace(-6, 8, 256))  # nats between a row's largest and smallest


def _density_left(u: np.ndarray, k: int) -> np.ndarray:
    """The integral of :math:`(1 + e^x/k)^{-1/2}` from u to infinity."""
    x = np.exp(np.minimum(u, _FAR)) / u.dtype.type(k)
    return np.log1p(2 * (np.sqrt(1 + x) + 1) / x)


@lru_cache(maxsize=8)
def _density_total(k: int) -> np.ndarray:
    """The integral of the density over each range."""
    return _density_left(np.zeros(1), k) - _density_left(_RANGES, k)


@lru_cache(maxsize=8)
def _decoded(k: int, log_probs: str) -> np.ndarray:
    """Nats below the row's largest, float32, by 256 * range + code, or by a float16's bits."""
    if log_probs == "float16":
        return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    ranges, total = _RANGES[:, None], _density_total(k)[:, None]
    wanted = np.arange(_LAST + 1) / _LAST
    low = np.zeros((256, _LAST + 1))
    high = np.broadcast_to(ranges, low.shape)
    for _ in range(48):  # bisection; float32 has 24 bits
        middle = (low + high) / 2
        inside = (_density_left(np.zeros(1), k) - _density_left(middle, k)) / total
        below = (1 - _LOG_SHARE) * inside + _LOG_SHARE * middle / ranges < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    table = np.full((256, 256), np.inf, dtype=np.float32)
    table[:, : _LAST + 1] = high
    table[:, 0] = 0
    return table.reshape(-1)


def array_of(where: str, name: str, value: Any, dtypes: tuple[str, ...]) -> np.ndarray:
    """A contiguous array on the CPU of a tensor or array of one of these dtypes."""
    if not isinstance(value, (torch.Tensor, np.ndarray)):
        raise TypeError(
            f"{where}: {name} must be a tensor or a numpy array, got {type(value).__name__}"
        )
    found = str(value.dtype).removeprefix("torch.")
    if found not in dtypes:
        raise TypeError(f"{where}: {name} must be {' or '.join(dtypes)}, got {found}")
    if isinstance(value, torch.Tensor) and (value.is_meta or value.layout != torch.strided):
        kind = "on the meta device" if value.is_meta else str(value.layout).removeprefix("torch.")
        raise ValueError(f"{where}: {name} must be a dense tensor that has values, got one {kind}")
    return np.ascontiguousarray(
        value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
    )


class Packing:
    r"""Converts rows of k log-probabilities and indices to records of bytes, and back.

    A record has ``record_bytes`` bytes, little-endian: log of the row's mass (float32), number of
    entries that are not padding (uint16), range (uint8, for 8-bit codes), k codes (uint8, or
    float16), the indices. Entries are sorted by their indices, which are Elias-Fano coded: the
    :math:`l = \lfloor \log_2(V/k) \rfloor` low bits unchanged (in planes of 8, 4, 2 and 1 bits;
    in a plane, byte b holds the entries b, b + bytes, b + 2 bytes, ...), then a bit set with bit
    ``(index >> l) + i`` for the i-th entry.

    A code is the distance u of the entry from the row's largest, in nats. 8-bit codes 0..254 are
    spread over u from 0 to the row's range: 1/8 of them evenly, so that rare tokens keep their
    log-probability, and 7/8 with density :math:`(1 + e^u/k)^{-1/2}`. A row's KL(exact || decoded)
    is half the sum of p x error². With this density no row's is larger than another's, at most
    :math:`(\ln(4k+1) / 444.5)^2 / 2`: 7.8e-5 nats for k = 64, 1.8e-4 for k = 1024. Code 255 is
    probability 0. The largest log-probability is not stored: it follows from the row's mass.
    Range r means :math:`2^{-6 + 14r/255}` nats; a distance of more than 256 nats (with float16,
    65504) is stored as that.

    Source of the index code: Elias 1974, "Efficient storage and retrieval by content and address
    of static files"; Fano 1971.
    """

    def __init__(self, vocab_size: int, k: int, log_probs: str) -> None:
        self.vocab_size, self.k, self.log_probs = vocab_size, k, log_probs
        self.low_bits = (vocab_size // k).bit_length() - 1
        self.planes: list[tuple[int, int]] = []  # number of bits, and their shift in the index
        shift = 0
        for bits in (8, 8, 8, 4, 2, 1):
            if shift + bits <= self.low_bits:
                self.planes.append((bits, shift))
                shift += bits
        sizes = [4, 2]
        sizes += [1, k] if log_probs == "8bit" else [0, 2 * k]
        sizes += [(k * bits + 7) // 8 for bits, _ in self.planes]
        sizes += [(((vocab_size - 1) >> self.low_bits) + k + 7) // 8]
        ends = np.cumsum(sizes).tolist()
        self.fields = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        self.record_bytes: int = ends[-1]

    def checked(self, log_probs: Any, indices: Any) -> tuple[np.ndarray, np.ndarray]:
        """Check the arguments of ``TeacherStore.append``, and convert them for :meth:`pack`."""
        where = "TeacherStore.append"
        log_probs = array_of(where, "log_probs", log_probs, ("float32",))
        indices = array_of(where, "indices", indices, ("int32", "int64")).astype(np.int64)
        if log_probs.ndim != 2 or log_probs.shape[1] != self.k:
            raise ValueError(
                f"{where}: log_probs must be [tokens, {self.k}], got {list(log_probs.shape)}"
            )
        if indices.shape != log_probs.shape:
            raise ValueError(
                f"{where}: indices must have log_probs' shape {list(log_probs.shape)}, got "
                f"{list(indices.shape)}"
            )

        padding = indices == -1
        log_probs = np.where(padding, np.float32(-np.inf), log_probs)
        ordered = np.sort(indices, axis=1)
        with np.errstate(over="ignore"):
            mass = np.exp(log_probs).sum(1, keepdims=True, dtype=np.float64)
        for rule, bad, values, error in (
            (
                f"indices must lie in [0, {self.vocab_size}) or be -1",
                (indices < -1) | (indices >= self.vocab_size),
                indices,
                IndexError,
            ),
            (
                "indices must have their padding (-1) at the end of a row",
                padding[:, :-1] & ~padding[:, 1:],
                indices[:, 1:],
                ValueError,
            ),
            (
                "indices must differ in a row",
                (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0),
                ordered[:, 1:],
                ValueError,
            ),
            ("log_probs must not be NaN", np.isnan(log_probs), log_probs, ValueError),
            ("log_probs must not be positive", log_probs > 1e-3, log_probs, ValueError),
            (
                "log_probs must be sorted descending",
                log_probs[:, 1:] > log_probs[:, :-1],
                log_probs[:, 1:],
                ValueError,
            ),
            ("log_probs' exp must sum to at most 1", mass > 1.01, mass, ValueError),
        ):
            if bad.any():
                token, j = np.argwhere(bad)[0].tolist()
                raise error(f"{where}: {rule}, got {values[token, j]} at token {token}")
        return log_probs, indices

    def pack(self, log_probs: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Records, uint8 ``[tokens, record_bytes]``.

        Args:
            log_probs: float32 ``[tokens, k]``, descending, no NaN; -inf for padding.
            indices: int64 ``[tokens, k]``, distinct in a row; -1 for padding, at the end.
        """
        records = np.zeros((len(indices), self.record_bytes), dtype=np.uint8)
        step = max(1, _ELEMENTS // self.k)
        for i in range(0, len(records), step):
            self._pack(log_probs[i : i + step], indices[i : i + step], records[i : i + step])
        return records

    def _pack(self, log_probs: np.ndarray, indices: np.ndarray, records: np.ndarray) -> None:
        mass_field, count_field, range_field, code_field, *plane_fields, high_field = self.fields
        valid = indices >= 0
        top = log_probs[:, :1]
        with np.errstate(invalid="ignore"):  # -inf - -inf in rows without mass
            below = np.where(log_probs == -np.inf, np.float32(np.inf), top - log_probs)
        rest = np.exp(-below[:, 1:]).sum(1, dtype=np.float64)  # relative to the largest
        log_mass = np.minimum(top[:, 0] + np.log1p(rest), 0).astype("<f4")
        records[:, mass_field] = log_mass[:, None].view(np.uint8)
        records[:, count_field] = valid.sum(1).astype("<u2")[:, None].view(np.uint8)
        if self.log_probs == "8bit":
            codes, ranges = self._codes(below)
            records[:, range_field] = ranges[:, None]
        else:
            far = np.float32(np.finfo(np.float16).max)
            nearest = np.where(below < np.inf, np.minimum(below, far), below).astype("<f2")
            codes = nearest.view("<u2")
        # One sort for both; padding comes last, with the largest index.
        keys = np.where(valid, indices.astype(np.uint64) << np.uint64(16), np.uint64(1 << 47))
        keys |= np.where(valid, codes, 0).astype(np.uint64)
        keys.sort(axis=1)
        records[:, code_field] = keys.astype("<u2" if codes.itemsize == 2 else "u1").view(np.uint8)
        ordered = np.minimum((keys >> np.uint64(16)).astype(np.int64), self.vocab_size - 1)
        for (bits, shift), field in zip(self.planes, plane_fields, strict=True):
            piece = ((ordered >> shift) & ((1 << bits) - 1)).astype(np.uint8)
            size = field.stop - field.start
            packed = records[:, field]
            for i in range(8 // bits):
                part = piece[:, i * size : (i + 1) * size]
                packed[:, : part.shape[1]] |= part << np.uint8(bits * i)
        bits_set = np.zeros((len(records), 8 * (high_field.stop - high_field.start)), np.uint8)
        np.put_along_axis(bits_set, (ordered >> self.low_bits) + np.arange(self.k), 1, axis=1)
        records[:, high_field] = np.packbits(bits_set, axis=1, bitorder="little")

    def _codes(self, below: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """8-bit codes, and the rows' ranges."""
        finite = below < np.inf
        span = np.max(below, axis=1, where=finite, initial=0)
        steps = (np.log2(np.maximum(span, _RANGES[0])) + 6) * (255 / 14)
        ranges = np.clip(np.ceil(steps - 1e-6), 0, 255).astype(np.uint8)
        width = _RANGES[ranges].astype(np.float32)[:, None]
        scale = ((1 - _LOG_SHARE) / _density_total(self.k)[ranges]).astype(np.float32)[:, None]
        whole = np.float32(_density_left(np.zeros(1), self.k)[0])
        share = (whole - _density_left(below, self.k)) * scale
        share += below / width * np.float32(_LOG_SHARE)
        codes = np.rint(np.clip(share, 0, 1) * np.float32(_LAST)).astype(np.uint8)
        return np.where(finite, codes, np.uint8(255)), ranges

    def unpack(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float32 log-probabilities and int32 indices, ``[tokens, k]``, of uint8 records.

        Descending, equal ones by index; padding (-inf, -1) last. A row's probabilities sum to its
        stored mass. Indices are in [0, vocab_size) and distinct in a row, or -1.

        Raises:
            ValueError: a record that :meth:`pack` cannot have made.
        """
        log_probs = np.empty((len(records), self.k), dtype=np.float32)
        indices = np.empty((len(records), self.k), dtype=np.int32)
        step = max(1, _ELEMENTS // self.k)
        for i in range(0, len(records), step):
            part = slice(i, i + step)
            self._unpack(records[part], log_probs[part], indices[part])
        return log_probs, indices

    def _unpack(self, records: np.ndarray, log_probs: np.ndarray, indices: np.ndarray) -> None:
        mass_field, count_field, range_field, code_field, *plane_fields, high_field = self.fields
        high_bits = np.unpackbits(records[:, high_field], axis=1, bitorder="little")
        places = np.flatnonzero(high_bits.view(bool))
        rows = high_bits.shape[1] * np.arange(len(records))
        keys = places.reshape(indices.shape) if places.size == indices.size else None
        if keys is None or (keys[:, 0] < rows).any() or (keys[:-1, -1] >= rows[1:]).any():
            raise ValueError(f"a record has another number of indices than k = {self.k}")
        keys -= np.arange(self.k) + rows[:, None]
        keys <<= self.low_bits
        for (bits, shift), field in zip(self.planes, plane_fields, strict=True):
            packed = records[:, field]
            size = packed.shape[1]
            for i in range(8 // bits):
                part = keys[:, i * size : (i + 1) * size]
                piece = (packed[:, : part.shape[1]] >> np.uint8(bits * i)) & np.uint8(2**bits - 1)
                part |= piece.astype(np.int64) << shift
        counts = np.ascontiguousarray(records[:, count_field]).view("<u2").astype(np.int64)
        padding = np.arange(self.k) >= counts if counts.min(initial=self.k) < self.k else None
        unordered = keys[:, 1:] <= keys[:, :-1]
        if padding is not None:
            unordered &= ~padding[:, 1:]
        largest, most = int(keys.max(initial=0)), int(counts.max(initial=0))
        if largest >= self.vocab_size:
            raise ValueError(f"a record has index {largest}, expected [0, {self.vocab_size})")
        if unordered.any() or most > self.k:
            raise ValueError(f"a record has {most} indices or equal ones, expected {self.k}")
        codes: np.ndarray = np.ascontiguousarray(records[:, code_field])
        impossible = 0xFFFF  # code 255 of the largest range, so that it is sorted last
        if self.log_probs == "8bit":
            codes = (records[:, range_field].astype(np.int64) << 8) | codes
        else:
            codes, impossible = codes.view("<u2").astype(np.int64), 0x7C00
            if codes.max(initial=0) > impossible:
                raise ValueError("a record has a log-probability above its largest, or NaN")
        keys |= codes << 32
        if padding is not None:
            keys[padding] = (impossible << 32) | 0xFFFFFFFF
        keys.sort(axis=1)
        indices[:] = keys.astype(np.int32)
        below = _decoded(self.k, self.log_probs).take(keys >> 32)
        log_mass = np.ascontiguousarray(records[:, mass_field]).view("<f4")
        if not (log_mass <= 0).all():
            raise ValueError("a record has more mass than 1, or NaN")
        rest = np.exp(-below[:, 1:]).sum(1, keepdims=True)
        np.subtract(log_mass - np.log1p(rest), below, out=log_probs)
        # Different codes may round to the same log-probability.
        swapped = (log_probs[:, 1:] == log_probs[:, :-1]) & (
            indices[:, 1:].view(np.uint32) < indices[:, :-1].view(np.uint32)
        )
        rows = np.flatnonzero(swapped.any(1))
        if rows.size:
            order = np.lexsort((indices[rows].view(np.uint32), -log_probs[rows]))
            indices[rows] = np.take_along_axis(indices[rows], order, axis=1)
