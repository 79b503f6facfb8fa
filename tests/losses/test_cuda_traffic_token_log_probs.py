"""What token_log_probs moves on CUDA, counted by the emulator, and what only CUDA does.

Forward: one read of the rows kept. Backward: one read of the rows that a gradient flows into, and
one write.
"""

import math

import emulator
import pytest
import torch
from cases import logits

import fastkd

pytestmark = pytest.mark.skipif(not emulator.is_built(), reason="run through `make test`")

QWEN = 151_936
WIDE = [torch.bfloat16, torch.float32]
ENTROPY = pytest.mark.parametrize("entropy", [False, True])


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    emulator.configure(90)
    fastkd.release_memory()
    monkeypatch.setattr(torch.ops, "fastkd", torch.ops.fastkd_simt)


def run(scores, ids, **options):
    found = fastkd.token_log_probs(scores, ids, **options)
    return found.log_probs.sum() + found.entropy.sum() if options["entropy"] else found.sum()


@ENTROPY
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("vocab", [50_257, QWEN])  # 50,257: each row begins elsewhere in a line
@pytest.mark.parametrize("capability", [80, 90])
def test_read_once_then_read_and_written_once(capability, vocab, dtype, entropy):
    emulator.configure(capability)
    scores, ids = logits((3, vocab), dtype).requires_grad_(), torch.tensor([0, vocab - 1, 777])
    size, out = scores.numel() * scores.element_size(), []
    forward = emulator.traffic_of(lambda: out.append(run(scores, ids, entropy=entropy)))
    backward = emulator.traffic_of(out[0].backward)
    for found, passes in ((forward, 1), (backward, 2)):
        assert found.launches == 1
        assert found.moved <= 1.02 * passes * size
        assert found.share_of_16 >= 0.99
        assert found.largest_shared_memory < 8192 + emulator.UNDER_WAY
        assert (found.largest_cluster > 1) == (capability == 90 and size > 3 * 200_000)


@ENTROPY
def test_rows_out_are_neither_read_nor_differentiated(entropy):
    scores = logits((5, QWEN)).requires_grad_()
    ids, mask = torch.tensor([1, -100, 3, 4, 5]), torch.tensor([True, True, False, True, True])
    size, out = scores.size(-1) * 4, []

    def call():
        out.append(fastkd.token_log_probs(scores, ids, mask=mask, entropy=entropy))

    assert emulator.traffic_of(call).moved <= 1.02 * 3 * size
    log_probs = out[0].log_probs if entropy else out[0]
    backward = emulator.traffic_of(log_probs[3].backward)
    assert backward.read <= 1.02 * size
    assert backward.written <= 1.02 * 5 * size
    assert scores.grad.any(-1).tolist() == [False, False, False, True, False]


@ENTROPY
@pytest.mark.parametrize("vocab", [300, 5000, QWEN])
def test_any_order_of_threads_gives_the_same_bits(vocab, entropy):
    scores, ids, found = logits((2, vocab)), torch.tensor([5, 299]), []
    for seed in (0, 1, 2):
        emulator.configure(90, seed)
        leaf = scores.clone().requires_grad_()
        loss = run(leaf, ids, entropy=entropy)
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@ENTROPY
@pytest.mark.parametrize("dtype", WIDE)
def test_without_clusters_the_same(dtype, entropy):
    scores, ids = logits((2, QWEN), dtype), torch.tensor([5, 299])
    found = []
    for clusters in (True, False):
        emulator.configure(90, clusters=clusters)
        leaf = scores.clone().requires_grad_()
        run(leaf, ids, entropy=entropy).backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("token", [40, -1, 2**40, -(2**40)])
def test_a_token_that_no_check_could_see_makes_its_row_nan(token):
    scores, ids = logits((3, 40)).requires_grad_(), torch.tensor([7, token, 9])
    found = fastkd.token_log_probs(scores, ids, entropy=True)
    assert found.log_probs.isnan().tolist() == [False, True, False]
    assert found.entropy.isfinite().all()
    (found.log_probs.sum() + found.entropy.sum()).backward()
    assert scores.grad.isnan().all(-1).tolist() == [False, True, False]
    assert scores.grad[[0, 2]].isfinite().all()


def test_a_temperature_that_is_not_positive_makes_its_row_nan():
    scores, ids = logits((4, 5000)).requires_grad_(), torch.tensor([7, 8, 9, 1])
    temperature = torch.tensor([1.0, 0.0, -1.0, math.nan])
    found = fastkd.token_log_probs(scores, ids, entropy=True, temperature=temperature)
    alone = fastkd.token_log_probs(scores, ids, temperature=temperature)
    for x in (*found, alone):
        assert x.isnan().tolist() == [False, True, True, True]
    alone.sum().backward()
    assert scores.grad.isnan().all(-1).tolist() == [False, True, True, True]


def test_float64_is_for_the_cpu():
    with pytest.raises(TypeError, match="token_log_probs: float64 logits are supported on the CPU"):
        fastkd.token_log_probs(logits((3, 20), torch.float64), torch.tensor([1, 2, 3]))
