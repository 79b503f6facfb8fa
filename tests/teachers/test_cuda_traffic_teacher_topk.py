"""What teacher_topk's CUDA kernel moves, counted by the emulator: one read of the logits."""

import emulator
import pytest
import torch
from cases import logits

import fastkd

pytestmark = pytest.mark.skipif(not emulator.is_built(), reason="run through `make test`")

QWEN = 151_936
WIDE = [torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    emulator.configure(90)
    monkeypatch.setattr(torch.ops, "fastkd", torch.ops.fastkd_simt)


def moved(teacher, k):
    """Traffic of one call, and the size of the logits."""
    found = emulator.traffic_of(lambda: fastkd.teacher_topk(teacher, k))
    assert found.launches == 1
    assert found.written == 8 * k * (teacher.numel() // teacher.size(-1))
    return found, teacher.numel() * teacher.element_size()


@pytest.mark.parametrize("dtype", WIDE)
def test_cluster_reads_once(dtype):
    found, tensor = moved(logits((2, QWEN), dtype), 64)
    assert found.largest_cluster > 1
    assert found.moved <= 1.02 * tensor
    assert found.share_of_16 >= 0.99


@pytest.mark.parametrize("vocab", [32_000, 49_152, 128_256, QWEN, 262_144])
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("capability", [90, 100])
def test_real_vocabularies_stay_on_chip(capability, dtype, vocab):
    emulator.configure(capability)
    found, tensor = moved(logits((1, vocab), dtype), 1024)
    assert found.read <= 1.01 * tensor


@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("vocab", [1000, 4096, 10_000])
def test_rows_that_fit_into_one_block_are_read_once_everywhere(capability, vocab):
    emulator.configure(capability)
    found, tensor = moved(logits((3, vocab), torch.bfloat16), 50)
    assert found.read <= 1.01 * tensor


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("k", [64, 1024])
def test_a_row_that_does_not_stay_on_chip_is_read_twice(dtype, k):
    emulator.configure(80)
    found, tensor = moved(logits((2, QWEN), dtype), k)
    assert found.largest_cluster == 1
    assert found.read <= 2.01 * tensor
    assert found.read_16 >= 0.99 * found.read


def test_many_equals_take_a_read_for_each_digit():
    """Three of the logits' 32 bits, two of 18 bits of columns; and those to sum and to collect."""
    emulator.configure(80)
    found, tensor = moved(torch.ones(1, QWEN), 64)
    assert found.read <= 6.01 * tensor


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("vocab", [300, 5000, QWEN])
def test_any_order_of_threads_gives_the_same_bits(capability, vocab):
    teacher = logits((3, vocab)).bfloat16()
    found = []
    for seed in (0, 1, 2):
        emulator.configure(capability, seed)
        found.append(fastkd.teacher_topk(teacher, 100))
    for other in found[1:]:
        assert torch.equal(other.log_probs, found[0].log_probs)
        assert torch.equal(other.indices, found[0].indices)
