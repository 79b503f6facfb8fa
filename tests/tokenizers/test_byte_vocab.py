"""ByteVocab against a brute-force oracle and on real vocabularies."""

import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import MissingPackage

import fastkd
from fastkd import ByteVocab

ALPHABET = [b"\x00", b"a", b"b", b"\x7f", b"\x80", b"\xff"]
WORDS = st.lists(st.sampled_from(ALPHABET), max_size=5).map(b"".join)


@st.composite
def any_vocab(draw):
    """Tokens with duplicates, holes, long ones and bytes that are not UTF-8; and classes of ids."""
    tokens = draw(st.lists(WORDS | st.none() | st.just(b"ab" * 512), max_size=40))
    ids = draw(st.permutations(range(len(tokens))))
    special, at = {}, 0
    for name in draw(st.lists(st.sampled_from(["eos", "bos", "x"]), unique=True)):
        count = draw(st.integers(0, 3))
        special[name] = ids[at : at + count]
        at += count
    return tokens, special


class Oracle:
    """What ByteVocab promises, written down without thinking of speed."""

    def __init__(self, tokens, special):
        classed = {index for ids in special.values() for index in ids}
        self.tokens = [None if not t or i in classed else t for i, t in enumerate(tokens)]
        self.classes = {name: sorted(ids) for name, ids in special.items()}
        rest = [i for i, t in enumerate(self.tokens) if t is None and i not in classed]
        if rest:
            self.classes["other"] = rest
        with_bytes = [i for i, t in enumerate(self.tokens) if t is not None]
        self.sorted = sorted(with_bytes, key=lambda i: (self.tokens[i], i))
        self.order = self.sorted + [i for ids in self.classes.values() for i in ids]

    def starting(self, prefix):
        return [i for i in self.sorted if self.tokens[i].startswith(prefix)]

    def columns_after(self, prefix):
        """Ids of each column."""
        found = [[] for _ in range(257 + len(self.classes))]
        for i in self.starting(prefix):
            token = self.tokens[i]
            found[256 if token == prefix else token[len(prefix)]].append(i)
        if not prefix:
            for column, ids in enumerate(self.classes.values(), 257):
                found[column] = ids
        return found


def check(vocab, oracle, prefixes):
    assert len(vocab) == len(oracle.tokens)
    assert vocab.tokens == oracle.tokens
    assert [vocab[i] for i in range(len(vocab))] == oracle.tokens
    assert vocab.special_classes == tuple(oracle.classes)
    assert vocab.num_columns == 257 + len(oracle.classes)
    assert vocab.order.tolist() == oracle.order
    assert (vocab.order.dtype, vocab.columns.dtype) == (np.int32, np.int16)
    columns = np.full(len(vocab), -1)
    for column, ids in enumerate(oracle.columns_after(b"")):
        columns[ids] = column
    assert vocab.columns.tolist() == columns.tolist()
    for prefix in prefixes:
        begin, end = vocab.interval(prefix)
        assert vocab.order[begin:end].tolist() == oracle.starting(prefix)
        expected = oracle.columns_after(prefix)
        assert vocab.find(prefix) == (expected[256] if prefix else [])
        found = vocab.segments(prefix)
        assert (found.dtype, found.shape) == (np.int32, (vocab.num_columns, 2))
        assert [vocab.order[begin:end].tolist() for begin, end in found] == expected


@given(any_vocab(), st.lists(WORDS, max_size=6))
@settings(max_examples=60, deadline=None)
def test_brute_force(drawn, prefixes):
    oracle = Oracle(*drawn)
    vocab = ByteVocab(drawn[0], special=drawn[1])
    tokens = [t for t in drawn[0] if t]
    prefixes = [b"", b"ab" * 513, *prefixes, *tokens, *(t[:-1] for t in tokens)]
    check(vocab, oracle, prefixes)
    segments, index = vocab.segments_of(prefixes)
    assert (segments.dtype, index.dtype) == (np.int32, np.int64)
    assert len(segments) == len(set(prefixes))
    assert segments.shape[1:] == (vocab.num_columns, 2)
    for prefix, which in zip(prefixes, index, strict=True):
        np.testing.assert_array_equal(segments[which], vocab.segments(prefix))
    ids = random.Random(0).choices(range(len(vocab)), k=9) if len(vocab) else []
    assert vocab.decode(ids) == b"".join(oracle.tokens[i] or b"" for i in ids)
    special = np.array([t is None for t in oracle.tokens], dtype=bool)
    first = np.array([bool(t) and t[0] in b"a\x80" for t in oracle.tokens], dtype=bool)
    np.testing.assert_array_equal(vocab.boundary(b"a\x80"), first | special)
    np.testing.assert_array_equal(vocab.boundary(b"a\x80", special=False), first)
    copy = pickle.loads(pickle.dumps(vocab))
    check(copy, oracle, prefixes[:3])
    assert copy == vocab
    assert hash(copy) == hash(vocab)


def test_empty():
    check(ByteVocab([]), Oracle([], {}), [b"", b"a"])
    check(ByteVocab([None, b""]), Oracle([None, None], {}), [b"", b"a"])
    segments, index = ByteVocab([b"a"]).segments_of([])
    assert segments.shape == (0, 257, 2)
    assert index.shape == (0,)


def test_sorts_long_common_prefixes():
    tokens = [
        b"x" * n + tail for n in range(7, 12) for tail in (b"", b"\x00", b"\xff", b"\x00\x00")
    ]
    tokens += tokens[::-1]
    check(ByteVocab(tokens), Oracle(tokens, {}), [*tokens, b"x" * 8, b"x" * 9 + b"\x00"])


def test_equality():
    vocab = ByteVocab([b"a", None], special={"eos": [1]})
    assert vocab == ByteVocab((b"a", b"b"), special={"eos": np.array([1])})
    assert vocab != ByteVocab([b"a", None])
    assert vocab != ByteVocab([b"a", b"b"])
    assert vocab != ByteVocab([b"b", None], special={"eos": [1]})
    assert vocab != ByteVocab([b"a", None, b"c"], special={"eos": [1]})
    assert ByteVocab([b"ab", b"c"]) != ByteVocab([b"a", b"bc"])
    assert vocab != 3
    assert {vocab: 1}[pickle.loads(pickle.dumps(vocab))] == 1


def test_other_is_a_name_like_any_while_nothing_else_needs_it():
    vocab = ByteVocab([b"a", None], special={"other": [1]})
    assert vocab.special_classes == ("other",)
    assert vocab == ByteVocab([b"a", None])


def test_immutable():
    vocab = ByteVocab([b"a", b"b"])
    for array in (vocab.order, vocab.columns):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(AttributeError):
        vocab.num_columns = 3
    order = vocab.order
    del vocab
    assert order.tolist() == [0, 1]


def test_repr():
    vocab = ByteVocab([b"a", None, None], special={"eos": [1]})
    assert repr(vocab) == "ByteVocab(3 ids, 1 with bytes; {eos: 1, other: 1})"


def test_decode_takes_what_holds_integers():
    vocab = ByteVocab([b"a", b"b", None])
    for ids in (
        [1, 0, 2],
        (1, 0, 2),
        np.array([1, 0, 2], dtype=np.uint8),
        torch.tensor([1, 0, 2]),
        torch.tensor([1, 9, 0, 9, 2, 9], dtype=torch.int32)[::2],
    ):
        assert vocab.decode(ids) == b"ba"
    assert vocab.decode([]) == vocab.decode(np.array([], dtype=int)) == b""
    assert vocab[np.int16(1)] == vocab[torch.tensor(1)] == b"b"


class Long(list):
    """Says that it is long."""

    def __len__(self):
        return 2**31


VOCAB = ByteVocab([b"a", b"b", None])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ByteVocab(b"ab"), TypeError, "tokens must be a sequence .*got bytes"),
        (lambda: ByteVocab({b"ab"}), TypeError, "tokens must be a sequence .*got set"),
        (lambda: ByteVocab([b"a", "b"]), TypeError, r"tokens\[1\] must be bytes or None, got str"),
        (lambda: ByteVocab([b"a", 3]), TypeError, r"tokens\[1\] must be bytes or None, got int"),
        (lambda: ByteVocab(Long()), ValueError, "at most 2147483647 entries, got 2147483648"),
        (
            lambda: ByteVocab([bytes(1 << 20)] * 2048),
            ValueError,
            "at most 2147483647 bytes in all, got 2147483648",
        ),
        (lambda: ByteVocab([b"a"], special=[0]), TypeError, "special must be a mapping.*got list"),
        (lambda: ByteVocab([b"a"], special={1: [0]}), TypeError, "strings as names, got int"),
        (lambda: ByteVocab([b"a"], special={"x": 0}), ValueError, r"special\['x'\].*one dimension"),
        (lambda: ByteVocab([b"a"], special={"x": [0.5]}), TypeError, "integers, got float64"),
        (lambda: ByteVocab([b"a"], special={"x": ["0"]}), TypeError, "integers, got <U1"),
        (lambda: ByteVocab([b"a"], special={"x": [2**63]}), TypeError, "integers, got uint64"),
        (lambda: ByteVocab([b"a"], special={"x": [1]}), IndexError, r"'x'\] .*\[0, 1\), got 1"),
        (lambda: ByteVocab([b"a"], special={"x": [-1]}), IndexError, r"\[0, 1\), got -1"),
        (
            lambda: ByteVocab([b"a"], special={"x": [0], "y": [0]}),
            ValueError,
            "must name an id once, got 0 in 'x' and in 'y'",
        ),
        (lambda: ByteVocab([b"a"], special={"x": [0, 0]}), ValueError, "in 'x' and in 'x'"),
        (
            lambda: ByteVocab([None, None], special={"other": [0]}),
            ValueError,
            "must not name a class 'other'",
        ),
        (
            lambda: ByteVocab([], special={str(i): [] for i in range(32510)}),
            ValueError,
            "at most 32509 classes, got 32510",
        ),
        (lambda: VOCAB[3], IndexError, r"must lie in \[0, 3\), got 3"),
        (lambda: VOCAB[-1], IndexError, r"must lie in \[0, 3\), got -1"),
        (lambda: VOCAB[2**70], IndexError, r"must lie in \[0, 3\), got"),
        (lambda: VOCAB["a"], TypeError, "an id must be an integer, got str"),
        (lambda: VOCAB.decode([0, 3]), IndexError, r"decode: ids .*\[0, 3\), got 3 at 1"),
        (lambda: VOCAB.decode([-1]), IndexError, "got -1 at 0"),
        (lambda: VOCAB.decode([0.0]), TypeError, "decode: ids must hold integers, got float64"),
        (lambda: VOCAB.decode(["a"]), TypeError, "decode: ids must hold integers"),
        (lambda: VOCAB.decode([None]), TypeError, "decode: ids must hold integers, got NoneType"),
        (lambda: VOCAB.decode(torch.ones(2)), TypeError, "integers, got float32"),
        (lambda: VOCAB.decode([True]), TypeError, "integers, got bool"),
        (lambda: VOCAB.decode([[0]]), ValueError, r"one dimension, got shape \(1, 1\)"),
        (lambda: VOCAB.find("a"), TypeError, "find: token must be bytes, got str"),
        (lambda: VOCAB.interval("a"), TypeError, "interval: prefix must be bytes, got str"),
        (lambda: VOCAB.segments(None), TypeError, "segments: prefix must be bytes, got NoneType"),
        (lambda: VOCAB.segments_of(b"ab"), TypeError, "sequence of bytes, got bytes"),
        (lambda: VOCAB.segments_of([b"", "a"]), TypeError, r"prefixes\[1\] must be bytes, got str"),
        (lambda: VOCAB.boundary(special="no"), TypeError, "special must be True or False, got str"),
        (
            lambda: VOCAB.decode(torch.zeros(2, dtype=torch.int64, device="meta")),
            ValueError,
            "decode: ids must be on a device that holds values, got meta",
        ),
        (lambda: VOCAB.boundary(" "), TypeError, "boundary: first_bytes must be bytes, got str"),
        (lambda: ByteVocab.from_tokenizer(3), TypeError, "from transformers, .*got builtins.int"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=f"ByteVocab.*{message}"):
        call()


@pytest.mark.parametrize("name", vocabularies.VOCABULARIES)
def test_real_vocabulary(name):
    try:
        tokens = vocabularies.VOCABULARIES[name]()
    except MissingPackage as missing:
        pytest.skip(f"{name}: {missing}")
    vocab = ByteVocab(tokens)
    tokens = [token or None for token in tokens]
    assert vocab.tokens == tokens
    ids = {}
    for index, token in enumerate(tokens):
        if token is not None:
            ids.setdefault(token, []).append(index)
    for token, expected in ids.items():
        assert vocab.find(token) == expected
    assert vocab.order.tolist() == [
        *(index for token in sorted(ids) for index in ids[token]),
        *(index for index, token in enumerate(tokens) if token is None),
    ]
    prefixes = [b"", b" ", b"\n", b" the", "é".encode()[:1], max(ids, key=len)]
    for prefix, which in zip(prefixes, vocab.segments_of(prefixes)[1], strict=True):
        segments = vocab.segments_of(prefixes)[0][which]
        begin, end = vocab.interval(prefix)
        expected = sorted(t for t in ids if t.startswith(prefix))
        assert [vocab[i] for i in vocab.order[begin:end]] == [t for t in expected for _ in ids[t]]
        for column, (first, last) in enumerate(segments[:256].tolist()):
            here = vocab.order[first:last].tolist()
            assert all(vocab[i].startswith(prefix + bytes([column])) for i in here)
        assert (segments[:257, 1] - segments[:257, 0]).sum() == end - begin
    assert all(vocab.find(bytes([byte])) for byte in range(256))


def test_missing_module_says_what_to_do(tmp_path):
    left_out = shutil.ignore_patterns("_host*", "__pycache__")
    shutil.copytree(Path(fastkd.__file__).parent, tmp_path / "fastkd", ignore=left_out)
    # An editable install would find the module in the source folder.
    finders = "[f for f in sys.meta_path if 'editable' not in f.__module__]"
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.meta_path[:] = {finders}; import fastkd"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert found.returncode != 0
    assert "fastkd._host is missing" in found.stderr
    assert "pip install --no-build-isolation -e ." in found.stderr
