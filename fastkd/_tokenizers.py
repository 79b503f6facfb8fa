"""The bytes of a tokenizer's tokens, read from the tokenizer; its package is not imported."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

Tokens = list[bytes | None]
#: Roles and the ids a tokenizer gives them.
Named = dict[str, int]

_WHERE = "ByteVocab.from_tokenizer"
#: An id with several roles counts for the first.
_ROLES = ("eos", "bos", "pad", "unk")
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")
#: Pre-tokenizers that throw away what is between tokens.
_LOSSY = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit")


def token_bytes(tokenizer: Any) -> tuple[Tokens, dict[str, list[int]]]:
    """Read each id's bytes and the special classes. What a tokenizer is, its methods tell."""
    if _has(tokenizer, "n_vocab", "decode_single_token_bytes"):
        tokens, named = _from_tiktoken(tokenizer)
    elif _has(tokenizer, "id_to_piece", "is_byte", "is_control"):
        tokens, named = _from_sentencepiece(tokenizer)
    elif _has(tokenizer, "backend_tokenizer", "added_tokens_decoder"):
        tokens, named = _from_tokenizers(tokenizer.backend_tokenizer)
        named |= _named_by_transformers(tokenizer)
    elif _has(tokenizer, "convert_ids_to_tokens", "added_tokens_decoder", "get_vocab"):
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
    return _by_id(found), named


def _from_sentencepiece(processor: Any) -> tuple[Tokens, Named]:
    tokens = [
        _sentencepiece_bytes(processor, index, processor.id_to_piece(index))
        for index in range(processor.get_piece_size())
    ]
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
    """For str.translate: the character that stands for a byte to that byte.

    Printable characters of Latin-1 stand for themselves, and those from 256 on, in turn, for the
    other bytes. These others as characters stand for none: they become one beyond Latin-1.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {256 + i: byte for i, byte in enumerate(others)}
    return table | dict.fromkeys(others, 0xFFFF)


def _byte_level_bytes(token: str) -> bytes:
    try:
        return token.translate(_byte_level()).encode("latin-1")
    except UnicodeEncodeError:  # literal text, as decoders of this kind take it
        return token.encode()


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder, those of a sequence one by one."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
    for key in ("normalizers", "pretokenizers", "decoders"):
        for step in part.get(key, ()):
            yield from _steps(step)


def _from_tokenizers(tokenizer: Any) -> tuple[Tokens, Named]:
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

    def read(token: str) -> bytes:
        return _byte_level_bytes(token) if byte_level else _piece_bytes(token, spaces, fallback)

    pairs = vocab.items() if isinstance(vocab, dict) else ((x[0], i) for i, x in enumerate(vocab))
    found: dict[int, bytes | None] = {index: read(token) for token, index in pairs}
    for added in parts["added_tokens"]:
        if added["special"]:
            found[added["id"]] = None
        elif added["id"] not in found:
            text = added["content"]
            found[added["id"]] = text.encode() if byte_level else read(text)
    return _by_id(found), _named_by_tokenizers(tokenizer, model, parts["padding"])


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
    """Of transformers, written in Python."""
    processor = getattr(tokenizer, "sp_model", None)
    if processor is not None:

        def read(token: str) -> bytes | None:
            return _sentencepiece_bytes(processor, processor.piece_to_id(token), token)

    elif hasattr(tokenizer, "byte_decoder"):
        read = _byte_level_bytes
    elif hasattr(tokenizer, "_utf_vocab_size"):  # a character of Latin-1 a byte

        def read(token: str) -> bytes | None:
            return token.encode("latin-1")

    else:
        raise TypeError(
            f"{_WHERE}: a tokenizer written in Python must be byte-level or SentencePiece's, got "
            f"{_name(tokenizer)}"
        )
    added = tokenizer.added_tokens_decoder
    found = {
        index: read(token) for token, index in tokenizer.get_vocab().items() if index not in added
    }
    for index, token in added.items():
        found[index] = None if token.special else token.content.encode()
    return _by_id(found), _named_by_transformers(tokenizer)
