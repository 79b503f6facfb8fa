"""fastkd.TeacherStore: killed writers, damaged files, several processes."""

import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from stores import (
    aligned,
    change,
    kl,
    numbered,
    real_looking,
    records_at,
    same,
    write,
)

from fastkd.teachers._store import TeacherStore
from fastkd.teachers._teacher_topk import TopK

pytest.importorskip("safetensors", reason='TeacherStore needs safetensors: "fastkd[store]"')


ENDLESS = """
import sys
sys.path.insert(0, sys.argv[2])
from stores import TeacherStore, numbered
options = dict(vocab_size=1000, k=4, shard_tokens=120, exist_ok=True)
with TeacherStore.create(sys.argv[1], **options) as writer:
    print(len(writer), flush=True)
    while True:
        writer.append(*numbered(len(writer)))
"""


def start_endless(path):
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(path), str(Path(__file__).parents[1])],
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, int(process.stdout.readline())


def test_killed_writer(tmp_path):
    """SIGKILL at any time: finished shards are there, whole, and the next writer goes on."""
    written = 0
    for round_ in range(3):
        (tmp_path / "shard-000099.safetensors.tmp").write_bytes(b"left over")
        process, begun_at = start_endless(tmp_path)
        assert begun_at == written
        try:
            deadline = time.monotonic() + 60
            while len(list(tmp_path.glob("shard-*.safetensors"))) < 40 * (round_ + 1):
                assert time.monotonic() < deadline
                time.sleep(0.003 * round_)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not (tmp_path / "shard-000099.safetensors.tmp").exists()
        store = TeacherStore(tmp_path)
        shards = len(list(tmp_path.glob("shard-*.safetensors")))
        assert len(store) == 3 * shards > written
        store.verify()
        written = len(store)
    with TeacherStore.append_to(tmp_path, vocab_size=1000) as writer:
        assert not list(tmp_path.glob("*.tmp"))
        assert writer.append(*numbered(written)) == written
    store = TeacherStore(tmp_path)
    assert len(store) == written + 1
    for i in (0, 1, written // 2, written - 1, written):
        exact, indices = numbered(i)
        assert kl(exact, aligned(store[i], indices)).max() < 1e-4


def test_killed_between_shard_and_index(tmp_path):
    with TeacherStore.create(tmp_path, vocab_size=1000, k=4) as writer:
        writer.append(*numbered(0))
        writer.flush()
        before = (tmp_path / "store.json").read_bytes()
        writer.append(*numbered(1))
    (tmp_path / "store.json").write_bytes(before)
    store = TeacherStore(tmp_path)
    assert len(store) == 2
    assert torch.equal(store[1].indices.sum(1), torch.from_numpy(numbered(1)[1]).sum(1))
    with TeacherStore.append_to(tmp_path) as writer:
        assert writer.append(*numbered(2)) == 2
    assert len(TeacherStore(tmp_path)) == 3
    assert len(json.loads((tmp_path / "store.json").read_text())["shards"]) == 3


def test_killed_before_the_index_exists(tmp_path):
    (tmp_path / "writer.lock").touch()
    (tmp_path / "store.json.tmp").write_text("{")
    with TeacherStore.create(tmp_path, vocab_size=1000, k=4) as writer:
        writer.append(*numbered(0))
    assert len(TeacherStore(tmp_path)) == 1


def test_a_failed_write_leaves_the_store_as_it_was(tmp_path, monkeypatch):
    writer = TeacherStore.create(tmp_path, vocab_size=1000, k=4, shard_tokens=100)
    assert writer.append(*numbered(0)) == 0

    def replace(self, target):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", replace)
        with pytest.raises(OSError, match="disk full"):
            writer.append(*numbered(1))
    assert len(writer) == 1
    assert len(TeacherStore(tmp_path)) == 0
    assert writer.append(*numbered(1)) == 1
    writer.close()
    assert len(TeacherStore(tmp_path)) == 2


def test_an_exception_in_the_block_keeps_what_was_appended(tmp_path):
    def fail():
        with TeacherStore.create(tmp_path, vocab_size=1000, k=4) as writer:
            writer.append(*numbered(0))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert len(TeacherStore(tmp_path)) == 1
    TeacherStore.append_to(tmp_path).close()


def test_bad_sequences_are_not_stored(tmp_path):
    with TeacherStore.create(tmp_path, vocab_size=1000, k=4) as writer:
        writer.append(*numbered(0))
        log_probs, indices = numbered(1)
        indices[-1, -1] = 1000
        with pytest.raises(IndexError):
            writer.append(log_probs, indices)
        assert len(writer) == 1
        assert writer.append(*numbered(2)) == 1
    store = TeacherStore(tmp_path)
    assert (len(store), store.num_tokens) == (2, 100)


def test_shards_hold_whole_sequences_up_to_their_limit(tmp_path):
    sequences = [
        real_looking(np.random.default_rng(i), n, 2, 50) for i, n in enumerate((3, 3, 9, 30, 1))
    ]
    write(tmp_path, sequences, 50, 2, shard_tokens=10)
    shards = json.loads((tmp_path / "store.json").read_text())["shards"]
    assert shards == [[3, 15], [1, 30], [1, 1]]


# Two writers


def test_one_writer_at_a_time(tmp_path):
    writer = TeacherStore.create(tmp_path, vocab_size=1000, k=4)
    busy = f"another writer, or TeacherStore.merge, is at work in {re.escape(str(tmp_path))}"
    with pytest.raises(RuntimeError, match="TeacherStore.append_to: " + busy):
        TeacherStore.append_to(tmp_path)
    with pytest.raises(RuntimeError, match="TeacherStore.create: " + busy):
        TeacherStore.create(tmp_path, vocab_size=1000, k=4, exist_ok=True)
    writer.append(*numbered(0))
    writer.close()
    writer.close()
    with TeacherStore.append_to(tmp_path) as writer:
        assert len(writer) == 1


def test_one_writer_at_a_time_among_processes(tmp_path):
    process, _ = start_endless(tmp_path)
    try:
        with pytest.raises(RuntimeError, match="another writer"):
            TeacherStore.append_to(tmp_path)
    finally:
        process.kill()
        process.wait()
    TeacherStore.append_to(tmp_path).close()


def test_writer_does_not_survive_a_fork_or_close(tmp_path):
    writer = TeacherStore.create(tmp_path, vocab_size=1000, k=4)
    child = os.fork()
    if child == 0:
        try:
            writer.append(*numbered(0))
        except RuntimeError as error:
            os._exit(0 if f"belongs to process {os.getppid()}" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    sleeper = os.fork()  # has the lock's descriptor too
    if sleeper == 0:
        time.sleep(60)
        os._exit(0)
    try:
        writer.append(*numbered(0))
        writer.close()
        TeacherStore.append_to(tmp_path).close()
    finally:
        os.kill(sleeper, signal.SIGKILL)
        os.waitpid(sleeper, 0)
    with pytest.raises(ValueError, match=r"TeacherStore\.append: the writer is closed"):
        writer.append(*numbered(1))
    with pytest.raises(ValueError, match=r"TeacherStore\.flush: the writer is closed"):
        writer.flush()


# Damage


def test_damaged_tokens(three_shards):
    intact = list(TeacherStore(three_shards))
    store = TeacherStore(three_shards)
    shard = three_shards / "shard-000001.safetensors"
    change(shard, records_at(shard) + 130 * store._packing.record_bytes + 3)
    message = (
        rf"^teacher_store: {re.escape(str(shard))} is damaged: checksum of tokens 128\.\.191 is "
        r"[0-9a-f]{8}, not [0-9a-f]{8}$"
    )
    for sequence in (2, 3):
        with pytest.raises(ValueError, match=message):
            store[sequence]
    with pytest.raises(ValueError, match=message):
        store.verify()
    for sequence in (0, 1, 4, 5):
        assert same(store[sequence], intact[sequence])
    # Also in the same shard.
    assert torch.equal(store.read(2, 0, 128).indices, intact[2].indices[:128])
    assert torch.equal(store.read(3, 42, 150).indices, intact[3].indices[42:])


def test_damage_in_the_last_block(three_shards):
    shard = three_shards / "shard-000002.safetensors"
    change(shard, shard.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"checksum of tokens 256\.\.299 is"):
        TeacherStore(three_shards).read(5, 149)


def test_no_byte_changes_unseen(tmp_path):
    with TeacherStore.create(tmp_path, vocab_size=1000, k=4) as writer:
        writer.append(*numbered(0, 70))
    store = TeacherStore(tmp_path)
    shard = tmp_path / "shard-000000.safetensors"
    content = shard.read_bytes()
    for place in range(len(content)):
        shard.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"shard-000000.safetensors is damaged: "):
            store.verify()
    shard.write_bytes(content)
    store.verify()
    index = tmp_path / "store.json"
    content = index.read_bytes()
    for place in range(len(content) - 1):  # the line's end says nothing
        index.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"store.json (is damaged|must have format)"):
            TeacherStore(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 100, 700, -1])
def test_truncated(three_shards, size):
    intact = list(TeacherStore(three_shards))
    open_before = TeacherStore(three_shards)
    open_before.read(2, 0, 1)
    shard = three_shards / "shard-000001.safetensors"
    os.truncate(shard, size if size >= 0 else shard.stat().st_size + size)
    message = rf"teacher_store: {re.escape(str(shard))} is damaged: "
    store = TeacherStore(three_shards)
    for broken in (lambda: store[2], store.verify, lambda: open_before[3]):
        with pytest.raises(ValueError, match=message):
            broken()
    for reader in (store, open_before):
        assert same(reader[1], intact[1])
        assert same(reader[5], intact[5])


def test_longer_than_written(three_shards):
    shard = three_shards / "shard-000001.safetensors"
    shard.write_bytes(shard.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"damaged: size in bytes: found \d+, expected \d+"):
        TeacherStore(three_shards)[2]


def test_missing_and_exchanged_shards(three_shards):
    first, second, third = sorted(three_shards.glob("shard-*"))
    second.rename(three_shards / "elsewhere")
    shutil.copy(third, first)
    store = TeacherStore(three_shards)
    with pytest.raises(ValueError, match=r"shard-000001.safetensors is missing"):
        store[2]
    with pytest.raises(
        ValueError, match=r"shard-000000.safetensors .*: shard: found 2, expected 0"
    ):
        store[0]
    assert store[5].indices.shape == (150, 4)
    with pytest.raises(ValueError) as caught:
        store.verify()
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "shard-000000" in lines[0]
    assert "shard-000001" in lines[1]


def test_shard_of_another_store(three_shards, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    with TeacherStore.create(other, vocab_size=999, k=4) as writer:
        writer.append(*numbered(0, 300, vocab=999))
    shutil.copy(other / "shard-000000.safetensors", three_shards)
    with pytest.raises(ValueError, match=r'store: found .*"vocab_size": 999.*expected .*1000'):
        TeacherStore(three_shards)[0]


def test_damaged_shard_that_is_not_listed(three_shards):
    """Its sequences' numbers are unknown: reading ends before it, and no writer goes on."""
    with TeacherStore.append_to(three_shards) as writer:
        before = (three_shards / "store.json").read_bytes()
        writer.append(*numbered(6, 150))
    (three_shards / "store.json").write_bytes(before)
    change(three_shards / "shard-000003.safetensors", 20)
    with pytest.warns(UserWarning, match=r"shard-000003.safetensors is damaged.*ends before it"):
        store = TeacherStore(three_shards)
    assert len(store) == 6
    assert len(store[5].indices) == 150
    with pytest.raises(ValueError, match=r"shard-000003.safetensors is damaged"):
        store.verify()
    with pytest.raises(ValueError, match=r"append_to: cannot continue: .*shard-000003"):
        TeacherStore.append_to(three_shards)


def test_shards_are_plain_safetensors(three_shards):
    from safetensors.numpy import load_file

    tensors = load_file(three_shards / "shard-000000.safetensors")
    assert sorted(tensors) == ["block_crc32", "offsets", "records"]
    assert tensors["offsets"].tolist() == [0, 150, 300]
    assert tensors["records"].dtype == np.uint8


@pytest.mark.parametrize("with_rich", [True, False])
def test_verify_shows_progress(three_shards, monkeypatch, capsys, with_rich):
    if with_rich:
        pytest.importorskip("rich", reason="the progress bar needs rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    TeacherStore(three_shards).verify(progress=True)
    assert ("TeacherStore.verify" in capsys.readouterr().out) == with_rich


# Processes


def test_pickled(three_shards):
    store = TeacherStore(three_shards, vocab_size=1000)
    store[2]
    copy = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 3000
    assert (len(copy), copy.vocab_size, copy.k) == (6, 1000, 4)
    assert all(same(a, b) for a, b in zip(store, copy, strict=True))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader(three_shards, method):
    store = TeacherStore(three_shards)
    expected = list(store)  # with files open here
    loader = torch.utils.data.DataLoader(
        store,
        batch_size=None,
        num_workers=2,
        multiprocessing_context=multiprocessing.get_context(method),
    )
    found = list(loader)
    assert len(found) == 6
    assert all(isinstance(x, TopK) for x in found)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    batches = torch.utils.data.DataLoader(store, batch_size=3)  # equally long ones
    assert [tuple(batch.indices.shape) for batch in batches] == [(3, 150, 4)] * 2


def test_a_reader_keeps_what_it_opened(three_shards):
    store = TeacherStore(three_shards)
    with TeacherStore.append_to(three_shards) as writer:
        writer.append(*numbered(6))
    assert len(store) == 6
    assert len(TeacherStore(three_shards)) == 7


# Settings
