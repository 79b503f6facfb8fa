"""fastkd.TeacherStore: what it gives back, in which order, how exactly, in how many bytes."""

import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import FORMATS, LENGTHS, VOCABS, aligned, check_order, kl, real_looking, same, write

from fastkd.teachers import _store as teacher_store
from fastkd.teachers._store import TeacherStore

pytest.importorskip("safetensors", reason='TeacherStore needs safetensors: "fastkd[store]"')


@pytest.mark.parametrize("log_probs", FORMATS)
@pytest.mark.parametrize("k", [1, 7, 64, 1024])
@pytest.mark.parametrize("vocab", VOCABS)
def test_round_trip(tmp_path, vocab, k, log_probs):
    if k > vocab:
        k = vocab  # the whole vocabulary
    generator = np.random.default_rng(k)
    sequences = [real_looking(generator, tokens, k, vocab) for tokens in LENGTHS]
    for _, indices in sequences:
        for edge in (0, vocab - 1):  # a first and a last token
            indices[:, -1][(indices != edge).all(1)] = edge
    store = write(tmp_path, sequences, vocab, k, log_probs=log_probs, shard_tokens=128)
    assert len(store) == len(LENGTHS)
    assert store.num_tokens == sum(LENGTHS)
    assert len(list(tmp_path.glob("shard-*.safetensors"))) == 3
    for number, (exact, indices) in enumerate(sequences):
        found = store[number]
        assert found.log_probs.dtype == torch.float32
        assert found.indices.dtype == torch.int32
        assert found.log_probs.shape == found.indices.shape == exact.shape
        assert store.length(number) == len(exact)
        check_order(found)
        assert same(store[number - len(store)], found)
        got = aligned(found, indices)
        if not len(exact):
            continue
        mass = np.exp(got.astype(np.float64)).sum(1)
        np.testing.assert_allclose(mass, np.exp(exact).sum(1), rtol=2e-6)
        assert kl(exact, got).max() < (1e-4 if k <= 128 else 2e-4)
        below = exact[:, :1] - exact
        allowed = below * 2**-11 + 2e-3 if log_probs == "float16" else 0.6 + below / 8
        assert (abs(got - exact) <= allowed).all()
        for start, stop in ((0, 1), (len(exact) - 1, len(exact)), (len(exact) // 3, None)):
            part = store.read(number, start, stop)
            assert torch.equal(part.log_probs, found.log_probs[start:stop])
            assert torch.equal(part.indices, found.indices[start:stop])
    store.verify()


@pytest.mark.parametrize("k", [1, 3, 64])
def test_largest_vocabulary(tmp_path, k):
    vocab = 2**31 - 1
    log_probs = np.log(np.full((3, k), 0.5 / k))
    indices = np.sort(np.random.default_rng(0).integers(1, vocab - 1, (3, k)))
    indices[1] = np.arange(k)
    indices[2] = np.arange(vocab - k, vocab)
    store = write(tmp_path, [(log_probs, indices)], vocab, k)
    assert torch.equal(store[0].indices, torch.from_numpy(indices).int())


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_rows(tmp_path_factory, data):
    """Padding, zeros, ties, rows without mass, of any vocabulary."""
    vocab = data.draw(st.integers(1, 300) | st.integers(1, 2**31 - 1))
    k = data.draw(st.integers(1, min(vocab, 9)))
    levels = st.sampled_from([0.0, -1e-4, -0.5, -0.5, -3.0, -40.0, -250.0, -np.inf])
    log_probs, indices = [], []
    for _ in range(data.draw(st.integers(1, 5))):
        valid = data.draw(st.integers(0, k))
        row = -np.sort(-np.array(data.draw(st.lists(levels, min_size=k, max_size=k))))
        mass = np.exp(row[:valid]).sum()
        row = row - np.log(max(mass, 1)) if valid else row
        drawn = st.lists(st.integers(0, vocab - 1), min_size=valid, max_size=valid, unique=True)
        log_probs.append(np.r_[row[:valid], np.full(k - valid, np.nan)])
        indices.append(data.draw(drawn) + [-1] * (k - valid))
    log_probs, indices = np.array(log_probs), np.array(indices)
    path = tmp_path_factory.mktemp("store")
    found = write(
        path, [(log_probs, indices)], vocab, k, log_probs=data.draw(st.sampled_from(FORMATS))
    )[0]
    shutil.rmtree(path)
    check_order(found)
    for row in range(len(indices)):
        valid = indices[row] >= 0
        count = valid.sum()
        assert found.indices[row, count:].eq(-1).all()
        assert found.log_probs[row, count:].eq(-np.inf).all()
        assert set(found.indices[row, :count].tolist()) == set(indices[row, :count].tolist())
        finite = log_probs[row][np.isfinite(log_probs[row])]
        allowed = 0.02 + np.ptp(finite) / 60 if finite.size else 0
        got = dict(zip(found.indices[row].tolist(), found.log_probs[row].tolist(), strict=True))
        for index, exact in zip(indices[row, :count], log_probs[row, :count], strict=True):
            if exact == -np.inf:
                assert got[index] == -np.inf
            else:
                assert got[index] == pytest.approx(exact, abs=allowed)


@pytest.mark.parametrize("log_probs", FORMATS)
def test_torch_and_numpy_in(tmp_path, log_probs):
    exact, indices = real_looking(np.random.default_rng(0), 5, 4, 50)
    exact = exact.astype(np.float32)
    with TeacherStore.create(tmp_path, vocab_size=50, k=4, log_probs=log_probs) as writer:
        writer.append(exact, indices)
        writer.append(exact, indices.astype(np.int32))
        writer.append(np.asfortranarray(exact), np.asfortranarray(indices))
        writer.append(torch.from_numpy(exact).requires_grad_(), torch.from_numpy(indices))
        writer.append(torch.from_numpy(exact.T.copy()).T, torch.from_numpy(indices).int())
        assert (len(writer), writer.num_tokens) == (5, 25)
    store = TeacherStore(tmp_path)
    assert all(same(store[0], store[i]) for i in range(1, 5))


# How close 8 bits come


def level_rows(k, outlier):
    """Where rounding errors of one sign meet those of the other: the worst that a row can do.

    One large entry, one far away that stretches the range, the others at the same depth but for a
    little, so that some are rounded up and some down.
    """
    depths = np.r_[np.arange(0.01, 0.5, 1e-4), np.arange(0.5, 16, 1e-3)]
    row = np.repeat(depths[:, None], k, axis=1)
    row[:, 1 : k // 2] -= depths[:, None] / 200
    row[:, k // 2 :] += depths[:, None] / 200
    row[:, 0] = 0
    row[:, -1] = outlier
    return -row


def normalised(log_weights, tail=0.0):
    log_weights = -np.sort(-np.asarray(log_weights, dtype=np.float64), axis=1)
    return log_weights - np.log(np.exp(log_weights).sum(1, keepdims=True)) + np.log1p(-tail)


ADVERSARIAL = {
    "dominant": lambda k: -np.arange(1, 60, 0.1)[:, None] * (np.arange(k) > 0) - np.arange(k) / 1e3,
    "flat": lambda k: np.zeros((1, k)),
    "zipf": lambda k: -np.linspace(0.5, 8, 50)[:, None] * np.log(np.arange(1, k + 1)),
    "geometric": lambda k: -np.geomspace(1e-4, 20, 400)[:, None] * np.arange(k),
    "two levels": lambda k: np.log(np.r_[2 / 3, np.full(k - 1, 1 / 3 / (k - 1))])[None],
    "any two levels": lambda k: level_rows(k, 16.01),
    "two levels, outlier": lambda k: level_rows(k, 250.0),
    "two levels, zero": lambda k: np.where(np.arange(k) < k - 1, level_rows(k, 30.0), -np.inf),
    "random": lambda k: 9 * np.random.default_rng(0).standard_normal((3000, k)),
    "random, heavy": lambda k: np.random.default_rng(1).standard_cauchy((3000, k)).clip(-200, 20),
}


@pytest.mark.parametrize("tail", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_kl_bound(tmp_path, name, tail):
    exact = normalised(ADVERSARIAL[name](64), tail)
    indices = np.argsort(np.random.default_rng(0).random(exact.shape), axis=1)
    found = write(tmp_path, [(exact, indices)], 262144, 64)[0]
    worst = kl(exact, aligned(found, indices)).max()
    print(f"{name}, tail {tail}: {worst:.3g}")
    assert worst < 1e-4


def test_rare_tokens_keep_their_log_probability(tmp_path):
    exact = normalised(-(np.linspace(0, 20, 64)[None] ** np.linspace(0.5, 1, 30)[:, None]))
    indices = np.tile(np.arange(64), (30, 1))
    found = write(tmp_path, [(exact, indices)], 262144, 64)[0]
    assert abs(aligned(found, indices) - exact).max() < 0.5


def test_rows_of_tiny_mass(tmp_path):
    exact = normalised(np.zeros((2, 4))) - np.array([[30.0], [1e4]])
    found = write(tmp_path, [(exact, np.tile(np.arange(4), (2, 1)))], 50, 4)[0]
    np.testing.assert_allclose(found.log_probs, exact, rtol=1e-6)


def test_almost_all_mass_keeps_its_tail(tmp_path):
    """1 - mass is small beside a float32 1, but not beside the log of the mass."""
    tails = 10.0 ** -np.arange(2, 10)
    exact = np.stack([np.log1p(-tails), np.log(tails / 2)], axis=1)
    indices = np.tile(np.arange(2), (len(tails), 1))
    log_probs = write(tmp_path, [(exact, indices)], 50, 2)[0].log_probs.double().numpy()
    np.testing.assert_allclose(
        -np.expm1(log_probs[:, 0]) - np.exp(log_probs[:, 1]), tails / 2, 1e-5
    )


# Size


@pytest.mark.parametrize(
    "vocab, log_probs, expected",
    [
        (49152, "8bit", 163),
        (151936, "8bit", 177),
        (262144, "8bit", 183),
        (262144, "float16", 246),
    ],
)
def test_bytes_on_disk(tmp_path, vocab, log_probs, expected):
    sequence = real_looking(np.random.default_rng(0), 256, 64, vocab)
    store = write(tmp_path, [sequence] * 64, vocab, 64, log_probs=log_probs)
    total = sum(file.stat().st_size for file in tmp_path.iterdir())
    print(f"vocab {vocab}, {log_probs}: {total / store.num_tokens:.2f} bytes a token")
    assert expected < total / store.num_tokens < expected + 0.3
    assert log_probs == "float16" or total / store.num_tokens < 200


def test_reads_only_what_it_needs(tmp_path, monkeypatch):
    sequence = real_looking(np.random.default_rng(0), 1000, 8, 50000)
    store = write(tmp_path, [sequence] * 20, 50000, 8)
    read = []

    def pread(descriptor, size, offset):
        read.append(size)
        return os_pread(descriptor, size, offset)

    os_pread = os.pread
    monkeypatch.setattr(os, "pread", pread)
    store.read(7, 500, 510)
    record_bytes = store._packing.record_bytes
    shard_bytes = 20000 * record_bytes
    assert sum(read) < shard_bytes / 20
    read.clear()
    store.read(7, 500, 510)
    assert read == [64 * record_bytes]
    store[3]
    assert sum(read) < 1200 * record_bytes


def test_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_store, "_OPEN_SHARDS", 3)
    sequence = real_looking(np.random.default_rng(0), 4, 2, 50)
    store = write(tmp_path, [sequence] * 20, 50, 2, shard_tokens=4)
    before = len(os.listdir("/proc/self/fd"))
    for i in (*range(20), *range(20)):
        assert len(store[i].indices) == 4
    assert len(os.listdir("/proc/self/fd")) <= before + 3


# Order, padding, zeros


@pytest.mark.parametrize("log_probs", FORMATS)
def test_ties_go_by_index(tmp_path, log_probs):
    exact = np.log([[0.3, 0.2, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25]])
    indices = np.array([[9, 40, 2, 30], [3, 2, 1, 0]])
    found = write(tmp_path, [(exact, indices)], 50, 4, log_probs=log_probs)[0]
    assert found.indices.tolist() == [[9, 2, 30, 40], [0, 1, 2, 3]]


def test_ties_that_rounding_makes_go_by_index(tmp_path):
    """Different codes whose log-probabilities float32 cannot tell apart."""
    exact = -np.sort(np.random.default_rng(0).random((5000, 64))) - 2047.9
    indices = np.tile(np.arange(64)[::-1], (5000, 1))
    check_order(write(tmp_path, [(exact, indices)], 64, 64, log_probs="float16")[0])


@pytest.mark.parametrize("log_probs", FORMATS)
def test_padding(tmp_path, log_probs):
    exact = np.log([[0.5, 0.25, 0.1], [0.5, 0.25, 1], [0.5, 1, 1], [1, 1, 1]])
    exact[1, 2], exact[2, 1], exact[3, 0] = np.nan, np.inf, 7.0
    indices = np.array([[49, 0, 1], [0, 49, -1], [49, -1, -1], [-1, -1, -1]])
    found = write(tmp_path, [(exact, indices)], 50, 3, log_probs=log_probs)[0]
    assert found.indices.tolist() == indices.tolist()
    for row, valid in enumerate((3, 2, 1, 0)):
        expected = np.log([0.5, 0.25, 0.1])[:valid]
        np.testing.assert_allclose(found.log_probs[row, :valid], expected, atol=0.01)
        assert (found.log_probs[row, valid:] == -np.inf).all()


@pytest.mark.parametrize("log_probs", FORMATS)
def test_probability_zero(tmp_path, log_probs):
    inf = np.inf
    exact = np.array([[-0.5, -1.0, -inf, -inf], [-inf, -inf, -inf, -inf], [-0.1, -inf, 0, 0]])
    indices = np.array([[4, 3, 49, 7], [3, 2, 1, 0], [5, 6, -1, -1]])
    found = write(tmp_path, [(exact, indices)], 50, 4, log_probs=log_probs)[0]
    assert found.indices.tolist() == [[4, 3, 7, 49], [0, 1, 2, 3], [5, 6, -1, -1]]
    expected = [[-0.5, -1.0, -inf, -inf], [-inf] * 4, [-0.1, -inf, -inf, -inf]]
    np.testing.assert_allclose(found.log_probs, expected, atol=0.01)


def test_further_down_than_codes_reach(tmp_path):
    exact = np.array([[-1e-3, -7.0, -3e38]])
    indices = np.array([[0, 1, 2]])
    for log_probs, last in (("8bit", -256), ("float16", -65504)):
        found = write(tmp_path / log_probs, [(exact, indices)], 50, 3, log_probs=log_probs)[0]
        assert found.indices.tolist() == [[0, 1, 2]]
        assert found.log_probs[0, 2].item() == pytest.approx(last, rel=1e-3)
        assert kl(exact, found.log_probs.numpy())[0] < 1e-4


# Empty


def test_empty_store_and_empty_sequences(tmp_path):
    TeacherStore.create(tmp_path / "a", vocab_size=50, k=3).close()
    store = TeacherStore(tmp_path / "a")
    assert (len(store), store.num_tokens, list(store)) == (0, 0, [])
    store.verify()
    with pytest.raises(IndexError):
        store[0]
    nothing = np.zeros((0, 3)), np.zeros((0, 3), dtype=np.int64)
    store = write(tmp_path / "b", [nothing] * 4, 50, 3)
    store.verify()
    assert (len(store), store.num_tokens) == (4, 0)
    assert [tuple(x.log_probs.shape) for x in store] == [(0, 3)] * 4
    assert store.read(2, 0, 0).indices.shape == (0, 3)


# Stopped writers
