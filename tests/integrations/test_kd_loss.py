"""The module that recipes of other trainers call."""

import pytest
import torch

import fastkd

ROWS, VOCAB = 6, 9


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(2, ROWS, VOCAB, dtype=torch.float64, generator=random) for _ in range(2)
    )
    labels = torch.randint(VOCAB, (2, ROWS), generator=random)
    labels[:, ::3] = -100
    return student.requires_grad_(), teacher, labels


def expected(student, teacher, labels, temperature):
    """The sum over rows with a label, as Automodel's loss has it."""
    q, p = ((z / temperature).log_softmax(-1) for z in (student, teacher))
    rows = temperature**2 * (p.exp() * (p - q)).sum(-1)
    return rows[labels != -100].sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_mean_and_sum(batch, temperature):
    student, teacher, labels = batch
    loss = fastkd.nn.KDLoss(temperature=temperature)
    total, kept = expected(*batch, temperature), (labels != -100).sum()
    torch.testing.assert_close(loss(*batch), total / kept)
    for count in (5, torch.tensor(5)):
        torch.testing.assert_close(loss(*batch, num_batch_labels=count), total / 5)
    (gradient,) = torch.autograd.grad(loss(*batch), student)
    (truth,) = torch.autograd.grad(total / kept, student)
    torch.testing.assert_close(gradient, truth)
    torch.testing.assert_close(
        loss(student, teacher), expected(student, teacher, torch.zeros(2, ROWS), temperature) / 12
    )


def test_recipes_read_and_set_two_attributes(batch):
    loss = fastkd.nn.KDLoss(ignore_index=7)
    assert (loss.ignore_index, loss.temperature) == (7, 1.0)
    loss.temperature, loss.ignore_index = 2.0, -100
    torch.testing.assert_close(loss(*batch), fastkd.nn.KDLoss(temperature=2.0)(*batch))


def test_no_label_and_further_options(batch):
    student, teacher, labels = batch
    loss = fastkd.nn.KDLoss(divergence="jsd", beta=0.3, label_weight=0.5)
    torch.testing.assert_close(
        loss(*batch),
        fastkd.softmax_divergence(
            student,
            teacher,
            divergence="jsd",
            beta=0.3,
            labels=labels,
            label_weight=0.5,
            square_temperature=True,
        ),
    )
    none = loss(student, teacher, torch.full_like(labels, -100))
    none.backward()
    assert none.item() == 0
    assert not student.grad.any()


def test_errors():
    for name in ("colour", "reduction", "labels", "normalizer", "inplace"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            fastkd.nn.KDLoss(**{name: 1})
    with pytest.raises(ValueError, match=r"divergence must be one of .* got 'forward'"):
        fastkd.nn.KDLoss(divergence="forward")
