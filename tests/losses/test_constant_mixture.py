"""skew_reverse_kl_detached: the value of skew_reverse_kl, the mixture a constant in gradients."""

import pytest
import torch
from cases import logits, relative_error

import fastkd

NAME = "skew_reverse_kl_detached"


def both_sides(function, student, teacher, **options):
    inputs = [x.detach().requires_grad_() for x in (student, teacher)]
    value = function(*inputs, reduction="none", **options)
    return value.detach(), torch.autograd.grad(value.sum(), inputs)


def by_hand(student, teacher, beta, temperature=1.0):
    """KL(q || m) and q (log q - log m - KL) / temperature."""
    q, p = ((x / temperature).softmax(-1) for x in (student, teacher))
    ratio = (q / (beta * q + (1 - beta) * p)).log()
    value = (q * ratio).sum(-1)
    return value, q * (ratio - value.unsqueeze(-1)) / temperature


@pytest.mark.only("cpu")  # float64
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9])
def test_is_the_formula(backend, beta):
    student, teacher = logits((4, 900), torch.float64), logits((4, 900), torch.float64)
    options = {"divergence": NAME, "beta": beta, "temperature": 1.5}
    value, (mine, zeros) = both_sides(fastkd.softmax_divergence, student, teacher, **options)
    right, gradient = by_hand(student, teacher, beta, 1.5)
    torch.testing.assert_close(value, right, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(mine, gradient, rtol=1e-9, atol=1e-13)
    assert not zeros.any()


@pytest.mark.parametrize("noise", [1.0, 1e-2, 1e-4])
def test_has_the_value_of_skew_reverse_kl(backend, noise):
    student = logits((5, 3000))
    teacher = student + noise * torch.randn(5, 3000)
    beta = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    options = {"beta": beta, "temperature": 0.8}
    value, (mine, zeros) = both_sides(
        fastkd.softmax_divergence, student, teacher, divergence=NAME, **options
    )
    other, _ = both_sides(
        fastkd.softmax_divergence, student, teacher, divergence="skew_reverse_kl", **options
    )
    torch.testing.assert_close(value, other, rtol=1e-6, atol=0)
    right, gradient = by_hand(student.double(), teacher.double(), beta.double()[:, None], 0.8)
    torch.testing.assert_close(value.double(), right, rtol=2e-5, atol=0)
    assert relative_error(mine, gradient) < 2e-5
    assert not zeros.any()
    assert value[-1] == 0
    assert not mine[-1].any()


def test_impossible_tokens(backend):
    student, teacher = logits((3, 700)), logits((3, 700))
    student[0, 5], teacher[1, 6], student[2, :9], teacher[2, :9] = 4 * (-torch.inf,)
    for beta in (0.0, 0.4):
        options = {"divergence": NAME, "beta": beta}
        value, (mine, zeros) = both_sides(fastkd.softmax_divergence, student, teacher, **options)
        assert value.isinf().tolist() == [False, beta == 0, False]
        assert mine.isfinite().all()
        assert not zeros.any()
        right, exact = both_sides(
            fastkd.reference.softmax_divergence, student.double(), teacher.double(), **options
        )
        torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-6)
        fine = value.isfinite()
        assert relative_error(mine[fine], exact[0][fine]) < 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_second_derivatives_hold_the_mixture(beta):
    student = logits((2, 6), torch.float64).requires_grad_()
    teacher = logits((2, 6), torch.float64).requires_grad_()
    loss = fastkd.softmax_divergence(student, teacher, divergence=NAME, beta=beta, reduction="sum")
    first = torch.autograd.grad(loss, [student, teacher], create_graph=True)
    direction = torch.randn_like(student)
    found = torch.autograd.grad((first[0] * direction).sum(), student)[0]
    assert not first[1].any()

    log_q = student.log_softmax(-1)
    m = (beta * log_q.exp() + (1 - beta) * teacher.softmax(-1)).detach()
    right = (log_q.exp() * (log_q - m.log())).sum()
    (gradient,) = torch.autograd.grad(right, student, create_graph=True)
    torch.testing.assert_close(first[0], gradient, rtol=1e-10, atol=1e-13)
    exact = torch.autograd.grad((gradient * direction).sum(), student)[0]
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
