"""label_weight with one entry a row: each row's own term, no weight, rows left out, errors."""

import math

import pytest
import torch
from cases import label_weights, logits

import fastkd

ROWS, VOCAB = 6, 700


def softmax(student, teacher, **options):
    return fastkd.softmax_divergence(student, teacher, divergence="jsd", **options)


def clipped(student, teacher, **options):
    return fastkd.clipped_divergence(student, teacher, 1e-4, 0.3, tail="lump", **options)


def topk(student, teacher, **options):
    log_probs, indices = teacher.log_softmax(-1).topk(4)
    return fastkd.topk_divergence(student, log_probs, indices, **options)


ALL = pytest.mark.parametrize("loss", [softmax, clipped, topk])


def problem(rows=ROWS):
    return logits((rows, VOCAB)), logits((rows, VOCAB)), torch.randint(0, VOCAB, (rows,))


def gradient(loss, student, teacher, **options):
    student = student.detach().requires_grad_()
    value = loss(student, teacher, reduction="none", **options)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


@ALL
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_each_row_has_its_own(backend, loss, temperature):
    """The same bits as calls with that number, for weights of any sign."""
    student, teacher, labels = problem()
    options = {"labels": labels, "temperature": temperature}
    weights = torch.tensor([0.3, 0.0, 2.0, -0.7, 1.0, 1e-3])
    found, mine = gradient(loss, student, teacher, label_weight=weights, **options)
    for row, number in enumerate(weights.tolist()):
        alone, right = gradient(loss, student, teacher, label_weight=number, **options)
        assert torch.equal(found[row], alone[row])
        assert torch.equal(mine[row], right[row])


@ALL
def test_is_that_much_cross_entropy(backend, loss):
    student, teacher, labels = problem()
    weights = label_weights((ROWS,)).to(torch.bfloat16)
    found, mine = gradient(loss, student, teacher, labels=labels, label_weight=weights)
    without, rest = gradient(loss, student, teacher, labels=labels, label_weight=0.0)
    leaf = student.double().requires_grad_()
    term = weights.double() * torch.nn.functional.cross_entropy(leaf, labels, reduction="none")
    torch.testing.assert_close(found.double() - without, term.detach(), rtol=1e-5, atol=2e-6)
    (exact,) = torch.autograd.grad(term.sum(), leaf)
    torch.testing.assert_close(mine.double() - rest, exact, rtol=1e-5, atol=1e-6)


@ALL
def test_rows_left_out_and_without_a_label_may_have_any(backend, loss):
    student, teacher, labels = problem()
    labels[4] = -100
    options = {"mask": torch.arange(ROWS) != 1, "labels": labels}
    weights = torch.tensor([0.3, math.nan, 0.0, 1.0, math.inf, 2.0])
    kept = options["mask"] & (labels >= 0)
    found = gradient(loss, student, teacher, label_weight=weights, **options)
    right = gradient(loss, student, teacher, label_weight=weights.where(kept, 0.5), **options)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


@ALL
def test_no_weight_leaves_an_impossible_label_alone(backend, loss):
    student, teacher, labels = problem()
    labels[:] = 7
    student[:, 7] = teacher[:, 7] = -math.inf
    weights = torch.tensor([0.0, 1.0] * (ROWS // 2))
    found, mine = gradient(
        loss, student, teacher, labels=labels, label_weight=weights, temperature=2.0
    )
    assert found.isinf().tolist() == [False, True] * (ROWS // 2)
    assert mine.isfinite().all()


@pytest.mark.only("cpu")  # float64
def test_minifinetuning(backend):
    """A teacher corrected by m towards the label: (1 - m) KL(p || q) + m CE has its gradient."""
    student, teacher, labels = (x.double() if x.is_floating_point() else x for x in problem())
    m = torch.rand(ROWS, dtype=torch.float64) * 0.9
    target = (1 - m[:, None]) * teacher.softmax(-1)
    target[torch.arange(ROWS), labels] += m
    leaf = student.requires_grad_()
    loss = fastkd.softmax_divergence(
        leaf, teacher, weight=1 - m, labels=labels, label_weight=m / (1 - m), reduction="sum"
    )
    (found,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(found, leaf.detach().softmax(-1) - target, rtol=1e-10, atol=1e-14)


@pytest.mark.only("simt", "cuda")
@ALL
def test_a_weight_no_check_could_see_is_nan(backend, loss):
    student, teacher, labels = problem()
    weights = torch.tensor([0.3, math.nan, 0.0, math.inf, -math.inf, 2.0])
    found, mine = gradient(loss, student, teacher, labels=labels, label_weight=weights)
    assert found.isnan().tolist() == [False, True, False, True, True, False]
    right, exact = gradient(
        loss, student, teacher, labels=labels, label_weight=weights.nan_to_num(0.0, 0.0, 0.0)
    )
    kept = weights.isfinite()
    assert torch.equal(found[kept], right[kept])
    assert torch.equal(mine[kept], exact[kept])


@ALL
@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.tensor([1.0, math.inf] * 3), ValueError, "must be finite, got inf in row 1"),
        (torch.ones(ROWS - 1), ValueError, "label_weight must have one entry a row"),
        (torch.ones(ROWS, dtype=torch.long), TypeError, "label_weight must be floating-point"),
        (torch.ones(ROWS, requires_grad=True), ValueError, "label_weight takes no gradient"),
        ([1.0] * ROWS, TypeError, "label_weight must be a number"),
    ],
)
def test_errors(loss, weights, error, message):
    student, teacher, labels = problem()
    with pytest.raises(error, match=message):
        loss(student.requires_grad_(), teacher, labels=labels, label_weight=weights)
