"""teacher_mix "contrast" and "share": two teachers mixed by how far they are apart in each row."""

import math

import pytest
import torch
from cases import logits

import fastkd

MIXES = ("contrast", "share")
pytestmark = pytest.mark.parametrize("mix", MIXES)


def by_distance(student, teachers, mix, strength, coefficient, **options):
    """Composed, in float64."""
    student, first, second = (x.double() for x in (student, *teachers))
    a = strength * (first.softmax(-1) - second.softmax(-1)).abs().sum(-1) + 1e-3
    pair = (1 + a, -a) if mix == "contrast" else (a, 1 - a)
    value = fastkd.reference.softmax_divergence(
        student, [first, second], teacher_weights=torch.stack(pair, -1), reduction="none", **options
    )
    return coefficient / a * value


def value_of(student, teachers, mix, strength, coefficient, **options):
    return fastkd.softmax_divergence(
        student,
        teachers,
        teacher_mix=mix,
        teacher_weights=[strength, coefficient],
        reduction="none",
        **options,
    )


@pytest.mark.parametrize("noise", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_teachers_near_each_other(backend, mix, divergence, noise):
    """The distance keeps its digits where it is tiny, and with it a."""
    student, first = logits((3, 1100)), logits((3, 1100))
    teachers = [first, first + noise * logits((3, 1100))]
    options = {"divergence": divergence, "temperature": 1.5}
    found = value_of(student, teachers, mix, 3.0, 0.1, **options)
    right = by_distance(student, teachers, mix, 3.0, 0.1, **options)
    torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=0)


def test_equal_teachers(backend, mix):
    student, teacher = logits((3, 77)), logits((3, 77))
    found = value_of(student, [teacher, teacher], mix, 3.0, 0.1, divergence="reverse_kl")
    options = {"divergence": "reverse_kl", "reduction": "none"}
    right = fastkd.softmax_divergence(student, teacher, **options)
    torch.testing.assert_close(found, 100 * right, rtol=1e-5, atol=0)


def test_special_values(backend, mix):
    """A token masked everywhere adds nothing; NaN and an empty row stay in their row."""
    student, teachers = logits((5, 100)), [logits((5, 100)) for _ in range(2)]
    for x in (student, *teachers):
        x[0, 7] = -math.inf
        x[1, 30:] = torch.finfo(torch.float32).min
    teachers[0][2, 3] = math.nan
    teachers[1][3] = -math.inf
    student.requires_grad_()
    found = value_of(student, teachers, mix, 0.5, 0.1, divergence="reverse_kl")
    assert found.isnan().tolist() == [False, False, True, True, False]
    kept = [0, 1, 4]
    some = [x.detach()[kept] for x in (student, *teachers)]
    right = by_distance(some[0], some[1:], mix, 0.5, 0.1, divergence="reverse_kl")
    torch.testing.assert_close(found[kept].double(), right, rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(found[kept].sum(), student)
    assert gradient[kept].isfinite().all()
    assert not gradient[1, 30:].any()


TRIPLES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.float16),
    (torch.float16, torch.float32, torch.bfloat16),
]


@pytest.mark.parametrize("dtypes", TRIPLES)
@pytest.mark.parametrize(("width", "begin"), [(300, 0), (9001, 1), (9004, 3), (41_000, 2)])
def test_rows_of_every_length_and_dtype(backend, mix, dtypes, width, begin):
    """Rows for a warp, a block and a cluster; some begin or end within 16 bytes."""
    student, *teachers = (logits((3, width), dtype)[:, begin:] for dtype in dtypes)
    mask = torch.tensor([True, False, True])
    labels = torch.tensor([1, 2, 3])
    options = {"divergence": "reverse_kl", "temperature": 2.0, "labels": labels, "mask": mask}
    options |= {"label_weight": 0.3}
    student.requires_grad_()
    found = value_of(student, teachers, mix, 0.5, 0.1, **options)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    exact = student.detach().double().requires_grad_()
    for row in (0, 2):
        own = exact[row], [x[row].double() for x in teachers]
        term = by_distance(*own, mix, 0.5, 0.1, divergence="reverse_kl", temperature=2.0)
        label = torch.nn.functional.cross_entropy(own[0][None], labels[row : row + 1])
        torch.testing.assert_close(found[row].double(), term + 0.3 * label, rtol=1e-4, atol=1e-5)
        (right,) = torch.autograd.grad(term + 0.3 * label, exact)
        wide = dtypes[0] == torch.float32
        torch.testing.assert_close(
            gradient[row].double(),
            right[row],
            rtol=1e-4 if wide else 1e-2,
            atol=2e-6 * right.abs().max().item() if wide else 1e-7,
        )
    assert found[1] == 0
    assert not gradient[1].any()


@pytest.mark.parametrize("weights", [[0.7, 0.3], [2.0, -1.0], [1.0, 0.0]])
def test_fixed_weights(backend, mix, weights):
    """Given weights of logits take the same way; a teacher without weight is not looked at."""
    student, teachers = logits((3, 5000)), [logits((3, 5000)) for _ in range(2)]
    if weights[1] == 0:
        teachers[1][:, 5] = -math.inf
    options = {"divergence": "reverse_kl", "teacher_weights": weights, "reduction": "none"}
    student.requires_grad_()
    found = fastkd.softmax_divergence(student, teachers, **options)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    exact = student.detach().double().requires_grad_()
    right = fastkd.reference.softmax_divergence(exact, [x.double() for x in teachers], **options)
    torch.testing.assert_close(found.double(), right.detach(), rtol=1e-4, atol=0)
    (right_gradient,) = torch.autograd.grad(right.sum(), exact)
    largest = right_gradient.abs().max().item()
    torch.testing.assert_close(gradient.double(), right_gradient, rtol=1e-4, atol=2e-6 * largest)


def test_the_label_term_is_not_multiplied(backend, mix):
    student, teachers = logits((3, 50)), [logits((3, 50)) for _ in range(2)]
    labels = torch.tensor([3, 0, 49])
    options = {"divergence": "reverse_kl", "temperature": 2.0}
    with_labels = value_of(student, teachers, mix, 0.5, 0.1, labels=labels, **options)
    without = value_of(student, teachers, mix, 0.5, 0.1, **options)
    right = torch.nn.functional.cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close(with_labels - without, right)
