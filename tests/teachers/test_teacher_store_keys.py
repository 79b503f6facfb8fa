"""Keys and input ids in a store, padded batches, several writers joined, and old files."""

import json
import multiprocessing
import pickle
import zlib

import numpy as np
import pytest
import torch
from stores import change, numbered, same, write
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

import fastkd
from fastkd.teachers._shards import Shard
from fastkd.teachers._store import TeacherStore

pytest.importorskip("safetensors", reason='TeacherStore needs safetensors: "fastkd[store]"')

VOCAB, K = 1000, 4
SETTINGS = {"vocab_size": VOCAB, "k": K, "shard_tokens": 150}


def ids_of(number, tokens=50):
    return np.random.default_rng(number).integers(0, VOCAB, tokens)


def fill(path, numbers, **options):
    settings = {**SETTINGS, "keys": True, "input_ids": True, **options}
    with TeacherStore.create(path, **settings, exist_ok=True) as writer:
        for number in numbers:
            more = {"key": f"text {number}"} if settings["keys"] else {}
            if settings["input_ids"]:
                more["input_ids"] = ids_of(number)
            writer.append(*numbered(number), **more)
    return TeacherStore(path)


def test_found_by_key(tmp_path):
    plain = write(tmp_path / "plain", [numbered(i) for i in range(7)], VOCAB, K)
    store = fill(tmp_path / "keys", range(7))
    assert (store.has_keys, store.has_input_ids) == (True, True)
    assert (plain.has_keys, plain.has_input_ids) == (False, False)
    assert store.keys() == [f"text {i}" for i in range(7)]
    for i in (0, 3, 6):
        assert store.find(f"text {i}") == i
        assert f"text {i}" in store
        for found in (store[f"text {i}"], store[i], store.read(f"text {i}"), store[i - 7]):
            assert same(found, plain[i])
        assert same(store.read(f"text {i}", 3, 9), plain.read(i, 3, 9))
        assert store.length(f"text {i}") == 50
        assert store.input_ids(f"text {i}").tolist() == ids_of(i).tolist()
        assert store.input_ids(i).dtype == torch.int64
    assert "text 7" not in store
    assert 3 not in store
    with pytest.raises(KeyError, match=r"TeacherStore.find: no sequence has the key 'text 7' in"):
        store["text 7"]
    store.verify()
    again = pickle.loads(pickle.dumps(store))
    assert same(again["text 5"], plain[5])


@pytest.mark.parametrize(("keys", "input_ids"), [(True, False), (False, True)])
def test_one_without_the_other(tmp_path, keys, input_ids):
    store = fill(tmp_path, range(5), keys=keys, input_ids=input_ids)
    plain = write(tmp_path / "plain", [numbered(i) for i in range(5)], VOCAB, K)
    assert all(same(store[i], plain[i]) for i in range(5))
    wrong = store.input_ids if keys else store.find
    with pytest.raises(ValueError, match="was created without"):
        wrong(0)
    if not keys:
        for call in (store.keys, lambda: "a" in store, lambda: store["a"]):
            with pytest.raises(ValueError, match="was created without keys"):
                call()


def test_integers_are_keys(tmp_path):
    with TeacherStore.create(tmp_path, **SETTINGS, keys=True) as writer:
        writer.append(*numbered(0), key=17)
        writer.append(*numbered(1), key=np.int64(3))
        writer.append(*numbered(2), key="")
        assert 17 in writer
        assert "17" in writer
        assert 4 not in writer
    store = TeacherStore(tmp_path)
    assert store.keys() == ["17", "3", ""]
    assert store.find(17) == store.find("17") == 0
    assert store.find(3) == 1  # the key, and no number
    assert 17 in store
    assert 0 not in store  # a number of a sequence, and no key
    assert 3.0 not in store
    assert [17] not in store
    assert same(store[""], store[2])
    for key in (None, 17.0, [17], True):
        with pytest.raises(TypeError, match=r"TeacherStore.find: key must be a text or an integer"):
            store.find(key)
    assert store.find(torch.tensor(17)) == 0


def test_keys_of_a_loader(tmp_path):
    """Indices of a data set as the loader collates them: a tensor."""
    best, _, _ = batch()
    with TeacherStore.create(tmp_path, **SETTINGS, keys=True) as writer:
        writer.append_batch(*best, keys=torch.tensor([4, 2, 7, 5]))
        assert torch.tensor(7) in writer
        assert [7] not in writer
        writer.append_batch(*best, keys=np.arange(10, 14))
    assert TeacherStore(tmp_path).keys() == ["4", "2", "7", "5", "10", "11", "12", "13"]


def test_files_without_them_are_of_version_1(tmp_path):
    """Byte for byte what fastkd wrote before it knew keys, which it then also reads."""
    store = write(tmp_path, [numbered(0)], VOCAB, K)
    content = json.loads((tmp_path / "store.json").read_bytes())
    crc32 = content.pop("crc32")
    names = ("format", "version", "vocab_size", "k", "temperature", "fingerprint", "log_probs")
    assert tuple(content) == (*names, "shard_tokens", "shards")
    assert content["version"] == 1
    assert zlib.crc32(json.dumps(content).encode()) == crc32
    shard = (tmp_path / "shard-000000.safetensors").read_bytes()
    header = json.loads(shard[8 : 8 + int.from_bytes(shard[:8], "little")])
    assert set(header) == {"__metadata__", "offsets", "block_crc32", "records"}
    assert "keys" not in header["__metadata__"]["store"]
    assert store.length(0) == 50
    fill(tmp_path / "new", [0])
    content = json.loads((tmp_path / "new" / "store.json").read_bytes())
    assert (content["version"], content["keys"], content["input_ids"]) == (2, True, True)


def test_a_store_continues_with_its_keys(tmp_path):
    fill(tmp_path, range(4))
    with TeacherStore.append_to(tmp_path) as writer:
        assert len(writer) == 4
        assert "text 2" in writer
        with pytest.raises(ValueError, match="key must be new, got 'text 2', which is stored"):
            writer.append(*numbered(2), key="text 2", input_ids=ids_of(2))
        assert len(writer) == 4
        writer.append(*numbered(4), key="text 4", input_ids=ids_of(4))
        with pytest.raises(ValueError, match="key must be new, got 'text 4'"):
            writer.append(*numbered(4), key="text 4", input_ids=ids_of(4))
    assert TeacherStore(tmp_path).keys() == [f"text {i}" for i in range(5)]
    with pytest.raises(ValueError, match=r"keys is False, but .* was written with True"):
        TeacherStore.create(tmp_path, **SETTINGS, exist_ok=True)


def test_a_failed_write_takes_no_key(tmp_path, monkeypatch):
    with TeacherStore.create(tmp_path, **SETTINGS, keys=True) as writer:
        for i in range(2):
            writer.append(*numbered(i), key=i)
        with monkeypatch.context() as patched:
            patched.setattr(writer, "_save_file", lambda *_: (_ for _ in ()).throw(OSError("full")))
            with pytest.raises(OSError, match="full"):
                writer.append(*numbered(2), key=2)
        assert 2 not in writer
        assert writer.append(*numbered(2), key=2) == 2
    assert TeacherStore(tmp_path).keys() == ["0", "1", "2"]


# Batches


def batch(lengths=(3, 0, 5, 1), seed=0):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(lengths), 5, VOCAB, generator=random)
    ids = torch.randint(VOCAB, (len(lengths), 5), generator=random)
    mask = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
    return fastkd.teacher_topk(logits, K), ids, mask


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, "numpy"])
def test_batches(tmp_path, kind):
    best, ids, mask = batch()
    if kind == "numpy":
        best, ids, mask = fastkd.TopK(*(x.numpy() for x in best)), ids.numpy(), mask.numpy()
    else:
        mask = mask.to(kind)
    settings = {**SETTINGS, "keys": True, "input_ids": True}
    with TeacherStore.create(tmp_path, **settings) as writer:
        found = writer.append_batch(*best, mask=mask, keys=list("abcd"), input_ids=ids)
        assert found == range(4)
        assert writer.append_batch(*best, keys=[1, 2, 3, 4], input_ids=ids) == range(4, 8)
    store = TeacherStore(tmp_path)
    assert [store.length(i) for i in range(8)] == [3, 0, 5, 1, 5, 5, 5, 5]
    for i, key in enumerate("abcd"):
        some = slice(0, store.length(key))
        assert np.array_equal(store[key].indices, best.indices[i][some])
        assert np.array_equal(store.input_ids(key), ids[i][some])


def test_errors_of_batches(tmp_path):
    best, ids, mask = batch()
    with TeacherStore.create(tmp_path, **SETTINGS, keys=True, input_ids=True) as writer:
        for arguments, more, error, message in (
            (
                best,
                {"keys": "abcd", "input_ids": ids},
                TypeError,
                "keys must be a sequence of keys, got str",
            ),
            (best, {"keys": b"abcd"}, TypeError, "keys must be a sequence of keys, got bytes"),
            (
                best,
                {"keys": torch.tensor(4)},
                TypeError,
                "keys must be a sequence of keys, got Tens",
            ),
            (best, {"keys": 4}, TypeError, "keys must be a sequence of keys, got int"),
            (
                best,
                {"mask": mask.float()},
                TypeError,
                "mask must be bool or integers, got torch.fl",
            ),
            (
                best,
                {"mask": mask.numpy() * 1.0},
                TypeError,
                "mask must be bool or integers, got fl",
            ),
            (best, {"keys": ["a"], "input_ids": ids}, ValueError, "keys must be 4 of them, got 1"),
            (
                best,
                {"input_ids": ids[:, :3]},
                ValueError,
                r"input_ids must be \[4, 5\], got \[4, 3",
            ),
            (best, {"mask": mask[:3]}, ValueError, r"mask must be \[4, 5\], got \[3, 5\]"),
            (best, {"mask": [1]}, TypeError, "mask must be a tensor or a numpy array, got list"),
            ((best[0][0], best[1][0]), {}, ValueError, r"log_probs must be \[B, T, k\], got \[5"),
            ((best[0], best[1][:2]), {}, ValueError, r"indices must be \[B, T, k\], got \[2, 5"),
        ):
            with pytest.raises(error, match=f"TeacherStore.append_batch: {message}"):
                writer.append_batch(*arguments, **more)
        assert len(writer) == 0
        message = r"^TeacherStore.append_batch: sequence 2: key must be new, got 'a'"
        with pytest.raises(ValueError, match=message):
            writer.append_batch(*best, keys=list("abac"), input_ids=ids)
        assert len(writer) == 2  # those before it


@pytest.mark.parametrize(
    ("settings", "more", "error", "message"),
    [
        ({}, {"key": "a"}, ValueError, "key must be None: the store was created without keys"),
        ({"keys": True}, {}, TypeError, "key must be a text or an integer, .* got NoneType"),
        ({"keys": True}, {"key": 1.0}, TypeError, "got float"),
        ({"keys": True}, {"key": True}, TypeError, "got bool"),
        ({"keys": True}, {"key": b"a"}, TypeError, "got bytes"),
        ({"keys": True}, {"key": "\ud800"}, ValueError, "key must be valid Unicode"),
        ({}, {"input_ids": ids_of(0)}, ValueError, "input_ids must be None: the store was"),
        ({"input_ids": True}, {}, TypeError, "input_ids must be a tensor or a numpy array, got N"),
        ({"input_ids": True}, {"input_ids": ids_of(0)[1:]}, ValueError, r"\[50\], got \[49\]"),
        ({"input_ids": True}, {"input_ids": ids_of(0) - 2000}, IndexError, r"\[0, 2\^31\), got -"),
        ({"input_ids": True}, {"input_ids": ids_of(0) + 2**31}, IndexError, r"lie in \[0, 2\^31"),
        ({"input_ids": True}, {"input_ids": ids_of(0) / 2}, TypeError, "int32 or int64, got float"),
    ],
)
def test_errors_of_append(tmp_path, settings, more, error, message):
    with TeacherStore.create(tmp_path, **SETTINGS, **settings) as writer:
        with pytest.raises(error, match=f"TeacherStore.append: .*{message}"):
            writer.append(*numbered(0), **more)
        assert len(writer) == 0


def test_flags(tmp_path):
    with pytest.raises(TypeError, match=r"TeacherStore.create: exist_ok must be True or False"):
        TeacherStore.create(tmp_path, **SETTINGS, exist_ok="no")
    with pytest.raises(TypeError, match=r"TeacherStore.verify: progress must be True or False"):
        fill(tmp_path, [0]).verify(progress="no")
    for name in ("keys", "input_ids"):
        with pytest.raises(TypeError, match=f"TeacherStore.create: {name} must be True or False"):
            TeacherStore.create("/nowhere", **SETTINGS, **{name: 1})


# Damage


@pytest.mark.parametrize("name", ["keys", "key_offsets", "records"])
def test_damage_is_found(tmp_path, name):
    fill(tmp_path, range(3))
    shard = tmp_path / "shard-000000.safetensors"
    content = shard.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    first = json.loads(content[8:start])[name]["data_offsets"][0]
    change(shard, start + first + 1)
    store = TeacherStore(tmp_path)
    with pytest.raises(ValueError, match=r"shard-000000.safetensors is damaged: checksum of"):
        store.verify()
    with pytest.raises(ValueError, match="is damaged"):
        TeacherStore(tmp_path).input_ids(0) if name == "records" else store.keys()
    with pytest.raises(ValueError, match=r"cannot continue: .* is damaged"):
        TeacherStore.append_to(tmp_path)


def test_a_shard_of_another_kind(tmp_path):
    """With keys beside one without, in either direction."""
    fill(tmp_path / "keys", range(3))
    fill(tmp_path / "plain", range(3), keys=False, input_ids=False)
    name = "shard-000000.safetensors"
    shards = [(tmp_path / x / name).read_bytes() for x in ("keys", "plain")]
    for folder, content in zip(("plain", "keys"), shards, strict=True):
        (tmp_path / folder / name).write_bytes(content)
        with pytest.raises(ValueError, match="is damaged: "):
            TeacherStore(tmp_path / folder)[0]


# Several writers


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("shard_tokens", [None, 70])
def test_merge(tmp_path, interleave, shard_tokens):
    numbers = [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    paths = [tmp_path / str(rank) for rank in range(3)]
    for path, some in zip(paths, numbers, strict=True):
        fill(path, some)
    merged = TeacherStore.merge(
        tmp_path / "all", paths, interleave=interleave, shard_tokens=shard_tokens
    )
    order = list(range(10)) if interleave else [i for some in numbers for i in some]
    assert merged.keys() == [f"text {i}" for i in order]
    whole = fill(tmp_path / "whole", range(10))
    for i in range(10):
        assert same(merged[f"text {i}"], whole[i])
        assert torch.equal(merged.input_ids(f"text {i}"), whole.input_ids(i))
    merged.verify()
    shards = len(list((tmp_path / "all").glob("shard-*")))
    assert shards == (4 if shard_tokens is None else 5)
    with TeacherStore.append_to(tmp_path / "all") as writer:
        assert len(writer) == 10


def test_merge_of_stores_without_keys(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, some in zip(paths, ([0, 1], [2]), strict=True):
        fill(path, some, keys=False, input_ids=False)
    merged = TeacherStore.merge(tmp_path / "all", paths)
    whole = fill(tmp_path / "whole", range(3), keys=False, input_ids=False)
    assert all(same(merged[i], whole[i]) for i in range(3))
    assert TeacherStore.merge(tmp_path / "one", paths[:1]).num_tokens == 100


def test_errors_of_merge(tmp_path):
    fill(tmp_path / "a", [0, 1])
    fill(tmp_path / "b", [1, 2])
    fill(tmp_path / "other", [1], k=K, fingerprint="x")
    fill(tmp_path / "plain", [1], keys=False)
    paths = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(ValueError, match=r"TeacherStore.merge: key 'text 1' of .*b is in another"):
        TeacherStore.merge(tmp_path / "1", paths)
    first = TeacherStore.merge(tmp_path / "2", paths, duplicates="first")
    assert first.keys() == ["text 0", "text 1", "text 2"]
    with pytest.raises(FileExistsError, match="is a store already; merge into a folder of its own"):
        TeacherStore.merge(tmp_path / "2", paths)
    for some, error, message in (
        ([], ValueError, "sources must be one store or more, got none"),
        (str(tmp_path), TypeError, "sources must be a sequence of paths, got str"),
        ([tmp_path / "a", tmp_path / "c"], FileNotFoundError, "is no teacher store"),
        ([tmp_path / "a", tmp_path / "other"], ValueError, "fingerprint is 'None', but .*other"),
        ([tmp_path / "other", tmp_path / "a"], ValueError, "fingerprint is 'x', but .*a was"),
        ([tmp_path / "a", tmp_path / "plain"], ValueError, "keys is True, but .*plain was"),
    ):
        with pytest.raises(error, match=message):
            TeacherStore.merge(tmp_path / "3", some)
    with pytest.raises(ValueError, match="duplicates must be error or first, got 'last'"):
        TeacherStore.merge(tmp_path / "3", paths, duplicates="last")
    with pytest.raises(TypeError, match=r"TeacherStore.merge: interleave must be True or False"):
        TeacherStore.merge(tmp_path / "3", paths, interleave="no")
    with pytest.raises(TypeError, match=r"TeacherStore.merge: sources must be a path, got int"):
        TeacherStore.merge(tmp_path / "3", [paths[0], 3])
    with pytest.raises(TypeError, match=r"TeacherStore.merge: path must be a path, got NoneType"):
        TeacherStore.merge(None, paths)
    assert not (tmp_path / "3").exists()


def write_slowly(path, started, end):
    with TeacherStore.create(path, **SETTINGS, keys=True) as writer:
        for number in range(5):
            writer.append(*numbered(number), key=number)
        started.set()
        end.wait(60)


def test_a_store_that_is_still_written_is_not_merged(tmp_path):
    """By this process or another: it has sequences that are not stored yet."""
    context = multiprocessing.get_context("fork")
    started, end = context.Event(), context.Event()
    process = context.Process(target=write_slowly, args=(tmp_path / "a", started, end))
    process.start()
    assert started.wait(60)
    fill(tmp_path / "b", [8, 9], input_ids=False)
    paths = [tmp_path / "b", tmp_path / "a"]
    message = r"TeacherStore.merge: .*[ab] has a writer, whose last sequences are not stored"
    with pytest.raises(RuntimeError, match=message):
        TeacherStore.merge(tmp_path / "all", paths)
    assert not (tmp_path / "all").exists()
    end.set()
    process.join(60)
    assert process.exitcode == 0
    writer = TeacherStore.append_to(tmp_path / "b")
    writer.append(*numbered(7), key="late")
    with pytest.raises(RuntimeError, match=message):
        TeacherStore.merge(tmp_path / "all", paths)
    writer.close()
    merged = TeacherStore.merge(tmp_path / "all", paths)
    assert merged.keys() == ["text 8", "text 9", "late", *map(str, range(5))]
    TeacherStore.append_to(tmp_path / "a").close()  # the lock is released


def test_no_writer_begins_while_a_store_is_merged(tmp_path, monkeypatch):
    fill(tmp_path / "a", [0, 1])
    read = Shard.read

    def and_append(shard, *where):
        with pytest.raises(
            RuntimeError, match=r"another writer, or TeacherStore.merge, is at work"
        ):
            TeacherStore.append_to(tmp_path / "a")
        return read(shard, *where)

    with monkeypatch.context() as patched:
        patched.setattr(Shard, "read", and_append)
        TeacherStore.merge(tmp_path / "all", [tmp_path / "a"])
    (tmp_path / "a" / "writer.lock").unlink()  # as in a copy that leaves it out
    assert len(TeacherStore.merge(tmp_path / "again", [tmp_path / "a"])) == 2


class Texts(Dataset):
    def __len__(self):
        return 11

    def __getitem__(self, i):
        return i


def one_rank(rank, ranks, folder):
    sampler = DistributedSampler(Texts(), ranks, rank, shuffle=False)
    numbers = [int(i) for some in DataLoader(Texts(), batch_size=2, sampler=sampler) for i in some]
    fill(folder / str(rank), dict.fromkeys(numbers))  # a sampler may repeat the first


def test_processes_of_a_distributed_sampler(tmp_path):
    """Their last batch is filled up with the first texts, which are stored once."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=one_rank, args=(rank, 2, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    paths = [tmp_path / "0", tmp_path / "1"]
    store = TeacherStore.merge(tmp_path / "all", paths, interleave=True, duplicates="first")
    assert store.keys() == [f"text {i}" for i in range(11)]


# Resuming


def test_resuming_from_a_position(tmp_path):
    """A run that dies between batches goes on where it was, in a DataLoader over the rest."""
    data, settings = Texts(), {**SETTINGS, "keys": True}
    for stop in (4, 9, 99):
        try:
            with TeacherStore.create(tmp_path, **settings, exist_ok=True) as writer:
                rest = Subset(data, range(len(writer), len(data)))
                for some in DataLoader(rest, batch_size=3):
                    for number in some.tolist():
                        if number == stop:
                            raise InterruptedError
                        assert number not in writer
                        writer.append(*numbered(number), key=number)
        except InterruptedError:
            pass
    store = TeacherStore(tmp_path)
    assert store.keys() == [str(i) for i in range(11)]
    plain = write(tmp_path / "plain", [numbered(i) for i in range(11)], VOCAB, K)
    assert all(same(store[i], plain[i]) for i in range(11))
