"""teacher_rows: which of the teacher's rows teaches a row."""

import math

import pytest
import torch
from cases import logits, relative_error

import fastkd

OPTIONS = (
    {},
    {"divergence": "jsd", "temperature": 1.7},
    {"divergence": "reverse_kl", "logit_softcap": 5.0},
    {"divergence": "tvd", "reduction": "none"},
)


def gradient(student, teacher, **options):
    leaf = student.detach().requires_grad_()
    value = fastkd.softmax_divergence(leaf, teacher, **options)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.parametrize("vocab", [7, 1031, 20_011])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32")], ids=str)
def test_is_the_copy_of_those_rows(backend, vocab, options, dtypes):
    """The same numbers as from rows copied first, wherever the rows begin."""
    own, other = (getattr(torch, x) for x in dtypes)
    student, teacher = logits((2, 3, vocab), own), logits((2, 2, vocab), other)
    rows = torch.tensor([[3, 0, 3], [1, 2, 0]])
    found, mine = gradient(student, teacher, teacher_rows=rows, **options)
    right, exact = gradient(student, teacher.flatten(0, 1)[rows], **options)
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-7)
    assert relative_error(mine, exact) < (1e-2 if own == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("vocab", [33, 4096])
def test_rows_without_a_teacher_drop_out(backend, vocab):
    student, teacher = logits((5, vocab)), logits((3, vocab))
    student[1] = math.nan
    rows = torch.tensor([2, -1, 0, 0, -1], dtype=torch.int32)
    labels = torch.randint(0, vocab, (5,))
    options = {"labels": labels, "label_weight": 0.4}
    found, mine = gradient(student, teacher, teacher_rows=rows, **options)
    kept = torch.tensor([0, 2, 3])
    options["labels"] = labels[kept]
    right, exact = gradient(student[kept], teacher[rows[kept].long()], **options)
    torch.testing.assert_close(found, right)
    assert relative_error(mine[kept], exact) < 1e-6
    assert (mine[[1, 4]] == 0).all()


def test_several_teachers_and_none_at_all(backend):
    student, teachers = logits((4, 700)), [logits((2, 700)) for _ in range(2)]
    rows = torch.tensor([1, 0, 1, 1])
    options = {"teacher_mix": "probs", "teacher_weights": [0.3, 0.7]}
    found, mine = gradient(student, teachers, teacher_rows=rows, **options)
    right, exact = gradient(student, [t[rows] for t in teachers], **options)
    torch.testing.assert_close(found, right)
    assert relative_error(mine, exact) < 1e-6
    for count in (0, 2):
        none = torch.full((4,), -1)
        found, mine = gradient(student, teachers[0][:count], teacher_rows=none)
        assert found == 0
        assert (mine == 0).all()


def test_definition_and_second_derivatives():
    student, teacher = logits((4, 9), torch.float64), logits((2, 9), torch.float64)
    rows = torch.tensor([1, -1, 0, 1])

    def loss(x):
        return fastkd.softmax_divergence(x, teacher, teacher_rows=rows, divergence="jsd")

    leaf = student.requires_grad_()
    assert torch.autograd.gradcheck(loss, leaf)
    assert torch.autograd.gradgradcheck(loss, leaf)
    right = fastkd.reference.softmax_divergence(leaf, teacher, teacher_rows=rows, divergence="jsd")
    torch.testing.assert_close(loss(leaf), right)


def test_one_graph():
    compiled = torch.compile(fastkd.softmax_divergence, fullgraph=True, dynamic=True)
    for rows, others in ((4, 2), (6, 3), (5, 5)):
        student, teacher = logits((rows, 33)), logits((others, 33))
        at = torch.randint(-1, others, (rows,))
        found = compiled(student, teacher, teacher_rows=at)
        torch.testing.assert_close(
            found, fastkd.softmax_divergence(student, teacher, teacher_rows=at)
        )


def test_errors():
    student, teacher = logits((4, 9)), logits((2, 9))
    rows = torch.tensor([1, -1, 0, 1])
    with pytest.raises(IndexError, match=r"teacher_rows must lie in \[-1, 2\), got 2 in row 3"):
        fastkd.softmax_divergence(student, teacher, teacher_rows=torch.tensor([0, 1, 0, 2]))
    with pytest.raises(IndexError, match=r"teacher_rows must lie in \[-1, 2\), got -2"):
        fastkd.softmax_divergence(student, teacher, teacher_rows=rows - 1)
    with pytest.raises(TypeError, match="teacher_rows must be int64 or int32, got Float"):
        fastkd.softmax_divergence(student, teacher, teacher_rows=rows.float())
    with pytest.raises(ValueError, match="teacher_rows must have one entry a row"):
        fastkd.softmax_divergence(student, teacher, teacher_rows=rows[:2])
    with pytest.raises(ValueError, match="teacher_logits must all have the same number of rows"):
        fastkd.softmax_divergence(student, [teacher, teacher[:1]], teacher_rows=rows)
    with pytest.raises(ValueError, match="teacher_logits take no gradient with teacher_rows"):
        fastkd.softmax_divergence(student, teacher.requires_grad_(), teacher_rows=rows)
    with pytest.raises(ValueError, match="has 8 columns, student_logits has 9"):
        fastkd.softmax_divergence(student, logits((2, 8)), teacher_rows=rows)
