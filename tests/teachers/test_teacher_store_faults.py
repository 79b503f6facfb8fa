"""fastkd.TeacherStore: file operations that fail, and files that nobody has written so."""

import errno
import json
import os
import random
import resource
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from stores import change, numbered, same

from fastkd.teachers._packing import Packing
from fastkd.teachers._shards import Shard, index_is, write_index
from fastkd.teachers._store import TeacherStore

pytest.importorskip("safetensors", reason='TeacherStore needs safetensors: "fastkd[store]"')

# Operations that fail


class Operations:
    """Counts the file operations of a writer, and makes those numbered `first` to `last` fail."""

    def __init__(self, monkeypatch, writer):
        self.first = self.last = self.count = 0
        self.afterwards = False
        for owner, name in (
            *((os, "open"), (os, "fsync"), (os, "close")),
            *((Path, "replace"), (Path, "write_text"), (Path, "read_bytes"), (Path, "unlink")),
            (writer, "_save_file"),
        ):
            monkeypatch.setattr(owner, name, self.failing(getattr(owner, name)))

    def failing(self, operation):
        def run(*arguments, **options):
            number, self.count = self.count, self.count + 1
            fails = self.first <= number < self.last
            if self.afterwards or not fails:
                found = operation(*arguments, **options)
            if fails:
                raise OSError(errno.ENOSPC, "No space left on device")
            return found

        return run

    def fail(self, first, last, afterwards):
        self.first, self.last, self.afterwards, self.count = first, last, afterwards, 0


def contents(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of shards that are damaged
        store = TeacherStore(path)
    store.verify()
    return [store[i] for i in range(len(store))]


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("afterwards", [False, True])
@pytest.mark.parametrize("most", [1, 2, 10**6])
def test_an_append_stores_once_or_not_at_all(tmp_path, monkeypatch, most, afterwards, again):
    """Whichever operation fails, alone or with all that follow it, before or after its effect."""
    options = {"vocab_size": 1000, "k": 4, "shard_tokens": 100}
    with TeacherStore.create(tmp_path / "right", **options) as writer:
        for i in range(6):
            writer.append(*numbered(i))
    right = contents(tmp_path / "right")
    for first in range(100):
        path = tmp_path / str(first)
        writer = TeacherStore.create(path, **options)
        for i in range(3):  # a shard of two, one in memory
            assert writer.append(*numbered(i)) == i
        with monkeypatch.context() as patched:
            operations = Operations(patched, writer)
            operations.fail(first, first + most, afterwards)
            try:
                writer.append(*numbered(3))
                failed = False
            except OSError:
                failed = True
            if operations.count <= first:  # there are no more operations
                break
        assert len(writer) == (3 if failed else 4)
        stored = contents(path)
        assert len(stored) in ((2, 4) if failed else (4,))
        assert all(map(same, stored, right))
        last = 3 if again or not failed else 5
        if failed:
            assert writer.append(*numbered(last)) == 3
        writer.close()
        stored = contents(path)
        assert len(stored) == 4
        assert all(map(same, stored, [*right[:3], right[last]]))
        with TeacherStore.append_to(path) as writer:
            assert len(writer) == 4
        assert sorted(file.name for file in path.iterdir()) == [
            *("shard-000000.safetensors", "shard-000001.safetensors", "store.json", "writer.lock")
        ]
    assert first > 8


def test_closing_may_be_repeated(tmp_path, monkeypatch):
    writer = TeacherStore.create(tmp_path, vocab_size=1000, k=4)
    writer.append(*numbered(0))
    with monkeypatch.context() as patched:
        Operations(patched, writer).fail(0, 10**6, False)
        for finish in (writer.flush, writer.close, writer.close):
            with pytest.raises(OSError, match="No space"):
                finish()
    assert len(writer) == 1
    writer.close()
    writer.close()
    assert len(contents(tmp_path)) == 1


def test_a_block_that_cannot_be_flushed_lets_another_writer_in(tmp_path, monkeypatch):
    writer = TeacherStore.create(tmp_path, vocab_size=1000, k=4)
    with monkeypatch.context() as patched:
        operations = Operations(patched, writer)
        writer.append(*numbered(0))
        operations.fail(0, 10**6, False)
        with pytest.raises(OSError, match="No space"), writer:
            pass
    with TeacherStore.append_to(tmp_path) as other:
        assert len(other) == 0


def test_a_file_that_may_not_grow(tmp_path):
    """Real writes that fail part way: the shard's, then the index's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    options = {"vocab_size": 1000, "k": 4, "shard_tokens": 10**6}
    for limit in (0, 1, 100, 300, 2000):
        writer = TeacherStore.create(tmp_path / str(limit), **options)
        for i in range(3):
            writer.append(*numbered(i, 150))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(OSError) as caught:
                writer.flush()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert caught.value.errno == errno.EFBIG
        assert contents(writer.path) == []
        assert len(list(writer.path.iterdir())) == 2
        writer.close()
        assert len(contents(writer.path)) == 3


# Files that nobody has written so


def test_no_writer_goes_on_behind_a_damaged_shard(three_shards):
    last = three_shards / "shard-000002.safetensors"
    content, names = last.read_bytes(), sorted(os.listdir(three_shards))
    index = (three_shards / "store.json").read_bytes()
    for place in (5, 300, len(content) // 2, len(content) - 1):
        change(last, place)
        with pytest.raises(ValueError, match=r"append_to: cannot continue: .*-000002.* is damaged"):
            TeacherStore.append_to(three_shards)
        last.write_bytes(content)
    last.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"append_to: cannot continue: .*-000002.* is damaged"):
        TeacherStore.append_to(three_shards)
    last.unlink()
    options = {"vocab_size": 1000, "k": 4, "shard_tokens": 300, "exist_ok": True}
    with pytest.raises(ValueError, match=r"append_to: cannot continue: .*-000002.* is missing"):
        TeacherStore.append_to(three_shards)
    with pytest.raises(ValueError, match=r"create: cannot continue: .*-000002.* is missing"):
        TeacherStore.create(three_shards, **options)
    last.write_bytes(content)
    assert (three_shards / "store.json").read_bytes() == index
    assert sorted(os.listdir(three_shards)) == names
    with TeacherStore.append_to(three_shards) as writer:
        assert len(writer) == 6


def sealed(content):
    """An index with the right checksum."""
    content = {**content, "crc32": zlib.crc32(json.dumps(content).encode())}
    return json.dumps(content).encode()


NUMBERS = [0, -1, 1, 2**31, 2**63, 10**400, 8.0, 0.5, 1e999, -0.0, float("nan"), True, False]
VALUES = [*NUMBERS, None, "", "8", "8bit", [], [1], {}, {"a": 1}, [[1, 2]], [[0, 0]] * 3]
#: JSON texts in the place of the index.
INDEXES = [
    *(b"[" * 100_000, b"{" * 9, b"[]", b"{}", b"null", b"8", b'"a"', b"\xff", b"", b"1" * 9999),
    b'{"format": ' + b"[" * 20_000 + b"]" * 20_000 + b', "version": 1, "crc32": 1}',
]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("k", value) for value in (0, -1, 8.0, 1025, True, None, "4", [4])),
        *(("vocab_size", value) for value in (0, 3, 2**31, 1000.0, None, 10**400)),
        *(("temperature", value) for value in (0, -1, None, "1", float("nan"), 10**400, True)),
        *(("log_probs", value) for value in ("float32", None, 8, ["8bit"])),
        *(("shard_tokens", value) for value in (0, 1.5, None)),
        ("fingerprint", 5),
        *(("shards", value) for value in (None, 3, [1], [[1]], [[1, 2, 3]], [["a", "b"]], "ab")),
        *(("shards", [[2, 300], value]) for value in ([-1, 5], [2, 1.5], [True, 3], [2, 10**30])),
    ],
)
def test_what_an_index_may_hold(three_shards, name, value):
    file = three_shards / "store.json"
    content = json.loads(file.read_bytes())
    del content["crc32"]
    file.write_bytes(sealed({**content, name: value}))
    for use in (TeacherStore, TeacherStore.append_to):
        with pytest.raises(ValueError, match=r"store\.json is damaged: \w+Error: "):
            use(three_shards)


@pytest.mark.parametrize("text", INDEXES, ids=range(len(INDEXES)))
def test_what_no_index_is(three_shards, text):
    (three_shards / "store.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"store\.json is damaged: \w+Error: "):
        TeacherStore(three_shards)


def replaced(generator, value):
    """Some number, text or list in a JSON value is another one."""
    if isinstance(value, dict) and value and generator.random() < 0.9:
        name = generator.choice(list(value))
        if generator.random() < 0.1:
            return {key: part for key, part in value.items() if key != name}
        return {**value, name: replaced(generator, value[name])}
    if isinstance(value, list) and value and generator.random() < 0.8:
        place = generator.randrange(len(value))
        return [*value[:place], replaced(generator, value[place]), *value[place + 1 :]]
    return generator.choice(VALUES)


def used(path):
    """Everything that a reader does, and what may come of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = TeacherStore(path)
        store.verify()
        for i in range(len(store)):
            log_probs, indices = store[i]
            assert indices.ge(-1).all()
            assert indices.lt(store.vocab_size).all()
            assert log_probs.le(0).all()


def was_refused(path, run):
    """With a message that names the path."""
    try:
        run()
    except ValueError as error:
        message = str(error)
    else:
        return False
    assert str(path) in message
    return True


def test_indexes_at_random(three_shards):
    """Each with the right checksum: a reader gets a store or a ValueError."""
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    generator = random.Random(seed)
    file = three_shards / "store.json"
    content = json.loads(file.read_bytes())
    del content["crc32"]
    refused = 0
    for _ in range(400):
        changed = replaced(generator, content)
        if generator.random() < 0.3:
            changed = replaced(generator, changed)
        file.write_bytes(sealed(changed) if isinstance(changed, dict) else b"1")
        refused += was_refused(three_shards, lambda: used(three_shards))
    assert refused > 200


def test_headers_at_random(three_shards):
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    generator = random.Random(seed)
    file = three_shards / "shard-000001.safetensors"
    content = file.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:size])
    for number in range(400):
        text = json.dumps(replaced(generator, header)).encode()
        if number == 0:
            text = b"[" * 100_000
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[size:])
        was_refused(file, lambda: used(three_shards))


def stored_as(path, settings, records):
    """A store with these records, whatever they are."""
    from safetensors.numpy import save_file

    counts = Shard.write(path, 0, settings, [records], save_file)
    write_index(path, settings, [counts])
    assert index_is(path, settings, [counts])


@pytest.mark.parametrize("log_probs", ["8bit", "float16"])
@pytest.mark.parametrize(("vocab", "k"), [(50, 1), (50, 4), (1000, 4), (300, 300), (70_000, 33)])
def test_records_at_random(tmp_path, vocab, k, log_probs):
    """Whatever is in a record: indices in range, different ones in a row, or a ValueError."""
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    generator = np.random.default_rng(seed)
    with TeacherStore.create(tmp_path, vocab_size=vocab, k=k, log_probs=log_probs) as writer:
        writer.append(*numbered(0, 6, k, vocab))
    store = TeacherStore(tmp_path)
    right = store._shards.get(0) or store._locate("", 0)[0]
    right = np.array(right.read(0, 6))
    refused = 0
    for round_ in range(50):
        records = right.copy()
        if round_ % 3 == 0:
            records[generator.integers(6)] = generator.integers(256, size=records.shape[1])
        else:
            for _ in range(generator.integers(1, 4)):
                place = tuple(generator.integers(records.shape))
                records[place] ^= 1 << generator.integers(8)
        (tmp_path / str(round_)).mkdir()
        stored_as(tmp_path / str(round_), store._settings, records)
        changed = TeacherStore(tmp_path / str(round_))
        changed.verify()
        damage = f"{changed.path}/shard-000000.safetensors is damaged: tokens 0..5"
        if was_refused(damage, lambda: changed[0]):  # noqa: B023
            refused += 1
            continue
        top = changed[0]
        assert top.indices.ge(-1).all()
        assert top.indices.lt(vocab).all()
        assert top.log_probs.le(0).all()
        for row in top.indices.tolist():
            kept = [index for index in row if index >= 0]
            assert len(set(kept)) == len(kept)
    assert refused > 5


def test_records_that_borrow_from_each_other():
    """The number of indices is right over all rows and wrong in each: -507 is what came of it."""
    packing = Packing(1000, 4, "8bit")
    records = packing.pack(*packing.checked(*numbered(0, 2)))
    high = packing.fields[-1]
    bits = np.unpackbits(records[:, high], axis=1, bitorder="little")
    for source, target in ((0, 1), (1, 0)):
        moved = bits.copy()
        moved[source, np.flatnonzero(bits[source])[-1]] = 0
        moved[target, np.flatnonzero(1 - bits[target])[0]] = 1
        changed = records.copy()
        changed[:, high] = np.packbits(moved, axis=1, bitorder="little")
        with pytest.raises(ValueError, match="another number of indices than k = 4"):
            packing.unpack(changed)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ([[-0.5]], "log_probs must be a tensor or a numpy array, got list"),
        (np.array([[-0.5]], dtype=object), "log_probs must be float32, got object"),
        (torch.ones(1, 1, device="meta"), "log_probs must be a dense tensor .*the meta device"),
        (-torch.ones(1, 1).to_sparse(), "log_probs must be a dense tensor .*sparse_coo"),
    ],
)
def test_what_is_no_dense_tensor(tmp_path, argument, message):
    with TeacherStore.create(tmp_path, vocab_size=50, k=1) as writer:
        with pytest.raises((TypeError, ValueError), match="TeacherStore.append: " + message):
            writer.append(argument, np.array([[1]]))
        assert len(writer) == 0
