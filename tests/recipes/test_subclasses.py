"""LELP against its definition in loops, and its subclasses by their properties."""

import pytest
import torch
from cases import logits
from recipe_checks import (
    LENGTH,
    TEXTS,
    VOCAB,
    Entry,
    by_rows,
    mixed_dtypes,
    one_graph,
    problem,
    promises,
)
from test_vision import without_elementmean

import fastkd
from fastkd import recipes


def plain_lelp(student_logits, teacher_logits, subclasses, temperature=1.0):
    p = (teacher_logits / temperature).softmax(-1)
    q = (student_logits / temperature).log_softmax(-1)
    classes, parts = subclasses.shape
    return -sum(
        p[c] * subclasses[c, s] * q[c * parts + s] for c in range(classes) for s in range(parts)
    )


def lelp_problem(dtype):
    found = problem(dtype)
    found["student_logits"] = logits((TEXTS, LENGTH, VOCAB * 2), dtype)
    found["subclasses"] = logits((TEXTS, LENGTH, VOCAB, 2), torch.float64, 1.0).softmax(-1)
    return found


ENTRIES = [
    Entry(
        "lelp",
        by_rows(plain_lelp),
        {"temperature": 2.0},
        lelp_problem,
        ("student_logits", "teacher_logits"),
        without_elementmean(),
        published={"temperature": 1.0},
    ),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)


def embeddings():
    labels = torch.arange(40) % 4
    labels[labels == 3] = 0
    labels[7] = 3  # one example of class 3, none of class 4
    head = torch.randn(5, 9, dtype=torch.float64)
    hidden = torch.randn(40, 9, dtype=torch.float64)
    return hidden, labels, head


@pytest.mark.parametrize("null_space", [True, False])
def test_subclasses_are_softmaxes_of_principal_coordinates(null_space):
    hidden, labels, head = embeddings()
    options = {"temperature": 0.5, "null_space": null_space}
    generator = torch.Generator().manual_seed(0)
    found = recipes.lelp_subclasses(hidden, labels, head, 3, **options, generator=generator)
    torch.testing.assert_close(found.sum(-1), torch.ones(40, 5).double())
    assert (found[:, 3:] == 1 / 3).all()
    if null_space:
        hidden = hidden - hidden @ torch.linalg.pinv(head) @ head
    for label in range(3):
        own = hidden[labels == label]
        deviations = hidden - own.mean(0)
        _, vectors = torch.linalg.eigh(torch.cov(own.mT))
        coordinates = deviations @ vectors[:, -3:]
        # A rotation keeps distances between coordinates; softmax keeps their differences.
        logarithms = found[:, label].log() * options["temperature"]
        centred = logarithms - logarithms.mean(-1, keepdim=True)
        gram = centred @ centred.mT
        # One direction is lost to the softmax: of rank 2, and not above the whole.
        whole = coordinates @ coordinates.mT
        assert torch.linalg.matrix_rank(gram, rtol=1e-9) == 2
        assert torch.linalg.eigvalsh(whole - gram).min() > -1e-9
        assert torch.linalg.matrix_rank(whole - gram, rtol=1e-9) == 1


def test_subclasses_do_not_depend_on_a_shift_of_the_class():
    hidden, labels, head = embeddings()
    own = labels == 1

    def run(x):
        generator = torch.Generator().manual_seed(0)
        return recipes.lelp_subclasses(x, labels, head, 2, generator=generator)[own, 1]

    moved = torch.where(own.unsqueeze(-1), hidden + torch.randn(9), hidden)
    torch.testing.assert_close(run(moved), run(hidden))


def test_one_subclass_is_plain_distillation():
    assert (recipes.lelp_subclasses(*embeddings(), 1) == 1).all()
    given = lelp_problem(torch.float64)
    student = given["student_logits"][..., :VOCAB]
    found = recipes.lelp(student, given["teacher_logits"], torch.ones(TEXTS, LENGTH, VOCAB, 1))
    right = fastkd.softmax_divergence(student, given["teacher_logits"], divergence="cross_entropy")
    torch.testing.assert_close(found, right)


def test_a_student_that_knows_the_subclasses_has_the_teachers_classes():
    given = lelp_problem(torch.float64)
    best = given["teacher_logits"].log_softmax(-1).unsqueeze(-1) + given["subclasses"].log()
    student = best.flatten(-2).requires_grad_()
    recipes.lelp(student, given["teacher_logits"], given["subclasses"]).backward()
    assert student.grad.abs().max() < 1e-15
    classes = student.unflatten(-1, (VOCAB, 2)).logsumexp(-1)
    torch.testing.assert_close(classes, given["teacher_logits"].log_softmax(-1))


def test_errors_name_the_recipe_and_the_argument():
    x = torch.zeros(2, 5)
    h, head = torch.randn(8, 6), torch.randn(3, 6)
    labels = torch.arange(8) % 3
    r = recipes
    wrong = [
        (r.lelp, (x, x, torch.ones(2, 5, 2)), {}, "student_logits must have 5 x 2 columns"),
        (r.lelp, (x, x, torch.ones(2, 4, 2)), {}, r"teacher_logits must be \[N, C\] and subcl"),
        (r.lelp_subclasses, (h, labels, head, 4), {}, r"num_sub must be in \[1, 3\]"),
        (r.lelp_subclasses, (h, labels, x, 1), {}, "head must have hidden's 6 channels"),
        (r.lelp_subclasses, (h, labels + 1, head, 1), {}, "labels must lie in"),
    ]
    for function, arguments, options, message in wrong:
        with pytest.raises((ValueError, TypeError, IndexError), match=message) as caught:
            function(*arguments, **options)
        assert str(caught.value).startswith(f"{function.__name__}: ")
