"""R2R's features, loss and uncertainties against loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import logits
from recipe_checks import (
    LENGTH,
    TEXTS,
    Entry,
    mixed_dtypes,
    one_graph,
    problem,
    promises,
)
from test_features import mean_over

import fastkd
from fastkd import recipes

ROWS = (TEXTS, LENGTH)


def router(dtype):
    divergent = torch.rand(ROWS) < 0.3
    return {
        "router_logits": logits(ROWS, dtype),
        "divergent": divergent,
        "mask": problem(dtype)["mask"],
    }


def soft(dtype):
    return {**router(dtype), "divergent": torch.rand(ROWS, dtype=torch.float64)}


def plain_r2r(tensors, recall_factor=1.0, pos_weight=1.0):
    z, y = tensors["router_logits"], tensors["divergent"].double()

    def one(i, j):
        p = 1 / (1 + (-z[i, j]).exp())
        return -pos_weight * recall_factor * y[i, j] * p.log() - (1 - y[i, j]) * (1 - p).log()

    return mean_over(tensors["mask"], one)


def digamma(x):
    """By the recurrence and the asymptotic series."""
    shift = 0.0
    while x < 20:
        shift -= 1 / x
        x += 1
    series = 1 / (12 * x**2) - 1 / (120 * x**4) + 1 / (252 * x**6) - 1 / (240 * x**8)
    return shift + math.log(x) - 1 / (2 * x) - series


def plain_log_u(evidence):
    a = [float(x) for x in evidence]
    total = sum(a)
    if min(a) <= -1 or total <= 0:
        return math.nan, math.nan
    spread = sum(x / total * (digamma(x + 1) - digamma(total + 1)) for x in a)
    return -spread, len(a) / (total + len(a))


UNREDUCED = {"reductions": ()}
ENTRIES = [
    Entry(
        "r2r",
        plain_r2r,
        {},
        router,
        ("router_logits",),
        **UNREDUCED,
        published={"recall_factor": 1.0, "pos_weight": None},
    ),
    Entry(
        "r2r",
        plain_r2r,
        {"recall_factor": 1.5, "pos_weight": 4.0},
        soft,
        ("router_logits",),
        **UNREDUCED,
    ),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)


def test_r2r_is_torchs_binary_cross_entropy():
    given = router(torch.float32)
    del given["mask"]
    right = F.binary_cross_entropy_with_logits(
        given["router_logits"], given["divergent"].float(), pos_weight=torch.tensor(3.0)
    )
    torch.testing.assert_close(recipes.r2r(**given, pos_weight=2.0, recall_factor=1.5), right)


def test_extreme_router_logits():
    z = torch.tensor([300.0, -300.0], requires_grad=True)
    loss = recipes.r2r(z, torch.tensor([False, True]))
    loss.backward()
    assert loss == 300
    assert z.grad.tolist() == [0.5, -0.5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_features_are_the_raw_logits(dtype):
    z = logits((4, 3, 50), dtype).requires_grad_()
    found = recipes.r2r_features(z, 7)
    best = z.detach().topk(7)
    assert torch.equal(found.top_logits, best.values)
    assert torch.equal(z.gather(-1, found.top_indices.long()), best.values)
    assert not found.top_logits.requires_grad
    p = z.detach().double().softmax(-1)
    error = 1e-9 if dtype == torch.float64 else 2e-5
    entropy = -(p * p.log()).sum(-1)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=error, atol=error)
    torch.testing.assert_close(found.top_prob.double(), p.amax(-1), rtol=error, atol=error)
    default = recipes.r2r_features(torch.randn(2, 200))
    assert default.top_logits.shape == (2, 100)


def test_uncertainties():
    evidence = logits((40, 10), torch.float64, 1.0) + 1.5
    evidence[0] = 0.1
    evidence[1, 0] = -1.0
    evidence[2] = -0.5
    evidence[3] = math.nan
    found = recipes.r2r_log_u(evidence)
    right = torch.tensor([plain_log_u(row) for row in evidence], dtype=torch.float64)
    right[3] = math.nan
    assert right.isnan().any(1).sum() > 2
    assert right.isfinite().any(1).sum() > 2
    torch.testing.assert_close(torch.stack(found, -1), right, equal_nan=True, rtol=1e-9, atol=1e-9)
    single = recipes.r2r_log_u(evidence.float())
    torch.testing.assert_close(
        torch.stack(single, -1).double(), right, equal_nan=True, rtol=2e-5, atol=2e-5
    )


def test_more_evidence_is_less_epistemic_uncertainty():
    few, much = (recipes.r2r_log_u(torch.full((10,), x))[1] for x in (1.0, 30.0))
    assert few == 0.5
    assert much < few


def test_features_and_uncertainties_compile():
    z = torch.randn(3, 50)
    torch._dynamo.reset()

    def both(x):
        features = recipes.r2r_features(x, 10)
        return features.entropy, *recipes.r2r_log_u(features.top_logits.abs())

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    for one, other in zip(compiled(z), both(z), strict=True):
        torch.testing.assert_close(one, other)


def test_a_row_of_nan_stays_alone():
    z = torch.randn(3, 20)
    z[1] = math.nan
    found = recipes.r2r_features(z, 4)
    assert found.entropy.isnan().tolist() == [False, True, False]
    assert torch.equal(found.entropy[0], fastkd.token_stats(z[:1]).student_entropy[0])


def test_errors_name_the_recipe_and_the_argument():
    x, y = torch.zeros(3), torch.ones(3, dtype=torch.bool)
    wrong = [
        (recipes.r2r, (x, y[:2]), {}, "divergent must have router_logits' shape"),
        (recipes.r2r, (x, y.long()), {}, "divergent must be bool or floating-point"),
        (recipes.r2r, (y, y), {}, "router_logits must be floating-point"),
        (recipes.r2r, (x, y), {"pos_weight": 0.0}, "pos_weight must be positive"),
        (recipes.r2r, (x, y), {"recall_factor": -1.0}, "recall_factor must be positive"),
        (recipes.r2r, (x, y), {"mask": y[:2]}, "mask must be bool"),
        (recipes.r2r_features, (x, 4), {}, r"k must be in \[1, 3\]"),
        (recipes.r2r_features, (x, 1.5), {}, "k must be an integer"),
        (recipes.r2r_log_u, (y,), {}, "top_logits must be floating-point"),
    ]
    for function, arguments, options, message in wrong:
        with pytest.raises((ValueError, TypeError), match=message) as caught:
            function(*arguments, **options)
        assert str(caught.value).startswith(f"{function.__name__}: ")
