"""Token ids and their bytes, sorted so that the tokens with a common prefix are an interval."""

import operator
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from fastkd._ops.arguments import to_flag, to_integer
from fastkd._ops.constants import Constants
from fastkd.tokenizers._token_bytes import token_bytes

try:
    import fastkd._host as _host
except ImportError as error:
    raise ImportError(
        f"fastkd._host is missing or does not load ({error}): fastkd was not built for Python "
        f"{sys.version_info[0]}.{sys.version_info[1]}. In its source folder run "
        "`pip install --no-build-isolation -e .`"
    ) from error

__all__ = ["ByteVocab"]


def integers(where: str, values: Any) -> np.ndarray:
    """A contiguous int64 array of the integers in a list, an array or a tensor on any device."""
    if isinstance(values, Tensor):
        if values.is_meta:
            raise ValueError(f"{where} must be on a device that holds values, got meta")
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.size == 0 and not isinstance(values, np.ndarray):
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu" or array.dtype == np.uint64:
        kind = array.dtype if array.dtype != object else type(array.flat[0]).__name__
        raise TypeError(f"{where} must hold integers, got {kind}")
    return np.asarray(array, dtype=np.int64, order="C")


def _bytes(where: str, value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError(f"{where} must be bytes, got {type(value).__name__}")
    return value


class ByteVocab:
    r"""The bytes of each token id.

    Two ids may have the same bytes, ids may have no token, and tokens may be invalid UTF-8 or have
    1,024 bytes, as in real vocabularies. Objects are immutable and hashable, are compared by
    content, and can be pickled.

    The distribution of what follows a prefix has the *columns*: 0 to 255 the next byte, 256 the
    token ends here, 257 and on the classes of special ids. :attr:`order` sorts the ids by (bytes,
    id), then the special ids class by class. In this order the ids of each column of any prefix
    are contiguous: :meth:`segments`.

    Args:
        tokens: each id's bytes; None or ``b""``: the id has no bytes.
        special: names of classes and their ids, in the order of their columns. An id in a class has
            no bytes even where ``tokens`` has some. Ids without bytes that are in no class form one
            last class, ``"other"``, if there are any; only then is the name reserved.

    Raises:
        TypeError: an entry is not bytes or None, an id no integer, a name no string.
            IndexError: an id in ``special`` is out of range. ValueError: an id is in ``special``
            twice, a class is named ``"other"`` and that name is reserved, or there are more than
            2^31 - 1 ids or bytes.

    >>> from fastkd import ByteVocab
    >>> vocab = ByteVocab([b"a", b"ab", b"b", None, b"</s>"], special={"eos": [4]})
    >>> len(vocab), vocab[1], vocab[4], vocab.special_classes
    (5, b'ab', None, ('eos', 'other'))
    >>> vocab.order.tolist()
    [0, 1, 2, 4, 3]
    >>> vocab.interval(b"a")
    (0, 2)
    >>> segments = vocab.segments(b"a")
    >>> segments[ord("b")].tolist(), segments[256].tolist()  # "ab" goes on with b, "a" ends
    ([1, 2], [0, 1])
    """

    def __init__(
        self,
        tokens: Sequence[bytes | None],
        *,
        special: Mapping[str, Sequence[int]] = {},
    ) -> None:
        if not isinstance(tokens, Sequence) or isinstance(tokens, (str, bytes)):
            raise TypeError(
                "ByteVocab: tokens must be a sequence of bytes and None, got "
                f"{type(tokens).__name__}"
            )
        if not isinstance(special, Mapping):
            raise TypeError(
                "ByteVocab: special must be a mapping of names to ids, got "
                f"{type(special).__name__}"
            )
        classes = []
        for name, ids in special.items():
            if not isinstance(name, str):
                raise TypeError(
                    f"ByteVocab: special must have strings as names, got {type(name).__name__}"
                )
            found = integers(f"ByteVocab: special[{name!r}]", ids)
            if found.ndim != 1:
                raise ValueError(
                    f"ByteVocab: special[{name!r}] must have one dimension, got shape {found.shape}"
                )
            classes.append((name, found))
        self._core = _host.ByteVocab(tokens, classes)
        #: len(self) as an int that torch.compile can read.
        self._size = len(tokens)
        #: Tables of the ops, for each device; a copy or a pickle has its own.
        self._constants = Constants()

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, *, vocab_size: int | None = None) -> "ByteVocab":
        r"""Read a tokenizer's bytes.

        Byte-level tokens are translated back from the characters that stand for bytes;
        SentencePiece's ``▁`` is a space and its ``<0x41>`` a byte. Added tokens that are not
        tokens of the model are literal text; those marked special have no bytes. Changes of the
        text by the normalizer (lower case, NFKC) are not part of the vocabulary. As a check, some
        texts are encoded, and the bytes of their ids compared with them, except for a leading
        space, and for tokenizers that write spaces as ``▁`` except for white space.

        The classes have one id each, where the tokenizer names it: ``"eos"``, ``"bos"``, ``"pad"``,
        ``"unk"``; an id with several roles is in the first of these classes. A
        ``tokenizers.Tokenizer`` names only pad and unk, a ``tiktoken.Encoding`` only eos.

        Args:
            tokenizer: from transformers (fast or slow), ``tokenizers.Tokenizer``,
                ``tiktoken.Encoding`` or ``sentencepiece.SentencePieceProcessor``.
            vocab_size: the model's number of logits, where it has more than there are tokens; the
                additional ids have no bytes. None: the tokenizer's largest id plus one.

        Raises:
            TypeError: the tokenizer is none of these, or its tokens do not hold the text byte by
                byte (WordPiece and WordLevel drop spaces; an added token with ``lstrip`` or
                ``rstrip`` that is not special takes them). ValueError: vocab_size is too small.

        >>> tokenizer = transformers.AutoTokenizer.from_pretrained(name)  # doctest: +SKIP
        >>> vocab = fastkd.ByteVocab.from_tokenizer(tokenizer)  # doctest: +SKIP
        """
        tokens, special = token_bytes(tokenizer)
        if vocab_size is not None:
            vocab_size = to_integer("ByteVocab.from_tokenizer", "vocab_size", vocab_size)
            if vocab_size < len(tokens):
                raise ValueError(
                    "ByteVocab.from_tokenizer: vocab_size must be at least the tokenizer's "
                    f"{len(tokens)}, got {vocab_size}"
                )
            tokens += [None] * (vocab_size - len(tokens))
        return cls(tokens, special=special)

    def __len__(self) -> int:
        """Number of ids."""
        return self._size

    def __getitem__(self, id: int) -> bytes | None:
        """Bytes of an id in [0, len(self)), None if it has none; IndexError outside."""
        try:
            number = operator.index(id)
        except TypeError:
            raise TypeError(
                f"ByteVocab: an id must be an integer, got {type(id).__name__}"
            ) from None
        if not 0 <= number < len(self):
            raise IndexError(f"ByteVocab: an id must lie in [0, {len(self)}), got {number}")
        return self._core.token(number)

    def __eq__(self, other: object) -> bool:
        """Whether all ids have the same bytes and classes."""
        if not isinstance(other, ByteVocab):
            return NotImplemented
        return self._core is other._core or self._core == other._core

    def __hash__(self) -> int:
        """Hash of the sizes and a few positions of the order: the same for equal vocabularies."""
        return hash((len(self), self.special_classes, self.order[::997].tobytes()))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the tokens and classes; a copy sorts them again."""
        return _rebuild, (self._core.tokens(), self._special())

    def __repr__(self) -> str:
        """Sizes."""
        classes = ", ".join(f"{name}: {len(ids)}" for name, ids in self._special().items())
        return f"ByteVocab({len(self)} ids, {self.interval(b'')[1]} with bytes; {{{classes}}})"

    def _special(self) -> dict[str, list[int]]:
        places = self.segments(b"")[257:].tolist()
        return {
            name: self.order[begin:end].tolist()
            for name, (begin, end) in zip(self.special_classes, places, strict=True)
        }

    @cached_property
    def tokens(self) -> list[bytes | None]:
        """Each id's bytes, None for none."""
        return self._core.tokens()

    @cached_property
    def special_classes(self) -> tuple[str, ...]:
        """Names of the classes of ids without bytes, in the order of their columns."""
        return tuple(self._core.class_names())

    @property
    def num_columns(self) -> int:
        """257 plus the number of special classes."""
        return self._core.num_columns()

    @cached_property
    def order(self) -> np.ndarray:
        """int32 ``[len(self)]``, read-only: the ids by (bytes, id), then class by class, by id."""
        return self._core.order()

    @cached_property
    def columns(self) -> np.ndarray:
        """int16 ``[len(self)]``, read-only: each id's first byte, or 257 + its class."""
        return self._core.columns()

    def decode(self, ids: Any) -> bytes:
        """Join the bytes of ids; those without bytes add nothing.

        Args:
            ids: integers ``[length]``: a list, an array, a tensor.

        Raises:
            IndexError: an id is out of range. TypeError: not integers. ValueError: not 1-d.

        >>> from fastkd import ByteVocab
        >>> ByteVocab([b"a", b"bc", None]).decode([1, 2, 0])
        b'bca'
        """
        found = integers("ByteVocab.decode: ids", ids)
        if found.ndim != 1:
            raise ValueError(
                f"ByteVocab.decode: ids must have one dimension, got shape {found.shape}"
            )
        return self._core.decode(found)

    def find(self, token: bytes) -> list[int]:
        """Return all ids with exactly these bytes, ascending; none for ``b""``.

        >>> from fastkd import ByteVocab
        >>> ByteVocab([b"a", b"b", b"a"]).find(b"a")
        [0, 2]
        """
        return self._core.find(_bytes("ByteVocab.find: token", token))

    def interval(self, prefix: bytes) -> tuple[int, int]:
        """Begin and end in :attr:`order` of the tokens that start with ``prefix``.

        For ``b""``: of all tokens with bytes. Without such tokens begin and end are the same.
        """
        return self._core.interval(_bytes("ByteVocab.interval: prefix", prefix))

    def segments(self, prefix: bytes) -> np.ndarray:
        """Begin and end in :attr:`order` of each column's tokens, after a prefix.

        Returns:
            int32 ``[num_columns, 2]``: the tokens that start with ``prefix`` by the byte that
            follows it (0 to 255), those equal to it (256; none for ``b""``), and the classes of
            special ids (257 and on; none for any prefix but ``b""``). Begin and end are the same
            for a column without tokens.
        """
        return self.segments_of([_bytes("ByteVocab.segments: prefix", prefix)])[0][0]

    def segments_of(self, prefixes: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """:meth:`segments` of many prefixes, once for each distinct prefix.

        Returns:
            int32 ``[unique, num_columns, 2]``, in the order of first occurrence, and int64
            ``[len(prefixes)]``: each prefix's index into them.

        >>> from fastkd import ByteVocab
        >>> segments, index = ByteVocab([b"a", b"ab"]).segments_of([b"a", b"", b"a"])
        >>> segments.shape, index.tolist()
        ((2, 257, 2), [0, 1, 0])
        """
        if not isinstance(prefixes, Sequence) or isinstance(prefixes, (str, bytes)):
            raise TypeError(
                "ByteVocab.segments_of: prefixes must be a sequence of bytes, got "
                f"{type(prefixes).__name__}"
            )
        return self._core.segments_of(tuple(prefixes))

    def boundary(self, first_bytes: bytes = b" \t\n", *, special: bool = True) -> np.ndarray:
        """Tokens that may begin a word.

        Args:
            first_bytes: a token counts if it starts with one of them.
            special: whether the ids without bytes count.

        Returns:
            bool ``[len(self)]``: with the defaults the set S of approximate likelihood matching
            (arXiv 2503.20083), whose total probability is that of the end of a word.

        >>> from fastkd import ByteVocab
        >>> ByteVocab([b" a", b"a", None]).boundary().tolist()
        [True, False, True]
        """
        of_column = np.zeros(self.num_columns, dtype=bool)
        of_column[list(_bytes("ByteVocab.boundary: first_bytes", first_bytes))] = True
        of_column[257:] = to_flag("ByteVocab.boundary", "special", special)
        return of_column[self.columns]


# torch.compile of PyTorch 2.10 needs this to treat a ByteVocab as a constant.
pytree.register_constant(ByteVocab)


def _rebuild(tokens: list[bytes | None], special: dict[str, list[int]]) -> ByteVocab:
    return ByteVocab(tokens, special=special)
