"""What clipped_divergence moves on CUDA, and what a row becomes that no check could see."""

import math

import emulator
import pytest
import torch
from cases import logits

import fastkd

pytestmark = pytest.mark.skipif(not emulator.is_built(), reason="run through `make test`")

QWEN = 151_936
WIDE = [torch.bfloat16, torch.float32]
EDGES = {
    "hard": (1e-5, 0.5, {}),
    "soft": (1e-5, 0.5, {"softness": 1e-3}),
    "quantile": (0.2, 0.9, {"quantile": True}),
    "soft-quantile": (0.2, 0.9, {"quantile": True, "softness": 1e-3}),
}


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    emulator.configure(90)
    fastkd.release_memory()
    monkeypatch.setattr(torch.ops, "fastkd", torch.ops.fastkd_simt)


def moved(student, teacher, lower, upper, **options):
    """Traffic of one call, and the size of one logits tensor."""
    options = {"reduction": "batchmean", "tail": "lump"} | options
    found = emulator.traffic_of(
        lambda: fastkd.clipped_divergence(student, teacher, lower, upper, **options)
    )
    return found, student.numel() * student.element_size()


def gradients_of(inputs, **options):
    """Losses and all gradients that there are."""
    soft = "softness" in options
    inputs = [x.clone().requires_grad_(soft or i < 2) for i, x in enumerate(inputs)]
    loss = fastkd.clipped_divergence(*inputs, reduction="none", **options)
    wanted = inputs if soft else inputs[:2]
    return loss.detach(), torch.autograd.grad(loss.sum(), wanted)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("edges", EDGES)
def test_cluster_reads_each_input_once_and_writes_once(edges, dtype):
    lower, upper, options = EDGES[edges]
    student = logits((2, QWEN), dtype).requires_grad_()
    found, tensor = moved(student, logits((2, QWEN), dtype), lower, upper, **options)
    assert found.largest_cluster > 1
    assert found.moved <= 1.02 * 3 * tensor
    assert found.share_of_16 >= 0.99
    alone, _ = moved(student.detach(), logits((2, QWEN), dtype), lower, upper, **options)
    assert alone.moved <= 1.02 * 2 * tensor
    assert alone.share_of_16 >= 0.99


def test_all_gradients():
    lower, upper, options = EDGES["soft-quantile"]
    bounds = [torch.full((2,), x, requires_grad=True) for x in (lower, upper)]
    student, teacher = logits((2, QWEN)).requires_grad_(), logits((2, QWEN)).requires_grad_()
    found, tensor = moved(student, teacher, *bounds, **options)
    assert found.moved <= 1.02 * 4 * tensor


@pytest.mark.parametrize(
    ("edges", "dtype", "reads"),
    [
        ("hard", torch.bfloat16, 6),
        ("soft", torch.float32, 6),
        ("quantile", torch.bfloat16, 8),
        ("quantile", torch.float16, 9),
        ("quantile", torch.float32, 10),
    ],
)
def test_without_clusters_rows_are_read_again(edges, dtype, reads):
    """Three passes; a quantile takes one more over the teacher for each 8 bits of a logit."""
    emulator.configure(80)
    lower, upper, options = EDGES[edges]
    student = logits((2, QWEN), dtype).requires_grad_()
    found, tensor = moved(student, logits((2, QWEN), dtype), lower, upper, **options)
    assert found.largest_cluster == 1
    assert found.moved <= 1.02 * (reads + 1) * tensor
    assert found.share_of_16 >= 0.99


@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("vocab", [1000, 4096, 10_000])
def test_rows_that_fit_into_one_block_are_read_once_everywhere(capability, vocab):
    emulator.configure(capability)
    lower, upper, options = EDGES["quantile"]
    student = logits((3, vocab), torch.bfloat16).requires_grad_()
    teacher = logits((3, vocab), torch.bfloat16)
    found, tensor = moved(student, teacher, lower, upper, **options)
    assert found.moved <= 1.02 * 3 * tensor


@pytest.mark.parametrize("edges", EDGES)
def test_masked_rows_are_not_read(edges):
    lower, upper, options = EDGES[edges]
    student = logits((4, QWEN)).requires_grad_()
    mask = torch.tensor([True, False, False, False])
    found, tensor = moved(student, logits((4, QWEN)), lower, upper, mask=mask, **options)
    assert found.read <= 1.02 * 2 * tensor / 4
    assert found.written <= 1.02 * tensor


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("vocab", [300, 5000, QWEN])
def test_any_order_of_threads_gives_the_same_bits(capability, vocab):
    lower, upper, options = EDGES["soft-quantile"]
    inputs = (
        logits((3, vocab)),
        logits((3, vocab)),
        torch.full((3,), lower),
        torch.full((3,), upper),
    )
    found = []
    for seed in (0, 1, 2):
        emulator.configure(capability, seed)
        loss, gradients = gradients_of(inputs, **options)
        found.append((loss, *gradients))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 2, 70, 3001, 40_000])
def test_quantiles_of_any_logits(vocab, dtype, capability):
    """Ties, zeros of both signs, tiny and large logits, -inf: those between the levels alone."""
    emulator.configure(capability)
    few = torch.tensor([-math.inf, -2.5, -0.0, 0.0, 3.0]).to(dtype)
    teacher = torch.stack(
        [
            torch.full((vocab,), 1.5, dtype=dtype),
            few[torch.randint(0, 5, (vocab,))],
            logits((vocab,), dtype, 6e-6),
            -logits((vocab,), dtype, 100.0).abs(),
            logits((vocab,), dtype).sort().values,
        ]
    )
    teacher[:, 0] = 1.0
    student = torch.zeros_like(teacher)
    for levels in ((0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (0.9, 1.0), (0.0, 1e-3)):
        bounds = [torch.full((5,), x) for x in levels]
        options = {"quantile": True, "tail": "lump", "vocab_size": vocab}
        loss, _ = gradients_of((student, teacher, *bounds), **options)
        right = fastkd.reference.clipped_divergence(
            student.double(), teacher.double(), *bounds, reduction="none", **options
        )
        torch.testing.assert_close(loss.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantile", [False, True])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("vocab", [100, 3000, 40_000])
def test_numbers_no_check_could_see_become_nan(vocab, capability, quantile):
    """NaN for that row and all its gradients, without a read out of bounds."""
    emulator.configure(capability)
    nan, bad = math.nan, (-0.1, 1.5) if quantile else (0.5, 0.2)
    lower = torch.tensor([0.1, 0.3, nan, 0.1, bad[0], 0.1, 0.1, 0.1])
    upper = torch.tensor([0.9, 0.2, 0.9, nan, bad[1], 0.9, 0.9, 0.9])
    labels = torch.tensor([1, 1, 1, 1, 1, vocab, -7, 1])
    temperature = torch.tensor([1.0] * 7 + [0.0])
    inputs = (logits((8, vocab)), logits((8, vocab)), lower, upper)
    for options in ({}, {"softness": 0.01, "renormalize": "both"}, {"label_weight": 0.5}):
        for temperatures in (
            {"temperature": temperature, "teacher_temperature": 2.0},
            {"temperature": 1.5, "teacher_temperature": temperature},
        ):
            loss, gradients = gradients_of(
                inputs, labels=labels, quantile=quantile, **temperatures, **options
            )
            assert loss.isnan().tolist() == [False] + [True] * 7
            for gradient in gradients:
                assert not gradient[0].isnan().any()
                assert gradient[1:].isnan().all()


@pytest.mark.parametrize("quantile", [False, True])
def test_rows_of_any_logits_stay_in_bounds(quantile):
    """NaN and infinite logits, in rows of one warp, block and cluster."""
    for vocab in (50, 5000, 40_000):
        teacher = logits((4, vocab))
        teacher[0, ::3], teacher[1], teacher[2, 7] = math.nan, -math.nan, math.inf
        bounds = torch.full((4,), 0.2), torch.full((4,), 0.9)
        loss, gradients = gradients_of((logits((4, vocab)), teacher, *bounds), quantile=quantile)
        assert loss.isnan().tolist() == [True, True, True, False]
        assert not gradients[0][3].isnan().any()
