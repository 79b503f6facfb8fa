"""What topk_divergence's CUDA kernel moves: one read of the student's logits, one write."""

import emulator
import pytest
import torch
from cases import logits, top_k

import fastkd

pytestmark = pytest.mark.skipif(not emulator.is_built(), reason="run through `make test`")

QWEN, K = 151_936, 64


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    emulator.configure(90)
    fastkd.release_memory()
    monkeypatch.setattr(torch.ops, "fastkd", torch.ops.fastkd_simt)


def moved(student, **options):
    """Traffic of one call, and the size of one logits tensor."""
    log_probs, indices = top_k(tuple(student.shape), K)
    found = emulator.traffic_of(
        lambda: fastkd.topk_divergence(student, log_probs, indices, **options)
    )
    return found, student.numel() * student.element_size()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tail", ["lump", "uniform", "renormalize", "drop"])
def test_one_read_and_one_write(dtype, tail):
    student = logits((2, QWEN), dtype)
    found, tensor = moved(student, tail=tail)
    assert found.largest_cluster > 1
    assert found.moved <= 1.02 * tensor
    found, tensor = moved(student.requires_grad_(), tail=tail)
    assert found.moved <= 1.02 * 2 * tensor
    assert found.share_of_16 >= 0.98  # the entries of the support are gathered one by one


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_clusters_the_row_is_read_again(dtype):
    emulator.configure(80)
    student = logits((2, QWEN), dtype).requires_grad_()
    found, tensor = moved(student)
    assert found.moved <= 1.02 * 3 * tensor
    alone, _ = moved(student.detach())
    assert alone.moved <= 1.02 * tensor


def test_masked_rows_are_not_read():
    student = logits((4, QWEN)).requires_grad_()
    found, tensor = moved(student, mask=torch.tensor([True, False, False, False]))
    assert found.read <= 1.02 * tensor / 4


@pytest.mark.parametrize("k", [1, 1024])
def test_any_number_of_entries(k):
    student = logits((2, QWEN)).requires_grad_()
    log_probs, indices = top_k((2, QWEN), k)
    loss = fastkd.topk_divergence(student, log_probs, indices, reduction="none")
    exact = fastkd.reference.topk_divergence(
        student.double(), log_probs.double(), indices, reduction="none"
    )
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="at most 1024 entries a row on CUDA, got 1025"):
        fastkd.topk_divergence(student, *top_k((2, QWEN), 1025))
