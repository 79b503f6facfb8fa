"""fastkd.TeacherStore: settings, fingerprints, and the errors for what does not fit."""

import re
import sys

import numpy as np
import pytest
import torch
from stores import same, write

from fastkd.teachers._store import TeacherStore, fingerprint

pytest.importorskip("safetensors", reason='TeacherStore needs safetensors: "fastkd[store]"')


def test_settings_are_kept(tmp_path):
    options = {"temperature": 2.5, "fingerprint": "0a1b", "log_probs": "float16"}
    TeacherStore.create(tmp_path, vocab_size=np.int64(50), k=np.int32(3), **options).close()
    store = TeacherStore(tmp_path, vocab_size=50, fingerprint="0a1b")
    assert (store.vocab_size, store.k, store.temperature, store.fingerprint) == (50, 3, 2.5, "0a1b")
    expected = (
        f"TeacherStore('{tmp_path}', 0 sequences, 0 tokens, vocab_size=50, k=3, "
        "log_probs='float16')"
    )
    assert repr(store) == expected
    TeacherStore.create(tmp_path, vocab_size=50, k=3, exist_ok=True, **options).close()


def test_another_vocabulary_or_fingerprint(tmp_path):
    TeacherStore.create(tmp_path / "a", vocab_size=50, k=3, fingerprint="0a1b").close()
    TeacherStore.create(tmp_path / "b", vocab_size=50, k=3).close()
    for opened, name in (
        (TeacherStore, "TeacherStore"),
        (TeacherStore.append_to, "TeacherStore.append_to"),
    ):
        with pytest.raises(
            ValueError, match=rf"^{name}: vocab_size is 51, but .* written with 50$"
        ):
            opened(tmp_path / "a", vocab_size=51)
        with pytest.raises(ValueError, match=rf"^{name}: fingerprint is 'ff', .* with '0a1b'$"):
            opened(tmp_path / "a", fingerprint="ff")
        with pytest.raises(ValueError, match=rf"^{name}: fingerprint is 'ff', .* with None$"):
            opened(tmp_path / "b", fingerprint="ff")
    for change_, message in (
        ({"k": 4}, "k is 4, but .* with 3"),
        ({"vocab_size": 60}, "vocab_size is 60, but .* with 50"),
        ({"temperature": 2}, "temperature is 2.0, but .* with 1.0"),
        ({"log_probs": "float16"}, "log_probs is 'float16', but .* with '8bit'"),
    ):
        with pytest.raises(ValueError, match="^TeacherStore.create: " + message):
            TeacherStore.create(
                tmp_path / "b", **{"vocab_size": 50, "k": 3, "exist_ok": True} | change_
            )


CREATE_ERRORS = [
    ({"vocab_size": 0}, ValueError, "vocab_size must lie in [1, 2147483647], got 0"),
    ({"vocab_size": 2**31}, ValueError, "vocab_size must lie in [1, 2147483647], got 2147483648"),
    ({"vocab_size": 50.0}, TypeError, "vocab_size must be an int, got float"),
    ({"k": 0}, ValueError, "k must lie in [1, 50], got 0"),
    ({"k": 51}, ValueError, "k must lie in [1, 50], got 51"),
    ({"k": 1025, "vocab_size": 2000}, ValueError, "k must lie in [1, 1024], got 1025"),
    ({"k": None}, TypeError, "k must be an int, got NoneType"),
    ({"temperature": 0}, ValueError, "temperature must be positive, got 0"),
    ({"temperature": float("nan")}, ValueError, "temperature must be positive, got nan"),
    ({"temperature": "1"}, TypeError, "temperature must be a number, got str"),
    ({"fingerprint": 7}, TypeError, "fingerprint must be a string, got int"),
    ({"log_probs": "4bit"}, ValueError, "log_probs must be one of 8bit, float16, got '4bit'"),
    ({"shard_tokens": 0}, ValueError, "shard_tokens must lie in [1, 1099511627776], got 0"),
]


@pytest.mark.parametrize("options, error, message", CREATE_ERRORS)
def test_create_errors(tmp_path, options, error, message):
    with pytest.raises(error, match="^" + re.escape("TeacherStore.create: " + message) + "$"):
        TeacherStore.create(tmp_path / "new", **{"vocab_size": 50, "k": 3, **options})
    assert not (tmp_path / "new").exists()


def test_paths_that_do_not_fit(tmp_path, tmp_path_factory):
    stored = tmp_path_factory.mktemp("stored")
    TeacherStore.create(stored, vocab_size=50, k=3).close()
    for opened, name in (
        (TeacherStore, "TeacherStore"),
        (TeacherStore.append_to, "TeacherStore.append_to"),
    ):
        with pytest.raises(FileNotFoundError, match=rf"^{name}: .*nowhere is no teacher store"):
            opened(tmp_path / "nowhere")
        with pytest.raises(TypeError, match=rf"^{name}: vocab_size must be an int, got list"):
            opened(stored, vocab_size=[50])
        with pytest.raises(TypeError, match=rf"^{name}: fingerprint must be a string, got int"):
            opened(stored, fingerprint=7)
        for path in (None, 3, ["a"]):
            with pytest.raises(TypeError, match=rf"^{name}: path must be a path, got "):
                opened(path)
    with pytest.raises(TypeError, match=r"^TeacherStore.create: path must be a path, got int"):
        TeacherStore.create(3, vocab_size=50, k=3)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileExistsError, match=r"must be empty, got notes.txt in it"):
        TeacherStore.create(tmp_path, vocab_size=50, k=3, exist_ok=True)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    TeacherStore.create(tmp_path / "store", vocab_size=50, k=3).close()
    with pytest.raises(FileExistsError, match=r"is a store already; exist_ok=True or"):
        TeacherStore.create(tmp_path / "store", vocab_size=50, k=3)


def test_other_versions(tmp_path):
    TeacherStore.create(tmp_path, vocab_size=50, k=3).close()
    index = tmp_path / "store.json"
    content = index.read_text()
    index.write_text(content.replace('"version": 1', '"version": 3'))
    with pytest.raises(ValueError, match=r"version 1 or 2, got fastkd.TeacherStore, version 3"):
        TeacherStore(tmp_path)
    for broken in ("", "[]", "{}", content[:-20], content.replace("50", "60")):
        index.write_text(broken)
        with pytest.raises(ValueError, match=r"^teacher_store: .*store.json is damaged: "):
            TeacherStore(tmp_path)


def test_without_safetensors(three_shards, tmp_path_factory, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    path = tmp_path_factory.mktemp("new")
    message = re.escape('needs the safetensors package: pip install "fastkd[store]"')
    with pytest.raises(ImportError, match="TeacherStore.create: " + message):
        TeacherStore.create(path, vocab_size=50, k=3)
    with pytest.raises(ImportError, match="TeacherStore.append_to: " + message):
        TeacherStore.append_to(three_shards)
    assert not list(path.iterdir())
    assert len(TeacherStore(three_shards)[0].indices) == 150  # not needed for reading


# Arguments


LOG = np.log(np.array([[0.5, 0.25], [0.5, 0.25], [0.5, 0.25]], dtype=np.float32))
INDEX = np.array([[1, 2], [3, 4], [5, 6]])


def put(array, value, token=2, j=1):
    array = array.copy()
    array[token, j] = value
    return array


APPEND_ERRORS = [
    (LOG.tolist(), INDEX, TypeError, "log_probs must be a tensor or a numpy array, got list"),
    (LOG, None, TypeError, "indices must be a tensor or a numpy array, got NoneType"),
    (LOG.astype(np.float64), INDEX, TypeError, "log_probs must be float32, got float64"),
    (torch.zeros(3, 2).bfloat16(), INDEX, TypeError, "log_probs must be float32, got bfloat16"),
    (LOG, INDEX.astype(np.uint8), TypeError, "indices must be int32 or int64, got uint8"),
    (LOG, torch.zeros(3, 2), TypeError, "indices must be int32 or int64, got float32"),
    (LOG[0], INDEX[0], ValueError, "log_probs must be [tokens, 2], got [2]"),
    (LOG[None], INDEX[None], ValueError, "log_probs must be [tokens, 2], got [1, 3, 2]"),
    (LOG[:, :1], INDEX[:, :1], ValueError, "log_probs must be [tokens, 2], got [3, 1]"),
    (LOG, INDEX[:2], ValueError, "indices must have log_probs' shape [3, 2], got [2, 2]"),
    (LOG, put(INDEX, 50), IndexError, "indices must lie in [0, 50) or be -1, got 50 at token 2"),
    (LOG, put(INDEX, -2), IndexError, "indices must lie in [0, 50) or be -1, got -2 at token 2"),
    (
        LOG,
        put(INDEX, 2**40),
        IndexError,
        f"indices must lie in [0, 50) or be -1, got {2**40} at token 2",
    ),
    (LOG, put(INDEX, 5), ValueError, "indices must differ in a row, got 5 at token 2"),
    (
        LOG,
        put(INDEX, -1, j=0),
        ValueError,
        "indices must have their padding (-1) at the end of a row, got 6 at token 2",
    ),
    (put(LOG, np.nan), INDEX, ValueError, "log_probs must not be NaN, got nan at token 2"),
    (put(LOG, 0.5, j=0), INDEX, ValueError, "log_probs must not be positive, got 0.5 at token 2"),
    (
        put(LOG, np.inf, j=0),
        INDEX,
        ValueError,
        "log_probs must not be positive, got inf at token 2",
    ),
    (
        put(LOG, -0.125),
        INDEX,
        ValueError,
        "log_probs must be sorted descending, got -0.125 at token 2",
    ),
    (
        put(LOG, 0, j=0),
        INDEX,
        ValueError,
        "log_probs' exp must sum to at most 1, got 1.25 at token 2",
    ),
]


@pytest.mark.parametrize("log_probs, indices, error, message", APPEND_ERRORS)
def test_append_errors(tmp_path, log_probs, indices, error, message):
    with TeacherStore.create(tmp_path, vocab_size=50, k=2) as writer:
        with pytest.raises(error, match="^" + re.escape("TeacherStore.append: " + message) + "$"):
            writer.append(log_probs, indices)
        assert len(writer) == 0
    assert not list(tmp_path.glob("shard-*"))


def test_rounding_errors_are_let_through(tmp_path):
    exact = np.array([[5e-4, -9.0], [-0.0, -5.0]])
    found = write(tmp_path, [(exact, np.array([[0, 1], [0, 1]]))], 50, 2)[0]
    assert (found.log_probs[:, 0] <= 0).all()
    np.testing.assert_allclose(found.log_probs, exact, atol=0.1)


READ_ERRORS = [
    (lambda s: s[6], IndexError, "TeacherStore: the sequence, of 6, must lie in [-6, 5], got 6"),
    (lambda s: s[-7], IndexError, "TeacherStore: the sequence, of 6, must lie in [-6, 5], got -7"),
    (lambda s: s[1:2], TypeError, "TeacherStore: the sequence, of 6, must be an int, got slice"),
    (
        lambda s: s.length(6),
        IndexError,
        "TeacherStore.length: the sequence, of 6, must lie in [-6, 5], got 6",
    ),
    (
        lambda s: s.read(6),
        IndexError,
        "TeacherStore.read: the sequence, of 6, must lie in [-6, 5], got 6",
    ),
    (
        lambda s: s.read(0, 0, 151),
        IndexError,
        "TeacherStore.read: stop must lie in [0, 150], got 151",
    ),
    (lambda s: s.read(0, -1), IndexError, "TeacherStore.read: start must lie in [0, 150], got -1"),
    (lambda s: s.read(0, 5, 4), IndexError, "TeacherStore.read: start must lie in [0, 4], got 5"),
    (lambda s: s.read(0, 1.0), TypeError, "TeacherStore.read: start must be an int, got float"),
]


@pytest.mark.parametrize("reading, error, message", READ_ERRORS)
def test_read_errors(three_shards, reading, error, message):
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        reading(TeacherStore(three_shards))


def test_numpy_positions(three_shards):
    store = TeacherStore(three_shards)
    assert same(store[np.int64(3)], store[3])
    assert same(store.read(torch.tensor(3), np.int32(5), np.int64(9)), store.read(3, 5, 9))


# Fingerprints


class Vocabulary:
    def __init__(self, vocab):
        self.vocab = vocab

    def get_vocab(self):
        return self.vocab


def test_fingerprint_of_a_tokenizer():
    same_ = fingerprint(Vocabulary({"a": 0, "é": 1})), fingerprint(Vocabulary({"é": 1, "a": 0}))
    assert same_ == ("6b01a657a7142f55",) * 2  # in every process
    assert re.fullmatch("[0-9a-f]{16}", same_[0])
    others = [
        Vocabulary({"a": 0, "e": 1}),
        Vocabulary({"a": 1, "é": 0}),
        Vocabulary({"a": 0, "é": 1, "b": 2}),
        [b"a", b"b"],
        [b"a", b"b", None],
        [b"a", None, b"b"],
        [b"ab"],
        [b"a", b"", b"b"],
        [],
        iter([b"b", b"a"]),
    ]
    assert len({fingerprint(x) for x in others} | set(same_)) == len(others) + 1
    assert fingerprint([b"a", b"b"]) == fingerprint(iter((b"a", b"b")))


def test_fingerprint_of_a_model():
    def model(**options):
        torch.manual_seed(0)
        return torch.nn.Linear(300, 20, **options)

    base = fingerprint(model=model())
    assert base == fingerprint(model=model().state_dict())
    changed = model()
    changed.weight.data[-1, -1] += 1
    others = [
        fingerprint(model=changed),
        fingerprint(model=model().bfloat16()),
        fingerprint(model=model(bias=False)),
        fingerprint(model={k + "x": v for k, v in model().state_dict().items()}),
        fingerprint(model={k: v.reshape(-1) for k, v in model().state_dict().items()}),
        fingerprint([b"a"], model()),
        fingerprint([b"b"], model()),
        fingerprint([b"a"]),
    ]
    assert len({base, *others}) == len(others) + 1
    mixed = {
        "flag": torch.tensor(True),
        "none": torch.empty(0, 3),
        "wide": torch.zeros(2, dtype=torch.complex64),
        "extra": {"no": "tensor"},
        "strided": torch.arange(6).reshape(2, 3).T,
    }
    assert re.fullmatch("[0-9a-f]{16}", fingerprint(model=mixed))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({}, ValueError, "tokenizer or model must be given, got neither"),
        (
            {"tokenizer": 3},
            TypeError,
            "tokenizer must have get_vocab() or be an iterable of bytes and None, got int",
        ),
        (
            {"tokenizer": "abc"},
            TypeError,
            "tokenizer must hold bytes and None, got an entry of type str",
        ),
        ({"model": 3}, TypeError, "model must be a module or a state dict, got int"),
        (
            {"model": torch.nn.Linear(1, 1, bias=False, device="meta")},
            ValueError,
            "model must have values, weight is on the meta device",
        ),
        (
            {"model": {"model": {"weight": torch.ones(1)}}},
            ValueError,
            "model must have tensors, got none",
        ),
    ],
)
def test_fingerprint_errors(arguments, error, message):
    with pytest.raises(error, match="^" + re.escape("fingerprint: " + message) + "$"):
        fingerprint(**arguments)
