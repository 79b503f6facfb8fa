"""acm.prefix_loss and acm.oracle: every prefix by its definition, in little memory; labels."""

import pytest
import torch
from cases import relative_error
from test_hard import GRADIENT_ERROR, exactly, problem
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd.acm import _kernels, _products


@pytest.mark.parametrize("dtype", list(GRADIENT_ERROR))
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize(
    "weights", ["sum", "mean", "without the first", "each its own", "one alone", "none"]
)
def test_prefix_loss(dtype, detach, weights):
    leaves = [*problem((5, 31), dtype), torch.randn(5, 31, 10).to(dtype).requires_grad_()]
    exact = exactly(leaves)
    found = fastkd.acm.prefix_loss(*leaves, detach=detach)
    right = fastkd.reference.acm.prefix_loss(*exact, detach=detach)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), right, rtol=max(1e-6, GRADIENT_ERROR[dtype]), atol=0)
    with torch.no_grad():
        plain = fastkd.acm.prefix_loss(*leaves, detach=detach)
    torch.testing.assert_close(plain, found.detach())
    factors = {
        "sum": torch.ones(5),
        "mean": torch.full((5,), 0.2),
        "without the first": torch.tensor([0.0, 3.0, 3.0, 3.0, 3.0]),
        "each its own": torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0]),
        "one alone": torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]),
        "none": torch.zeros(5),
    }[weights].double()
    scale = 2.0**11 if dtype == torch.float16 else 1.0
    (found * (scale * factors).to(found.dtype)).sum().backward()
    (right * (scale * factors)).sum().backward()
    for mine, truth in zip(leaves, exact, strict=True):
        assert mine.grad.dtype == dtype
        assert relative_error(mine.grad, truth.grad) <= GRADIENT_ERROR[dtype]


def test_prefix_loss_of_many_blocks():
    rows = 3 * _products._LARGEST_BLOCK + 5
    leaves = problem((rows,), n=2, d=40, b=3, out=40)
    target = torch.randn(rows, 40)
    exact = exactly(leaves)
    fastkd.acm.prefix_loss(*leaves, target).sum().backward()
    right = fastkd.reference.acm.prefix_loss(*exact, target.double())
    right.sum().backward()
    for mine, truth in zip(leaves, exact, strict=True):
        assert relative_error(mine.grad, truth.grad) < 4e-6


def test_prefix_loss_again_and_again():
    """Gradients that wait for a factor survive a graph that is kept."""
    leaves = [*problem(), torch.randn(3, 11, 10)]
    losses = fastkd.acm.prefix_loss(*leaves)
    first = torch.autograd.grad(losses.sum(), leaves[:4], retain_graph=True)
    other = torch.autograd.grad(losses[3], leaves[:4], retain_graph=True)
    second = torch.autograd.grad(losses.sum(), leaves[:4])
    assert not torch.equal(first[1], other[1])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_prefix_loss_without_rows():
    leaves = [*problem((0,)), torch.randn(0, 10)]
    losses = fastkd.acm.prefix_loss(*leaves)
    losses.sum().backward()
    assert not losses.any()
    assert not leaves[1].grad.any()


def peak_bytes(run):
    """Most bytes that torch's allocations held at once, beyond those before `run`."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_prefix_loss_in_little_memory():
    rows, width, n = 4096, 128, 4
    leaves = problem((rows,), n=n, d=width, b=width, out=width)
    target = torch.randn(rows, width)
    gradients = sum(4 * v.numel() for v in leaves[1:])

    def run():
        fastkd.acm.prefix_loss(*leaves, target).mean().backward()

    run()
    for leaf in leaves:
        leaf.grad = None
    assert peak_bytes(lambda: torch.empty(1000, dtype=torch.uint8)) >= 1000
    assert peak_bytes(run) - gradients < 3 * rows * width * 4


@pytest.mark.parametrize("rule", ["paper", "code"])
def test_oracle(rule):
    for n in (1, 2, 4):
        x, *weights = (v.detach() for v in problem((50,), torch.float64, n=n))
        target = fastkd.acm.hard(x, *weights, torch.full((50,), n)) + 0.3 * torch.randn(50, 10)
        for threshold in (0.5, 1 / 1.2, 1.0):
            options = {"threshold": threshold, "rule": rule}
            found = fastkd.acm.oracle(x, *weights, target, **options)
            assert found.dtype == torch.int64
            assert torch.equal(found, fastkd.reference.acm.oracle(x, *weights, target, **options))


def test_oracle_by_hand():
    """Distances of each row from its target, as the learners add up."""
    ones = torch.ones(4, 1, 1)
    w2 = torch.tensor([1.0, 1.0, 1.0, 1.0]).view(4, 1, 1)
    x = torch.ones(5, 1)
    # Distances: 4 3 2 1 0; 1 0 1 2 3; 0 1 2 3 4; 10 9 8 7 6; NaN.
    target = torch.tensor([[4.0], [1.0], [0.0], [10.0], [torch.nan]])

    def labels(rule, threshold):
        return fastkd.acm.oracle(
            *(x, ones, torch.zeros(4, 1), w2, target),
            activation="identity",
            rule=rule,
            threshold=threshold,
        ).tolist()

    assert labels("paper", 0.7) == [4, 2, 2, 2, 4]
    assert labels("paper", 0.6) == [2, 2, 2, 2, 4]
    # Code: learner 1 leaves 3/4, 0, more than before, 9/10 of the distance.
    assert labels("code", 0.8) == [4, 2, 4, 4, 4]
    assert labels("code", 0.95) == [4, 2, 4, 4, 4]
    assert labels("code", 0.6) == [4, 2, 4, 4, 4]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    leaves, target = problem(), torch.randn(3, 11, 10)
    run = lambda *operands: fastkd.acm.prefix_loss(*operands, target).sum()  # noqa: E731
    right = torch.autograd.grad(run(*leaves), leaves)
    checkpoint(run, *leaves, use_reentrant=reentrant).backward()
    assert all(
        torch.equal(leaf.grad, gradient) for leaf, gradient in zip(leaves, right, strict=True)
    )


@pytest.mark.parametrize("size", [2e4, 1.0])
@pytest.mark.parametrize("factors", [(1.0, 1.0, 1.0, 1.0, 1.0), (1.0, 2.0, 0.5, 1.0, 1.0)])
def test_float16_products_of_large_targets(monkeypatch, size, factors):
    """A sum of N residuals of 2e4 is no float16."""
    monkeypatch.setattr(_kernels, "CPU_PRODUCTS", {torch.float16: True})
    leaves = problem(dtype=torch.float16)
    target = (size * (2 * torch.rand(3, 11, 10) - 1)).half()
    exact, weigh = exactly(leaves), torch.tensor(factors) / size
    (fastkd.acm.prefix_loss(*leaves, target) * weigh).sum().backward()
    (fastkd.reference.acm.prefix_loss(*exact, target.double()) * weigh.double()).sum().backward()
    for mine, truth in zip(leaves, exact, strict=True):
        assert relative_error(mine.grad, truth.grad) < 3e-3


def test_the_factor_of_prefix_0_is_not_the_learners():
    leaves, target = problem(), torch.randn(3, 11, 10)
    losses = fastkd.acm.prefix_loss(*leaves, target)
    right = torch.autograd.grad(losses, leaves, torch.tensor([0.0, 1, 2, 1, 1]), retain_graph=True)
    for factor in (torch.inf, torch.nan, 1e30):
        others = torch.tensor([factor, 1, 2, 1, 1])
        found = torch.autograd.grad(losses, leaves, others, retain_graph=True)
        assert all(map(torch.equal, found, right))


@pytest.mark.parametrize("rule", ["paper", "code"])
def test_oracle_under_vmap(rule):
    x, *weights = (v.detach() for v in problem((4, 9)))
    target = torch.randn(4, 9, 10)
    run = lambda a, b: fastkd.acm.oracle(a, *weights, b, rule=rule)  # noqa: E731
    assert torch.equal(torch.func.vmap(run)(x, target), run(x, target))
