"""decoupled_kl: its parts, certain labels, impossible tokens, the label's own term, errors."""

import math

import pytest
import torch
from cases import assert_derivatives, logits, relative_error

import fastkd

ROWS, VOCAB = 4, 900


def run(function, student, teacher, labels, **options):
    inputs = [x.detach().requires_grad_() for x in (student, teacher)]
    options = {"divergence": "decoupled_kl", "label_weight": 0.0, "reduction": "none", **options}
    value = function(*inputs, labels=labels, **options)
    return value.detach(), torch.autograd.grad(value.sum(), inputs)


def both(student, teacher, labels, **options):
    """What fastkd finds, and the definition in float64."""
    return run(fastkd.softmax_divergence, student, teacher, labels, **options), run(
        fastkd.reference.softmax_divergence, student.double(), teacher.double(), labels, **options
    )


def sides(vocab=VOCAB, dtype=torch.float32):
    return logits((ROWS, vocab), dtype), logits((ROWS, vocab), dtype)


@pytest.mark.only("cpu")  # float64
def test_is_the_formula(backend):
    student, teacher = sides(dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (ROWS,))
    inputs = [x.requires_grad_() for x in (student, teacher)]
    q, p = (x.softmax(-1) for x in inputs)
    at = labels[:, None]
    q_t, p_t = (x.gather(1, at)[:, 0] for x in (q, p))
    rest = torch.ones(ROWS, VOCAB, dtype=torch.bool).scatter(1, at, False)
    others = [x[rest].view(ROWS, VOCAB - 1) / (1 - y[:, None]) for x, y in ((q, q_t), (p, p_t))]
    target = p_t * (p_t / q_t).log() + (1 - p_t) * ((1 - p_t) / (1 - q_t)).log()
    right = 0.7 * target + 3 * (others[1] * (others[1] / others[0]).log()).sum(-1)
    exact = torch.autograd.grad(right.sum(), inputs)
    value, mine = run(fastkd.softmax_divergence, student, teacher, labels, alpha=0.7, beta=3.0)
    torch.testing.assert_close(value, right.detach(), rtol=1e-10, atol=1e-12)
    for found, true in zip(mine, exact, strict=True):
        assert relative_error(found, true) < 1e-9


def test_is_the_kl_divergence_with_the_mass_of_the_others(backend):
    student, teacher = sides()
    labels = torch.randint(0, VOCAB, (ROWS,))
    others = 1 - teacher.softmax(-1).gather(1, labels[:, None])[:, 0]
    value, mine = run(fastkd.softmax_divergence, student, teacher, labels, alpha=1.0, beta=others)
    leaf = student.detach().requires_grad_()
    right = fastkd.softmax_divergence(leaf, teacher, reduction="none")
    torch.testing.assert_close(value, right.detach(), rtol=1e-5, atol=1e-6)
    exact = torch.autograd.grad(right.sum(), leaf)[0]
    assert relative_error(mine[0], exact) < 1e-5


@pytest.mark.parametrize("target", [8.0, 12.0, 20.0, 60.0])
def test_a_certain_label(backend, target):
    """Eager float32, which masks the label and subtracts logarithms, is off by 1e-2 to NaN here."""
    student, teacher = (2 * torch.randn(ROWS, VOCAB) for _ in range(2))
    labels = torch.randint(0, VOCAB, (ROWS,))
    for side, more in ((student, 0.0), (teacher, 1.0)):
        side.scatter_(1, labels[:, None], target + more)
    options = {"alpha": 1.0, "beta": 8.0}
    (value, mine), (right, exact) = both(student, teacher, labels, **options)
    torch.testing.assert_close(value.double(), right, rtol=1e-6, atol=0)
    for found, true in zip(mine, exact, strict=True):
        assert relative_error(found, true) < 1e-6
    # TCKD alone: its value and gradient are tiny, and keep their digits.
    (value, mine), (right, exact) = both(student, teacher, labels, alpha=1.0, beta=0.0)
    torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-30)
    assert relative_error(mine[0], exact[0]) < 1e-5


@pytest.mark.parametrize("noise", [1e-1, 1e-3])
def test_near_the_teacher(backend, noise):
    teacher = (logits((ROWS, 5000)) * 256).round() / 256
    student = teacher + noise * torch.randn(ROWS, 5000)
    labels = torch.randint(0, 5000, (ROWS,))
    (value, mine), (right, exact) = both(student, teacher, labels, beta=1.0)
    torch.testing.assert_close(value.double(), right, rtol=1e-4, atol=0)
    for found, true in zip(mine, exact, strict=True):
        assert relative_error(found, true) < 3e-5


@pytest.mark.parametrize("vocab", [1, 2, 5, 33, 700, 5001])
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "label_weight": 0.4}])
def test_few_tokens(backend, vocab, options):
    """Sides of which the label is the only token, or impossible; also a vocabulary of one."""
    student, teacher = sides(vocab)
    labels = torch.randint(0, vocab, (ROWS,))
    label = labels[:, None] == torch.arange(vocab)
    teacher[0] = teacher[0].masked_fill(~label[0], -math.inf)  # TCKD alone
    student[3], teacher[3] = (
        x[3].masked_fill(~label[3], -math.inf).masked_fill(label[3], 1.0)
        for x in (student, teacher)
    )
    if vocab > 1:
        teacher[1] = teacher[1].masked_fill(label[1], -math.inf)
        student[2], teacher[2] = (x[2].masked_fill(label[2], -math.inf) for x in (student, teacher))
        if "label_weight" in options:
            student[2] = student[2].masked_fill(label[2], 0.0)
    (value, mine), (right, exact) = both(student, teacher, labels, beta=2.0, **options)
    assert right.isfinite().all()
    torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-6)
    for found, true in zip(mine, exact, strict=True):
        torch.testing.assert_close(found.double(), true, rtol=2e-5, atol=2e-6)


def test_impossible_for_the_student_alone(backend):
    student, teacher = sides()
    labels = torch.randint(0, VOCAB, (ROWS,))
    student[0, labels[0]] = -math.inf
    student[1, (labels[1] + 1) % VOCAB] = -math.inf
    label = torch.arange(VOCAB) == labels[2]
    student[2] = student[2].masked_fill(~label, -math.inf)
    value, mine = run(fastkd.softmax_divergence, student, teacher, labels)
    assert (value[:3] == math.inf).all()
    assert value[3].isfinite()
    assert all(x.isfinite().all() for x in mine)
    # As if the probability were 2^-126: q - p of the label.
    p_t = teacher.softmax(-1)[0, labels[0]]
    torch.testing.assert_close(mine[0][0, labels[0]], -p_t, rtol=1e-5, atol=1e-7)
    # Factors of 0 leave the infinite part out.
    value, mine = run(fastkd.softmax_divergence, student, teacher, labels, alpha=0.0)
    assert value[[0, 2]].isfinite().all()
    assert value[1] == math.inf
    value, mine = run(fastkd.softmax_divergence, student, teacher, labels, beta=0.0)
    assert value[1].isfinite()


def test_no_distribution(backend):
    student, teacher = sides()
    labels = torch.randint(0, VOCAB, (ROWS,))
    student[0, labels[0]] = math.nan
    teacher[1, (labels[1] + 3) % VOCAB] = math.nan
    student[2] = -math.inf
    value, mine = run(fastkd.softmax_divergence, student, teacher, labels)
    assert value[:3].isnan().all()
    assert value[3].isfinite()
    assert all(x[3].isfinite().all() for x in mine)


def test_rows_without_a_label_drop_out(backend):
    student, teacher = sides()
    labels = torch.tensor([3, -100, 5, -100])
    student[1] = math.nan
    leaf = student.requires_grad_()
    options = {"divergence": "decoupled_kl", "beta": 8.0}
    found = fastkd.softmax_divergence(leaf, teacher, labels=labels, **options)
    found.backward()
    kept = fastkd.softmax_divergence(
        student[[0, 2]], teacher[[0, 2]], labels=labels[[0, 2]], **options
    )
    torch.testing.assert_close(found, kept)
    assert (leaf.grad[[1, 3]] == 0).all()


def test_in_place(backend):
    student, teacher = sides(5001)
    labels = torch.randint(0, 5001, (ROWS,))
    _, (right, _) = run(fastkd.softmax_divergence, student, teacher, labels, label_weight=0.3)
    leaf = student.clone().requires_grad_()
    memory = leaf * 1
    loss = fastkd.softmax_divergence(
        memory,
        teacher,
        labels=labels,
        divergence="decoupled_kl",
        label_weight=0.3,
        reduction="sum",
        inplace=True,
    )
    loss.backward()
    assert torch.equal(leaf.grad, right)


@pytest.mark.only("cpu")  # float64
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_derivatives(backend, temperature):
    labels = torch.tensor([2, 0])

    def loss(student, teacher):
        options = {"beta": 2.0, "alpha": 0.6, "label_weight": 0.3, "temperature": temperature}
        return fastkd.softmax_divergence(
            student, teacher, divergence="decoupled_kl", labels=labels, **options
        )

    inputs = [torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert_derivatives(loss, inputs)


@pytest.mark.only("cpu")
def test_errors(backend):
    student, teacher = sides()
    for function in (fastkd.softmax_divergence, fastkd.reference.softmax_divergence):
        with pytest.raises(ValueError, match=r"labels must be given .* got None"):
            function(student, teacher, divergence="decoupled_kl")
    labels = torch.full((ROWS,), VOCAB)
    with pytest.raises(IndexError, match="softmax_divergence: labels must lie in"):
        run(fastkd.softmax_divergence, student, teacher, labels)
    with pytest.raises(ValueError, match="softmax_divergence: beta must be finite, got inf"):
        run(fastkd.softmax_divergence, student, teacher, labels * 0, beta=math.inf)
