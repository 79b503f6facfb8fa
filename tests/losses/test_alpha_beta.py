"""alpha_beta: formula, limits, rows near convergence, impossible tokens, numbers of rows."""

import math

import pytest
import torch
from cases import assert_derivatives, logits, relative_error

import fastkd

PAIRS = ((0.2, 0.7), (0.7, 0.2), (1.0, 1.0), (2.0, -1.0), (-0.5, 1.5), (3.0, 0.1), (0.01, 0.02))
#: Where a denominator is 0.
LIMITS = {
    (1.0, 0.0): lambda p, q: (p * (p / q).log()).sum(-1),
    (0.0, 1.0): lambda p, q: (q * (q / p).log()).sum(-1),
    (0.6, 0.0): lambda p, q: ((q**0.6 - p**0.6 - 0.6 * p**0.6 * (q / p).log()) / 0.36).sum(-1),
    (0.0, 0.6): lambda p, q: ((p**0.6 - q**0.6 - 0.6 * q**0.6 * (p / q).log()) / 0.36).sum(-1),
    (0.5, -0.5): lambda p, q: 4 * ((p / q).sqrt() - 1 - 0.5 * (p / q).log()).sum(-1),
    (-2.0, 2.0): lambda p, q: ((q / p) ** 2 - 1 - 2 * (q / p).log()).sum(-1) / 4,
    (0.0, 0.0): lambda p, q: 0.5 * (p / q).log().square().sum(-1),
    (0.5, 0.5): lambda p, q: 2 * (p.sqrt() - q.sqrt()).square().sum(-1),
    (1.0, 1.0): lambda p, q: 0.5 * (p - q).square().sum(-1),
}


def formula(p, q, alpha, beta):
    s = alpha + beta
    terms = p**alpha * q**beta - alpha / s * p**s - beta / s * q**s
    return -terms.sum(-1) / (alpha * beta)


def both_sides(function, student, teacher, alpha, beta, **options):
    inputs = [x.detach().requires_grad_() for x in (student, teacher)]
    options = {"divergence": "alpha_beta", "alpha": alpha, "beta": beta, **options}
    value = function(*inputs, reduction="none", **options)
    return value.detach(), torch.autograd.grad(value.sum(), inputs)


@pytest.mark.only("cpu")  # float64
@pytest.mark.parametrize("numbers", [*PAIRS, *LIMITS])
def test_is_the_formula(backend, numbers):
    student, teacher = (2 * torch.randn(3, 900, dtype=torch.float64) for _ in range(2))
    inputs = [x.requires_grad_() for x in (student, teacher)]
    q, p = (x.softmax(-1) for x in inputs)
    right = LIMITS[numbers](p, q) if numbers in LIMITS else formula(p, q, *numbers)
    exact = torch.autograd.grad(right.sum(), inputs)
    for function in (fastkd.softmax_divergence, fastkd.reference.softmax_divergence):
        value, mine = both_sides(function, student, teacher, *numbers)
        torch.testing.assert_close(value, right.detach(), rtol=1e-9, atol=1e-12)
        for found, true in zip(mine, exact, strict=True):
            assert relative_error(found, true) < 1e-9


@pytest.mark.only("cpu")  # float64
@pytest.mark.parametrize("numbers", LIMITS)
def test_nothing_jumps_at_a_limit(backend, numbers):
    student, teacher = logits((2, 300), torch.float64), logits((2, 300), torch.float64)
    right, exact = both_sides(fastkd.softmax_divergence, student, teacher, *numbers)
    for step in (1e-4, 1e-8, 1e-12):
        alpha, beta = numbers[0] + step, numbers[1] + 0.7 * step
        value, mine = both_sides(fastkd.softmax_divergence, student, teacher, alpha, beta)
        torch.testing.assert_close(value, right, rtol=200 * step + 1e-10, atol=0)
        for found, true in zip(mine, exact, strict=True):
            assert relative_error(found, true) < 200 * step + 1e-9


@pytest.mark.parametrize("numbers", [*PAIRS[:4], *LIMITS])
@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-5])
def test_near_the_teacher(backend, numbers, noise):
    """As accurate relatively as the logits allow, also with a constant added to a side."""
    teacher = (logits((3, 5000)) * 256).round() / 256
    student = teacher + noise * torch.randn(3, 5000)
    student[1] += 8
    value, mine = both_sides(fastkd.softmax_divergence, student, teacher, *numbers)
    right, exact = both_sides(
        fastkd.reference.softmax_divergence, student.double(), teacher.double(), *numbers
    )
    torch.testing.assert_close(value.double(), right, rtol=3e-5, atol=0)
    for found, true in zip(mine, exact, strict=True):
        assert relative_error(found, true) < 3e-5


def test_equal_sides_have_none(backend):
    student = logits((3, 900))
    for numbers in (*PAIRS, *LIMITS):
        value, mine = both_sides(fastkd.softmax_divergence, student, student, *numbers)
        assert not value.any()
        assert not any(g.any() for g in mine)


@pytest.mark.parametrize("numbers", [*PAIRS, *LIMITS])
@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (2.0, 0.7)])
def test_impossible_tokens_of_both_add_nothing(backend, numbers, fill, temperatures):
    student, teacher = logits((2, 700)), logits((2, 700))
    wide = [torch.cat([x, torch.full((2, 90), fill)], -1) for x in (student, teacher)]
    options = dict(zip(("temperature", "teacher_temperature"), temperatures, strict=True))
    value, mine = both_sides(fastkd.softmax_divergence, *wide, *numbers, **options)
    right, exact = both_sides(fastkd.softmax_divergence, student, teacher, *numbers, **options)
    # Quotients of probabilities have the roundings of their logarithms, times the exponents.
    torch.testing.assert_close(value, right, rtol=1e-5, atol=0)
    for found, true in zip(mine, exact, strict=True):
        assert not found[:, 700:].any()
        assert relative_error(found[:, :700], true) < 1e-5


@pytest.mark.parametrize("numbers", [*PAIRS, *LIMITS])
def test_a_token_impossible_for_one(backend, numbers):
    student, teacher = logits((2, 700)), logits((2, 700))
    student[0, 5], teacher[1, 6] = -math.inf, -math.inf
    value, mine = both_sides(fastkd.softmax_divergence, student, teacher, *numbers)
    alpha, beta = numbers
    infinite = [not (x > 0 and alpha + beta > 0) for x in (beta, alpha)]
    assert value.isinf().tolist() == infinite
    assert all(g.isfinite().all() for g in mine)
    right, exact = both_sides(
        fastkd.reference.softmax_divergence, student.double(), teacher.double(), *numbers
    )
    torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=0)
    for row in range(2):
        if not infinite[row]:
            for found, true in zip(mine, exact, strict=True):
                assert relative_error(found[row], true[row]) < 1e-5


def test_numbers_of_each_row(backend):
    """The same bits as calls with that row's numbers."""
    numbers = [*PAIRS, *LIMITS]
    student, teacher = logits((len(numbers), 1300)), logits((len(numbers), 1300))
    alpha, beta = (torch.tensor(x, dtype=torch.float64) for x in zip(*numbers, strict=True))
    found, mine = both_sides(fastkd.softmax_divergence, student, teacher, alpha, beta)
    for row, pair in enumerate(numbers):
        alone, right = both_sides(fastkd.softmax_divergence, student, teacher, *pair)
        assert torch.equal(found[row], alone[row])
        assert all(torch.equal(a[row], b[row]) for a, b in zip(mine, right, strict=True))


@pytest.mark.only("cpu")  # float64
@pytest.mark.parametrize("numbers", [(0.2, 0.7), (0.0, 1.0), (0.5, -0.5), (0.0, 0.0)])
def test_derivatives(backend, numbers):
    student, teacher = (logits((2, 5), torch.float64, 1.0).requires_grad_() for _ in range(2))
    alpha, beta = numbers
    options = {"divergence": "alpha_beta", "alpha": alpha, "beta": beta}
    assert_derivatives(lambda s, t: fastkd.softmax_divergence(s, t, **options), (student, teacher))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"alpha": math.nan}, "alpha must be finite, got nan"),
        ({"beta": math.inf}, "beta must be finite, got inf"),
        ({"alpha": -0.6}, r"alpha \+ beta must not be negative, got -0.6 \+ 0.5"),
        (
            {"alpha": torch.tensor([0.5, 0.1]), "beta": torch.tensor([-0.5, -0.2])},
            r"alpha \+ beta must not be negative, got 0.1.* in row 1",
        ),
        ({"alpha": torch.ones(3)}, "alpha must have one entry a row"),
    ],
)
def test_errors(numbers, message):
    student, teacher = logits((2, 9)), logits((2, 9))
    with pytest.raises(ValueError, match=f"softmax_divergence: {message}"):
        fastkd.softmax_divergence(student, teacher, divergence="alpha_beta", **numbers)


@pytest.mark.only("simt", "cuda")
def test_numbers_no_check_could_see_are_nan(backend):
    student, teacher = logits((4, 300)), logits((4, 300))
    alpha = torch.tensor([0.2, math.nan, 0.1, math.inf])
    beta = torch.tensor([0.7, 0.7, -0.2, 0.5])
    value, mine = both_sides(fastkd.softmax_divergence, student, teacher, alpha, beta)
    assert value.isnan().tolist() == [False, True, True, True]
    assert mine[0].isnan().all(-1).tolist() == [False, True, True, True]
