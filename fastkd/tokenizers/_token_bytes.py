"""The bytes of a tokenizer's tokens, read from the tokenizer; its package is not imported."""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

Tokens = list[bytes | None]
#: Roles and their ids in a tokenizer.
Named = dict[str, int]

_WHERE = "ByteVocab.from_tokenizer"
#: An id with several roles counts for the first.
_ROLES = ("eos", "bos", "pad", "unk")
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")
#: Pre-tokenizers that drop the characters between tokens.
_LOSSY = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit")
#: Texts for the check that a text's ids have its bytes: punctuation, runs of white space, scripts.
_TEXTS = (
    'The quick brown fox\'s 12,345 jumps: x_1 = [a*b] + {c/d}; "no" - 50% #!?',
    "ends with space \n\n  two  spaces,\ta tab\n\tand lines\n",
    "naïve café, Ελληνικά, Русский, 日本語, العربية, हिन्दी, 한국어 🙂",
)
_PLAIN_TEXT = "the quick brown fox jumps over the lazy dog"


def token_bytes(tokenizer: Any) -> tuple[Tokens, dict[str, list[int]]]:
    """Read each id's bytes and the special classes. A tokenizer's kind is known by its methods."""
    if _has(tokenizer, "n_vocab", "decode_single_token_bytes"):
        tokens, named = _from_tiktoken(tokenizer)
    elif _has(tokenizer, "id_to_piece", "is_byte", "is_control"):
        tokens, named = _from_sentencepiece(tokenizer)
    elif _has(tokenizer, "backend_tokenizer", "added_tokens_decoder"):
        special = set(getattr(tokenizer, "all_special_ids", ()))
        tokens, named = _from_tokenizers(tokenizer.backend_tokenizer, special)
        named |= _named_by_transformers(tokenizer)
    elif _has(tokenizer, "convert_ids_to_tokens", "added_tokens_decoder", "get_vocab", "encode"):
        tokens, named = _from_slow(tokenizer)
    elif _has(tokenizer, "to_str", "get_vocab", "id_to_token"):
        tokens, named = _from_tokenizers(tokenizer)
    else:
        raise TypeError(
            f"{_WHERE}: tokenizer must be from transformers, or a tokenizers.Tokenizer, "
            f"tiktoken.Encoding or sentencepiece.SentencePieceProcessor, got {_name(tokenizer)}"
        )
    classes: dict[str, list[int]] = {}
    for role in _ROLES:
        if role in named and [named[role]] not in classes.values():
            classes[role] = [named[role]]
    return tokens, classes


def _has(tokenizer: Any, *methods: str) -> bool:
    return all(hasattr(tokenizer, method) for method in methods)


def _name(tokenizer: Any) -> str:
    return f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"


def _by_id(found: Mapping[int, bytes | None]) -> Tokens:
    tokens: Tokens = [None] * (max(found, default=-1) + 1)
    for index, token in found.items():
        tokens[index] = token
    return tokens


def _check(tokens: Tokens, text: str, ids: Iterable[int], **options: Any) -> None:
    """Compare the bytes of a text's ids with the text."""
    found = [tokens[i] if i < len(tokens) else None for i in ids]
    if not any(_agree(found, x, **options) for x in (text, " " + text)):
        shown = b"".join(x or b"" for x in found)
        raise TypeError(
            f"{_WHERE}: a tokenizer's tokens must hold the text byte by byte, got tokens that "
            f"stand for {shown!r} for the text {text!r}"
        )


def _agree(found: Tokens, text: str, *, any_space: bool = False, cut: bool = False) -> bool:
    """Whether tokens are those of a text; one without bytes matches any text.

    ``any_space``: all runs of white space are equal. ``cut``: the text may be longer.
    """
    pieces, whole = b"\0".join([b"".join(x) for x in _runs(found)]), text.encode()
    if any_space:
        pieces, whole = (re.sub(rb"\s+", b" ", x).strip() for x in (pieces, whole))
    pattern = b".*".join(map(re.escape, pieces.split(b"\0")))
    return bool(re.compile(pattern if cut else pattern + rb"\Z", re.DOTALL).match(whole))


def _runs(found: Tokens) -> list[list[bytes]]:
    """Split at the tokens without bytes."""
    runs: list[list[bytes]] = [[]]
    for token in found:
        if token is None:
            runs.append([])
        else:
            runs[-1].append(token)
    return runs


def _spellable(tokens: Tokens, pieces: Iterable[str], text: str) -> str:
    """The characters of a text that have a token each, or all if every byte has one."""
    known = {token for token in tokens if token}
    if all(bytes([byte]) in known for byte in range(256)):
        return text
    known |= {piece.encode() for piece in pieces if len(piece) == 1}
    return "".join(x for x in text if x.encode() in known)


def _refuse_strip(content: str, added: Any) -> None:
    """Raise for an added token that absorbs the white space beside it."""
    for side in ("lstrip", "rstrip"):
        if added[side] if isinstance(added, dict) else getattr(added, side):
            raise TypeError(
                f"{_WHERE}: an added token must stand for its own text only, got {content!r} with "
                f"{side}=True, which takes the spaces beside it; add it without, or as a special "
                "token, which has no bytes"
            )


def _from_tiktoken(encoding: Any) -> tuple[Tokens, Named]:
    special = {text: encoding.encode_single_token(text) for text in encoding.special_tokens_set}
    found: dict[int, bytes | None] = dict.fromkeys(special.values())
    for index in range(encoding.n_vocab):
        if index in found:
            continue
        try:
            found[index] = encoding.decode_single_token_bytes(index)
        except KeyError:  # no token has this id
            continue
    named = {"eos": special["<|endoftext|>"]} if "<|endoftext|>" in special else {}
    tokens = _by_id(found)
    for text in _TEXTS:
        _check(tokens, text, encoding.encode_ordinary(text))
    return tokens, named


def _from_sentencepiece(processor: Any) -> tuple[Tokens, Named]:
    tokens = [
        _sentencepiece_bytes(processor, index, processor.id_to_piece(index))
        for index in range(processor.get_piece_size())
    ]
    normalize = getattr(processor, "normalize", None)  # sentencepiece 0.2 and newer
    for text in _TEXTS if normalize is not None else (_PLAIN_TEXT,):
        expected = text if normalize is None else normalize(text).replace("▁", " ")
        _check(tokens, expected, processor.encode(text, out_type=int), any_space=True)
    ids = {role: getattr(processor, f"{role}_id")() for role in _ROLES}
    return tokens, {role: index for role, index in ids.items() if index >= 0}


def _sentencepiece_bytes(processor: Any, index: int, piece: str) -> bytes | None:
    if processor.is_control(index) or processor.is_unknown(index) or processor.is_unused(index):
        return None
    return _piece_bytes(piece, ("▁",), processor.is_byte(index))


def _piece_bytes(piece: str, spaces: tuple[str, ...], byte_fallback: bool) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece) if byte_fallback else None
    if byte:
        return bytes([int(byte[1], 16)])
    for space in spaces:
        piece = piece.replace(space, " ")
    return piece.encode()


@cache
def _byte_level() -> dict[int, int]:
    """For str.translate: from the character that stands for a byte to that byte.

    Printable Latin-1 characters stand for themselves, and the characters from 256 on, in turn, for
    the other bytes. Characters with the codes of those other bytes stand for no byte: they are
    mapped outside Latin-1.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {256 + i: byte for i, byte in enumerate(others)}
    return table | dict.fromkeys(others, 0xFFFF)


def _byte_level_bytes(token: str) -> bytes:
    try:
        return token.translate(_byte_level()).encode("latin-1")
    except UnicodeEncodeError:  # literal text, as in decoders of this kind
        return token.encode()


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder; for a sequence each of its parts."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
    for key in ("normalizers", "pretokenizers", "decoders"):
        for step in part.get(key, ()):
            yield from _steps(step)


def _from_tokenizers(
    tokenizer: Any, special: Collection[int] = frozenset()
) -> tuple[Tokens, Named]:
    tokenizer = getattr(tokenizer, "_tokenizer", tokenizer)  # of tokenizers.implementations
    parts = json.loads(tokenizer.to_str())
    model = parts["model"]
    vocab = model["vocab"]
    if model["type"] not in ("BPE", "Unigram"):
        raise TypeError(
            f"{_WHERE}: a tokenizer's model must be BPE or Unigram, got {model['type']}, whose "
            "tokens do not hold the spaces between words"
        )
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(affix):
            raise TypeError(
                f"{_WHERE}: a tokenizer's tokens must be bytes of the text, got BPE with "
                f"{affix} {model[affix]!r}, which marks words in place of the spaces between them"
            )
    before = [*_steps(parts["normalizer"]), *_steps(parts["pre_tokenizer"])]
    after = [*_steps(parts["decoder"])]
    kinds = {step["type"] for step in (*before, *after)}
    byte_level = "ByteLevel" in kinds
    spaces = tuple({x["replacement"] for x in (*before, *after) if x["type"] == "Metaspace"})
    spaces += tuple(
        step["pattern"]["String"]
        for step in after
        if step["type"] == "Replace" and step["content"] == " " and "String" in step["pattern"]
    )
    lossy = {x["type"] for x in before if x["type"] in _LOSSY or x.get("behavior") == "Removed"}
    if lossy and not byte_level and not spaces:
        raise TypeError(
            f"{_WHERE}: a tokenizer's tokens must hold the whole text, got the pre-tokenizer "
            f"{min(lossy)}, which drops the spaces between words"
        )
    fallback = bool(model.get("byte_fallback")) or "ByteFallback" in kinds

    undone = _undone(before, after)

    def read(token: str) -> bytes:
        if byte_level:
            return _byte_level_bytes(token)
        for written, meant in undone:
            token = token.replace(written, meant)
        return _piece_bytes(token, spaces, fallback)

    pairs = vocab.items() if isinstance(vocab, dict) else ((x[0], i) for i, x in enumerate(vocab))
    found: dict[int, bytes | None] = {index: read(token) for token, index in pairs}
    for added in parts["added_tokens"]:
        if added["special"] or added["id"] in special:
            found[added["id"]] = None
        elif added["id"] not in found:
            text = added["content"]
            _refuse_strip(text, added)
            found[added["id"]] = text.encode() if byte_level else read(text)
    tokens = _by_id(found)
    any_space = bool(spaces) and not byte_level
    _check_tokenizers(tokenizer, parts, tokens, spaces, any_space)
    return tokens, _named_by_tokenizers(tokenizer, model, parts["padding"])


def _replacement(step: dict[str, Any]) -> tuple[str, str] | None:
    """The replaced text and its replacement, if the step is a plain replacement."""
    if step["type"] != "Replace" or "String" not in step["pattern"]:
        return None
    return step["pattern"]["String"], step["content"]


def _undone(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Replacements of the decoder that undo one of the normalizer or pre-tokenizer."""
    made = {_replacement(step) for step in before}
    pairs = [x for step in after if (x := _replacement(step)) is not None]
    return [(written, meant) for written, meant in pairs if (meant, written) in made]


def _check_tokenizers(
    tokenizer: Any,
    parts: dict[str, Any],
    tokens: Tokens,
    spaces: tuple[str, ...],
    any_space: bool,
) -> None:
    """Encode texts and compare with the normalized texts."""
    cut = parts["truncation"] or {}
    if cut.get("direction") == "Left":
        return
    before, after = [*_steps(parts["normalizer"])], [*_steps(parts["decoder"])]
    undone = {(meant, written) for written, meant in _undone(before, after)}
    undone |= {(" ", space) for space in spaces}
    steps = [
        step for step in before if step["type"] != "Prepend" and _replacement(step) not in undone
    ]
    normalizer = None
    if steps:
        only = {"type": "Sequence", "normalizers": steps}
        empty = {"type": "BPE", "vocab": {}, "merges": []}
        blank = {"version": "1.0", "added_tokens": [], "normalizer": only, "model": empty}
        normalizer = type(tokenizer).from_str(json.dumps(blank)).normalizer
    vocab = parts["model"]["vocab"]
    pieces = vocab if isinstance(vocab, dict) else [x[0] for x in vocab]
    for text in _TEXTS:
        text = _spellable(tokens, pieces, text)
        expected = text if normalizer is None else normalizer.normalize_str(text)
        for space in spaces:
            if space not in text:
                expected = expected.replace(space, " ")
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        _check(tokens, expected, ids, any_space=any_space, cut=bool(cut))


def _named_by_tokenizers(tokenizer: Any, model: dict[str, Any], padding: Any) -> Named:
    named: dict[str, int | None] = {"unk": model.get("unk_id")}
    if model.get("unk_token") is not None:
        named["unk"] = tokenizer.token_to_id(model["unk_token"])
    if padding and tokenizer.id_to_token(padding["pad_id"]) == padding["pad_token"]:
        named["pad"] = padding["pad_id"]
    return {role: index for role, index in named.items() if index is not None}


def _named_by_transformers(tokenizer: Any) -> Named:
    ids = {role: getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES}
    return {role: index for role, index in ids.items() if index is not None}


def _from_slow(tokenizer: Any) -> tuple[Tokens, Named]:
    """Read a tokenizer of transformers that is written in Python."""
    processor = getattr(tokenizer, "sp_model", None)
    if processor is not None:

        def read(token: str) -> bytes | None:
            return _sentencepiece_bytes(processor, processor.piece_to_id(token), token)

    elif hasattr(tokenizer, "byte_decoder"):
        read = _byte_level_bytes
    elif hasattr(tokenizer, "_utf_vocab_size"):  # each byte is a Latin-1 character

        def read(token: str) -> bytes | None:
            return token.encode("latin-1")

    else:
        raise TypeError(
            f"{_WHERE}: a tokenizer written in Python must be byte-level or SentencePiece's, got "
            f"{_name(tokenizer)}"
        )
    added, special = tokenizer.added_tokens_decoder, set(getattr(tokenizer, "all_special_ids", ()))
    found = {
        index: read(token) for token, index in tokenizer.get_vocab().items() if index not in added
    }
    for index, token in added.items():
        found[index] = None
        if not token.special and index not in special:
            _refuse_strip(token.content, token)
            found[index] = token.content.encode()
    tokens = _by_id(found)
    # SentencePiece tokenizers change a text by more than their normalizer.
    for text in _TEXTS if processor is None else (_PLAIN_TEXT,):
        ids = tokenizer.encode(text, add_special_tokens=False)
        _check(tokens, text, ids, any_space=processor is not None)
    return tokens, _named_by_transformers(tokenizer)
