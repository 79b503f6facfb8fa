"""What cross_entropy moves on CUDA, counted by the emulator, and what only CUDA does.

One read and one write where rows stay in shared memory, else one more read; one read alone without
a gradient.
"""

import emulator
import pytest
import torch
from cases import logits

import fastkd

pytestmark = pytest.mark.skipif(not emulator.is_built(), reason="run through `make test`")

QWEN = 151_936
WIDE = [torch.bfloat16, torch.float32]
TERMS = (
    {},
    {"entropy_weight": 0.5, "entropy_mask": "correct"},
    {"entropy_weight": 0.5, "entropy_temperature": 2.0, "label_smoothing": 0.1},
)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    emulator.configure(90)
    fastkd.release_memory()
    monkeypatch.setattr(torch.ops, "fastkd", torch.ops.fastkd_simt)


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("vocab", [50_257, QWEN])  # 50,257: each row begins elsewhere in a line
@pytest.mark.parametrize("capability", [80, 90])
def test_one_read_and_one_write(capability, vocab, dtype, terms):
    emulator.configure(capability)
    scores, labels = logits((3, vocab), dtype).requires_grad_(), torch.tensor([0, vocab - 1, 777])
    size = scores.numel() * scores.element_size()
    found = emulator.traffic_of(lambda: fastkd.cross_entropy(scores, labels, **terms))
    fits = capability == 90 or size <= 3 * 160_000
    assert found.moved <= 1.02 * (2 if fits else 3) * size
    assert found.share_of_16 >= 0.99
    with torch.no_grad():
        found = emulator.traffic_of(lambda: fastkd.cross_entropy(scores, labels, **terms))
    assert found.moved <= 1.02 * size
    assert found.share_of_16 >= 0.99


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("vocab", [300, 5000, QWEN])
def test_any_order_of_threads_gives_the_same_bits(vocab, terms):
    scores, labels, found = logits((2, vocab)), torch.tensor([5, 299]), []
    for seed in (0, 1, 2):
        emulator.configure(90, seed)
        leaf = scores.clone().requires_grad_()
        loss = fastkd.cross_entropy(leaf, labels, **terms)
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("dtype", WIDE)
def test_without_clusters_the_same(dtype, terms):
    scores, labels = logits((2, QWEN), dtype), torch.tensor([5, 299])
    found = []
    for clusters in (True, False):
        emulator.configure(90, clusters=clusters)
        leaf = scores.clone().requires_grad_()
        fastkd.cross_entropy(leaf, labels, **terms).backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("label", [40, -1, 2**40])
def test_a_label_that_no_check_could_see_makes_its_row_nan(label):
    scores, labels = logits((3, 40)).requires_grad_(), torch.tensor([7, label, 9])
    loss = fastkd.cross_entropy(scores, labels, reduction="none", **TERMS[2])
    assert loss.isnan().tolist() == [False, True, False]
    loss.sum().backward()
    assert scores.grad.isnan().all(-1).tolist() == [False, True, False]
    assert scores.grad[[0, 2]].isfinite().all()


def test_float64_is_for_the_cpu():
    with pytest.raises(TypeError, match="cross_entropy: float64 logits are supported on the CPU"):
        fastkd.cross_entropy(logits((3, 20), torch.float64), torch.tensor([1, 2, 3]))
